"""The model that is decoded: a transformers model of one of the recorder's families, with its experts separated out.

A model is a folder or a name on the hub, with its own weights; or a preset of this package or a TOML file of shapes, of
which random weights are made. Random experts alias a pool of host memory, so that a model need not fit there: what a
copy takes does not depend on what is copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import InputError
from ...workloads.model import preset_names
from ...workloads.model_files.shapes import Shapes
from ...workloads.model_files.sources import read_shapes
from ...workloads.recorder import cache_name, family_of

#: Bytes of host memory that random experts alias if they need more.
POOL_BYTES = 3 * 2**30
#: Each part of an expert begins at a multiple of so many bytes.
_ALIGNED = 256
#: The deviation of random weights, as transformers' own are drawn.
_SPREAD = 0.02


class DecodeError(InputError):
    """A model that cannot be decoded, or a run that is not possible: one line naming what was met and what would do."""


class Field(NamedTuple):
    """One tensor of every expert of a layer: its parameter's name, an expert's shape, and its bytes' beginning."""

    name: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Layout:
    """How an expert lies in its bytes: fields of one element type, which are copied at once."""

    fields: tuple[Field, ...]
    dtype: Any
    expert_bytes: int

    @classmethod
    def of(cls, shapes: Sequence[tuple[str, tuple[int, ...]]], dtype: Any) -> Layout:
        """Returns the layout of an expert whose fields have these names and shapes."""
        fields, start = [], 0
        for name, shape in shapes:
            fields.append(Field(name, shape, start))
            start += -(-math.prod(shape) * dtype.itemsize // _ALIGNED) * _ALIGNED
        return cls(tuple(fields), dtype, start)

    def views(self, room: Any) -> dict[str, Any]:
        """Returns the tensors of the expert that lies in a room (expert_bytes,) uint8, by name."""
        return {
            name: room[start : start + math.prod(shape) * self.dtype.itemsize].view(self.dtype).view(shape)
            for name, shape, start in self.fields
        }


@dataclass(frozen=True)
class Loaded:
    """A model without its experts on the GPU, and its experts in host memory.

    `routers` and `experts` are the modules of each MoE layer, in order; `host[expert]` (expert_bytes,) uint8 are the
    bytes of each expert, numbered layer * experts + index. `cache_name`: what its forward pass calls the KV cache.
    """

    model: Any
    routers: tuple[Any, ...]
    modules: tuple[Any, ...]
    layout: Layout
    host: Sequence[Any]
    num_experts: int
    top_k: int
    cache_name: str
    random: bool

    @property
    def layers(self) -> int:
        """How many MoE layers there are."""
        return len(self.modules)


def load(gpu: Any, name: str, *, layers: int | None = None, top_k: int | None = None, seed: int = 0) -> Loaded:
    """Load a model by a preset's name or file of shapes, a folder or a name on the hub, and put its experts apart.

    `layers`: only the first so many blocks. `top_k`: experts a token, in place of the model's. Raises DecodeError for
    what cannot be loaded or has no experts that can be put apart.
    """
    try:
        import transformers
    except ImportError as error:
        raise DecodeError("decoding needs transformers: pip install 'prestage[record]'") from error
    transformers.logging.set_verbosity_error()
    if name in preset_names() or name.endswith(".toml"):
        return _random(gpu, name, layers, top_k, seed)
    return _pretrained(gpu, name, layers, top_k)


def _pretrained(gpu: Any, name: str, layers: int | None, top_k: int | None) -> Loaded:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=Path(name).exists())
        _change(config, layers, top_k)
        family_of(config)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, config=config, dtype="auto").eval()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise DecodeError(f"model {name!r}: cannot be loaded: {' '.join(str(error).split())}") from error
    routers, modules = _parts(name, model)
    shapes = [(key, tuple(value.shape[1:])) for key, value in modules[0].named_parameters()]
    layout = Layout.of(shapes, next(modules[0].parameters()).dtype)
    host = []
    for module in modules:
        parameters = dict(module.named_parameters())
        experts = next(iter(parameters.values())).shape[0]
        rooms = gpu.host_empty(experts, layout.expert_bytes)
        for index in range(experts):
            for key, view in layout.views(rooms[index]).items():
                view.copy_(parameters[key].detach()[index])
            host.append(rooms[index])
        _without_weights(module)
    return _loaded(model.to(gpu.device), routers, modules, layout, host, random=False)


def _random(gpu: Any, name: str, layers: int | None, top_k: int | None, seed: int) -> Loaded:
    """Build a model of a preset's shapes with experts of width 1, whose weights are then put apart at their own."""
    import torch
    import transformers

    shapes = read_shapes(name)
    kind, options, width = _config_of(name, shapes)
    config = transformers.AutoConfig.for_model(kind, **options)
    _change(config, layers, top_k)
    setattr(config, width, 1)
    torch.manual_seed(seed)
    dtype = getattr(torch, shapes.dtypes.dense)
    with torch.device(gpu.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():  # routers begin at 0: all experts alike
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    routers, modules = _parts(name, model)
    wide = [
        (key, tuple(_widened(length, shapes.moe.expert_ff) for length in value.shape[1:]))
        for key, value in modules[0].named_parameters()
    ]
    layout = Layout.of(wide, dtype)
    setattr(config, width, shapes.moe.expert_ff)
    for module in modules:
        for key in ("intermediate_dim", "intermediate_size"):
            if hasattr(module, key):
                setattr(module, key, shapes.moe.expert_ff)
        _without_weights(module)
    count = len(modules) * shapes.moe.experts
    pool = gpu.host_empty(max(2, min(count, POOL_BYTES // layout.expert_bytes)), layout.expert_bytes)
    for number, room in enumerate(pool):
        drawn = gpu.random(layout.expert_bytes // dtype.itemsize, dtype=str(dtype).split(".")[-1], scale=_SPREAD,
                           seed=seed + number)  # fmt: skip
        room.copy_(drawn.view(torch.uint8))
    # Neighbors in number, which meet in one visit, are never the same bytes.
    host = [pool[expert % len(pool)] for expert in range(count)]
    return _loaded(model, routers, modules, layout, host, random=True)


def _loaded(
    model: Any, routers: Sequence[Any], modules: Sequence[Any], layout: Layout, host: Sequence[Any], *, random: bool
) -> Loaded:
    experts, top_k = int(routers[0].num_experts), int(routers[0].top_k)
    return Loaded(model, tuple(routers), tuple(modules), layout, host, experts, top_k, cache_name(model), random)


def _change(config: Any, layers: int | None, top_k: int | None) -> None:
    """Take other numbers of blocks and of experts a token into a configuration."""
    if layers is not None:
        if not 1 <= layers <= config.num_hidden_layers:
            raise DecodeError(f"--layers {layers}: the model has 1 to {config.num_hidden_layers}")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    if top_k is not None:
        config.num_experts_per_tok = top_k


def _parts(name: str, model: Any) -> tuple[list[Any], list[Any]]:
    """Returns the routers and the modules of experts of each MoE layer, in order."""
    router = family_of(model.config).router
    routers = [module for module in model.modules() if type(module).__name__ == router]
    modules = [module for module in model.modules() if _holds_experts(module)]
    if not modules or len(modules) != len(routers):
        raise DecodeError(
            f"model {name!r}: {len(routers)} routers and {len(modules)} modules of stacked experts: decoders of "
            "transformers 5.17 or later can be decoded, switch_transformers cannot"
        )
    return routers, modules


def _holds_experts(module: Any) -> bool:
    names = {name for name, _ in module.named_parameters(recurse=False)}
    return {"gate_up_proj", "down_proj"} <= names and hasattr(module, "_apply_gate")


def _without_weights(module: Any) -> None:
    """Take a module's parameters away: they lie elsewhere from here on."""
    for key in [key for key, _ in module.named_parameters(recurse=False)]:
        delattr(module, key)


def _widened(length: int, width: int) -> int:
    """Returns an inner length of experts of width 1 (1, or 2 where gate and up lie together) at their own width."""
    return {1: width, 2: 2 * width}.get(length, length)


def _config_of(name: str, shapes: Shapes) -> tuple[str, dict[str, Any], str]:
    """Returns the model type of a preset, its configuration's options, and what they call an expert's width."""
    mixer, moe = shapes.one_attention, shapes.moe
    if mixer is None or shapes.dense or moe.shared_experts or moe.shared_ff or moe.latent or shapes.hidden <= 2:
        raise DecodeError(
            f"model {name!r}: random weights are made of mixtral-8x7b, qwen3-30b-a3b, olmoe-1b-7b, gpt-oss-20b and "
            "gpt-oss-120b; give the folder of another, with its weights"
        )
    options = {
        "vocab_size": shapes.vocabulary,
        "hidden_size": shapes.hidden,
        "num_hidden_layers": shapes.moe_layers,
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "num_experts_per_tok": moe.top_k,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": shapes.tied_embeddings,
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if mixer.sinks:
        return "gpt_oss", options | {"num_local_experts": moe.experts, "head_dim": mixer.head_dim}, "intermediate_size"
    if mixer.qk_norm == "head":
        return "qwen3_moe", options | {"num_experts": moe.experts, "head_dim": mixer.head_dim}, "moe_intermediate_size"
    if mixer.qk_norm == "whole":
        return "olmoe", options | {"num_experts": moe.experts}, "intermediate_size"
    return "mixtral", options | {"num_local_experts": moe.experts}, "intermediate_size"
