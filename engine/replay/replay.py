"""Sequential replay: the memory manager driven by a trace with copies instant. It counts; it has no clock.

Found means the expert had room when it was looked up; whether its bytes would have been there in time is what the
overlapped decoder adds. The decoder makes the same decisions, so its counts are these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...words import unknown_name
from ...workloads.batches import DECODE, Step, plan_steps
from ...workloads.model import load_model
from ...workloads.trace import RoutingTrace
from ..decide.dispatch import LOOKUPS, Visit, single_accesses, step_accesses
from ..decide.memory_manager import MemoryManager
from ..decide.partition import divider
from ..policies.eviction import EVICTION, Setting
from ..scenario.amounts import parse_budget
from ..scenario.warnings import cliff_warning
from .compiled import COMPILED, is_compiled
from .guessing import USUAL, Guessing, goes_by_guesses

#: What became of each (token, layer, rank): missed, found, or not looked up (a repeat within the batch, or not run).
MISSED, FOUND, NOT_LOOKED_UP = 0, 1, 255


@dataclass(frozen=True)
class Replayed:
    """A finished replay: `outcome` uint8 (tokens, layers, k) of MISSED, FOUND or NOT_LOOKED_UP, and evictions."""

    trace: RoutingTrace
    outcome: npt.NDArray[np.uint8]
    evict: int

    def count(self, what: int, phase: int | None = None) -> int:
        """Returns how many look-ups ended as `what`, in all or in one phase."""
        outcome = self.outcome if phase is None else self.outcome[self.trace.phase == phase]
        return int((outcome == what).sum())

    def hit_rate(self, phase: int | None = None) -> float | None:
        """Returns the share of look-ups that were found, in all or in one phase; None without look-ups."""
        hits = self.count(FOUND, phase)
        accesses = hits + self.count(MISSED, phase)
        return hits / accesses if accesses else None

    def bytes_read(self, expert_bytes: Sequence[int]) -> int:
        """Returns the bytes copied, given those of one expert of each layer (layers,)."""
        missed = (self.outcome == MISSED).sum(axis=(0, 2)).tolist()
        return sum(count * size_bytes for count, size_bytes in zip(missed, expert_bytes, strict=True))

    def residency_agreement(self) -> float | None:
        """Returns the share of decode look-ups found exactly if the trace's log says resident (`residency` > 0).

        None if the trace has no logged `residency` (tokens, layers, k): 0 miss, otherwise resident.
        """
        if "residency" not in self.trace.extra:
            return None
        looked_up = (self.outcome != NOT_LOOKED_UP) & (self.trace.phase == DECODE)[:, None, None]
        agrees = (self.outcome == FOUND) == (self.trace.extra["residency"] > 0)
        return float(agrees[looked_up].mean()) if looked_up.any() else None


def replay(trace: RoutingTrace, steps: Sequence[Step], manager: MemoryManager, *, lookup: str = "batch") -> Replayed:
    """Replay the steps of a trace through a memory manager, on demand only: the reference for every other replay."""
    if lookup not in LOOKUPS:
        raise InputError(unknown_name("lookup", lookup, LOOKUPS))
    outcome = np.full(trace.experts.shape, NOT_LOOKED_UP, dtype=np.uint8)
    number = 0
    for step in steps:
        lookups = enumerate(step_accesses(trace, step)) if lookup == "batch" else single_accesses(trace, step)
        cells: Iterator[npt.NDArray[np.intp]] = _first_cells(trace, step, lookup)
        for layer, access in lookups:
            if manager.shared:
                access = access.by_index(manager.experts)
            found: list[int] = []
            for wave in manager.visit(number, layer, access.experts, access.recency, access.weights):
                found += wave.found
            manager.unpin()
            outcome.flat[next(cells)] = [FOUND if expert in found else MISSED for expert in access.experts]
            number += 1
    return Replayed(trace, outcome, manager.evicted)


def _first_cells(trace: RoutingTrace, step: Step, lookup: str) -> Iterator[npt.NDArray[np.intp]]:
    """Yield, look-up by look-up of a step, the flat indices of the (token, layer, rank) cells that are looked up."""
    shape = trace.experts.shape
    for layer in range(trace.layers):
        here = slice(None) if trace.made is None else trace.made[step.rows, layer]
        cells = ((step.rows[:, None] * shape[1] + layer) * shape[2] + np.arange(shape[2]))[here].ravel()
        if lookup == "single":
            yield from cells.reshape(-1, 1)
        elif len(step.rows) == 1:
            yield cells
        else:
            _, first = np.unique(trace.experts[step.rows, layer][here], return_index=True)
            yield cells[np.sort(first)]


@dataclass(frozen=True)
class VisitCounts:
    """The counts that the replay and the decoder must agree on."""

    accesses: int
    found: int
    miss: int
    prefetch: int
    dropped: int
    evict: int


def count_visits(visits: Iterable[Visit], manager: MemoryManager) -> VisitCounts:
    """Replay dispatched visits, prefetches included, and count them."""
    accesses = miss = prefetch = 0
    for visit in visits:
        accesses += len(visit.accesses.experts) + sum(access.whole for access in visit.resolution.accesses)
        miss += len(list(visit.missed()))
        prefetch += len(visit.prefetches)
    return VisitCounts(accesses, accesses - miss, miss, prefetch, manager.dropped, manager.evicted)


def replay_trace(
    trace: RoutingTrace,
    budget: str,
    *,
    eviction: str = "lru",
    scope: str = "global",
    lookup: str = "batch",
    batch: int = 1,
    model: str | None = None,
    expert_bytes: int | None = None,
    predictor: str = "transition",
    lookahead: int | None = None,
    weights: str | None = None,
    recall: float | None = None,
) -> dict[str, Any]:
    """Replay a whole trace and return plain data for JSON: the counts, rates and warnings.

    The bytes of an expert are `expert_bytes`, else the model's, else the trace's own. Where none is given, a budget
    in percent or experts still has a meaning, and `bytes_read` is None. `predictor`, `lookahead`, `weights` and
    `recall` are of `Guessing`, for an eviction policy that goes by guesses. Raises ValueError on bad input.
    """
    if eviction not in EVICTION:
        raise InputError(unknown_name("eviction", eviction, EVICTION))
    guessing = Guessing(predictor, lookahead, weights, recall)
    sizes = expert_sizes(trace, model, expert_bytes, [budget])
    known = sizes or [1] * trace.layers
    budget_bytes = parse_budget(budget, known, trace.num_experts, scope)
    divide = divider(scope, known, trace)
    pools = divide(budget_bytes)
    steps = plan_steps(trace.sequence, trace.phase, batch=batch)
    if lookup not in LOOKUPS:
        raise InputError(unknown_name("lookup", lookup, LOOKUPS))
    setting = setting_of(trace, steps, eviction, lookup, guessing)
    if is_compiled(eviction, steps, lookup):
        shared = scope == "shared"
        outcome, evict = COMPILED[eviction](trace, steps, pools, known, lookup, shared=shared, setting=setting)
        replayed = Replayed(trace, outcome, evict)
    else:
        manager = MemoryManager(
            known, trace.num_experts, budget_bytes, EVICTION[eviction], setting=setting, scope=scope, divide=divide
        )
        replayed = replay(trace, steps, manager, lookup=lookup)
    cliff = cliff_warning(budget_bytes, known, trace.k, scope, eviction) if batch == 1 else None
    return {
        **_counted(replayed),
        "bytes_read": replayed.bytes_read(known) if sizes else None,
        "evict": replayed.evict,
        "budget_bytes": sum(pools) if sizes else None,
        "residency_agreement": replayed.residency_agreement() if lookup == "batch" else None,
        "eviction": eviction,
        "scope": scope,
        "lookup": lookup,
        "warnings": [cliff] if cliff else [],
    }


def setting_of(
    trace: RoutingTrace, steps: Sequence[Step], eviction: str, lookup: str, guessing: Guessing = USUAL
) -> Setting:
    """Returns what an eviction policy may know beforehand; with guesses, if it goes by them."""
    guesses = guessing.guesses(trace, steps) if goes_by_guesses(eviction) else None
    return Setting(trace=trace, steps=steps, single=lookup == "single", guesses=guesses)


def _counted(replayed: Replayed) -> dict[str, Any]:
    """Returns accesses, hits and their rate, of all steps and of decode steps alone."""
    hits, hits_decode = replayed.count(FOUND), replayed.count(FOUND, DECODE)
    return {
        "accesses": hits + replayed.count(MISSED),
        "hits": hits,
        "hit_rate": replayed.hit_rate(),
        "accesses_decode": hits_decode + replayed.count(MISSED, DECODE),
        "hits_decode": hits_decode,
        "hit_rate_decode": replayed.hit_rate(DECODE),
    }


def expert_sizes(
    trace: RoutingTrace, model: str | None, expert_bytes: int | None, budgets: Sequence[str]
) -> list[int] | None:
    """Returns the bytes of one expert of each layer, or None where nobody says and none of the budgets needs it."""
    if expert_bytes is not None:
        if expert_bytes < 1:
            raise InputError(f"expert_bytes = {expert_bytes}: must be at least 1")
        return [expert_bytes] * trace.layers
    if model is not None:
        shape = load_model(model)
        if shape.layers != trace.layers:
            raise InputError(f"model {model!r} has {shape.layers} MoE layers, but the trace has {trace.layers}")
        return list(shape.expert_bytes)
    if "expert_bytes" in trace.extra:
        return [int(size) for size in trace.extra["expert_bytes"]]
    for budget in budgets:
        parse_budget(budget, [1], 1)  # refuses what is no budget at all
        if not budget.strip().endswith(("%", "experts")):
            raise InputError(
                f"budget {budget!r}: the trace does not say how large an expert is; give --model or --expert-bytes, "
                f"or a budget in '%' or 'experts'"
            )
    return None
