"""Families: what each calls its fields in a config.json, and by which rules its blocks are made.

To add a family: add a row, with a rule of its own in `config_mixers.py` where none fits, and a real config under
tests/data/configs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ...words import shown
from ..model import ModelError
from . import config_mixers as mixers
from .config_fields import Config


def every(config: Config) -> list[str]:
    """Returns a MoE in every block."""
    return ["moe"] * config.blocks


def after_dense(config: Config) -> list[str]:
    """Returns dense blocks first, then MoE, every one or as `moe_layer_freq` says (DeepSeek)."""
    listed = config.of_blocks("mlp_layer_types")
    if listed is not None:
        return ["dense" if kind == "dense" else "moe" for kind in listed]
    pattern = config.get("moe_layer_freq")
    if isinstance(pattern, list):
        return ["moe" if each else "dense" for each in config.of_blocks("moe_layer_freq") or []]
    enumerated = config.get("moe_layers_enum")  # Step's: "3,4,5"
    if enumerated is not None:
        moe = {each.strip() for each in str(enumerated).split(",")}
        return ["moe" if str(i) in moe else "dense" for i in range(config.blocks)]
    first = config.count("first_k_dense_replace", "num_dense_layers", default=0, least=0)
    step = config.count("moe_layer_freq", default=1)
    return ["moe" if i >= first and i % step == 0 else "dense" for i in range(config.blocks)]


def by_step(config: Config) -> list[str]:
    """Returns a MoE in every so many blocks, but in those of `mlp_only_layers` (Qwen)."""
    step = config.count("decoder_sparse_step", default=1)
    dense = set(config.entries("mlp_only_layers") or [])
    return ["moe" if i not in dense and (i + 1) % step == 0 else "dense" for i in range(config.blocks)]


def interleaved(config: Config) -> list[str]:
    """Returns the MoE blocks that are listed, or every so many (Llama 4)."""
    listed, step = config.entries("moe_layers"), config.count("interleave_moe_layer_step", default=1)
    moe = set(range(step - 1, config.blocks, step) if listed is None else listed)
    return ["moe" if i in moe else "dense" for i in range(config.blocks)]


def by_period(config: Config) -> list[str]:
    """Returns a MoE once a period (Jamba)."""
    period, offset = config.count("expert_layer_period"), config.count("expert_layer_offset", least=0)
    return ["moe" if i % period == offset else "dense" for i in range(config.blocks)]


def between(config: Config) -> list[str]:
    """Returns a MoE in every so many blocks from a first to a last one (ERNIE)."""
    first = config.count("moe_layer_start_index", default=0, least=0)
    last = config.count("moe_layer_end_index", default=-1, least=-1)
    step = config.count("moe_layer_interval", default=1)
    last = config.blocks - 1 if last < 0 else last
    return ["moe" if first <= i <= last and (i + 1) % step == 0 else "dense" for i in range(config.blocks)]


def after_skipped(config: Config) -> list[str]:
    """Returns dense blocks first, as many as `moe_layer_num_skipped` (Hunyuan)."""
    first = config.count("moe_layer_num_skipped", default=0, least=0)
    return ["moe" if i >= first else "dense" for i in range(config.blocks)]


def nemotron(config: Config) -> list[str]:
    """Returns the feed-forward parts of Nemotron-H's blocks, of which those that mix have none."""
    return [{"moe": "moe", "mlp": "dense"}.get(kind, "none") for kind in mixers.nemotron_blocks(config)]


def no_shared(config: Config) -> dict[str, Any]:
    """Returns no shared experts."""
    return {}


def shared_count(*names: str, width: str = "") -> Callable[[Config], dict[str, Any]]:
    """Returns the rule of so many shared experts, as wide as the routed ones, or as a field says."""

    def rule(config: Config) -> dict[str, Any]:
        count = config.count(*names, default=0, least=0)
        own = config.count(width, default=0, least=0) if width else 0
        return {"shared_ff": count * own} if own else {"shared_experts": count}

    return rule


def shared_width(*names: str, gate: bool = False) -> Callable[[Config], dict[str, Any]]:
    """Returns the rule of one shared expert, or of a dense part beside the routed ones, of a width."""

    def rule(config: Config) -> dict[str, Any]:
        width = config.count(*names, default=0, least=0)
        return {"shared_ff": width, "shared_gate": gate and width > 0}

    return rule


def residual(config: Config) -> dict[str, Any]:
    """Returns Arctic's dense part beside the experts, as wide as the model."""
    return {"shared_ff": config.hidden}


def flattened(config: Config) -> Config:
    """Returns DBRX's config with the fields of its sections beside the others."""
    inner = {**config.section("ffn_config").data, **config.section("attn_config").data}
    heads = {"num_key_value_heads": inner.get("kv_n_heads"), "intermediate_size": inner.get("ffn_hidden_size")}
    return Config(config.where, {**inner, **heads, **config.data})


def unblocked(config: Config) -> Config:
    """Returns a config whose `block_configs` say what each block has (Puzzle) with a list by block for each field."""
    blocks = config.get("block_configs")
    if not isinstance(blocks, list) or not blocks or not all(isinstance(each, dict) for each in blocks):
        raise ModelError(f"{config.where}: block_configs = {shown(blocks)}: must be a list of objects, one a layer")
    names = {key: "layers_block_type" if key == "block_type" else key for each in blocks for key in each}
    lists = {name: [each.get(key) for each in blocks] for key, name in names.items()}
    return Config(config.where, {**config.data, "num_hidden_layers": len(blocks), **lists})


class Family(NamedTuple):
    """The fields of a family, its rules, and what an eager implementation launches (assumed)."""

    mixers: mixers.Rule
    feed_forward: Callable[[Config], list[str]] = every
    shared: Callable[[Config], dict[str, Any]] = no_shared
    experts: tuple[str, ...] = ("num_experts", "num_local_experts", "n_routed_experts")
    top_k: tuple[str, ...] = ("num_experts_per_tok", "num_experts_per_token")
    expert_ff: tuple[str, ...] = ("moe_intermediate_size",)
    dense_ff: tuple[str, ...] = ("intermediate_size", "ffn_hidden_size")
    router_bias: bool = False
    matrices: int = 3
    dense_matrices: int = 3
    bias: bool = False
    latent: tuple[str, ...] = ()
    tied: bool = False
    prepare: Callable[[Config], Config] = lambda config: config
    kernels: int = 58
    expert_kernels: int = 5


_SHARED = shared_count("n_shared_experts", "num_shared_experts")
_WIDE = ("intermediate_size",)
_DEEPSEEK = Family(mixers.multi_latent, after_dense, _SHARED, router_bias=True, kernels=81)
_QWEN_HYBRID = Family(mixers.delta_hybrid, by_step, shared_width("shared_expert_intermediate_size", gate=True))
_BAILING = Family(
    mixers.grouped(qkv_bias="use_qkv_bias", qk_norm="head?"),
    after_dense,
    shared_count("num_shared_experts", width="moe_shared_expert_intermediate_size"),
    kernels=42,
)
_NEMOTRON = Family(
    mixers.nemotron_hybrid,
    nemotron,
    shared_count("n_shared_experts", width="moe_shared_expert_intermediate_size"),
    router_bias=True,
    matrices=2,
    dense_matrices=2,
    latent=("moe_latent_size",),
    kernels=40,
    expert_kernels=4,
)

#: By `model_type`, of the language part where there are several parts.
FAMILIES: dict[str, Family] = {
    "mixtral": Family(mixers.grouped(), expert_ff=_WIDE, kernels=42),
    "qwen2_moe": Family(
        mixers.grouped(qkv_bias=True), by_step, shared_width("shared_expert_intermediate_size", gate=True)
    ),
    "qwen3_moe": Family(mixers.grouped(bias="attention_bias", qk_norm="head"), by_step),
    "qwen3_vl_moe_text": Family(mixers.grouped(bias="attention_bias", qk_norm="head"), by_step),
    "qwen3_next": _QWEN_HYBRID,
    "qwen3_5_moe_text": _QWEN_HYBRID,
    "qwen4_exp_text": _QWEN_HYBRID._replace(kernels=90),
    "deepseek": Family(mixers.grouped(), after_dense, _SHARED, kernels=42),
    "deepseek_v2": _DEEPSEEK._replace(router_bias=False, kernels=60),
    "deepseek_v3": _DEEPSEEK,
    "kimi_k2": _DEEPSEEK,
    "axk1": _DEEPSEEK,
    "glm4_moe_lite": _DEEPSEEK,
    "deepseek_v32": _DEEPSEEK._replace(mixers=mixers.indexed_latent),
    "glm_moe_dsa": _DEEPSEEK._replace(mixers=mixers.indexed_latent),
    "deepseek_v4": _DEEPSEEK._replace(mixers=mixers.compressed, feed_forward=every),
    "kimi_linear": Family(
        mixers.kimi_hybrid, after_dense, _SHARED, latent=("routed_expert_hidden_size",), router_bias=True, kernels=60
    ),
    "glm4_moe": Family(
        mixers.grouped(qkv_bias="attention_bias", qk_norm="head?"), after_dense, _SHARED, router_bias=True
    ),
    "glm4v_moe_text": Family(
        mixers.grouped(qkv_bias="attention_bias", qk_norm="head?"), after_dense, _SHARED, router_bias=True
    ),
    "gpt_oss": Family(
        mixers.grouped(bias="attention_bias", more={"sinks": True}),
        expert_ff=_WIDE,
        router_bias=True,
        bias=True,
        kernels=54,
        expert_kernels=9,
    ),
    "gpt_oss_puzzle": Family(
        mixers.puzzled, expert_ff=_WIDE, router_bias=True, bias=True, prepare=unblocked, kernels=54, expert_kernels=9
    ),
    "llama4_text": Family(
        mixers.chunked,
        interleaved,
        shared_width("intermediate_size"),
        expert_ff=_WIDE,
        dense_ff=("intermediate_size_mlp",),
        kernels=42,
    ),
    "minimax_m2": Family(mixers.grouped(qk_norm="whole?"), expert_ff=_WIDE, router_bias=True),
    "minimax_m3": Family(
        mixers.minimax_sparse,
        after_dense,
        shared_count("n_shared_experts", width="shared_intermediate_size"),
        expert_ff=("moe_intermediate_size", "intermediate_size"),
        dense_ff=("dense_intermediate_size",),
        router_bias=True,
    ),
    "minimax": Family(mixers.lightning_hybrid, expert_ff=_WIDE, kernels=42),
    "minimax_text_01": Family(mixers.lightning_hybrid, expert_ff=_WIDE, kernels=42),
    "gemma4_text": Family(
        mixers.gemma, every, shared_width("intermediate_size"), top_k=("top_k_experts",), tied=True, kernels=90
    ),
    "mimo_v2_flash": Family(mixers.mimo, after_dense, _SHARED, router_bias=True, kernels=54),
    "nemotron_h": _NEMOTRON,
    "nemotron_h_puzzle": _NEMOTRON._replace(prepare=unblocked),
    "step3p7": Family(
        mixers.step,
        after_dense,
        shared_width("share_expert_dim", "share_expert_dims"),
        experts=("num_experts", "n_routed_experts", "moe_num_experts"),
        top_k=("num_experts_per_tok", "moe_top_k"),
        router_bias=True,
    ),
    "ernie4_5_moe": Family(
        mixers.grouped(bias="use_bias"),
        between,
        shared_count("moe_num_shared_experts"),
        experts=("moe_num_experts",),
        top_k=("moe_k",),
        router_bias=True,
        tied=True,
        kernels=42,
    ),
    "hunyuan_v1_moe": Family(
        mixers.grouped(bias="attention_bias", qk_norm="head?"),
        after_skipped,
        shared_count("num_shared_expert"),
        top_k=("moe_topk",),
        expert_ff=("moe_intermediate_size", "intermediate_size"),
        tied=True,
    ),
    "granitemoe": Family(mixers.grouped(bias="attention_bias"), expert_ff=_WIDE, tied=True, kernels=42),
    "granitemoeshared": Family(
        mixers.grouped(bias="attention_bias"),
        every,
        shared_width("shared_intermediate_size"),
        expert_ff=_WIDE,
        tied=True,
    ),
    "granitemoehybrid": Family(
        mixers.granite_hybrid, every, shared_width("shared_intermediate_size"), expert_ff=_WIDE, tied=True, kernels=42
    ),
    "jamba": Family(mixers.jamba, by_period, expert_ff=_WIDE, kernels=42),
    "phimoe": Family(mixers.grouped(bias="attention_bias"), expert_ff=_WIDE, kernels=42),
    "dbrx": Family(
        mixers.grouped(),
        experts=("moe_num_experts",),
        top_k=("moe_top_k",),
        expert_ff=("ffn_hidden_size",),
        prepare=flattened,
        kernels=42,
    ),
    "olmoe": Family(mixers.grouped(bias="attention_bias", qk_norm="whole"), expert_ff=_WIDE, kernels=56),
    "flex_olmo": Family(mixers.grouped(bias="attention_bias", qk_norm="whole"), expert_ff=_WIDE, kernels=56),
    "grok-1": Family(mixers.grouped(), expert_ff=("moe_intermediate_size", "intermediate_size"), tied=True, kernels=42),
    "hy_v3": Family(mixers.grouped(bias="attention_bias", qk_norm="head"), after_dense, _SHARED, router_bias=True),
    "exaone_moe": Family(mixers.grouped(qk_norm="head"), after_dense, _SHARED, router_bias=True),
    "sarvam_moe": Family(
        mixers.grouped(qkv_bias="attention_bias", qk_norm="head?"), after_dense, _SHARED, router_bias=True
    ),
    "mellum": Family(mixers.grouped(bias="attention_bias", qk_norm="head"), after_dense),
    "mistral4": _DEEPSEEK._replace(router_bias=False),
    "afmoe": Family(
        mixers.grouped(bias="attention_bias", qk_norm="head", more={"gate": "channel"}),
        after_dense,
        _SHARED,
        router_bias=True,
    ),
    "dots1": Family(mixers.grouped(bias="attention_bias", qk_norm="head"), after_dense, _SHARED, router_bias=True),
    "solar_open": Family(
        mixers.grouped(qkv_bias="attention_bias", qk_norm="head?"), after_dense, _SHARED, router_bias=True
    ),
    "bailing_moe": _BAILING,
    "bailing_moe_v2": _BAILING,
    "arctic": Family(mixers.grouped(), every, residual, expert_ff=_WIDE, kernels=42),
    "lfm2_moe": Family(mixers.short_convolution, after_dense, router_bias=True, tied=True),
}
#: Other names of the same: a model's own, of the part around the language part, or of architectures that say more.
SAME: dict[str, str] = {
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen4_exp": "qwen4_exp_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
    "qwen3_omni_moe": "qwen3_vl_moe_text",
    "llama4": "llama4_text",
    "gemma4": "gemma4_text",
    "glm4v_moe": "glm4v_moe_text",
    "kimi_k25": "deepseek_v3",
    "kimi_k3": "kimi_linear",
    "minimax_m3_vl": "minimax_m3",
    "minimax_m3_vl_text": "minimax_m3",
    "minimax_m1": "minimax_text_01",
    "step3p7_text": "step3p7",
    "step3p5": "step3p7",
    "grok1": "grok-1",
    "git": "grok-1",
    "hunyuan": "hunyuan_v1_moe",
}
#: Families whose `model_type` another family shares are known by their architecture.
BY_ARCHITECTURE: dict[str, str] = {
    "DeepseekV32ForCausalLM": "deepseek_v32",
    "DeepseekV4ForCausalLM": "deepseek_v4",
    "Grok1ForCausalLM": "grok-1",
    "Grok1ModelForCausalLM": "grok-1",
    "BailingMoeV2ForCausalLM": "bailing_moe_v2",
}
#: Known, and refused: what no shapes here can say.
REFUSED: dict[str, str] = {
    "longcat_flash": "some of its experts are none (zero-computation), so that a token's bytes vary",
    "jetmoe": "its attention is a mixture of experts too",
    "switch_transformers": "an encoder and a decoder: write a TOML file with two stacks, as the preset switch-base-128",
    "nllb-moe": "an encoder and a decoder: write a TOML file with two stacks, as the preset switch-base-128",
}


def family_of(config: Config) -> tuple[str, Family]:
    """Returns a config's family and its name. Raises ModelError, which lists the families."""
    architectures = config.entries("architectures") or []
    named = next((BY_ARCHITECTURE[each] for each in architectures if each in BY_ARCHITECTURE), None)
    given = config.get("model_type")
    name = named or SAME.get(str(given), str(given))
    if name in FAMILIES:
        return name, FAMILIES[name]
    if name in REFUSED:
        raise ModelError(f"{config.where}: model_type = {given!r}: {REFUSED[name]}")
    known = ", ".join(sorted([*FAMILIES, *SAME]))
    raise ModelError(
        f"{config.where}: model_type = {given!r}: not a family that is known; write its shapes in a TOML file, or use "
        f"one of {known}"
    )
