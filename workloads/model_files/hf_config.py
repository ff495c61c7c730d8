"""Hugging Face's config.json: the shapes of the language model that it describes, and its quantization."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ...bounded import read_json
from ..model import ModelError
from .config_families import SAME, Family, family_of
from .config_fields import Config
from .config_mixers import Mixers
from .named import CONFIG
from .quantization import UnknownQuantization, dtypes_of
from .weights import bytes_of

#: Where a config of several parts has its language model.
_LANGUAGE = ("text_config", "llm_config", "language_config", "thinker_config")
_DRAFTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")


def shapes_of_config(path: Path, *, stated: bool = False) -> dict[str, Any]:
    """Returns the shapes of a config.json, or of the folder of one, as plain data of a TOML file.

    With `stated` bits of all matrices, a quantization that is not known does not matter.
    Raises ModelError, naming the file, the field, its value and what would be right.
    """
    if path.is_dir():
        path = path / CONFIG
    config = language(_read(path))
    name, family = family_of(config)
    config = family.prepare(config.with_usual(class_defaults().get(name, {})))
    found, parts = family.mixers(config), family.feed_forward(config)
    if "moe" not in parts:
        raise ModelError(f"{path}: no block is a mixture of experts, and Prestage simulates those")
    shapes: dict[str, Any] = {
        "name": path.resolve().parent.name if path.name == CONFIG else path.stem,
        "source": _source(path, name, config),
        "hidden": config.hidden,
        "vocabulary": config.count("vocab_size", "padded_vocab_size"),
        "tied_embeddings": config.whole.flag(
            "tie_word_embeddings", default=config.flag("tie_word_embeddings", default=family.tied)
        ),
        "dtypes": _dtypes(path.parent, config, stated),
        "stacks": [_stack(found, parts)],
        "moe": _moe(config, family, [i for i, part in enumerate(parts) if part == "moe"]),
        "kernels": {"dense": family.kernels, "expert": family.expert_kernels},
    }
    if config.get("hc_lowrank") is not None:
        shapes["streams"] = {"count": config.count("hc_count"), "rank": config.count("hc_lowrank")}
    if config.get("ngram_size") is not None:
        shapes["host_table_bytes"] = _table_bytes(config, shapes["dtypes"])
    mixers = {key: table for key, table in found.tables.items() if key != "attention"}
    shapes |= {"mixers": mixers} if mixers else {}
    shapes |= {"attention": found.tables["attention"]} if "attention" in found.tables else {}
    if "dense" in parts:
        shapes["dense"] = {"ff": config.count(*family.dense_ff), "matrices": family.dense_matrices}
    return shapes


@cache
def class_defaults() -> dict[str, dict[str, Any]]:
    """Returns the defaults of families' classes in transformers, of the fields that are read, by family."""
    found: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "config_defaults.json").read_text("utf-8"))
    return found


def language(config: Config) -> Config:
    """Returns the config of the language model; what it does not say is looked for around it."""
    for name in _LANGUAGE:
        inner = config.data.get(name)
        if isinstance(inner, dict):
            return language(Config(config.where, inner, config))
    return config


def _dtypes(folder: Path, config: Config, stated: bool) -> dict[str, Any]:
    try:
        return dtypes_of(folder, config)
    except UnknownQuantization:
        if not stated:
            raise
        return dict.fromkeys(("expert", "dense"), "bfloat16")


def draft_layers(config: Config) -> int:
    """Returns the number of layers that only guess ahead; they are not part of a model's shapes."""
    return config.count(*_DRAFTS, default=0, least=0)


def _table_bytes(config: Config, dtypes: Mapping[str, str]) -> int:
    """Returns the bytes of Qwen4-Exp's tables of n-grams; 8 bits a weight where the matrices are quantized."""
    heads = config.count("heads_per_ngram") * (config.count("ngram_size", least=2) - 1)
    rows = heads * config.count("ngram_vocab_size_base")
    weights = (
        rows * (config.count("ple_embed_dim", "hidden_size") // heads) * len(config.entries("ple_layer_ids") or [])
    )
    return bytes_of(weights, "float8" if "other" in dtypes else dtypes["dense"])


def _read(path: Path) -> Config:
    try:
        data = json.loads(read_json(path, ModelError))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path}: must be an object, as a model's {CONFIG}")
    return Config(str(path), data)


def _source(path: Path, name: str, config: Config) -> str:
    drafts = draft_layers(config)
    without = f", without its {drafts} draft layer{'s' if drafts > 1 else ''}" if drafts else ""
    part = ", the language part" if config.is_part else ""
    return f"{path.name} of {name}{part}{without}"


def _stack(found: Mixers, parts: list[str]) -> dict[str, Any]:
    stack: dict[str, Any] = {"blocks": len(parts)}
    if set(found.of_block) != {"attention"}:
        stack["mixers"] = _pattern(found.of_block)
    if set(parts) != {"moe"}:
        stack["feed_forward"] = _pattern(parts)
    return stack


def _pattern(of_block: list[str]) -> list[str]:
    """Returns the shortest beginning that, repeated, gives the whole list (Knuth, Morris and Pratt, for long lists)."""
    matched = [0] * len(of_block)  # the longest beginning, not all, that ends at each place
    for i in range(1, len(of_block)):
        length = matched[i - 1]
        while length and of_block[i] != of_block[length]:
            length = matched[length - 1]
        matched[i] = length + (of_block[i] == of_block[length])
    return of_block[: len(of_block) - matched[-1]]


def _moe(config: Config, family: Family, blocks: list[int]) -> dict[str, Any]:
    """Returns the table of experts, with the MoE layers that differ from most others, given the blocks that are MoE."""
    numbered = [((block, config.blocks), (layer, len(blocks))) for layer, block in enumerate(blocks)]
    layers = [_moe_of(config.at(*numbers), family) for numbers in numbered]
    ((common, _),) = Counter(tuple(moe.items()) for moe in layers).most_common(1)
    usual = dict(common)
    differing: dict[tuple[Any, ...], list[int]] = {}
    for layer, moe in enumerate(layers):
        if moe != usual:
            differing.setdefault(tuple(moe.items()), []).append(layer)
    by_layer = [
        {"layers": numbers, **{key: value for key, value in moe if usual.get(key) != value}}
        for moe, numbers in differing.items()
    ]
    return usual | ({"by_layer": by_layer} if by_layer else {})


def _moe_of(config: Config, family: Family) -> dict[str, Any]:
    moe: dict[str, Any] = {
        "experts": config.count(*family.experts),
        "top_k": config.count(*family.top_k),
        "expert_ff": config.count(*family.expert_ff),
        "matrices": family.matrices,
        "bias": family.bias,
        "router_bias": family.router_bias,
    }
    if family.latent:
        moe["latent"] = config.count(*family.latent, default=0, least=0)
    return moe | family.shared(config)


def known_types() -> list[str]:
    """Returns every `model_type` that is read, sorted."""
    from .config_families import FAMILIES

    return sorted({*FAMILIES, *SAME})
