"""The order of dispatch: what the host decides at each layer visit, in the order in which it decides it.

The replay, the SimPy engine and the execution on a GPU all draw the same stream of visits from here, so they make
the same decisions. Only the order counts here; what o'clock it is, nobody asks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...workloads.batches import PulledSteps, Step
from ...workloads.guesses import Guesses
from ...workloads.trace import RoutingTrace
from ..policies.miss import BY_CPU, LOW_PRECISION, Absent, Miss, Resolved, defer
from ..policies.prefetch import Gauge, Moment, Prefetch
from .guessed import later_steps, ranked_confidences, ranked_guesses
from .memory_manager import Admission, MemoryManager, Wave

#: When prefetches are enqueued: after the launch of the visit's experts, or before it.
ISSUE = ("after_launch", "before_launch")
#: What one access is: a unique expert of the batch, or every (token, expert) pair by itself.
LOOKUPS = ("batch", "single")


@dataclass(slots=True)
class Accesses:
    """The look-ups of one layer visit: unique experts in access order and the tokens that chose each.

    `recency` holds the same experts in the order of their last appearance, `weights` their gate weights in that
    order (1.0 where the trace has none).
    """

    experts: list[int]
    tokens: list[int]
    recency: list[int]
    weights: list[float]

    def by_index(self, experts: int) -> Accesses:
        """Returns them where all layers share the experts of the same index, `experts` in number."""
        shared = [expert % experts for expert in self.experts]
        recency = [expert % experts for expert in self.recency]
        return Accesses(shared, self.tokens, recency, self.weights)

    def without(self, resolved: Sequence[Resolved]) -> Accesses:
        """Returns what is left to the GPU's experts: fewer tokens, and none of those that were whole accesses."""
        if not resolved:
            return self
        gone = {access.expert: access.tokens for access in resolved}
        whole = {access.expert for access in resolved if access.whole}
        left = [pair for pair in zip(self.experts, self.tokens, strict=True) if pair[0] not in whole]
        recent = [pair for pair in zip(self.recency, self.weights, strict=True) if pair[0] not in whole]
        return Accesses(
            [expert for expert, _ in left],
            [tokens - gone.get(expert, 0) for expert, tokens in left],
            [expert for expert, _ in recent],
            [weight for _, weight in recent],
        )


class Resolution(NamedTuple):
    """The accesses of a visit, or some of their tokens, that need no expert of the GPU's.

    `cpu_tokens`: for how many different tokens the CPU computes something.
    """

    accesses: Sequence[Resolved] = ()
    cpu_tokens: int = 0


#: All is the GPU's.
NOTHING_RESOLVED = Resolution()


@dataclass(slots=True)
class HostReads:
    """Where host memory, if it is a cache, has what a visit needs of it: the read that brings or brought each expert.

    Beside it is the room that the read is given, where it has to be made: by `copies` to the GPU, by experts `on_cpu`,
    and of the experts `staged`, which are read for nobody yet. `demoted`, by the copy that they make room for: the
    experts that the GPU has evicted and host memory takes in, each with its copy on the GPU and its room here.
    """

    copies: dict[int, tuple[int, Admission | None]] = field(default_factory=dict)
    on_cpu: dict[int, tuple[int, Admission | None]] = field(default_factory=dict)
    staged: list[tuple[int, Admission]] = field(default_factory=list)
    demoted: dict[int, list[tuple[int, int, Admission]]] = field(default_factory=dict)


@dataclass(slots=True)
class Visit:
    """One layer visit as dispatched: its look-ups, the waves that serve it and the prefetches that follow.

    A prefetch is (admission, target visit number); `staged` are experts to prefetch into host memory alone. At the end
    `assigned_bytes` of `budget_bytes` are given out. What a miss policy has found another way for, its `resolution`, is
    not in `accesses`, but in all that was `asked`. Where host memory is a cache, it fills in the `reads`.
    """

    number: int
    step: int
    layer: int
    accesses: Accesses
    waves: list[Wave]
    prefetches: list[tuple[Admission, int]]
    assigned_bytes: int
    budget_bytes: int
    staged: Sequence[int] = ()
    resolution: Resolution = NOTHING_RESOLVED
    reads: HostReads | None = None
    all_accesses: Accesses | None = None

    @property
    def asked(self) -> Accesses:
        """All look-ups, whatever became of them."""
        return self.all_accesses or self.accesses

    @property
    def computes(self) -> bool:
        """Whether the GPU has an expert to run, of whatever precision."""
        resolved = self.resolution.accesses
        return bool(self.accesses.experts) or any(access.way == LOW_PRECISION for access in resolved)

    def admissions(self) -> Iterator[Admission]:
        """Yields the admissions of the visit in the order in which they were decided."""
        for wave in self.waves:
            yield from wave.admitted
        for admission, _ in self.prefetches:
            yield admission

    def missed(self) -> Iterator[int]:
        """Yields the experts that were absent: those that were fetched, and those that need not be."""
        for wave in self.waves:
            for admission in wave.admitted:
                yield admission.expert
        for access in self.resolution.accesses:
            if access.whole:
                yield access.expert


@dataclass(frozen=True)
class Part:
    """What one GPU gets of each step: its look-ups by layer, and the guesses and confidences it prefetches by, if any.

    Those are laid out [layer][horizon - 1][rank by token].
    """

    accesses: Iterator[Iterable[Accesses]]
    ranked: Iterator[list[list[list[int]]]] | None = None
    confidences: Iterator[list[list[list[float]]]] | None = None
    #: The experts that it may prefetch; None for all.
    owned: Set[int] | None = None


def whole(
    trace: RoutingTrace, steps: Sequence[Step], guesses: Guesses | None, prefetch: Prefetch, *, shared: bool = False
) -> Part:
    """Returns all that there is of each step; guesses only as far as the policy wants them.

    With `shared`, where all layers share the experts of the same index, guesses are those indices.
    """
    apart = 0 if shared else trace.num_experts
    return Part(
        (step_accesses(trace, step) for step in steps),
        ranked_guesses(guesses, steps, apart) if guesses is not None and prefetch.guesses else None,
        ranked_confidences(guesses, steps) if guesses is not None and prefetch.needs_confidences else None,
    )


def visits(
    trace: RoutingTrace,
    steps: Sequence[Step],
    manager: MemoryManager,
    prefetch: Prefetch,
    guesses: Guesses | None,
    *,
    issue: str = "after_launch",
    gauge: Gauge | None = None,
    budgets: Sequence[int] | None = None,
    to_host: bool = False,
    miss: Miss | None = None,
    part: Part | None = None,
) -> Iterator[Visit]:
    """Yields every layer visit of the run, decided when it is asked for.

    `guesses` may be None if the prefetch policy wants none; `gauge` is the clock for policies that look at it.
    `budgets` (steps,), in bytes, resizes the expert memory before each step. With `to_host`, what the policy prefetches
    takes no room here, but is staged in host memory. `miss` finds other ways for what is absent (None: all is fetched).
    With a `part`, the look-ups and guesses are those that one of several GPUs gets of each step.
    """
    if issue not in ISSUE:
        raise InputError(f"issue = {issue!r}: choose one of {', '.join(ISSUE)}")
    layers, shared = trace.layers, trace.num_experts if manager.shared else 0
    part = part or whole(trace, steps, guesses, prefetch, shared=manager.shared)
    looks_behind = miss is not None and miss.looks_behind
    asking = None
    if prefetch.horizons > 0:
        later = later_steps(trace, steps, (layers - 1 + prefetch.horizons) // layers)
        moment = Moment(gauge=gauge or Gauge(), assigned=manager.assigned)
        asking = _Asking(
            manager, prefetch, layers, shared, later, moment, issue == "after_launch", to_host, part.owned
        )  # fmt: skip
    for number, asked, step_guesses, confidences in _looked_up(part, layers, manager, budgets):
        index, layer = divmod(number, layers)
        accesses = asked.by_index(shared) if shared else asked
        resolution = None if miss is None else _resolve(
            miss, trace, steps[index], layer, accesses.experts, manager.assigned
        )  # fmt: skip
        waves, elsewhere = _serve(manager, number, layer, accesses, resolution)
        if asking is None:
            manager.unpin()
            prefetches, staged, asked_for = _NOTHING
        else:
            missed = sum(len(wave.admitted) for wave in waves) + elsewhere if prefetch.reads_moment else 0
            prefetches, staged, asked_for = asking.visit(number, layer, asked, missed, step_guesses, confidences)
        if miss is not None and resolution is not None and looks_behind and _goes_on(steps, index):
            behind = [one for one in miss.behind(index, layer, resolution.accesses) if one not in asked_for]
            prefetches = [*prefetches, *_fetched_behind(manager, behind, number + layers)]
        assigned_bytes, budget_bytes = manager.assigned_bytes, manager.budget_bytes
        visit = Visit(number, index, layer, accesses, waves, prefetches, assigned_bytes, budget_bytes, staged)
        if resolution is not None:
            visit.resolution, visit.accesses = resolution, accesses.without(resolution.accesses)
            visit.all_accesses = accesses
        yield visit


def _looked_up(
    part: Part, layers: int, manager: MemoryManager, budgets: Sequence[int] | None
) -> Iterator[tuple[int, Accesses, Any, Any]]:
    """Yields each visit's number, look-ups, guesses and confidences; the memory has each step's budget before."""
    no_guesses: list[list[list[int]]] = [[]] * layers
    for index, by_layer in enumerate(part.accesses):
        if budgets is not None:
            manager.resize(budgets[index])
        guesses = next(part.ranked) if part.ranked is not None else no_guesses
        confidences = next(part.confidences) if part.confidences is not None else None
        first = index * layers
        for layer, accesses in enumerate(by_layer):
            yield first + layer, accesses, guesses[layer], confidences[layer] if confidences is not None else None


def _serve(
    manager: MemoryManager, number: int, layer: int, accesses: Accesses, resolution: Resolution | None
) -> tuple[list[Wave], int]:
    """Returns the waves that serve a visit, and how many of its experts are served elsewhere."""
    looked_up = accesses.experts, accesses.recency, accesses.weights
    if resolution is None:
        return manager.visit(number, layer, *looked_up), 0
    elsewhere = {access.expert for access in resolution.accesses if access.whole}
    return manager.visit(number, layer, *looked_up, elsewhere), len(elsewhere)


#: What a visit prefetches (with the visit that each is for), stages in host memory, and was asked for, by expert.
_Asked = tuple[list[tuple[Admission, int]], list[int], Mapping[int, tuple[int, int]]]
_NOTHING: _Asked = ([], [], {})


@dataclass
class _Asking:
    """Asks the prefetch policy at each visit, unpins what the visit used, and admits what is asked for.

    `later` are as of `later_steps`; `shared` is the number of experts where all layers share those of an index, else 0.
    Where only a part of the experts are one's own, `owned` names them.
    """

    manager: MemoryManager
    prefetch: Prefetch
    layers: int
    shared: int
    later: Sequence[Sequence[int]]
    moment: Moment
    unpin_first: bool
    to_host: bool
    owned: Collection[int] | None
    misses: int = 0

    def __post_init__(self) -> None:
        self._observes = type(self.prefetch).observe is not Prefetch.observe

    def visit(self, number: int, layer: int, asked: Accesses, missed: int, guesses: Any, confidences: Any) -> _Asked:
        """Returns what is prefetched at a visit of which `missed` look-ups missed."""
        manager, prefetch = self.manager, self.prefetch
        if self.unpin_first:
            manager.unpin()
            if manager.drop_after_visit:
                manager.drop_prefetched(number)
        if self._observes:
            prefetch.observe(asked.experts, asked.tokens)
        if prefetch.reads_moment:
            self._look(number, layer, missed, confidences)
        chosen = prefetch.choose(guesses, self.moment)
        asked_for = _merge_guesses(chosen, layer, self.layers, self.later[number // self.layers], self.shared)
        prefetches, staged = self._admit(asked_for)
        if not self.unpin_first:
            manager.unpin()
        return prefetches, staged, asked_for

    def _look(self, number: int, layer: int, missed: int, confidences: Any) -> None:
        """Note what a policy that reads the moment may see."""
        manager, moment = self.manager, self.moment
        self.misses += missed
        moment.visit, moment.layer = number, layer
        moment.misses_per_visit = self.misses / (number + 1)
        moment.unused_share = manager.unused_bytes / manager.budget_bytes
        moment.confidences = confidences

    def _admit(self, asked_for: Mapping[int, tuple[int, int]]) -> tuple[list[tuple[Admission, int]], list[int]]:
        """Returns what found room here, with the visit that it is for, and what is staged in host memory instead."""
        manager, assigned, owned = self.manager, self.manager.assigned, self.owned
        prefetches: list[tuple[Admission, int]] = []
        staged: list[int] = []
        for expert, (target, times) in asked_for.items():
            if owned is not None and expert not in owned:
                continue
            manager.guessed += times
            manager.unique_guesses += 1
            if expert in assigned:
                continue
            if self.to_host:
                staged.append(expert)
                continue
            admission = manager.prefetch(expert, target, times)
            if admission is not None:
                prefetches.append((admission, target))
        return prefetches, staged


def _merge_guesses(
    chosen: Iterable[Iterable[int]], layer: int, layers: int, later: Sequence[int], shared: int
) -> dict[int, tuple[int, int]]:
    """Returns what a policy wants at one visit of `layer`, each expert once: the visit it is for, and how often named.

    The nearest layer comes first, then the best rank; an expert that is wanted for several visits is for the first of
    them. What is for no step of the run is left out; `later` as of `later_steps`. Where all layers share the experts
    of the same index, `shared` is their number; else 0.
    """
    merged: dict[int, tuple[int, int]] = {}
    for ahead, wanted in enumerate(chosen, layer + 1):
        wraps, target_layer = divmod(ahead, layers)
        if later[wraps] < 0:
            break
        visit = later[wraps] * layers + target_layer
        for expert in wanted:
            if expert < 0:
                continue
            if shared:
                expert %= shared
            first = merged.get(expert)
            merged[expert] = (visit, 1) if first is None else (first[0], first[1] + 1)
    return merged


def _resolve(
    miss: Miss, trace: RoutingTrace, step: Step, layer: int, experts: Sequence[int], assigned: Collection[int]
) -> Resolution:
    """Returns what a policy makes of a visit's experts that are absent."""
    absent = [expert for expert in experts if expert not in assigned]
    if miss.terms.fetch_from is not None and len(step.rows) >= miss.terms.fetch_from:
        absent = []  # nothing is resolved another way
    resolved = miss.resolve(layer, _absent(trace, step, layer, absent)) if absent else []
    on_cpu = [access.expert for access in resolved if access.way in BY_CPU]
    if miss.terms.deferred and on_cpu and layer < trace.layers - 1:
        defer(resolved, _best(trace, step, layer, trace.k - miss.terms.deferred))
    return Resolution(resolved, _tokens_of(trace, step, layer, on_cpu) if on_cpu else 0)


def _absent(trace: RoutingTrace, step: Step, layer: int, experts: list[int]) -> list[Absent]:
    """Returns what was asked of the absent experts of a layer visit: the gate weights (1.0 where there are none)."""
    gates: dict[int, list[float]] = {expert: [] for expert in experts}
    for expert, gate in zip(*_pairs(trace, step.rows, layer), strict=True):
        if expert in gates:
            gates[expert].append(gate)
    return [Absent(expert, gates[expert]) for expert in experts]


def _tokens_of(trace: RoutingTrace, step: Step, layer: int, experts: list[int]) -> int:
    """Returns how many tokens of a layer visit chose at least one of the experts."""
    index = np.array(experts, dtype=np.int64) - layer * trace.num_experts
    asked = np.isin(trace.experts[step.rows, layer], index)
    if trace.made is not None:
        asked &= trace.made[step.rows, layer]
    return int(asked.any(axis=1).sum())


def _best(trace: RoutingTrace, step: Step, layer: int, most: int) -> set[int]:
    """Returns the experts of a layer visit that are among the best `most` of any token, by gate weight.

    Ties, and tokens of a trace without gate weights, go by the router's order.
    """
    if most <= 0:
        return set()
    best: set[int] = set()
    for row in step.rows:
        experts, gates = _pairs(trace, np.array([row]), layer)
        ranked = sorted(range(len(experts)), key=lambda place: -gates[place])
        best.update(experts[place] for place in ranked[:most])
    return best


def _goes_on(steps: Sequence[Step], index: int) -> bool:
    """Whether a step is not known to be the last."""
    return index + 1 < len(steps) or isinstance(steps, PulledSteps)


def _fetched_behind(manager: MemoryManager, experts: Iterable[int], target: int) -> Iterator[tuple[Admission, int]]:
    """Prefetch what a visit did without, for the next visit of its layer."""
    for expert in experts:
        admission = manager.prefetch(expert, target) if expert not in manager.assigned else None
        if admission is not None:
            yield admission, target


def launch_order(visit: Visit, wave: Wave, resident_first: bool) -> Iterable[tuple[int, int, int]]:
    """Yields (expert, tokens, copy) of the experts of one wave, in the order of their launch.

    That is the order of access, or first those that were found (`resident_first`).
    """
    experts, tokens, copies = visit.accesses.experts, visit.accesses.tokens, wave.found
    if len(copies) == len(experts):  # found, all of them, in order of access
        return zip(experts, tokens, copies.values())  # noqa: B905 - a check of lengths would cost more than all the rest
    if wave.admitted:
        copies = {**copies, **{admission.expert: admission.copy for admission in wave.admitted}}
    order = [
        (expert, tokens[place], copies[expert])
        for place, expert in enumerate(experts)
        if expert in copies  # else another wave's
    ]
    if resident_first and wave.admitted:
        order.sort(key=lambda access: access[0] not in wave.found)
    return order


def step_accesses(trace: RoutingTrace, step: Step) -> Iterator[Accesses]:
    """Yields the look-ups of each layer of one step; order: tokens in order, router's order within a token."""
    rows = step.rows
    offsets = np.arange(trace.layers, dtype=np.int64)[:, None] * trace.num_experts
    if len(rows) == 1 and trace.present is None:
        row = int(rows[0])
        experts: list[list[int]] = (trace.experts[row] + offsets).tolist()
        weights = repeat([1.0] * trace.k) if trace.weights is None else trace.weights[row].tolist()
        return map(Accesses, experts, repeat([1] * trace.k), experts, weights)
    return (accesses_at(trace, step, layer) for layer in range(trace.layers))


def accesses_at(trace: RoutingTrace, step: Step, layer: int) -> Accesses:
    """Returns the look-ups of one step at a layer."""
    return merge(*_pairs(trace, step.rows, layer))


def _pairs(trace: RoutingTrace, rows: npt.NDArray[np.int64], layer: int) -> tuple[list[int], list[float]]:
    """Returns the experts that some rows choose at a layer, one after the other, and their gate weights (1.0: none)."""
    here = slice(None) if trace.made is None else trace.made[rows, layer]
    experts: list[int] = (
        (trace.experts[rows, layer][here].astype(np.int64) + layer * trace.num_experts).ravel().tolist()
    )
    if trace.weights is None:
        return experts, [1.0] * len(experts)
    return experts, trace.weights[rows, layer][here].ravel().tolist()


def single_accesses(trace: RoutingTrace, step: Step) -> Iterator[tuple[int, Accesses]]:
    """Yields (layer, look-up) of every (token, expert) pair by itself, layers in order, tokens in order."""
    for layer in range(trace.layers):
        for row in step.rows.tolist():
            for expert, weight in zip(*_pairs(trace, np.array([row]), layer), strict=True):
                yield layer, Accesses([expert], [1], [expert], [weight])


def merge(pairs: list[int], gate: list[float]) -> Accesses:
    """Merge the (token, expert) pairs of a batch, in order, into one access per unique expert."""
    tokens: dict[int, int] = {}
    weight: dict[int, float] = {}
    last: dict[int, None] = {}
    for expert, share in zip(pairs, gate, strict=True):
        tokens[expert] = tokens.get(expert, 0) + 1
        weight[expert] = weight.get(expert, 0.0) + share
        last.pop(expert, None)
        last[expert] = None
    recency = list(last)
    return Accesses(list(tokens), list(tokens.values()), recency, [weight[expert] for expert in recency])
