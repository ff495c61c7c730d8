"""Models as tables for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from .tables.layout import plain_console

_GIB, _MIB = 2**30, 2**20


def print_models(models: Sequence[dict[str, Any]], families: Sequence[str]) -> None:
    """Print the shipped models, a line each, and what else is read."""
    console = plain_console()
    table = Table(box=None)
    for name in ("model", "weights", "active", "experts", "top-k", "GiB", "experts' dtype"):
        table.add_column(name, no_wrap=True, justify="left" if name in ("model", "experts' dtype") else "right")
    for model in models:
        table.add_row(
            model["name"],
            billions(model["parameters"]),
            billions(model["active_parameters"]),
            f"{model['layers']} x {model['experts']}",
            str(model["top_k"]),
            f"{model['weight_bytes'] / _GIB:.1f}",
            model["expert_dtype"],
        )
    console.print(table)
    console.print(
        "\nAs models are also read: a TOML file, a GGUF file, and config.json, or its folder, of the families"
    )
    console.print(", ".join(families), style="dim")


def print_model(data: dict[str, Any]) -> None:
    """Print what a model holds and moves."""
    console = plain_console()
    console.print(Text(f"{data['name']}: {data['source']}", style="bold"))
    sizes = data["expert_bytes"] if isinstance(data["expert_bytes"], list) else [data["expert_bytes"]]
    low, high = min(sizes), max(sizes)
    expert = f"{high / _MIB:.2f} MiB" if low == high else f"{low / _MIB:.2f} to {high / _MIB:.2f} MiB by layer"
    rows = [
        ("weights", billions(data["parameters"]), f"{billions(data['active_parameters'])} for a token, with the head"),
        ("MoE layers", str(data["layers"]), _routed(data)),
        ("all weights", _gib(data["weight_bytes"]), ""),
        ("experts", _gib(data["total_expert_bytes"]), f"{expert} each, {data['expert_dtype']}"),
        ("dense part", _gib(data["dense_bytes"]), data["dense_dtype"]),
        ("head", _gib(data["head_bytes"]), ""),
        ("input embedding", _gib(data["embedding_bytes"]), "" if data["embedding_bytes"] else "the head's own matrix"),
        ("read for a token", _gib(data["step_bytes"]), ""),
        ("KV cache a token", f"{data['kv_bytes_per_token'] / 1024:,.1f} KiB", _windows(data["windows"])),
    ]
    if data["state_bytes_per_sequence"]:
        rows.append(("states a sequence", f"{data['state_bytes_per_sequence'] / _MIB:,.1f} MiB", "whatever its length"))
    if data["host_table_bytes"]:
        rows.append(("table in host memory", _gib(data["host_table_bytes"]), "no expert"))
    table = Table(show_header=False, box=None)
    for name, value, more in rows:
        table.add_row(name, Text(value, justify="right"), Text(more, style="dim"))
    console.print(table)


def billions(weights: int | None) -> str:
    """Returns a number of weights as people write it: 46.7 B."""
    return "-" if weights is None else f"{weights / 1e9:,.1f} B"


def _routed(data: dict[str, Any]) -> str:
    """Returns how many experts a token takes of how many; where layers differ, in how many of them."""
    kinds = Counter((each["top_k"], each["experts"]) for each in data["by_layer"])
    if len(kinds) < 2:
        return f"top-{data['top_k']} of {data['experts']} experts"
    words = [f"top-{top_k} of {experts} experts in {count}" for (top_k, experts), count in kinds.items()]
    return ", ".join(words) if len(words) < 4 else f"{', '.join(words[:3])}, and {len(words) - 3} other kinds"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / _GIB:,.2f} GiB" if size_bytes else "-"


def _windows(windows: Sequence[dict[str, Any]]) -> str:
    return "; ".join(
        f"{each['kv_bytes_per_token'] / 1024:,.1f} KiB of it for the last {each['tokens']:,} tokens alone"
        for each in windows
    )
