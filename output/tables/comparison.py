"""Runs side by side as tables: what differs, figures with their ratios, where the time between them arises.

Headings are the runs' names where these fit beside one another, else numbers, which a list above explains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .layout import columns_of, known_of, plain_console, print_warnings

#: The columns of where a difference arises.
_DIFFERENCE = ("from_ms", "to_ms", "difference_ms")
#: As wide as no table is.
_NO_END = 1 << 16
#: Makes a table of some of the runs, which are given by their places, under these headings.
_Make = Callable[[Sequence[int], Sequence[str]], Table]


def print_comparison(data: Mapping[str, Any], verbose: bool = False) -> None:
    """Print runs side by side, and where the time between them arises; with `verbose`, warnings with their reasons."""
    console = plain_console()
    if not data["same_work"]:
        console.print(Text("warning: these runs decode different numbers of tokens", style="yellow"))
    tables: dict[str, _Make] = {
        "Settings that differ": lambda places, heads: _settings(data, places, heads),
        "\nFigures, and their ratio to the first": lambda places, heads: _figures(data, places, heads),
    }
    heads, everyone = data["runs"], range(len(data["runs"]))
    if any(_widths(console, make(everyone, heads)).maximum > console.width for make in tables.values()):
        heads = [f"run {place + 1}" for place in everyone]
        for head, name in zip(heads, data["runs"], strict=True):
            console.print(Text(f"{head}  {name}"), soft_wrap=True)
        console.print()
    for title, make in tables.items():
        console.print(Text(title, style="bold"))
        for table in _beside(console, make, heads):
            console.print(table)
    for head, gpus in zip(heads[1:], data["where"].values(), strict=True):
        for gpu, parts in gpus.items():
            console.print(Text(f"\nWhere {head} differs ({gpu})", style="bold"))
            console.print(_where(parts, heads[0], head))
    print_warnings(console, _warnings(data["warnings"], heads, verbose), verbose)


def _widths(console: Console, table: Table) -> Measurement:
    """Returns how wide a table is at least, and without breaking any cell, wherever it is shown."""
    return console.measure(table, options=console.options.update(width=_NO_END))


def _beside(console: Console, make: _Make, heads: Sequence[str]) -> Iterator[Table]:
    """Yields as few tables as have room for every run, each of them beside the first."""
    shown = [0]
    for place in range(1, len(heads)):
        wider = [*shown, place]
        table = make(wider, [heads[each] for each in wider])
        if len(shown) > 1 and _widths(console, table).minimum > console.width:
            yield make(shown, [heads[each] for each in shown])
            wider = [0, place]
        shown = wider
    yield make(shown, [heads[each] for each in shown])


def _settings(data: Mapping[str, Any], places: Sequence[int], heads: Sequence[str]) -> Table:
    table = columns_of("", *heads)
    for key, values in data["settings"].items():
        table.add_row(key, *(str(values[place]) for place in places))
    return table


def _figures(data: Mapping[str, Any], places: Sequence[int], heads: Sequence[str]) -> Table:
    table = columns_of("", *heads)
    for key, values in data["figures"].items():
        if not any(values):
            continue
        ratios = [None, *data["ratios"][key][1:]]
        shares = ["" if ratio is None else f" ({ratio:.2f}x)" for ratio in ratios]
        figures = [comparison_figure(key, value) for value in values]
        table.add_row(key, *(figures[place] + shares[place] for place in places))
        for column in table.columns[1:]:  # a figure is not parted from its unit, though it may be from its ratio
            column.min_width = max(column.min_width or 0, *map(len, figures))
    return table


def _where(parts: Mapping[str, Mapping[str, float]], first: str, other: str) -> Table:
    """Returns the parts of one GPU's time in two runs, and what they come to."""
    table = columns_of("", first, other, "difference")
    whole = {key: sum(part[key] for part in parts.values()) for key in _DIFFERENCE}
    for part, ms in {**parts, "makespan": whole}.items():
        if ms["from_ms"] or ms["to_ms"]:
            table.add_row(part, *(f"{ms[key]:,.3f} ms" for key in _DIFFERENCE[:2]), f"{ms['difference_ms']:+,.3f} ms")
    return table


def _warnings(by_run: Mapping[str, Sequence[str]], heads: Sequence[str], verbose: bool) -> list[str]:
    """Returns the warnings of all runs, each once: first those that some runs have alone, with their names."""
    found: dict[tuple[str, str], tuple[str, list[str]]] = {}
    for head, warnings in zip(heads, by_run.values(), strict=True):
        for warning in warnings:
            kind, _, rest = warning.partition(": ")
            said = rest if verbose else rest.rpartition("; ")[2]
            found.setdefault((kind, said), (rest, []))[1].append(head)
    return [
        f"{kind}: {rest}" if len(of) == len(heads) else f"{kind} ({', '.join(of)}): {rest}"
        for (kind, _), (rest, of) in sorted(found.items(), key=lambda each: len(each[1][1]) == len(heads))
    ]


def comparison_figure(name: str, value: float | None) -> str:
    """Returns a figure of a comparison with its unit, which its name gives; counts are whole."""
    if value is None:
        return "-"
    if "bytes" in name:
        return f"{value / 2**30:,.2f} GiB"
    if "_ms" in name:
        return f"{known_of(value, 4)} ms"
    if name.startswith(("counts.", "miss.ways.")):
        return f"{value:,}"
    return known_of(value, 4) if name.endswith(("tokens_per_second", "speedup", "imbalance")) else f"{value:.1%}"
