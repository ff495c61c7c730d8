"""Expert parallelism from a scenario: its GPUs, who owns which experts, and runs of it.

`[parallel] gpus` spreads every layer's experts over so many GPUs, by a `placement`; each has the expert memory that
[memory] gives to one: a share in percent is of the experts that it owns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..resources.network import Carried
from ..resources.timeline import COMBINE, DISPATCH, PEER
from ..resources.topology import Route, TopologyError
from ..workloads.trace_limits import MAX_TOTAL_EXPERTS
from .costs.costs import Costs, activation_bytes
from .decide.host_memory import HostMemory
from .decide.memory_manager import BudgetError, MemoryManager
from .links import Links
from .loading.offloading import cached_budgets, make_miss
from .measure.accesses import miss_keys
from .measure.recording import Recording, ratio
from .placed import Placed, PlacedVisit, Prices, Worker, homes, own_guesses, own_steps, placed_visits
from .policies.placement import PLACEMENT, Owners, Request
from .policies.prefetch import Gauge, NoPrefetch, Prefetch
from .scenario.amounts import ScenarioError, parse_budget, parse_bytes
from .scenario.inputs import Inputs
from .timing.records import COPIES_FROM


def place(whole: Inputs, make_manager: Callable[[Inputs], MemoryManager]) -> Inputs:
    """Returns inputs with those of each GPU, and how the experts lie; raise ScenarioError if they cannot run.

    `whole` has the guesses of the whole run. `make_manager` refuses what a GPU cannot hold.
    """
    scenario, model, parallel = whole.scenario, whole.model, whole.scenario.parallel
    links = Links(whole.profile, scenario, parallel.gpus, "parallel.gpus")
    if parallel.lends:
        ask_peers(links)
    routes(links)
    owners = PLACEMENT[parallel.placement](
        Request(
            parallel.gpus,
            whole.trace,
            model.expert_bytes,
            batch=scenario.workload.batch,
            replicas=parallel.replicas,
            replica_bytes=parse_bytes(parallel.replica_bytes),
            objective=parallel.objective,
        )
    )
    spare_experts = min(parse_bytes(parallel.spare_bytes) // max(model.expert_bytes), MAX_TOTAL_EXPERTS)
    if spare_experts and not model.uniform:
        raise ScenarioError("parallel.spare_bytes: needs experts of one size in all layers")
    lives = homes(whole.trace, whole.steps, parallel.gpus)
    placed = Placed(parallel.gpus, owners, lives, parallel.remote, spare_experts=spare_experts)
    if parallel.remote == "cost":
        placed = replace(placed, prices=prices(links, Costs(whole), activation_bytes(model, 1)))
    gpus = []
    for number in range(parallel.gpus):
        part = replace(whole, device=f"gpu{number}", placed=placed, budget_bytes=_budget_bytes(whole, owners, number))
        if not placed.moves_tokens:
            own = own_steps(whole.steps, lives, number)
            part = replace(part, steps=own, guesses=own_guesses(whole.guesses, lives, number))
        try:
            make_manager(part)
        except BudgetError as error:
            raise ScenarioError(f"gpu{number} of parallel.gpus = {parallel.gpus}: {error}") from None
        gpus.append(part)
    budget_bytes = sum(part.budget_bytes for part in gpus)
    return replace(whole, gpus=tuple(gpus), placed=placed, links=links, budget_bytes=budget_bytes)


def _budget_bytes(whole: Inputs, owners: Owners, gpu: int) -> int:
    """Returns the expert memory of one GPU: a share of the experts that it owns, or so many bytes or experts."""
    budget, sizes = whole.scenario.memory.gpu_budget, whole.model.expert_bytes
    if budget.rstrip().endswith("%"):
        return parse_budget(budget, [owned_bytes(owners, sizes, gpu)], 1)
    return parse_budget(budget, sizes, whole.model.experts)


def owned_bytes(owners: Owners, expert_bytes: Sequence[int], gpu: int) -> int:
    """Returns the bytes of all experts that a GPU owns."""
    return sum(
        size_bytes * sum(gpu in gpus for gpus in of_layer)
        for size_bytes, of_layer in zip(expert_bytes, owners, strict=True)
    )


def routes(links: Links) -> dict[tuple[int, int], Route]:
    """Returns the way from each GPU to each other one; raise ScenarioError if there is none."""
    gpus = range(len(links.gpus))
    try:
        return {(a, b): links.route(a, b) for a in gpus for b in gpus if a != b}
    except TopologyError as error:
        raise ScenarioError(f"parallel.gpus = {len(links.gpus)}: {error}") from None


def ask_peers(links: Links) -> None:
    """Let copies between all GPUs count where links are shared."""
    for source, target in routes(links):
        links.peer(source, target)


def prices(links: Links, costs: Costs, token_bytes: int) -> Prices:
    """Returns what `remote = "cost"` compares: a token there and back on the slowest way, and copies behind others."""
    ways = routes(links)
    slowest = min(route.bytes_per_second for route in ways.values())
    return Prices(
        2 * token_bytes * 1e9 / slowest,
        [copy.queued_ns for copy in costs.copies],
        [max(links.peer(*pair).queued_ns(size_bytes) for pair in ways) for size_bytes in costs.expert_bytes],
    )


def held(placed: Placed, device: str) -> list[int]:
    """Returns the experts that a GPU holds if everything is resident: what it owns, or all if no token moves."""
    return placed.served(int(device.removeprefix("gpu")))


def sent_tokens_and_experts(inputs: Inputs, recordings: Sequence[Recording], links: Links) -> list[Carried]:
    """Returns what the GPUs of a finished run have sent each other: tokens there and back, and experts."""
    token_bytes, ways, carried = activation_bytes(inputs.model, 1), routes(links), []
    for kind in (DISPATCH, COMBINE):
        exchanges = recordings[0].spans[recordings[0].spans["kind"] == kind]  # all GPUs' are at once
        start_ns, end_ns = exchanges["start_ns"].copy(), exchanges["end_ns"].copy()
        for (source, target), route in ways.items():
            home, server = (source, target) if kind == DISPATCH else (target, source)
            tokens = recordings[home].decoded.sent[:, server].astype(np.int64)
            carried.append(Carried(route, tokens * token_bytes, start_ns, end_ns))
    for target, recording in enumerate(recordings):
        for number, lane in enumerate(recording.decoded.timeline.lanes):
            found = re.fullmatch(COPIES_FROM.format(r"gpu(\d+)"), lane.title)
            if found is not None:
                copies = recording.spans[recording.spans["lane"] == number]
                route, size_bytes = ways[int(found[1]), target], recording.bytes_of(copies["expert"])
                carried.append(Carried(route, size_bytes, copies["start_ns"], copies["end_ns"]))
    return carried


def sharing_metrics(recordings: Sequence[Recording]) -> dict[str, Any]:
    """Returns what sharing the experts took, as plain data for JSON.

    `tokens_sent`: one way, a token once to each GPU that serves it; `all_to_all_ms`: there and back, together;
    `copied_bytes`: experts from one GPU to another, those that spare memory takes included; `imbalance`: the (token,
    expert) pairs of the GPU that serves the most in a layer visit, over all visits / those of the mean GPU (None: there
    are none). All GPUs wait for the busiest of a visit, and it is another one each time.
    """
    exchanges = recordings[0].spans[np.isin(recordings[0].spans["kind"], (DISPATCH, COMBINE))]
    copied_bytes = 0
    for recording in recordings:
        copied = recording.spans["expert"][recording.spans["kind"] == PEER]
        copied_bytes += int(recording.bytes_of(copied).sum())
    busiest, total = _served(recordings)
    return {
        "tokens_sent": sum(int(recording.decoded.sent.sum(dtype=np.int64)) for recording in recordings),
        "all_to_all_ms": int((exchanges["end_ns"] - exchanges["start_ns"]).sum()) / 1e6,
        "copied_bytes": copied_bytes,
        "imbalance": ratio(busiest * len(recordings), total),
    }


def _served(recordings: Sequence[Recording]) -> tuple[int, int]:
    """Returns the (token, expert) pairs that the busiest GPU of each layer visit serves, and all GPUs' pairs."""
    busiest = np.zeros(len(recordings[0].decoded.visits), dtype=np.int64)
    total = 0
    for recording in recordings:
        accesses = recording.decoded.accesses
        pairs = np.bincount(accesses["visit"], weights=accesses["tokens"], minlength=len(busiest)).astype(np.int64)
        busiest, total = np.maximum(busiest, pairs), total + int(pairs.sum())
    return int(busiest.sum()), total


def decided(
    inputs: Inputs,
    managers: Sequence[MemoryManager],
    prefetches: Sequence[Prefetch],
    gauges: Sequence[Gauge] = (),
    host: HostMemory | None = None,
) -> Iterator[PlacedVisit]:
    """Returns the visits of a run over several GPUs, decided one by one as they are asked for, with host memory's."""
    assert inputs.placed is not None
    workers = [
        Worker(
            manager, prefetch, part.steps, part.guesses, gauges[number] if gauges else None, cached_budgets(part),
            make_miss(part),
        )
        for number, (part, manager, prefetch) in enumerate(zip(inputs.gpus, managers, prefetches, strict=True))
    ]  # fmt: skip
    return placed_visits(
        inputs.placed, inputs.trace, workers, issue=inputs.scenario.prefetch.issue, host=host,
        to_host=inputs.scenario.tiers.prefetch == "host",
    )  # fmt: skip


def shadow_misses(inputs: Inputs, managers: Sequence[MemoryManager]) -> list[npt.NDArray[np.int64]]:
    """Returns what each GPU's cache (`managers`, fresh ones) misses without prefetch, as `metrics.miss_keys`."""
    missed = [manager.spool.column("missed", np.int64) for manager in managers]
    for visit in decided(inputs, managers, [NoPrefetch() for _ in managers]):
        for manager, keys, own in zip(managers, missed, visit.visits, strict=True):
            keys.buffer += miss_keys([own], inputs.model.total_experts).tobytes()
            if not visit.layer:
                manager.spool.flush()
    return [keys.array() for keys in missed]
