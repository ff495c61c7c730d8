"""Sources: a model by its preset's name, its TOML file, a config.json or the folder of one, or a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...bounded import parse_toml, read
from ...words import did_you_mean, problems
from ..model import Model, ModelError, preset_names
from .derive import derive
from .gguf_model import read_gguf
from .hf_config import shapes_of_config
from .named import CONFIG, is_gguf
from .shapes import Shapes

Changes = Mapping[str, int | None]


def open_model(name: str, changes: Changes, dtype: str | None, all_dtype: str | None) -> Model:
    """Returns a model with other `layers`, `experts` and `top_k`, its experts of `dtype`, or all matrices of another.

    Raises ModelError, naming the file or the key of the change, the value and what would be right.
    """
    if gguf := _gguf(name):
        return _of_tensors(read_gguf(gguf), changes, dtype or all_dtype)
    return _of_shapes(read_shapes(name, stated=all_dtype is not None), changes, dtype, all_dtype)


def read_shapes(name: str, *, stated: bool = False) -> Shapes:
    """Returns the shapes of a preset, a TOML file, a config.json or the folder of one; ModelError if there are none.

    `stated` as of `shapes_of_config`.
    """
    path = Path(name)
    if name.endswith(".json") or path.is_dir():
        data = shapes_of_config(path, stated=stated)
        return _valid(str(path), data)
    presets = preset_names()
    if name in presets:
        return _preset(name)
    hint = did_you_mean(name, presets)
    if name.endswith(".toml") or (path.name != name and (path.exists() or not hint)):
        return _valid(name, parse_toml(_read_text(path), name, ModelError))
    raise ModelError(
        f"model {name!r}: {hint}{' ' if hint else ''}choose one of {', '.join(presets)}, or FILE.toml, {CONFIG}, its "
        "folder, FILE.gguf"
    )


@cache
def _preset(name: str) -> Shapes:
    """Returns the shapes of a preset that is there."""
    label = f"{name}.toml"
    text = (resources.files("prestage.workloads.models") / label).read_text(encoding="utf-8")
    return _valid(label, parse_toml(text, label, ModelError))


def _valid(label: str, data: dict[str, Any]) -> Shapes:
    try:
        return Shapes.model_validate(data)
    except ValidationError as error:
        raise ModelError(f"{label}: {problems(error, Shapes, data)}") from None


def _gguf(name: str) -> Path | None:
    """Returns the GGUF file that is meant; of a folder without a config.json, the one in it."""
    path = Path(name)
    if not is_gguf(name) or not path.is_dir():
        return path if is_gguf(name) else None
    found = sorted(path.glob("*.gguf"))
    first = [each for each in found if "-of-" not in each.name or "-00001-of-" in each.name]
    if len(first) > 1:
        raise ModelError(f"{path}: {len(first)} models: name one of {', '.join(each.name for each in first[:8])}")
    return first[0] if first else None


def _of_tensors(model: Model, changes: Changes, dtype: str | None) -> Model:
    """Returns the model of a GGUF file, of which only the number of layers and of chosen experts can differ."""
    for key in ("experts", "dtype"):
        value = dtype if key == "dtype" else changes[key]
        if value is not None:
            raise ModelError(f"model.{key} = {value!r}: {model.name} is as large as its tensors: leave it out")
    top_k, layers = changes["top_k"] or model.top_k, changes["layers"] or model.layers
    _check_changes(model.name, model.layers, {**changes, "layers": layers}, min(model.experts_by_layer), top_k)
    if changes["top_k"] is not None and top_k != model.top_k:
        by_layer = tuple(each._replace(top_k=top_k) for each in model.by_layer)
        model = replace(model, top_k=top_k, by_layer=by_layer, parameters=None)
    if layers == model.layers:
        return model
    return replace(
        model,
        layers=layers,
        expert_bytes=model.expert_bytes[:layers],
        dense_bytes=model.dense_bytes[:layers],
        caches=(*model.caches[:layers], model.caches[-1]) if model.caches else (),
        attention=model.attention[:layers],
        by_layer=model.by_layer[:layers],
        kv_bytes_per_token=sum(
            each.bytes_per_token for layer in (*model.caches[:layers], model.caches[-1]) for each in layer
        ),
        parameters=None,
        active_parameters=None,
    )


def _of_shapes(shapes: Shapes, changes: Changes, dtype: str | None, all_dtype: str | None) -> Model:
    known = shapes.moe_layers
    moe = shapes.moe.changed({key: value for key in ("experts", "top_k") if (value := changes[key]) is not None})
    for each in (moe, *map(moe.of, range(changes["layers"] or known) if moe.by_layer else ())):
        _check_changes(shapes.name, known, changes, each.experts, each.top_k)
    dtypes = shapes.dtypes
    if all_dtype is not None:
        alike = dict.fromkeys(("expert", "dense", "embedding", "head"), all_dtype)
        alike |= {"other": dtypes.other or "float32", "kv": dtypes.kv or "float16"}
        dtypes = dtypes.model_copy(update=alike)
    if dtype is not None:
        dtypes = dtypes.model_copy(update={"expert": dtype})
    return derive(shapes.model_copy(update={"moe": moe, "dtypes": dtypes}), changes["layers"] or known)


def _check_changes(name: str, known: int, changes: Changes, experts: int, top_k: int) -> None:
    layers = changes["layers"]
    if layers is not None and layers > known:
        raise ModelError(f"model.layers = {layers}: {name} has {known} MoE layers; give 1 to {known}")
    if top_k > experts:
        key, value = ("top_k", top_k) if changes["top_k"] is not None else ("experts", experts)
        raise ModelError(
            f"model.{key} = {value}: {name} would take {top_k} of {experts} experts; top_k must be 1 to experts"
        )


def _read_text(path: Path) -> str:
    try:
        return read(path, ModelError).decode("utf-8")
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ModelError(f"{path}: not UTF-8 text") from None
