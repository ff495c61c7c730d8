"""Models: how many experts a Mixture-of-Experts model has, and how many bytes each of its parts moves.

The unit is the MoE layer. Everything that runs between the experts of MoE layer l-1 and those of layer l is the dense
part of layer l: attention, norms, router, shared experts, and any dense-only block in between. Dense blocks before the
first MoE layer belong to the dense part of layer 0, those after the last one to the head.

A model is described by its published shapes in a TOML file (`models/` holds the presets); no file states a byte count.
`model_files` turns shapes into weights and weights into bytes. To add a model, write one more TOML file and add its
published size to tests/test_model.py.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ..dtypes import bits_of, dtype_of
from ..errors import InputError
from .model_files.named import is_config, is_gguf
from .trace_limits import check_total_experts

#: What all experts of a model, its dense parts and head may take together: an exbibyte, so that sums fit into 64 bits.
MOST_BYTES = 2**60


class ModelError(InputError):
    """A model that cannot be; the message names the file, the key, the value and what would be right."""


@dataclass(frozen=True)
class Cached:
    """What a layer keeps of one sequence: bytes a token, of the last `window` tokens (0: of all), and bytes once."""

    bytes_per_token: int = 0
    window: int = 0
    state_bytes: int = 0


@dataclass(frozen=True)
class Attending:
    """What one attention of a layer looks at for every row: the last `most` positions (0: all), `ratio` a key.

    `heads` query heads of `head_dim`, the mean of the widths of keys and values (0 heads: not known). `kv_heads` share
    the `key_bytes` that a row reads of the cache for each key. `latent_dim` is the width in which decoding attends to a
    compressed cache (0: `head_dim`). One that `indexes` chooses the keys of another, which is sparse.
    """

    heads: int
    kv_heads: int
    head_dim: int
    key_bytes: int
    most: int = 0
    ratio: int = 1
    latent_dim: int = 0
    indexes: bool = False

    def keys(self, positions: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Returns how many keys rows look at that have so many positions before them, themselves included."""
        return (np.minimum(positions, self.most) if self.most else positions) / self.ratio


class Routed(NamedTuple):
    """The routed experts of one layer: how many, of which a token takes `top_k`, and the inner width of each."""

    experts: int
    top_k: int
    expert_ff: int


@dataclass(frozen=True)
class Model:
    """What a run needs to know of a model. Build it with `load_model`.

    - `layers`: MoE layers; `experts`: routed experts of one layer, of which each token takes `top_k`. Where layers
      differ in them these, and `expert_ff`, are the most of any, and `by_layer` (layers,) has each one's own; empty
      where they are alike. Ask `routed(layer)`.
    - `hidden`, `expert_ff`: width of the model and of one routed expert's inner layer, which has `expert_matrices`
      matrices (3 gated, 2 plain) of `expert_dtype`. The dense part's matrices are of `dense_dtype`.
    - `expert_bytes` (layers,): bytes to move for one expert of that layer, biases included.
    - `dense_bytes` (layers,): weight bytes read by the dense part of that layer; no embedding table.
    - `head_bytes`: final norm and language-model head, with any block after the last MoE layer.
    - `embedding_bytes`: the table of input embeddings; with `tied_embeddings` it is the head's matrix too.
    - `dense_kernels`, `expert_kernels`: GPU kernels that an eager PyTorch implementation launches for a layer's dense
      part and for one expert. Assumptions, counted by reading the implementation.
    - `kv_bytes_per_token`: what one token adds to the KV cache, over all layers (until a window is full).
    - `parameters`: all weights, embeddings included and tied ones once; `active_parameters`: those that one token uses,
      the head's included and the input embedding's left out. None where it is not known.
    - `caches`: what the blocks of each layer, and last those behind the last layer, keep of a sequence; empty where all
      keep the same and it grows with every token.
    - `host_table_bytes`: a table that is looked up in host memory and is no expert.
    - `attention`: what the blocks of each layer attend to, those behind the last layer with it; empty where no more is
      known than what is cached (see `attention_of`).

    Raises ModelError naming the field and its value if a number is out of range or a length is not `layers`.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    expert_ff: int
    expert_matrices: int
    expert_dtype: str
    dense_dtype: str
    expert_bytes: tuple[int, ...]
    dense_bytes: tuple[int, ...]
    head_bytes: int
    dense_kernels: int
    expert_kernels: int
    kv_bytes_per_token: int = 0
    source: str = ""
    parameters: int | None = None
    embedding_bytes: int = 0
    tied_embeddings: bool = False
    active_parameters: int | None = None
    caches: tuple[tuple[Cached, ...], ...] = ()
    host_table_bytes: int = 0
    attention: tuple[tuple[Attending, ...], ...] = ()
    by_layer: tuple[Routed, ...] = ()

    def __post_init__(self) -> None:
        for field in _AT_LEAST_ONE:
            self._check(field, getattr(self, field), 1)
        for field in ("head_bytes", "kv_bytes_per_token", "embedding_bytes", "host_table_bytes"):
            self._check(field, getattr(self, field), 0)
        if self.top_k > self.experts:
            raise ModelError(f"model {self.name}: top_k = {self.top_k}: must be 1 to experts = {self.experts}")
        check_total_experts(f"model {self.name}", self.layers, self.experts, ModelError)
        self._check_by_layer()
        for field in ("expert_dtype", "dense_dtype"):
            _check_dtype(self.name, field, getattr(self, field))
        for field, low in (("expert_bytes", 1), ("dense_bytes", 0)):
            sizes = getattr(self, field)
            if len(sizes) != self.layers:
                raise ModelError(
                    f"model {self.name}: {field} has {len(sizes)} entries: must have one per layer, {self.layers}"
                )
            for layer, size in enumerate(sizes):
                self._check(f"{field}[{layer}]", size, low)
        if self.caches and len(self.caches) != self.layers + 1:
            raise ModelError(
                f"model {self.name}: caches: must have one entry per layer and one more, {self.layers + 1}"
            )
        if self.attention and len(self.attention) != self.layers:
            raise ModelError(f"model {self.name}: attention: must have one entry per layer, {self.layers}")
        total_bytes = self.total_expert_bytes + sum(self.dense_bytes) + self.head_bytes + self.host_table_bytes
        kept_bytes = self.kv_bytes_per_token + self.state_bytes
        for what, size in (("all weights", total_bytes), ("kv_bytes_per_token", kept_bytes)):
            if size > MOST_BYTES:
                raise ModelError(f"model {self.name}: {what}: {size} bytes: must be at most {MOST_BYTES}")

    def _check_by_layer(self) -> None:
        if self.by_layer and len(self.by_layer) != self.layers:
            raise ModelError(f"model {self.name}: by_layer: must have one entry per layer, {self.layers}")
        for layer, (experts, top_k, width) in enumerate(self.by_layer):
            fits = 1 <= top_k <= min(self.top_k, experts) and experts <= self.experts
            if not (fits and 1 <= width <= self.expert_ff):
                raise ModelError(
                    f"model {self.name}: layer {layer}: top-{top_k} of {experts} experts of width {width}: must be at "
                    f"most top-{self.top_k} of {self.experts} of {self.expert_ff}, the most of any layer"
                )

    def _check(self, field: str, value: object, low: int) -> None:
        if type(value) is not int or value < low:
            raise ModelError(f"model {self.name}: {field} = {value!r}: must be an integer of at least {low}")

    @property
    def total_experts(self) -> int:
        """Expert ids are 0 to this, exclusive; layers with fewer experts than others leave some of them out."""
        return self.layers * self.experts

    def routed(self, layer: int) -> Routed:
        """Returns the routed experts of a layer."""
        return self.by_layer[layer] if self.by_layer else Routed(self.experts, self.top_k, self.expert_ff)

    @cached_property
    def experts_by_layer(self) -> tuple[int, ...]:
        """How many routed experts each layer has (layers,)."""
        return tuple(self.routed(layer).experts for layer in range(self.layers))

    def ids_of(self, layer: int) -> range:
        """Returns the ids of a layer's experts."""
        return range(layer * self.experts, layer * self.experts + self.experts_by_layer[layer])

    @cached_property
    def ids(self) -> Sequence[int]:
        """The ids of all experts, ascending."""
        if not self.by_layer:
            return range(self.total_experts)
        return tuple(expert for layer in range(self.layers) for expert in self.ids_of(layer))

    # Cached: hot paths ask for these, and a frozen instance never changes.
    @cached_property
    def total_expert_bytes(self) -> int:
        """Bytes of all routed experts."""
        return sum(size * count for size, count in zip(self.expert_bytes, self.experts_by_layer, strict=True))

    @cached_property
    def chosen_bytes(self) -> int:
        """Bytes of the experts that one token takes in all layers."""
        return sum(size * self.routed(layer).top_k for layer, size in enumerate(self.expert_bytes))

    @property
    def embedding_beside_head_bytes(self) -> int:
        """Bytes that the input embedding takes beside the head: none where it is the head's own matrix."""
        return 0 if self.tied_embeddings else self.embedding_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes that a sequence keeps whatever its length: the states of linear attention and state spaces."""
        return sum(each.state_bytes for layer in self.caches for each in layer)

    def cached_bytes(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns what sequences of so many tokens keep, in bytes, by sequence; one without tokens keeps nothing."""
        if not self.caches:
            return tokens * self.kv_bytes_per_token
        kept = np.where(tokens > 0, self.state_bytes, 0).astype(np.int64)
        for each in (each for layer in self.caches for each in layer):
            kept += each.bytes_per_token * (np.minimum(tokens, each.window) if each.window else tokens)
        return kept

    def attention_of(self, layer: int) -> tuple[Attending, ...]:
        """Returns what a layer's blocks attend to; where only its cache is known, heads of 128 that are as wide."""
        if self.attention:
            return self.attention[layer]
        caches = self.caches[layer] if self.caches else (Cached(self.kv_bytes_per_token // self.layers),)
        heads = max(1, self.hidden // 128)
        return tuple(
            Attending(heads, max(1, size // 512), self.hidden // heads, size, each.window)
            for each in caches
            if (size := each.bytes_per_token)
        )

    @cached_property
    def uniform(self) -> bool:
        """Whether all experts have the same size."""
        return len(set(self.expert_bytes)) == 1

    def expert_id(self, layer: int, index: int) -> int:
        """Returns the one number that names expert `index` of MoE layer `layer`, both from 0."""
        return layer * self.experts + index

    def activation_bytes(self, tokens: int) -> int:
        """Returns the bytes of so many tokens' hidden states: in 16 bits, unless the weights have more."""
        return tokens * self.hidden * (4 if self.dense_dtype == "float32" else 2)

    def dtype_bits(self, part: Literal["expert", "dense"]) -> float:
        """Returns the bits per weight of the routed experts or of the dense part's matrices."""
        return float(bits_of(self.expert_dtype if part == "expert" else self.dense_dtype))


_AT_LEAST_ONE = (
    "layers",
    "experts",
    "top_k",
    "hidden",
    "expert_ff",
    "expert_matrices",
    "dense_kernels",
    "expert_kernels",
)


def _check_dtype(model: str, field: str, name: str) -> None:
    try:
        known = dtype_of(name) == name
        choose = f"must be {dtype_of(name)!r}"
    except InputError as error:
        known, choose = False, str(error)
    if not known:
        raise ModelError(f"model {model}: {field} = {name!r}: {choose}")


def preset_names() -> list[str]:
    """Returns the names of the shipped models, sorted."""
    files = resources.files(f"{__package__}.models").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def names_model(name: str) -> bool:
    """Whether a name that may be a scenario's is a model's: a GGUF file, a config.json, the folder of one, or a preset.

    A file that is called like a preset is no model, but what it says.
    """
    return is_gguf(name) or is_config(name) or (name in preset_names() and not Path(name).is_file())


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    layers: int | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    dtype: str | None = None,
    bits_per_weight: float | None = None,
    expert_bytes: int | Iterable[int] | None = None,
    kv_dtype: str | None = None,
) -> Model:
    """Returns a model by its preset's name, or by the path of a TOML file, a Hugging Face config.json or its folder, or
    a GGUF file.

    Overrides, all optional: `layers` keeps the first so many MoE layers, and the head; `experts` and `top_k` change the
    router; `dtype` changes the routed experts' matrices, `bits_per_weight` all matrices, embedding and head too;
    `expert_bytes` states an expert's size, one number or one per layer, and wins over `dtype`; `kv_dtype` is that of
    keys and values in the cache. Everything else is derived again from the shapes.

    Raises ModelError, naming the file, the key, the value and what would be right.
    """
    from .model_files.sources import open_model

    changes = {"layers": layers, "experts": experts, "top_k": top_k}
    for key, value in changes.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ModelError(f"model.{key} = {value!r}: must be an integer of at least 1")
    try:
        dtype = None if dtype is None else dtype_of(dtype)
    except InputError as error:
        raise ModelError(f"model.dtype = {dtype!r}: {error}") from None
    model = open_model(os.fspath(name_or_path), changes, dtype, _per_weight(bits_per_weight))
    if expert_bytes is not None:
        model = replace(model, expert_bytes=_per_layer(expert_bytes, model.layers))
    return model if kv_dtype is None else _cached_in(model, kv_dtype)


def _cached_in(model: Model, dtype: str) -> Model:
    """Returns a model whose keys and values are kept in a dtype, of as many bits as activations have where unsaid."""
    try:
        share = bits_of(dtype) / (8 * model.activation_bytes(1) // model.hidden)
    except InputError as error:
        raise ModelError(f"model.kv_dtype = {dtype!r}: {error}") from None

    def kept(size_bytes: int) -> int:
        return -int(-size_bytes * share // 1)

    return replace(
        model,
        kv_bytes_per_token=kept(model.kv_bytes_per_token),
        caches=tuple(
            tuple(replace(each, bytes_per_token=kept(each.bytes_per_token)) for each in layer) for layer in model.caches
        ),
        attention=tuple(
            tuple(replace(each, key_bytes=kept(each.key_bytes)) for each in layer) for layer in model.attention
        ),
    )


def _per_weight(bits: float | None) -> str | None:
    """Returns the dtype of so many bits per weight."""
    if bits is None:
        return None
    try:
        return dtype_of(f"{bits}bpw")
    except InputError:
        raise ModelError(f"model.bits_per_weight = {bits!r}: must be above 0 and at most 64, such as 4.85") from None


def _per_layer(expert_bytes: int | Iterable[int], layers: int) -> tuple[int, ...]:
    given = expert_bytes if isinstance(expert_bytes, Iterable) else (expert_bytes,) * layers
    sizes = []
    for layer, size in enumerate(given):
        try:
            # numpy's integers are welcome, as from a trace's `expert_bytes`; True and False are not.
            sizes.append(0 if isinstance(size, bool) else operator.index(size))
        except TypeError:
            sizes.append(0)
        if sizes[-1] < 1:
            raise ModelError(f"model.expert_bytes = {size!r} at layer {layer}: must be an integer of at least 1")
    if len(sizes) != layers:
        raise ModelError(f"model.expert_bytes has {len(sizes)} entries: must be one number, or one per layer, {layers}")
    return tuple(sizes)
