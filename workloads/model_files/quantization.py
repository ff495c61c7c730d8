"""Quantization of a Hugging Face model: the dtype of its experts, dense part, embedding, head and KV cache.

A config.json says it under `quantization_config`, ModelOpt's also in a file beside it. What stays as it is, is named by
patterns: of these, those that name attention, shared experts or the head are understood.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...bounded import read_json
from ...dtypes import bits_of, dtype_of
from ...errors import InputError
from ...words import shown
from ..model import ModelError
from .config_fields import Config

#: ModelOpt's file beside a config.json.
BESIDE = "hf_quant_config.json"
#: Plain patterns that leave attention, or routed experts, as they are: their modules' names end or go on like this.
_ATTENTION = re.compile(r"(?:attn|attention)(?:\.?\*|$|\.(?:q|qkv|q_a|q_b)_proj)|mixer\.q_proj")
_EXPERTS = re.compile(r"(?<!shared_)experts(?:\.?\*|$|\.\d)")
#: What a regular expression (`re:`) is tried on.
_ATTENTION_NAMES = ("model.layers.9.self_attn.q_proj", "language_model.model.layers.9.self_attn.q_a_proj")
_EXPERT_NAMES = ("model.layers.9.mlp.experts.0.up_proj", "language_model.model.layers.9.mlp.experts.0.up_proj")


class UnknownQuantization(ModelError):
    """A config.json names a method that nothing here knows the bytes of."""


def dtypes_of(folder: Path, config: Config) -> dict[str, Any]:
    """Returns the dtypes of a model as plain data of a TOML file's [dtypes]. Raises ModelError for unknown ones."""
    plain = _dtype(config, "dtype", config.get("dtype", "torch_dtype") or "bfloat16")
    section = config.get("quantization_config", "quantization", "compression_config")
    if section is None and (folder / BESIDE).is_file():
        section = _beside(folder / BESIDE, config)
    if section is None:
        return {"expert": plain, "dense": plain}
    if not isinstance(section, Mapping):
        raise ModelError(f"{config.where}: quantization_config = {shown(section)}: must be an object")
    quantized = Config(f"{config.where}: quantization_config", section)
    if layers := quantized.get("quantized_layers"):
        expert, dense = _by_layer(quantized, layers, plain)
    else:
        skipped = _skipped(quantized)
        expert = dense = _quantized(quantized)
        # MXFP4 is gpt-oss's, whose experts alone are quantized.
        if quantized.get("quant_method") == "mxfp4" or _leaves(skipped, _ATTENTION, _ATTENTION_NAMES):
            dense = plain
        if _leaves(skipped, _EXPERTS, _EXPERT_NAMES):
            expert = plain
    # Of experts alone, by an own field: DeepSeek-V4's, and ModelOpt's of it.
    if own := quantized.get("moe_quant_algo") or config.get("expert_dtype"):
        expert = _dtype(config, "expert_dtype", {"fp4": "mxfp4"}.get(str(own), str(own)))
        dense = _quantized(Config(quantized.where, {"quant_method": quantized.get("quant_method")}))
    return {"expert": expert, "dense": dense, "other": plain, "kv": _kv(quantized, plain)}


def _kv(config: Config, plain: str) -> str:
    """Returns the dtype of the KV cache: of 8 bits where a scheme is given that does not name it."""
    given = config.get("kv_cache_quant_algo") or config.get("kv_cache_scheme")
    if given is None:
        return plain
    return _dtype(config, "kv_cache_quant_algo", given) if isinstance(given, str) else "float8"


def _by_layer(config: Config, layers: Any, plain: str) -> tuple[str, str]:
    """Returns the dtypes of the routed experts and of attention where ModelOpt names each module's."""
    if not isinstance(layers, Mapping):
        raise ModelError(f"{config.where}: quantized_layers = {shown(layers)}: must be an object")
    found = {"expert": plain, "dense": plain}
    for name, how in layers.items():
        part = "expert" if re.search(r"(?<!shared_)experts", name) else "dense" if _ATTENTION.search(name) else ""
        if part and isinstance(how, Mapping) and found[part] == plain:
            found[part] = _quantized(Config(f"{config.where}: quantized_layers", {"quant_algo": how.get("quant_algo")}))
    return found["expert"], found["dense"]


def _quantized(config: Config) -> str:
    """Returns the dtype of quantized matrices."""
    method = str(config.get("quant_method") or "").lower()
    algorithm = str(config.get("quant_algo") or "").lower()
    if "nvfp4" in algorithm or "nvfp4" in str(config.get("format") or ""):
        return "nvfp4"
    if "mxfp8" in algorithm:
        return "mxfp8"
    if algorithm.startswith("fp8") or method in ("fp8", "fbgemm_fp8"):
        return "float8"
    if method == "mxfp4" or "mxfp4" in str(config.get("format") or ""):
        return "mxfp4"
    if method in ("awq", "gptq", "auto-round", "intel/auto-round", "autoround") or "w4a16" in algorithm:
        return _integers(
            config.count("bits", "w_bit", default=4), config.count("group_size", "q_group_size", default=128, least=-1)
        )
    if method == "bitsandbytes":
        return "nf4" if config.flag("load_in_4bit", "_load_in_4bit") else "int8"
    if method == "compressed-tensors" or algorithm == "mixed_precision" or config.get("config_groups"):
        return _of_groups(config)
    if method in ("", "mlx") and config.get("bits") is not None:
        return _mlx(config)
    if method in ("exl2", "exl3") and config.get("bits") is not None:
        return _dtype(config, "bits", f"{config.get('bits')}bpw")
    raise UnknownQuantization(
        f"{config.where}: quant_method = {shown(config.get('quant_method'))}: choose one of fp8, mxfp4, nvfp4, awq, "
        "gptq, bitsandbytes, compressed-tensors, modelopt, exl2, exl3, mlx; or set model.bits_per_weight"
    )


def _mlx(config: Config) -> str:
    """Returns the dtype of MLX's weights: by its mode, or integers with a scale and a bias of 16 bits a group."""
    mode = str(config.get("mode") or "affine").lower()
    if mode != "affine":
        return _dtype(config, "mode", mode)
    bits, group = config.count("bits"), config.count("group_size", default=64)
    return _dtype(config, "bits", f"{bits + 32 / group:g}bpw")


def _of_groups(config: Config) -> str:
    """Returns the dtype of compressed-tensors' groups of weights; of several, the one with the fewest bits."""
    groups = config.get("config_groups")
    found = []
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        weights = Config(f"{config.where}: config_groups.{name}", group if isinstance(group, Mapping) else {}).section(
            "weights"
        )
        bits, size = weights.count("num_bits"), weights.count("group_size", default=-1, least=-1)
        if weights.get("type") == "float":
            found.append({(4, 32): "mxfp4", (4, 16): "nvfp4"}.get((bits, size), "float8" if bits == 8 else "mxfp4"))
        else:
            found.append(_integers(bits, size))
    if not found:
        raise ModelError(f"{config.where}: config_groups: missing; must be given")
    return min(found, key=bits_of)


def _integers(bits: int, group: int) -> str:
    """Returns the dtype of integers with a scale a group of weights; a group of -1 is a whole row."""
    name = f"int{bits}_g{group}" if 0 < group <= 1024 and bits < 8 else f"int{bits}"
    try:
        return dtype_of(name)
    except InputError:
        return f"{bits}bpw"


def _skipped(config: Config) -> list[str]:
    """Returns the patterns of modules that stay as they are."""
    dynamic = config.get("dynamic")
    if isinstance(dynamic, Mapping):  # GPTQModel's: regular expressions of modules, with "-:" those that are left out
        return [f"re:{name[2:]}" for name in dynamic if name.startswith("-:")]
    for name in ("modules_to_not_convert", "ignore", "exclude_modules", "ignored_layers", "llm_int8_skip_modules"):
        found = config.entries(name)
        if found is not None:
            return [str(each) for each in found]
    return []


def _leaves(patterns: list[str], plain: re.Pattern[str], names: tuple[str, ...]) -> bool:
    """Returns whether a pattern names a part: a plain one by its end, a regular expression by fitting a name."""
    for pattern in patterns:
        if not pattern.startswith("re:"):
            if plain.search(pattern):
                return True
            continue
        try:
            if any(re.match(pattern[3:], name) for name in names):
                return True
        except re.error:
            continue
    return False


def _beside(path: Path, config: Config) -> Any:
    try:
        data = json.loads(read_json(path, ModelError))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    section = data.get("quantization") if isinstance(data, dict) else None
    if not isinstance(section, dict):
        raise ModelError(f"{path}: quantization: missing; must be given")
    return {"quant_method": "modelopt", **section}


def _dtype(config: Config, key: str, name: Any) -> str:
    try:
        return dtype_of(str(name))
    except InputError as error:
        raise ModelError(f"{config.where}: {key} = {shown(name)}: {error}") from None
