"""A model described: what it holds and moves, as plain data."""

from __future__ import annotations

from typing import Any

from ..model import Model, load_model, preset_names
from .checkpoint import weight_bytes


def described(model: Model) -> dict[str, Any]:
    """Returns a model as plain data for JSON: sizes in bytes, weights in numbers; by layer where layers differ."""
    windows: dict[int, int] = {}
    for each in (each for layer in model.caches for each in layer if each.window):
        windows[each.window] = windows.get(each.window, 0) + each.bytes_per_token
    return {
        "name": model.name,
        "source": model.source,
        "layers": model.layers,
        "experts": model.experts,
        "top_k": model.top_k,
        "hidden": model.hidden,
        "expert_ff": model.expert_ff,
        "by_layer": [each._asdict() for each in model.by_layer],
        "parameters": model.parameters,
        "active_parameters": model.active_parameters,
        "expert_dtype": model.expert_dtype,
        "dense_dtype": model.dense_dtype,
        "weight_bytes": weight_bytes(model),
        "total_expert_bytes": model.total_expert_bytes,
        "expert_bytes": model.expert_bytes[0] if model.uniform else list(model.expert_bytes),
        "dense_bytes": sum(model.dense_bytes),
        "head_bytes": model.head_bytes,
        "embedding_bytes": model.embedding_beside_head_bytes,
        "host_table_bytes": model.host_table_bytes,
        "kv_bytes_per_token": model.kv_bytes_per_token,
        "windows": [{"tokens": tokens, "kv_bytes_per_token": size} for tokens, size in sorted(windows.items())],
        "state_bytes_per_sequence": model.state_bytes,
        "step_bytes": step_bytes(model),
    }


def step_bytes(model: Model) -> int:
    """Returns the weight bytes that one token reads: dense parts, its experts and the head."""
    return sum(model.dense_bytes) + model.chosen_bytes + model.head_bytes


def shipped() -> list[dict[str, Any]]:
    """Returns the shipped models, described, sorted by name."""
    return [described(load_model(name)) for name in preset_names()]
