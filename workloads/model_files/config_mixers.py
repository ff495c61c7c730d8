"""Mixers of a config.json: which table of [mixers] each family's fields make, and which block has which.

Each rule returns the tables by name, and the name of every block's mixer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ...words import shown
from ..model import ModelError
from .config_fields import Config

Tables = dict[str, dict[str, Any]]


class Mixers(NamedTuple):
    """The tables of [mixers] by name, and the name of each block's mixer (blocks,)."""

    tables: Tables
    of_block: list[str]


Rule = Callable[[Config], Mixers]
#: What families call a kind of block in `layer_types` and the like.
_WINDOWS = ("sliding_attention", "chunked_attention", "sliding", "local")
#: Fields of attention that single blocks may have of their own, and what a table calls them.
_OVERRIDDEN = {"num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "head_dim": "head_dim"}


def attention(config: Config, **more: Any) -> dict[str, Any]:
    """Returns the table of grouped-query attention, with what a family adds to the usual fields."""
    heads = config.count("num_attention_heads", "n_heads", "num_heads")
    table = {
        "kind": "gqa",
        "heads": heads,
        "kv_heads": config.count("num_key_value_heads", "num_kv_heads", "num_attention_groups", default=heads),
        "head_dim": config.count("head_dim", "attention_head_dim", default=max(1, config.hidden // heads)),
    }
    return table | more


def latent(config: Config, **more: Any) -> dict[str, Any]:
    """Returns the table of multi-head latent attention."""
    table = {
        "kind": "mla",
        "heads": config.count("num_attention_heads"),
        "q_lora_rank": config.count("q_lora_rank", default=0, least=0),
        "kv_lora_rank": config.count("kv_lora_rank"),
        "qk_nope_head_dim": config.count("qk_nope_head_dim"),
        "qk_rope_head_dim": config.count("qk_rope_head_dim", least=0),
        "v_head_dim": config.count("v_head_dim"),
    }
    return table | more


def grouped(
    *, bias: bool | str = False, qkv_bias: bool | str = False, qk_norm: str = "none", more: Mapping[str, Any] = {}
) -> Rule:
    """Returns the rule of attention in all blocks, in some of them over a window; a name is a field that says it."""

    def rule(config: Config) -> Mixers:
        table = attention(
            config,
            bias=config.flag(bias) if isinstance(bias, str) else bias,
            qkv_bias=config.flag(qkv_bias) if isinstance(qkv_bias, str) else qkv_bias,
            qk_norm=_norm(config, qk_norm),
            **more,
        )
        return windowed(config, table)

    return rule


def _norm(config: Config, qk_norm: str) -> str:
    """Returns which norm queries and keys have; "head?" and "whole?" have it only if the config says so."""
    if not qk_norm.endswith("?"):
        return qk_norm
    return qk_norm[:-1] if config.flag("use_qk_norm") else "none"


def windowed(config: Config, full: dict[str, Any], windows: Mapping[str, Any] | None = None) -> Mixers:
    """Returns full attention, or attention over a window where `layer_types` says so."""
    kinds = config.of_blocks("layer_types")
    if kinds is None or not any(kind in _WINDOWS for kind in kinds):
        return overridden(config, Mixers({"attention": full}, ["attention"] * config.blocks))
    window = config.count("sliding_window", "attention_chunk_size", "sliding_window_size")
    tables = {"attention": full, "window": full | dict(windows or {}) | {"window": window}}
    return overridden(config, used(tables, ["window" if kind in _WINDOWS else "attention" for kind in kinds]))


def overridden(config: Config, found: Mixers) -> Mixers:
    """Returns mixers with the heads that `per_layer_config` gives single blocks (transformers 5 saves it)."""
    given = config.get("per_layer_config")
    if given is None:
        return found
    if not isinstance(given, Mapping):
        raise ModelError(f"{config.where}: per_layer_config = {shown(given)}: must be an object, by the block's number")
    tables, of_block = dict(found.tables), list(found.of_block)
    for key, fields in given.items():
        where = f"{config.where}: per_layer_config.{key}"
        if not (isinstance(fields, Mapping) and key.isdecimal() and int(key) < config.blocks):
            raise ModelError(f"{where} = {shown(fields)}: must be an object, of a block from 0 to {config.blocks - 1}")
        own = Config(where, fields)
        heads = {mine: own.count(name) for name, mine in _OVERRIDDEN.items() if fields.get(name) is not None}
        name = of_block[int(key)]
        changed = {mine: count for mine, count in heads.items() if tables[name][mine] != count}
        if changed:
            name += "".join(f"_{mine}_{count}" for mine, count in changed.items())
            tables[name] = tables[of_block[int(key)]] | changed
            of_block[int(key)] = name
    return used(tables, of_block)


def puzzled(config: Config) -> Mixers:
    """Returns attention as gpt-oss has it, over a window of each block's own, or over all where it names none."""
    full = attention(config, bias=config.flag("attention_bias", default=True), sinks=True)
    windows = config.of_blocks("sliding_window") or [None] * config.blocks
    tables = {f"window_{window}": full | {"window": window} for window in windows if window is not None}
    of_block = ["attention" if window is None else f"window_{window}" for window in windows]
    return used({"attention": full, **tables}, of_block)


def used(tables: Tables, of_block: list[str]) -> Mixers:
    """Returns the tables that blocks use."""
    return Mixers({name: table for name, table in tables.items() if name in of_block}, of_block)


def multi_latent(config: Config) -> Mixers:
    """Returns latent attention in all blocks."""
    return Mixers({"attention": latent(config)}, ["attention"] * config.blocks)


def indexed_latent(config: Config) -> Mixers:
    """Returns latent attention with an indexer of the tokens that it looks at."""
    chosen = {"index_top_k": config.count("index_topk", default=0, least=0)}
    more = {"index_heads": config.count("index_n_heads"), "index_dim": config.count("index_head_dim")}
    tables = {"attention": latent(config, **more, **chosen), "shared_index": latent(config, **chosen)}
    kinds = config.of_blocks("indexer_types")
    shared = kinds is not None
    return used(
        tables,
        ["shared_index" if shared and kind == "shared" else "attention" for kind in kinds or [""] * config.blocks],
    )


def chunked(config: Config) -> Mixers:
    """Returns Llama 4's attention: over a chunk of tokens, and in every fourth block over all."""
    full = attention(config, bias=config.flag("attention_bias"))
    rope = config.of_blocks("no_rope_layers")
    chunk = config.count("attention_chunk_size", default=8192)
    every = config.count("no_rope_layer_interval", default=4)
    over_all = [not each for each in rope] if rope else [(i + 1) % every == 0 for i in range(config.blocks)]
    return used(
        {"attention": full, "window": full | {"window": chunk}},
        ["attention" if each else "window" for each in over_all],
    )


def delta_hybrid(config: Config) -> Mixers:
    """Returns gated delta rules, and every so often gated attention (Qwen3-Next)."""
    linear = {
        "kind": "gated_delta",
        "key_heads": config.count("linear_num_key_heads"),
        "value_heads": config.count("linear_num_value_heads"),
        "key_dim": config.count("linear_key_head_dim"),
        "value_dim": config.count("linear_value_head_dim"),
        "convolution": config.count("linear_conv_kernel_dim"),
    }
    gate = "channel" if config.flag("attn_output_gate", default=True) else "none"
    full = attention(config, qk_norm="head", gate=gate, bias=config.flag("attention_bias"))
    if config.get("indexer_n_heads") is not None:
        full |= {
            "index_heads": config.count("indexer_n_heads"),
            "index_dim": config.count("indexer_head_dim"),
            "index_top_k": config.count("indexer_topk", default=0, least=0),
        }
    kinds = config.of_blocks("layer_types")
    every = 1 if kinds else config.count("full_attention_interval", default=4)
    linears = (
        [k == "linear_attention" for k in kinds] if kinds else [(i + 1) % every != 0 for i in range(config.blocks)]
    )
    return used({"attention": full, "linear": linear}, ["linear" if each else "attention" for each in linears])


def kimi_hybrid(config: Config) -> Mixers:
    """Returns Kimi delta attention, and latent attention in the blocks that are named (counted from 1)."""
    linear = config.section("linear_attn_config")
    table = {
        "kind": "kimi_delta",
        "heads": linear.count("num_heads"),
        "head_dim": linear.count("head_dim"),
        "convolution": linear.count("short_conv_kernel_size"),
        "output_gate": "whole" if linear.flag("use_full_rank_gate") else "low_rank",
    }
    gate = "channel" if config.flag("mla_use_output_gate") else "none"
    full = set(linear.entries("full_attn_layers") or [])
    of_block = ["attention" if i + 1 in full else "linear" for i in range(config.blocks)]
    return used({"attention": latent(config, gate=gate), "linear": table}, of_block)


def lightning_hybrid(config: Config) -> Mixers:
    """Returns lightning attention, and attention where `attn_type_list` or `layer_types` says so (MiniMax-01)."""
    full = attention(config)
    linear = {"kind": "lightning", "heads": full["heads"], "head_dim": full["head_dim"]}
    kinds = config.of_blocks("attn_type_list", "layer_types")
    if kinds is None:
        raise ModelError(f"{config.where}: attn_type_list: missing; must be given")
    of_block = ["attention" if kind in (1, "full_attention") else "linear" for kind in kinds]
    return used({"attention": full, "linear": linear}, of_block)


def jamba(config: Config) -> Mixers:
    """Returns Mamba, and attention once a period."""
    inner = config.count("mamba_expand") * config.hidden
    state_space = {
        "kind": "mamba",
        "inner": inner,
        "state": config.count("mamba_d_state"),
        "rank": -(-config.hidden // 16) if config.get("mamba_dt_rank") == "auto" else config.count("mamba_dt_rank"),
        "convolution": config.count("mamba_d_conv"),
        "norms": True,
    }
    period, offset = config.count("attn_layer_period"), config.count("attn_layer_offset", least=0)
    of_block = ["attention" if i % period == offset else "state_space" for i in range(config.blocks)]
    return used({"attention": attention(config), "state_space": state_space}, of_block)


def mamba2(config: Config) -> dict[str, Any]:
    """Returns the table of Mamba 2 by the fields of Nemotron-H or of Granite."""
    return {
        "kind": "mamba2",
        "heads": config.count("mamba_num_heads", "mamba_n_heads"),
        "head_dim": config.count("mamba_head_dim", "mamba_d_head"),
        "groups": config.count("n_groups", "mamba_n_groups"),
        "state": config.count("ssm_state_size", "mamba_d_state"),
        "convolution": config.count("conv_kernel", "mamba_d_conv"),
        "bias": config.flag("use_bias", "mamba_proj_bias"),
    }


def granite_hybrid(config: Config) -> Mixers:
    """Returns Mamba 2, and attention where `layer_types` says so."""
    kinds = config.of_blocks("layer_types", "layers_block_type") or ["attention"] * config.blocks
    tables = {"attention": attention(config)}
    spaces = ["state_space" if kind in ("mamba", "linear_attention") else "attention" for kind in kinds]
    if "state_space" in spaces:
        tables["state_space"] = mamba2(config)
    return used(tables, spaces)


#: The letters of Nemotron-H's pattern: state space, attention, MoE and feed-forward blocks.
LETTERS = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
#: What transformers 5 calls them.
_SAVED = {"linear_attention": "mamba", "full_attention": "attention"}


def nemotron_blocks(config: Config) -> list[str]:
    """Returns what each of Nemotron-H's blocks is: mamba, attention, moe or mlp, and nothing else."""
    pattern = config.get("hybrid_override_pattern")
    kinds = config.of_blocks("layers_block_type") if pattern is None else [LETTERS.get(s, s) for s in str(pattern)]
    kinds = None if kinds is None else [_SAVED.get(kind, kind) for kind in kinds]
    if kinds is None or len(kinds) != config.blocks or set(kinds) - set(LETTERS.values()):
        raise ModelError(
            f"{config.where}: hybrid_override_pattern = {pattern!r}: must have one of {' '.join(LETTERS)} a layer, "
            f"{config.blocks}"
        )
    return kinds


def nemotron_hybrid(config: Config) -> Mixers:
    """Returns Nemotron-H's blocks that mix; the others have no mixer."""
    names = {"mamba": "state_space", "attention": "attention"}
    tables = {"attention": attention(config, bias=config.flag("attention_bias")), "state_space": mamba2(config)}
    return used(tables, [names.get(kind, "none") for kind in nemotron_blocks(config)])


def short_convolution(config: Config) -> Mixers:
    """Returns LFM2's short convolutions and attention."""
    table = {
        "kind": "short_convolution",
        "width": config.count("conv_L_cache"),
        "bias": config.flag("conv_bias"),
    }
    kinds = config.of_blocks("layer_types") or ["conv"] * config.blocks
    full = attention(config, qk_norm="head")
    return used(
        {"attention": full, "convolution": table}, ["convolution" if k == "conv" else "attention" for k in kinds]
    )


def gemma(config: Config) -> Mixers:
    """Returns Gemma 4's windows, and wider heads in blocks that see all, whose keys are values too."""
    window = attention(config, qk_norm="head")
    full = window | {
        "head_dim": config.count("global_head_dim", default=window["head_dim"]),
        "kv_heads": config.count("num_global_key_value_heads", default=window["kv_heads"]),
        "values": "keys" if config.flag("attention_k_eq_v") else "own",
    }
    return windowed(config, full, window | {"values": "own"})


def mimo(config: Config) -> Mixers:
    """Returns MiMo-V2's attention, in most blocks over a window with key heads of its own."""
    full = attention(config, value_dim=config.count("v_head_dim"), sinks=config.flag("add_full_attention_sink_bias"))
    window = full | {
        "heads": config.count("swa_num_attention_heads"),
        "kv_heads": config.count("swa_num_key_value_heads"),
        "head_dim": config.count("swa_head_dim"),
        "value_dim": config.count("swa_v_head_dim"),
        "sinks": config.flag("add_swa_attention_sink_bias"),
        "window": config.count("sliding_window", "sliding_window_size"),
    }
    pattern = config.of_blocks("hybrid_layer_pattern") or [0] * config.blocks
    return used({"attention": full, "window": window}, ["window" if each else "attention" for each in pattern])


def step(config: Config) -> Mixers:
    """Returns Step's attention, with a gate for each head, over a window with heads of its own in most blocks."""
    full = attention(config, qk_norm="head", gate="head")
    other = config.get("attention_other_setting")
    aside = config if other is None else config.section("attention_other_setting")
    heads = {
        "heads": config.count("num_sliding_attention_heads", default=aside.count("num_attention_heads")),
        "kv_heads": aside.count("num_attention_groups", "num_key_value_heads", default=full["kv_heads"]),
        "head_dim": aside.count("head_dim", default=full["head_dim"]),
    }
    return windowed(config, full, heads)


def minimax_sparse(config: Config) -> Mixers:
    """Returns MiniMax-M3's attention, in most blocks with an indexer of blocks of tokens."""
    full = attention(config, qk_norm="head")
    sparse = config.section("sparse_attention_config")
    index = {
        "index_heads": sparse.count("sparse_num_index_heads"),
        "index_dim": sparse.count("sparse_index_dim"),
        "index_top_k": sparse.count("sparse_topk_blocks", default=0, least=0)
        * sparse.count("sparse_block_size", default=1),
    }
    pattern = sparse.entries("sparse_attention_freq") or [1] * config.blocks
    of_block = ["indexed" if each else "attention" for each in pattern[: config.blocks]]
    return used({"attention": full, "indexed": full | index}, of_block)


#: DeepSeek-V4's compressed attention, by what transformers 5 calls it, and how many tokens become one.
_COMPRESSED = {"compressed_sparse": 4, "heavily_compressed": 128}


def compressed(config: Config) -> Mixers:
    """Returns DeepSeek-V4's attention over a window and over tokens compressed by 4 or 128."""
    base = {
        "kind": "compressed",
        "heads": config.count("num_attention_heads"),
        "head_dim": config.count("head_dim"),
        "q_lora_rank": config.count("q_lora_rank"),
        "o_groups": config.count("o_groups"),
        "o_lora_rank": config.count("o_lora_rank"),
        "window": config.count("sliding_window"),
        "streams": config.count("hc_mult"),
    }
    index = {
        "index_heads": config.count("index_n_heads"),
        "index_dim": config.count("index_head_dim"),
        "index_top_k": config.count("index_topk", default=0, least=0),
    }
    rates = Config(config.where, {}) if config.get("compress_rates") is None else config.section("compress_rates")
    fine, coarse = (rates.count(f"{kind}_attention", default=usual) for kind, usual in _COMPRESSED.items())
    ratios = config.of_blocks("compress_ratios")
    if ratios is None and config.get("layer_types") is not None:
        saved = {
            "sliding_attention": 0,
            **dict(zip((f"{kind}_attention" for kind in _COMPRESSED), (fine, coarse), strict=True)),
        }
        ratios = [saved.get(kind, -1) for kind in config.of_blocks("layer_types") or []]
    if ratios is None or any(type(ratio) is not int or ratio < 0 for ratio in ratios):
        raise ModelError(f"{config.where}: compress_ratios = {shown(ratios)}: must be a list of integers of at least 0")
    # Only the finely compressed tokens are looked up by an indexer.
    tables: Tables = {
        f"compressed_{ratio}": base | {"ratio": ratio} | (index if ratio == fine else {})
        for ratio in dict.fromkeys(ratios)
    }
    return Mixers(tables, [f"compressed_{ratio}" for ratio in ratios])
