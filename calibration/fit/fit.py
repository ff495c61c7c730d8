"""Fitting: from samples to a profile, each cost with its residuals and with how well it predicts what was held back.

A straight line where one fits, a monotone table where it does not. Where a cost was also seen inside schedules (rows
of `in_schedule.samples`), it is taken from there; microbenchmarks then give the sizes and tokens that no schedule had,
times the ratio at the nearest that one had.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ...files import replacing
from ...resources.profile import LEAST_FACTOR, MOST_FACTOR, Profile, make_profile
from ...resources.profile_costs import ProfileError, TransferCost
from ...resources.topology import Topology
from ..measure.samples import Samples
from .evidence import (
    MICRO,
    SCHEDULE,
    Evidence,
    Points,
    Row,
    Term,
    latency_of,
    sample_rows,
    together,
    uncertainty,
    weighted_mean_ns,
)
from .host import FURTHER, further_launch_ns, launch_tables, solve_host
from .kernels import KernelFitter
from .surface import fit_surface, surface_of

#: A list of whole numbers only, as it is written with one a line.
_NUMBERS = re.compile(r"\[[\s\d,]+\]")
#: The largest residual of a line, as a share of what was measured; a table is kept where it would be larger.
LINE_RESIDUAL = 0.015


@dataclass(frozen=True)
class Fit:
    """A fitted profile, the report of each cost, and the series that were noisy."""

    profile: Profile
    terms: list[Term]
    noisy: list[Row]


def fit(
    samples: Samples,
    name: str,
    schedule: Iterable[Row] = (),
    more: Sequence[Samples] = (),
    topology: Topology | None = None,
) -> Fit:
    """Returns the profile of the machine that the samples are of; `more` samples give what these do not have.

    `topology` is the machine's graph, whose links between the GPUs and to the host are measured here. Raises
    ProfileError if something needed is missing.
    """
    evidence = Evidence(sample_rows([samples, *more]), schedule)
    surface = surface_of([samples, *more])
    fitter = _Fitter(evidence, surface, typical_copies=topology is not None)
    host = fitter.host()
    data: dict[str, Any] = {
        "name": name,
        "device": samples.device,
        "driver": samples.driver,
        "date": samples.date,
        "versions": samples.versions,
        "source": f"CUDA event timings on an {samples.device}: microbenchmarks, and costs as they are inside executed "
        "schedules where there were any (prestage calibrate measure, execute, fit)",
        "gpu_memory_bytes": samples.gpu_memory_bytes,
        "h2d": {memory: fitter.copies("h2d", memory) for memory in ("pinned", "pageable")},
        "d2h": fitter.copies("d2h", "pinned"),
        "d2d": fitter.copies("d2d", "device"),
        "compute": fitter.compute(),
        "host": host,
        "contention": fitter.contention(),
        "allocation": fitter.allocation(),
    }
    if evidence.micro("copy", direction="peer"):
        data["peer"] = fitter.copies("peer", "device")
    if topology is not None:
        data["topology"] = fitter.topology(topology, data)
    return Fit(make_profile(data, f"fit of {name}"), fitter.terms, evidence.noisy())


def fit_data(fitted: Fit) -> dict[str, Any]:
    """Returns the report of a fit as plain data; fractions."""
    return {
        "name": fitted.profile.name,
        "device": fitted.profile.device,
        "terms": [{"name": term.name, "form": term.form, "n": term.n, **term.uncertainty} for term in fitted.terms],
        "noisy": [{"cost": row.cost, **row.key, "iqr_over_median": row.iqr_ns / row.median_ns} for row in fitted.noisy],
    }


def profile_text(profile: Profile) -> str:
    """Returns a profile as JSON, what is not set left out."""
    data = profile.model_dump(exclude_none=True, exclude_defaults=True)
    text = json.dumps(data, indent=1)
    if "surface" in data["compute"]:  # tens of thousands of numbers: a table's axis, or its durations, are one line
        head, key, tables = text.partition('\n  "surface": ')
        text = head + key + _NUMBERS.sub(lambda found: "".join(found.group().split()), tables)
    return text


def write_profile(profile: Profile, path: Path) -> None:
    """Write a profile as JSON, what is not set left out."""
    text = profile_text(profile)
    with replacing(path) as file:
        file.write(text.encode() + b"\n")


def fit_transfer(points: Points) -> dict[str, Any]:
    """Returns a line (latency_ns, bytes_per_second) through (bytes, ns), or a monotone table where none fits.

    Least squares of the relative residuals, so that small copies count as much as large ones. A table is made to grow
    by taking the least of each size and all larger ones: what disturbs a copy makes it longer, never shorter.
    """
    sizes, times = np.array(sorted(points), dtype=np.float64).T
    if len(sizes) > 2:
        weights = np.stack([1 / times, sizes / times], axis=1)
        latency_ns, ns_per_byte = np.linalg.lstsq(weights, np.ones(len(times)), rcond=None)[0].tolist()
        residuals = (latency_ns + ns_per_byte * sizes) / times - 1
        if latency_ns >= 0 and ns_per_byte > 0 and np.abs(residuals).max() <= LINE_RESIDUAL:
            return {"latency_ns": round(latency_ns), "bytes_per_second": round(1e9 / ns_per_byte)}
    grown = np.minimum.accumulate(times[::-1])[::-1]
    table = [(int(size), round(ns)) for size, ns in zip(sizes.tolist(), grown.tolist(), strict=True)]
    if len(table) == 1:  # in proportion
        table = [(0, 0), *table]
    return {"points": table}


def _transfer(points: Points) -> Callable[[int], float]:
    """Returns the function from bytes to ns that `fit_transfer` gives."""
    return TransferCost.model_validate({**fit_transfer(points), "source": "measured"}).ns


#: Two streams' copies that are under way together for less than this, on average, take turns.
_AT_ONCE_NS = 1000
#: How one duration is made of the rows of it.
_FORMS: dict[str, Callable[[Sequence[Row]], float]] = {
    "median": lambda rows: float(np.average([row.median_ns for row in rows], weights=[row.n for row in rows])),
    "mean": weighted_mean_ns,
}


class _Fitter:
    """Makes each part of a profile from the evidence and keeps the report of every cost.

    A copy inside schedules takes its median. With `typical_copies` it takes the mean of a typical run: where several
    GPUs load, many copies are a little slower, and a few by much.
    """

    def __init__(self, evidence: Evidence, surface: Samples | None = None, *, typical_copies: bool = False) -> None:
        self._evidence, self._surface, self._typical_copies = evidence, surface, typical_copies
        self._counted = () if surface is None else surface.surface
        self._launched = launch_tables(self._counted)
        self.terms: list[Term] = []

    # Copies.

    def copies(self, direction: str, memory: str) -> dict[str, Any]:
        """Returns the costs of copies in one direction."""
        evidence, ours = self._evidence, {"direction": direction, "memory": memory}
        where = f"{direction}.{memory}"
        # Schedules copy experts from pinned memory only. What starting an idle engine takes lies before a copy's first
        # event there, so that a copy alone takes what a queued one does.
        before = {"h2d.pinned": "", "peer.device": "peer:"}.get(where)

        def in_schedule(cost: str) -> list[Row]:
            return [] if before is None else evidence.schedule(before + cost)

        sends = evidence.schedule("send", beside_copy=False) if direction == "peer" else []
        costs = {}
        for mode in ("alone", "queued"):
            rows = {row.key["bytes"]: row for row in evidence.micro("copy", **ours, mode=mode, beside="none")}
            self._need(rows, f"copy, {where}, {mode}")
            rows |= {row.key["bytes"]: row for row in [*in_schedule("copy_queued"), *sends]}
            costs[mode] = self._transfer_cost(f"{where}.{mode}", list(rows.values()))
        gaps = in_schedule("copy_gap") or evidence.micro("copy_gap", **ours)
        costs["gap"] = self._duration(f"{where}.gap", gaps)
        if direction == "peer":
            if waits := evidence.micro("peer_wait"):
                costs["event_wait_gap"] = self._beside_copy(f"{where}.event_wait_gap", "send_wait_gap", waits)
        elif waits := in_schedule("copy_wait_gap") or (
            evidence.micro("event_wait_gap", waits="copy") if where == "h2d.pinned" else []
        ):
            costs["event_wait_gap"] = self._duration(f"{where}.event_wait_gap", waits)
        if tails := in_schedule("copy_alone"):
            alone = TransferCost.model_validate(costs["alone"]).ns
            latencies = [(row.n, row.median_ns - alone(row.key["bytes"])) for row in tails]
            costs["launch_latency"] = latency_of(
                latencies, f"{SCHEDULE}: end less the return of the call, less the copy"
            )
        return costs

    def _transfer_cost(self, name: str, rows: Sequence[Row]) -> dict[str, Any]:
        typical = [self._typical_copies and row.where == SCHEDULE for row in rows]
        taken_ns = [
            row.typical_ns if is_typical else row.median_ns for row, is_typical in zip(rows, typical, strict=True)
        ]
        form = fit_transfer([(row.key["bytes"], ns) for row, ns in zip(rows, taken_ns, strict=True)])
        unsure = uncertainty(rows, _transfer, "bytes")
        self.terms.append(Term(name, "table" if "points" in form else "line", sum(row.n for row in rows), unsure))
        return {**form, **_measured(rows), "uncertainty": unsure}

    # Single durations.

    def _duration(self, name: str, rows: Sequence[Row], form: str = "median") -> dict[str, Any]:
        """Returns a duration from rows that are the same thing: their median, or the mean of all."""
        self._need(rows, name)
        unsure = uncertainty(rows)
        self.terms.append(Term(name, form, sum(row.n for row in rows), unsure))
        ns = max(0, round(_FORMS[form](rows)))
        return {"ns": ns, **_measured(rows), "uncertainty": unsure}

    def _beside_copy(self, name: str, cost: str, micro: Sequence[Row], **key: Any) -> dict[str, Any]:
        """Returns a duration that may be longer beside a copy: the mean inside schedules, else the microbenchmark's."""
        quiet = self._evidence.schedule(cost, beside_copy=False, **key)
        beside = self._evidence.schedule(cost, beside_copy=True, **key)
        if not quiet:
            return self._duration(name, micro)
        costs = self._duration(name, quiet, "mean")
        if beside:
            costs["beside_copy_ns"] = self._duration(f"{name}, beside a copy", beside, "mean")["ns"]
        return costs

    # The compute stream.

    def compute(self) -> dict[str, Any]:
        """Returns the costs of the compute stream."""
        evidence = self._evidence
        kernels = KernelFitter(evidence)
        parts = {part: kernels.points(part) for part in ("expert", "dense", "head")}
        self.terms += kernels.terms
        gaps = {}
        for dispatch in ("eager", "graph"):
            micro = evidence.micro("kernel_gap", dispatch=dispatch, beside="none")
            gaps[dispatch] = self._beside_copy(f"{dispatch}_gap", "kernel_gap", micro, dispatch=dispatch)
        wait = self._beside_copy("event_wait_gap", "event_wait_gap", evidence.micro("event_wait_gap", waits="kernel"))
        peer = {}
        if hops := evidence.micro("peer_wait"):
            peer["peer_wait_gap"] = self._beside_copy("peer_wait_gap", "arrival_gap", hops)
        return {
            "experts": parts["expert"],
            "dense": parts["dense"],
            "heads": parts["head"],
            "cpu_experts": list(self._cpu_experts()),
            "predictors": list(self._predictors()),
            "rule": kernels.rule(),
            **({"surface": self._fit_surface(self._surface, parts)} if self._surface is not None else {}),
            "eager_gap": gaps["eager"],
            "graph_gap": gaps["graph"],
            "event_wait_gap": wait,
            **peer,
            "launch_latency": kernels.launch_latency(),
        }

    def _fit_surface(self, samples: Samples, points: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """Returns the surface, and report how far groups are off that are put together of its kernels."""
        surface = fit_surface(samples, self._evidence, points)
        if self._launched:
            surface["launches"] = self._launched
        for (part, by_dispatch), dispatch in product(surface["groups"].items(), ("graph", "eager")):
            group = by_dispatch[dispatch]
            if "uncertainty" in group:
                self.terms.append(
                    Term(f"surface, {part}, {dispatch}", "sum", len(samples.surface), group["uncertainty"])
                )
        return surface

    def _cpu_experts(self) -> Iterable[dict[str, Any]]:
        for row in self._evidence.micro("cpu_expert", beside="none"):
            key = {name: value for name, value in row.key.items() if name != "beside"}
            beside = self._evidence.micro("cpu_expert", beside="h2d", **key)
            size = key.pop("size")
            yield {
                **key, "expert_ff": size, "ns": round(row.median_ns), **_measured([row]),
                "beside_copy_ns": round(beside[0].median_ns if beside else row.median_ns),
            }  # fmt: skip

    def _predictors(self) -> Iterable[dict[str, Any]]:
        for row in self._evidence.micro("predictor"):
            yield {**row.key, "ns": round(row.median_ns), **_measured([row])}

    # The host.

    def host(self) -> dict[str, Any]:
        """Returns the costs of the host thread: of its calls inside schedules, solved for; else of each call alone."""
        evidence = self._evidence
        calls = {str(row.key["call"]): row for row in evidence.micro("host")}
        self._need(calls, "host calls")
        if "product_launch" not in calls:
            raise ProfileError("samples: only what several GPUs add (--links): give those of one GPU behind them, too")
        costs: dict[str, Any] = {name: self._duration(f"host.{name}", [row]) for name, row in calls.items()}
        if "turn" in costs:  # to another GPU and back
            costs["turn"]["ns"] //= 2
        costs["product_launches"] = dict.fromkeys(("bfloat16", "float32"), costs.pop("product_launch"))
        entries = evidence.schedule_like("host:") + evidence.schedule_like("peer:host:")
        note = f"{SCHEDULE}: the calls of whole entries, solved for"
        known = {"source": "measured", "note": note, "uncertainty": uncertainty(entries)}
        further_ns = further_launch_ns(self._counted)
        if further_ns is not None:
            costs[FURTHER] = {"ns": round(further_ns), "source": "measured", "note": MICRO}
        record_ns = calls["event_record"].calm_ns
        for name, ns in solve_host(entries, record_ns, self._launched, further_ns or 0.0).items():
            call, _, dtype = name.partition(":")
            if dtype:
                costs["product_launches"][dtype] = {"ns": ns, **known}
            else:
                costs[call] = {"ns": ns, **known}
        # Of all runs, calm or not: host and GPU clocks are set against each other once a run, to some microseconds, and
        # what one of the following costs loses by that another gains.
        costs["synchronize"] = self._beside_copy("host.synchronize", "synchronize", evidence.micro("synchronize"))
        costs["readback"] = self._beside_copy("host.readback", "readback", evidence.micro("readback"))
        if late := evidence.schedule("readback_late"):
            costs["readback_late"] = self._duration("host.readback_late", late)
        return costs

    # What slows what.

    def contention(self) -> dict[str, Any]:
        """Returns the factors by which copies to the GPU are slowed."""
        factors = {
            f"copy_beside_{load}": self._factor("h2d", load)
            for load in ("compute", "d2h", "cpu_experts", "all_gpus")
            if self._evidence.micro("copy", direction="h2d", beside=load)
        }
        one, two = (self._evidence.micro("copy_streams", streams=streams) for streams in (1, 2))
        gaps = self._evidence.micro("copy_gap", direction="h2d", memory="pinned")
        self._need(two, "copy_streams")
        self._need(gaps, "copy_gap")
        # The gaps of one stream are hidden by the other's copies, as they are in a simulation.
        alone_ns = one[0].median_ns - (one[0].key["copies"] - 1) * gaps[0].median_ns
        note = f"{one[0].key['copies']} copies over two streams, over the same in one without its gaps"
        sharing = _factor(two[0].median_ns / alone_ns, [*one, *two], note)
        return {
            **factors, **self._beside_peers(), "copies_sharing": sharing, "copies_take_turns": self._take_turns()
        }  # fmt: skip

    def _beside_peers(self) -> dict[str, Any]:
        """Returns what kernels and copies from another GPU do to each other, and the host's copies to those."""
        evidence, costs = self._evidence, {}
        pairs = [
            (row, quiet)
            for part in ("expert", "dense", "head")
            for row in evidence.schedule(f"peer:{part}", beside_copy=True)
            for quiet in evidence.schedule(part, **{**row.key, "beside_copy": False})
        ]
        pairs = pairs or [
            (row, quiet)
            for row in evidence.micro("kernel", where="beside_peer")
            for quiet in evidence.micro("kernel", **{**row.key, "where": "queued"})
        ]
        if pairs:
            rows, ratios = [row for row, _ in pairs], [row.median_ns / quiet.median_ns for row, quiet in pairs]
            factor = float(np.average(ratios, weights=[row.n for row in rows]))
            costs["compute_beside_peer"] = _factor(max(1.0, factor), rows, rows[0].where)
        if beside := evidence.schedule("send", beside_copy=True):
            quiet = {row.key["bytes"]: row.median_ns for row in evidence.schedule("send", beside_copy=False)}
            longer = (
                [
                    (row.n, row.median_ns - quiet[min(quiet, key=lambda size: abs(size - row.key["bytes"]))])
                    for row in beside
                ]
                if quiet
                else []
            )
            if longer:
                costs["peer_beside_copy"] = latency_of(longer, f"{SCHEDULE}: copies between stages, less quiet ones")
        return costs

    def _take_turns(self) -> bool:
        """Whether two streams' copies were seen, and were hardly ever under way at once."""
        overlaps = self._evidence.schedule("copies_at_once")
        return bool(overlaps) and weighted_mean_ns(overlaps) < _AT_ONCE_NS

    def _factor(self, direction: str, load: str) -> dict[str, Any]:
        rows = self._evidence.micro("copy", direction=direction, beside=load)
        ratios = []
        for row in rows:
            quiet = self._evidence.micro("copy", **{**row.key, "beside": "none"})
            ratios += [row.median_ns / alone.median_ns for alone in quiet]
        self._need(ratios, f"copies {direction} of the same size, quiet")
        return _factor(float(np.median(ratios)), rows, f"queued copies of {rows[0].key['bytes']} bytes")

    # The machine's graph.

    def topology(self, graph: Topology, costs: dict[str, Any]) -> dict[str, Any]:
        """Returns a graph with the speeds of its links as these costs have them, and the capacity of its GPUs."""
        if "peer" not in costs:
            raise ProfileError("samples: no series of copies between GPUs: measure on a machine with several")
        fastest = "the fastest copies"
        rates = {
            "pcie": (max(map(_fastest, (*costs["h2d"].values(), costs["d2h"]))), fastest),
            "nvlink": (_fastest(costs["peer"]), fastest),
            "dram": (len(graph.gpus) * self._each_while_all_load(), "what all GPUs together get while all load"),
        }
        data = graph.model_dump(mode="json", exclude_none=True)
        for part in data["links"]:
            if part["kind"] in rates:
                rate, what = rates[part["kind"]]
                part |= {
                    "bytes_per_second": math.ceil(rate),
                    "source": "measured",
                    "note": f"{what}; the latency is assumed",
                    "device": None,
                }
        for part in data["nodes"]:
            if part["kind"] == "gpu":
                part["capacity_bytes"] = costs["gpu_memory_bytes"]
        return data

    def _each_while_all_load(self) -> float:
        """Returns the bytes a second that a GPU gets while all load: in typical schedules, else of the longest copy."""
        rows = self._evidence.schedule("copy_beside_all_gpus") or [self._longest("h2d", "all_gpus")]
        rates = [row.key["bytes"] * 1e9 / row.typical_ns for row in rows]
        return float(np.average(rates, weights=[row.n for row in rows]))

    def _longest(self, direction: str, beside: str) -> Row:
        """Returns the row of the longest copies of a direction that were queued."""
        memory = "device" if direction == "peer" else "pinned"
        key = {"direction": direction, "memory": memory, "mode": "queued", "beside": beside}
        rows = self._evidence.micro("copy", **key)
        self._need(rows, f"copy, {direction}, beside {beside}")
        return max(rows, key=lambda row: row.key["bytes"])

    def allocation(self) -> dict[str, Any]:
        """Returns the host's time for one block of the smallest size measured."""
        costs = {}
        for how in ("raw", "cached"):
            rows = self._evidence.micro("allocation", how=how, blocks=1)
            self._need(rows, f"allocation, {how}")
            costs[how] = self._duration(f"allocation.{how}", [min(rows, key=lambda row: row.key["bytes"])])
        return costs

    def _need(self, rows: Any, what: str) -> None:
        if not rows:
            raise ProfileError(f"samples: no series of {what}: measure again with this version")


def _fastest(costs: dict[str, Any]) -> float:
    """Returns the most bytes a second of any copy in one direction."""
    rates = []
    for mode in ("alone", "queued"):
        points = costs[mode].get("points", ())
        rates += [size_bytes * 1e9 / ns for size_bytes, ns in points if ns] or [costs[mode]["bytes_per_second"]]
    return float(max(rates))


def _measured(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns where a cost is from: what its note says, and the samples of its rows in short."""
    note = ", ".join(dict.fromkeys(row.where for row in rows))
    return {"source": "measured", "note": note, "samples": together(rows)}


def _factor(factor: float, rows: Sequence[Row], note: str) -> dict[str, Any]:
    """Returns how many times as long something takes beside something else; 1, or the most, where that is absurd.

    Nothing is twice as fast in company: such a factor is that of a measurement that was disturbed, as its note says.
    """
    if not LEAST_FACTOR <= factor <= MOST_FACTOR:
        note = f"{note}; {factor:.3g} was measured: disturbed, measure again"
        factor = 1.0 if factor < LEAST_FACTOR else MOST_FACTOR
    return {"factor": round(factor, 4), "source": "measured", "note": note, "uncertainty": uncertainty(rows)}
