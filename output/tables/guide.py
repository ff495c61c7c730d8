"""The guide's simulations and its published tables, beside ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from .layout import columns_of, number_of, plain_console, print_rows, share_of


def print_virtual_memory(data: dict[str, Any]) -> None:
    """Print a run of the virtual memory manager: its counts, and its times in both accountings."""
    console = plain_console()
    counts, accesses, charged = data["event_counts"], data["accesses"], data["copies_charged"]
    events = [(name.replace("_", " "), f"{count:,}") for name, count in counts.items()]
    print_rows(console, f"{accesses:,} accesses, hit rate {share_of(data['hit_rate'], 1)}", events)
    table = columns_of("", "prefetches hidden", "every copy charged")
    for name, key, show in _PRICED:
        table.add_row(name, show(data[key]), show(charged[key]))
    console.print(table)


#: What depends on which copies cost time: its name, its key, and how it is written.
_PRICED: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("mean latency of an access", "avg_latency_ms", lambda value: f"{number_of(value, 3)} ms"),
    ("latency in all", "total_latency_ms", lambda value: f"{number_of(value, 1)} ms"),
    ("memory utilization", "memory_utilization", lambda value: share_of(value, 1)),
    ("speedup over no prefetch, no cache", "speedup", lambda value: f"{number_of(value, 2)}x"),
    ("speedup / memory utilization", "efficiency", lambda value: number_of(value, 2)),
)


def print_inference(data: dict[str, Any]) -> None:
    """Print a run of the inference simulator: in the guide's accounting, with copies charged, and overlapped."""
    console = plain_console()
    charged, overlapped, accesses = data["copies_charged"], data["overlapped"], data["accesses"]
    console.print(Text(_in_words(overlapped)))
    table = columns_of("", "prefetches hidden", "every copy charged", "overlapped")
    times = (data, charged, {"total_latency_ms": overlapped["makespan_ms"]})
    baselines = (data["baseline_latency_ms"], data["baseline_latency_ms"], overlapped["baseline_ms"])
    tokens = overlapped["decode_tokens"]
    rows: tuple[tuple[str, Iterable[float], Callable[[float], str]], ...] = (
        ("speedup", (run["speedup"] for run in (data, charged, overlapped)), _times),
        ("no prefetch, no cache", baselines, _ms),
        ("in all", (run["total_latency_ms"] for run in times), _ms),
        ("a token", (run["total_latency_ms"] / tokens for run in times), _ms),
        ("an access", (run["total_latency_ms"] / accesses for run in times), _ms),
        ("memory utilization", (run["memory_utilization"] for run in (data, charged, overlapped)), _percent),
        ("hit rate", (data["hit_rate"], data["hit_rate"], overlapped["hit_rate"]), _percent),
        ("  by prefetching", _shares(data, overlapped, "hit", "prefetch_hit"), _percent),
        ("  by caching", _shares(data, overlapped, "cache_hit", "cache_hit"), _percent),
        ("late", (0.0, 0.0, overlapped["late_rate"]), _percent),
        ("miss", _shares(data, overlapped, "miss", "miss"), _percent),
    )
    for name, values, show in rows:
        table.add_row(name, *map(show, values))
    console.print(table)
    foretold = share_of(data["prediction_accuracy"], 1, 2)
    console.print(Text(f"{foretold} of the experts used were among the guesses prefetched for them"))


def _in_words(data: dict[str, Any]) -> str:
    """Returns in a line what an inference simulation was of."""
    model, scenario = data["model"], data["scenario"]
    trace = scenario["workload"]["trace"] or "a synthetic trace"
    return (
        f"{model['layers']} x {model['experts']} experts, top-{model['top_k']}, on {scenario['machine']['profile']}; "
        f"{data['decode_tokens']:,} tokens of {trace}; predictor {scenario['predictor']['name']}, "
        f"k = {scenario['prefetch']['k'] or 0}; room for {data['budget_bytes'] / 2**20:,.0f} MiB of experts"
    )


def _shares(data: dict[str, Any], overlapped: dict[str, Any], event: str, outcome: str) -> list[float]:
    guide = data["event_counts"][event] / data["accesses"]
    return [guide, guide, overlapped["counts"][outcome] / overlapped["accesses"]]


def _ms(value: float) -> str:
    return f"{value:,.3f} ms"


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _percent(value: float) -> str:
    return f"{value:.1%}"


class GuideFigure(NamedTuple):
    """A figure of the guide's table: its key with us and in the overlapped engine, and how it is written."""

    name: str
    key: str
    overlapped: str
    unit: str
    units_in_one: int
    digits: int
    difference: str


GUIDE_FIGURES = (
    GuideFigure("hit rate", "hit_rate", "hit_rate", "%", 100, 1, "points"),
    GuideFigure("memory", "memory_utilization", "memory_utilization", "%", 100, 1, "points"),
    GuideFigure("mean latency", "avg_latency_ms", "time_per_access_ms", "ms", 1, 2, "ms"),
)

_LEGEND = (
    "ours: the guide's accounting, prefetches hidden. shared: so, if layers shared experts of one index. "
    "charged: ours with every copy charged. overlapped: ours on one timeline; its latency is the time per access, "
    "computation included. verdict: ours is inside the published range, or how far outside."
)


def print_reproduction(tables: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Print published tables by name, each row beside ours, and why it differs."""
    console = plain_console()
    console.print(Text(_LEGEND))
    for name, rows in tables.items():
        console.print(Text(f"\n{name.replace('-', ' ')}", style="bold underline"))
        if name == "virtual-memory":
            _print_configurations(console, rows)
        else:
            _print_figures(console, rows)


def _print_figures(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows of `reproduce.Row`, or those that have two statements."""
    table = columns_of(*figure_columns(rows))
    for row in rows:
        table.add_row(row["name"], *figure_cells(row))
    console.print(table)
    for row in rows:
        console.print(Text(f"  {row['name']}: {row['why']}.", style="dim"))


def figure_columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the columns of a table of figures, the first one's being the name's."""
    if "statements" in rows[0]:
        return ["", "stated", "also stated", "apart", "ours"]
    return ["", "published", "ours", "charged", "overlapped", "verdict"]


def figure_cells(row: dict[str, Any]) -> list[str]:
    """Returns a figure: published, ours, with copies charged, overlapped and the verdict; or statements and ours."""
    unit = row["unit"]
    if "statements" in row:
        return [
            *(_quantity(value, unit) for value in row["statements"]),
            f"{row['apart']:.3g}x",
            _quantity(row["ours"], unit),
        ]
    published, verdict = row["published"], row["verdict"]
    ends = dict.fromkeys(_plain(bound, unit, digits=6) for bound in published or ())
    told = _with_unit("-".join(ends), unit) if ends else "-"
    values = [_quantity(row[key], unit) for key in ("ours", "charged", "overlapped")]
    if verdict is None:
        return [told, *values, "-"]
    return [told, *values, "inside" if verdict["inside"] else _quantity(verdict["off_by"], unit, "+")]


def _quantity(value: float | None, unit: str, sign: str = "") -> str:
    """Returns four digits of a value and its unit; shares are fractions written in percent."""
    return "-" if value is None else _with_unit(_plain(value, unit, sign), unit)


def _plain(value: float, unit: str, sign: str = "", digits: int = 4) -> str:
    return f"{value * (100 if unit == '%' else 1):{sign}.{digits}g}"


def _with_unit(number: str, unit: str) -> str:
    return f"{number}{'' if unit == 'x' else ' '}{unit}"


def _print_configurations(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Print the guide's configurations: published, in its accounting, with copies charged, overlapped; and why."""
    for row in rows:
        console.print(Text(f"\n{row['scenario']}", style="bold"))
        table = columns_of("", "published", "ours", "shared", "charged", "overlapped", "verdict")
        for figure in GUIDE_FIGURES:
            table.add_row(figure.name, *guide_cells(row, figure))
        console.print(table)
        for figure in GUIDE_FIGURES:
            console.print(Text(f"  {figure.name}: {row['verdicts'][figure.key]['why']}.", style="dim"))


def guide_cells(row: dict[str, Any], figure: GuideFigure) -> list[str]:
    """Returns a figure: published, ours, if layers shared experts, with copies charged, overlapped; and the verdict."""
    key, scale, digits = figure.key, figure.units_in_one, figure.digits
    ours, verdict = row["guide_accounting"], row["verdicts"][key]
    low, high = (bound * scale for bound in row["published"][key])
    values = (
        ours[key],
        row["shared_across_layers"][key],
        ours["copies_charged"].get(key, ours[key]),
        row["overlapped"][figure.overlapped],
    )
    outside = f"{verdict['off_by'] * scale:+.{digits}f} {figure.difference}"
    return [
        f"{low:g}-{high:g} {figure.unit}",
        *(f"{number_of(value * scale, digits)} {figure.unit}" for value in values),
        "inside" if verdict["inside"] else outside,
    ]
