"""What was measured, as tables: transfers, calibrations, predictors, timelines, kernels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .layout import columns_of, number_of, plain_console, share_of

#: The columns of the transfer benchmark.
TRANSFER_COLUMNS = ("", "MiB", "single", "ten", "throughput of ten", "an expert of")

#: The times of a late prefetch.
_LATE_TIMES = ("had_ms", "queued_ms", "copied_ms", "late_ms")


def print_transfer(data: dict[str, Any]) -> None:
    """Print the transfer benchmark: one copy, ten in a row and their throughput, by way and size; and allocations."""
    console = plain_console()
    console.print(Text(data["machine"], style="bold"))
    table = columns_of(*TRANSFER_COLUMNS)
    for cells in transfer_cells(data):
        table.add_row(*cells)
    console.print(table)


def transfer_cells(data: dict[str, Any]) -> Iterator[list[str]]:
    """Yields the transfer benchmark's rows in TRANSFER_COLUMNS, the guide's last."""
    guide = data["guide"]

    def row(name: str, size_bytes: int, times: dict[str, Any], *more: str) -> list[str]:
        return [name, _mib(size_bytes), *(f"{times[key]:,.3f} ms" for key in ("single_ms", "ten_ms")), *more]

    for copied in data["rows"]:
        yield row(
            copied["way"], copied["bytes"], copied, f"{copied['gb_per_s']:,.1f} GB/s", ", ".join(copied["models"])
        )
    for allocated in data["allocations"]:
        yield row(f"allocation, {allocated['how']}", allocated["bytes"], allocated, "", "")
    for said in guide["rows"]:
        speed = "" if said["what"] == "allocation" else f"{10 * guide['bytes'] / said['ten_ms'] / 1e6:,.1f} GB/s"
        yield row(f"{said['what']} ({guide['machine']})", guide["bytes"], said, speed, "")


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.2f}"


def print_calibration(data: dict[str, Any]) -> None:
    """Print how each cost was fitted, and how far it can be off."""
    console = plain_console()
    table = columns_of("cost", "form", "samples", "between runs", "within a run", "held back")
    for term in data["terms"]:
        shares = (f"{term[name]:.2%}" for name in ("run_spread", "scatter", "held_back_error"))
        table.add_row(term["name"], term["form"], f"{term['n']:,}", *shares)
    console.print(Text(f"{data['name']}: {data['device']}", style="bold"))
    console.print(table)
    if data["noisy"]:
        worst = max(data["noisy"], key=lambda row: float(row["iqr_over_median"]))
        console.print(
            Text(
                f"warning: {len(data['noisy'])} series are noisier than 10 %, worst {_described(worst)}", style="yellow"
            )
        )


def _described(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )


def print_predictors(data: dict[str, Any], *, layers: bool = False) -> None:
    """Print how good predictors are: a table by horizon, bounds on top-1, and every target layer if asked for."""
    console = plain_console()
    lengths = list(data["predictors"][0]["horizons"][0]["recall"])
    shape = f"{data['layers']} layers, top-{data['k']} of {data['num_experts']} experts"
    console.print(
        Text(f"{data['model'] or 'trace'}: {shape}; {data['tokens']:,} tokens of {data['sequences']} sequences")
    )
    heads = ["predictor", "ahead", "top-1", *(f"recall@{n}" for n in lengths), "miscalibration"]
    if layers:
        heads.insert(2, "layer")
    table = Table(box=None, padding=(0, 1))
    for head in heads:
        # On a narrow terminal only names of weights, which are paths, are folded.
        table.add_column(head, min_width=max(len(head), 14 if head == "predictor" else 0), overflow="fold")
    for entry in data["predictors"]:
        for at in entry["horizons"]:
            named = (entry["name"], str(at["horizon"]))
            every = ["all"] if layers else []
            recalls = [share_of(at["recall"][n], 1) for n in lengths]
            table.add_row(*named, *every, share_of(at["top1"], 1), *recalls, number_of(at["calibration_error"], 3))
            for layer, top1 in enumerate(at["layers"]["top1"] if layers else ()):
                recalls = [share_of(at["layers"]["recall"][n][layer], 1) for n in lengths]
                table.add_row(*named, str(layer), share_of(top1, 1), *recalls, "")
    console.print(table)
    for entry in data["predictors"]:
        if entry["memory_bytes"] is not None:
            latency = ", ".join(f"{us:,.0f} us on {device}" for device, us in entry["latency_us"].items())
            console.print(Text(f"{entry['name']}: {entry['memory_bytes']:,} bytes; one guess takes {latency}"))
    bounds = Table("no top-1 above, one layer ahead, knowing", "entropy", "Fano", "hindsight", box=None, padding=(0, 1))
    for knows, bound in data["top1_bounds"][0]["knowing"].items():
        entropy = f"{number_of(bound['entropy_bits'], 2)} bits"
        bounds.add_row(knows, entropy, share_of(bound["fano"], 1), share_of(bound["hindsight"], 1))
    console.print(bounds)


#: What the table of timelines shows of each GPU: the key and its words; all but the first also as a share of it.
_GPU_ROWS = {
    "span_ms": "first work to last",
    "compute_ms": "kernels",
    "not_compute_ms": "copies and communication alone",
    "idle_ms": "idle",
}
#: So many GPUs, roles, lanes and rows of one are printed; of more it is said, and --json has them.
_MOST_PRINTED = 64


def print_timelines(summaries: Mapping[str, dict[str, Any]]) -> None:
    """Print the summaries of timelines, by name, side by side; what a timeline has not stays empty.

    Below stands what of each file was repaired or left out, by its `reading`.
    """
    table = columns_of("", *summaries)

    def add(name: str, cells: Iterable[str]) -> None:
        table.add_row(name, *cells)

    add("spans", (f"{summary['spans']:,}" for summary in summaries.values()))
    devices = dict.fromkeys(device for summary in summaries.values() for device in summary["gpus"])
    for device in islice(devices, _MOST_PRINTED):
        gpus = [summary["gpus"].get(device) for summary in summaries.values()]
        for key, words in _GPU_ROWS.items():
            add(f"{device}: {words}", ("" if gpu is None else _ms_and_share(gpu[key], gpu["span_ms"]) for gpu in gpus))
        add(f"{device}: overlap", ("" if gpu is None else share_of(gpu["overlap"], 1) for gpu in gpus))
    roles = dict.fromkeys(role for summary in summaries.values() for role in summary["roles"])
    for role in islice(roles, _MOST_PRINTED):
        parts = [summary["roles"].get(role) for summary in summaries.values()]
        add(f"{role}, busy", ("" if part is None else _ms_and_share(part["busy_ms"], part["of_ms"]) for part in parts))
    console = plain_console()
    console.print(table)
    _say_more(console, {"GPUs": len(devices), "roles": len(roles)})
    console.print(
        "A GPU's shares are of its time from first work to last, all others of the whole timeline; overlap: of copy "
        "time, with kernels beside it."
    )
    for name, summary in summaries.items():
        for line in _reading_lines(summary.get("reading")):
            console.print(Text(f"{name}: {line}", style="yellow"))


def print_late(data: Mapping[str, Any]) -> None:
    """Print a run's late prefetches: why they were, and those that were waited for longest."""
    console = plain_console()
    console.print(f"{data['late']:,} of {data['prefetches']:,} prefetches came late")
    if not data["late"]:
        return
    console.print(
        f"  {data['ordered_too_late']:,} were ordered too late: their copy alone takes longer than they had\n"
        f"  {data['behind_others']:,} waited behind other copies or for the drive; alone they would be in time"
    )
    table = columns_of("layer", "expert", "ordered in", "used in", "had", "queued", "copied", "late by")
    for row in data["worst"]:
        numbers = [f"{row[name]:,}" for name in ("layer", "expert", "ordered_visit", "used_visit")]
        table.add_row(*numbers, *(f"{row[name]:,.2f} ms" for name in _LATE_TIMES))
    table.add_row("median", "", "", "", *(f"{data['medians'][name]:,.2f} ms" for name in _LATE_TIMES))
    console.print()
    console.print(f"The {len(data['worst'])} that were waited for longest; they were ordered and used in layer visits")
    console.print(table)
    console.print(
        "had: from the order to the router's choice; had + late by = queued + copied\n"
        "queued: behind other copies, or for the drive"
    )


def _say_more(console: Console, numbers: Mapping[str, int]) -> None:
    for what, number in numbers.items():
        if number > _MOST_PRINTED:
            console.print(f"{number - _MOST_PRINTED:,} more {what} are not shown: see --json.")


def _reading_lines(reading: Mapping[str, Any] | None) -> Iterator[str]:
    """Yields what is to be said of how a file was read: nothing if all was read as it stands."""
    if reading is None:
        return
    for key, words in (("left_out", f"of {reading['events']:,} events are left out"), ("repaired", "values repaired")):
        reasons = list(reading[key].items())
        if reasons:
            total = sum(told["events"] for _, told in reasons)
            said = [f"{told['events']:,} {reason} ({told['first']})" for reason, told in reasons[:8]]
            said += [f"{len(reasons) - 8:,} reasons more (see --json)"] if len(reasons) > 8 else []
            yield f"{total:,} {words}: {'; '.join(said)}"
    if reading["breaks_off"]:
        yield f"breaks off after {reading['events']:,} events: {reading['breaks_off']}; what comes behind is left out"


def _ms_and_share(ms: float, whole_ms: float) -> str:
    return f"{ms:,.3f} ms" if ms == whole_ms else f"{ms:,.3f} ms {share_of(ms, whole_ms):>6}"


def print_kernels(rows: Sequence[dict[str, Any]]) -> None:
    """Print what each kind of work of a timeline took, a table a lane: quiet is beside no copy to the GPU."""
    console = plain_console()
    lanes: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        lanes.setdefault((row["device"], row["lane"]), []).append(row)
    for lane, here in islice(lanes.items(), _MOST_PRINTED):
        table = columns_of("n", "total ms", "median us", "IQR us", "quiet us", "beside copies", "MiB", "work")
        for column in table.columns[:-1]:
            column.no_wrap = True
        table.columns[-1].justify = "left"
        for row in here[:_MOST_PRINTED]:
            parts = [row["samples"]["median_ns"], row["samples"]["iqr_ns"]]
            parts += [part and part["median_ns"] for part in (row["quiet"], row["beside_copy"])]
            took = ("" if ns is None else f"{ns / 1e3:,.1f}" for ns in parts)
            size = _mib(row["bytes"]) if row["bytes"] else ""
            # A kernel's name can be as long as a page.
            name = Text(row["name"].removeprefix("void "), no_wrap=True, overflow="ellipsis")
            table.add_row(f"{row['n']:,}", f"{row['total_ms']:,.3f}", *took, size, name)
        console.print(Text(", ".join(lane), style="bold"))
        console.print(table)
        _say_more(console, {"kinds of work": len(here)})
    _say_more(console, {"lanes": len(lanes)})


def print_decoded(rows: Iterable[tuple[str, float, float | None, Mapping[str, int]]]) -> None:
    """Print what each setting of a real runtime took: name, tokens per second, spread, and what was decided."""
    table = columns_of("setting", "tokens/s", "spread", "found", "miss", "prefetch")
    for name, rate, spread, counts in rows:
        decided = (f"{counts[key]:,}" for key in ("found", "miss", "prefetch"))
        table.add_row(name, f"{rate:,.2f}", "" if spread is None else f"{spread:.1%}", *decided)
    plain_console().print(table)


def print_observed(found: Mapping[str, Any]) -> None:
    """Print what was fitted to a runtime's settings: costs, and the errors, fitted and left out."""
    console = plain_console()
    costs = columns_of("cost", "before", "fitted", "known within")
    for name, cost in found["costs"].items():
        within = f"{cost['spread']:.0%} (before {cost['spread_before']:.0%})"
        costs.add_row(name, f"{cost['prior']:,.6g}", f"{cost['value']:,.6g}", within)
    console.print(costs)
    table = columns_of("setting", "ms a step", "spread", "fitted", "left out")
    for row in found["settings"]:
        off = (f"{row[key] / row['measured_ns'] - 1:+.1%}" for key in ("fitted_ns", "left_out_ns"))
        spread = "" if row["spread"] is None else f"{row['spread']:.1%}"
        table.add_row(row["name"], f"{row['measured_ns'] / 1e6:,.3f}", spread, *off)
    console.print(table)
