"""What the arrays of a trace must be: shape, type and range, refused in words that say what would be right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .batches import DECODE, PREFILL
from .trace_limits import Array, TraceError, check_num_experts


class Layout(NamedTuple):
    """What an array must look like: its types, narrowest first, the name of each axis, and its values."""

    dtypes: tuple[str, ...]
    axes: tuple[str, ...]
    low: int | None = None
    high: int | None = None


#: The arrays a trace may have. Any other array is kept in `extra`.
LAYOUT = {
    "experts": Layout(("uint8", "uint16"), ("row", "layer", "slot")),
    "weights": Layout(("float16",), ("row", "layer", "slot")),
    "sequence": Layout(("int32",), ("row",), low=0),
    "position": Layout(("int32",), ("row",), low=0),
    "phase": Layout(("uint8",), ("row",), low=PREFILL, high=DECODE),
    "present": Layout(("bool",), ("row", "layer")),
    "predictions": Layout(("int16",), ("row", "layer", "horizon", "rank")),
    "confidences": Layout(("float16", "float32"), ("row", "layer", "horizon", "rank")),
}
#: The extra array that says how many experts each layer has, where they differ.
LAYER_EXPERTS = "layer_experts"
#: The extra arrays that say whom a router ranked next behind its choice, and with which gates (scaled as `weights`).
RUNNERS_UP, RUNNERS_UP_WEIGHTS = "runners_up", "runners_up_weights"
#: Extra arrays whose meaning is known; they are checked too.
KNOWN_EXTRA = {
    "expert_bytes": Layout((), ("layer",), low=1),
    "dense_bytes": Layout((), ("layer",), low=0),
    LAYER_EXPERTS: Layout((), ("layer",), low=1),
    "residency": Layout((), ("row", "layer", "slot"), low=0, high=2),
    RUNNERS_UP: Layout((), ("row", "layer", "runner"), low=0),
    RUNNERS_UP_WEIGHTS: Layout(("float16", "float32"), ("row", "layer", "runner")),
}
#: An extra array (layers, experts) of numbers that say how popular experts are, whatever the rows chose.
POPULARITY = "popularity"
_SIZES_IN_WORDS = {"row": "tokens", "layer": "layers", "slot": "k", "horizon": "horizons", "rank": "n", "runner": "n"}


def check_array(where: str, name: str, value: Array, layout: Layout, sizes: dict[str, int]) -> None:
    """Refuse an array of another type, shape or range than its layout; `sizes` are those of the axes, by name."""
    kinds = {"experts": "iu"}.get(name, "biu" if layout.dtypes == ("bool",) else "iu")
    wanted = " or ".join(layout.dtypes) or "integers"
    is_float = layout.dtypes[:1] == ("float16",)
    if value.dtype.kind not in ("f" if is_float else kinds):
        what = "Python objects" if value.dtype.kind == "O" else f"dtype {value.dtype}"
        raise TraceError(f"{where}: {name}: {what}: must be {wanted}")
    expected = tuple(sizes.get(axis, -1) for axis in layout.axes)
    if value.shape != expected:
        words = ", ".join(_SIZES_IN_WORDS[axis] for axis in layout.axes)
        numbers = "" if -1 in expected else f" = {expected}"
        raise TraceError(f"{where}: {name}: shape {value.shape}: must be ({words}){numbers}")
    if value.size and not is_float and value.dtype.kind != "b":
        _check_range(where, name, value, layout)
    if layout.dtypes and value.dtype.name not in layout.dtypes:
        raise TraceError(f"{where}: {name}: dtype {value.dtype}: must be {wanted}")


def _check_range(where: str, name: str, value: Array, layout: Layout) -> None:
    """Refuse integers beyond what the layout allows."""
    low, high = layout.low, layout.high
    if (low is not None and value.min() < low) or (high is not None and value.max() > high):
        wrong = np.zeros(value.shape, dtype=np.bool_)
        wrong |= False if low is None else value < low
        wrong |= False if high is None else value > high
        allowed = f"at least {low}" if high is None else f"{low}..{high}"
        raise TraceError(f"{where}: {_at(name, layout, value, wrong)}: must be {allowed}")


def check_floats(where: str, name: str, value: Array, low: int | None) -> None:
    """Refuse numbers that are not finite, or below `low`."""
    layout = LAYOUT.get(name) or KNOWN_EXTRA[name]
    fine = np.isfinite(value)
    if low is not None:
        fine &= value >= low
    if not fine.all():
        allowed = "a number" if low is None else f"a number, at least {low}"
        raise TraceError(f"{where}: {_at(name, layout, value, ~fine)}: must be {allowed}")


def first_wrong(wrong: Array) -> tuple[int, ...]:
    """Returns the index of the first value that is wrong."""
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(wrong)), wrong.shape))


def _at(name: str, layout: Layout, value: Array, wrong: Array) -> str:
    """Say where the first wrong value is: `experts at row 3, layer 0, slot 1: 200`."""
    index = first_wrong(wrong)
    place = ", ".join(f"{axis} {number}" for axis, number in zip(layout.axes, index, strict=True))
    return f"{name} at {place}: {value[index]}"


def agree_on_num_experts(path: Path, named: Any, given: int | None) -> int:
    """Returns the number of experts that a file names or a caller gives; TraceError unless they agree."""
    if named is None and given is None:
        raise TraceError(
            f"{path}: meta: names no num_experts: add it to the file's meta, a JSON string such as "
            '{"num_experts": 64}, or give num_experts when loading'
        )
    if named is not None:
        check_num_experts(f"{path}: meta", named)
        if given is not None and named != given:
            raise TraceError(f"{path}: meta: num_experts = {named}, but {given} was given: leave it out")
        return int(named)
    assert given is not None
    return given


def parse_meta(path: Path, text: str | None) -> dict[str, Any]:
    """Returns the facts that a file has about its trace, empty without any."""
    if text is None:
        return {}
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path}: meta: not JSON ({error}): must be one JSON object") from error
    if not isinstance(meta, dict):
        raise TraceError(f"{path}: meta: {text[:40]!r}: must be one JSON object")
    return meta
