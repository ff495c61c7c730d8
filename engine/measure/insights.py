"""What the rows of a sweep say together: figures by setting, the front of speed against memory, what matters most."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ...errors import InputError
from ...words import unknown_name
from ..scenario.rows import Row, flat

#: So many lines, or names along an axis, are drawn.
MOST_LINES = 200


class InsightError(InputError):
    """Rows that do not say what was asked of them."""


class Effect(NamedTuple):
    """What one setting does: the median of a figure at its least and its most favorable value."""

    key: str
    low_at: Any
    low: float
    high_at: Any
    high: float


class Spot(NamedTuple):
    """One row as memory against speed."""

    memory: float
    speed: float
    settings: dict[str, Any]


def finished(rows: Iterable[Row], *figures: str) -> list[Row]:
    """Returns the rows without an error, with these figures alone, undefined ones left out.

    Each row keeps `settings` and has the figures beside them by their dotted names. Raises InsightError if none is left
    or no row knows a figure.
    """
    kept, names = [], dict[str, None]()
    for row in rows:
        if row["error"] is None:
            values = flat({name: value for name, value in row.items() if name not in ("settings", "scenario")})
            names.update(dict.fromkeys(values))
            chosen = {figure: values.get(figure) for figure in figures}
            if all(isinstance(value, int | float) for value in chosen.values()):
                kept.append({"settings": row["settings"], **chosen})
    for figure in figures:
        if names and figure not in names:
            raise InsightError(unknown_name("figure", figure, names))
    if not kept:
        raise InsightError(f"no row of this sweep has {' and '.join(figures)}")
    return kept


def varying(rows: Sequence[Row]) -> list[str]:
    """Returns the keys of the grid that have more than one value, those with most values first."""
    keys = dict.fromkeys(key for row in rows for key in row["settings"])
    counts = {key: len(values_of(rows, key)) for key in keys}
    return sorted((key for key in keys if counts[key] > 1), key=lambda key: -counts[key])


def values_of(rows: Sequence[Row], key: str) -> list[Any]:
    """Returns the values that a key of the grid has, numbers in order, others in that of the rows."""
    values = list(dict.fromkeys(row["settings"].get(key) for row in rows))
    numbers = all(isinstance(value, int | float) for value in values)
    return sorted(values) if numbers else values


def check_key(rows: Sequence[Row], key: str) -> None:
    """Raise InsightError unless the sweep's grid has this key."""
    keys = list(dict.fromkeys(key for row in rows for key in row["settings"]))
    if key not in keys:
        raise InsightError(unknown_name("key of the grid", key, keys))


def table(rows: Sequence[Row], x: str, by: str | None, figure: str) -> dict[Any, dict[Any, float]]:
    """Returns the median of a figure by the value of `by` (None: one line), then by that of `x`."""
    groups: dict[Any, dict[Any, list[float]]] = {}
    for row in rows:
        settings = row["settings"]
        line = groups.setdefault(settings.get(by) if by else None, {})
        line.setdefault(settings.get(x), []).append(row[figure])
    across = values_of(rows, x)
    down = values_of(rows, by) if by else [None]
    check_few(by, down)
    return {
        name: {value: statistics.median(groups[name][value]) for value in across if value in groups[name]}
        for name in down
        if name in groups
    }


def check_few(key: str | None, values: Sequence[Any]) -> None:
    """Raise InsightError if a key has more values than lines, or names along an axis, can be told apart."""
    if len(values) > MOST_LINES:
        raise InsightError(f"{key} has {len(values):,} values: at most {MOST_LINES} are told apart: choose another key")


def front(rows: Sequence[Row], speed: str, memory: str) -> list[Spot]:
    """Returns the rows that no other beats: with no more memory none is faster; least memory first."""
    spots = sorted((Spot(row[memory], row[speed], row["settings"]) for row in rows), key=lambda s: (s.memory, -s.speed))
    best: list[Spot] = []
    for spot in spots:
        if not best or spot.speed > best[-1].speed:
            best.append(spot)
    return best


def effects(rows: Sequence[Row], figure: str) -> list[Effect]:
    """Returns what each setting does to a figure, its median over all other settings, the strongest first."""
    found = []
    for key in varying(rows):
        medians = table(rows, key, None, figure)[None]
        low_at, high_at = min(medians, key=medians.__getitem__), max(medians, key=medians.__getitem__)
        found.append(Effect(key, low_at, medians[low_at], high_at, medians[high_at]))
    return sorted(found, key=lambda effect: effect.low - effect.high)


def best(rows: Sequence[Row], figure: str, memory: str, *, most: bool) -> Row:
    """Returns the row with most, or least, of a figure; of equals that with the least memory, of those the first."""
    return min(rows, key=lambda row: (-row[figure] if most else row[figure], row[memory]))
