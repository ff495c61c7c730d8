"""Conformance: what is asked of every member of a table, whether it ships or is a user's own.

Each check raises AssertionError saying what was found. `check` asks all of them over small random runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..engine.decide.dispatch import Visit
from ..engine.decide.memory_manager import MemoryManager
from ..engine.loading.deciders import dispatched, make_manager, make_prefetch
from ..engine.policies.copy_order import COPY_ORDERS, ByRank, QueuedCopy
from ..engine.policies.eviction import EVICTION, Eviction
from ..engine.policies.placement import PLACEMENT, Request
from ..engine.policies.prefetch import PREFETCH, Gauge, Moment, Options, Prefetch
from ..engine.scenario.inputs import Inputs
from ..errors import InputError
from ..words import unknown_name
from ..workloads.batches import Step, plan_steps
from ..workloads.guesses import Guesses
from ..workloads.predictors import PREDICTORS, make_predictor
from ..workloads.trace import RoutingTrace
from .machine import record
from .random_runs import GUESSES, HORIZONS, distinct, random_inputs, random_trace


def check(family: str, name: str, *, runs: int = 20, **options: Any) -> None:
    """Ask of a member of a table what is asked of those that ship, over so many random runs.

    `family` is one of CONFORMANCE, `name` a name in its table, `options` what a predictor is made with. Raises
    AssertionError if it does not keep to it, InputError if there is no such family or member.
    """
    if family not in CONFORMANCE:
        raise InputError(unknown_name("family", family, CONFORMANCE))
    asked = CONFORMANCE[family]
    if name not in asked.names:
        raise InputError(unknown_name(family, name, asked.names))
    for seed in range(runs):
        asked.check(name, seed, **options)


# Eviction.


class Watched(Eviction):
    """A policy under watch: it is asked and told the right things, and answers with whom it holds."""

    def __init__(self, policy: Eviction, everyone: list[Watched]) -> None:
        self.policy = policy
        self.inside: set[int] = set()
        self.asked_for_prefetch = False
        everyone.append(self)

    def admit(self, expert: int, demanded: bool) -> None:
        """Pass it on; the expert was outside."""
        assert expert not in self.inside
        self.inside.add(expert)
        self.policy.admit(expert, demanded)

    def use(self, expert: int, weight: float) -> None:
        """Pass it on; the expert is inside."""
        assert expert in self.inside
        self.policy.use(expert, weight)

    def evict(self, expert: int) -> None:
        """Pass it on; the expert was inside."""
        self.inside.remove(expert)
        self.policy.evict(expert)

    def victims(self) -> Iterator[int]:
        """Yields whom the policy yields: each expert in memory once, and nobody else."""
        walked = set()
        for expert in self.policy.victims():
            assert expert in self.inside, f"victims() names expert {expert}, which is not in memory"
            assert expert not in walked, f"victims() names expert {expert} twice"
            walked.add(expert)
            yield expert  # whoever asks may stop here
        spared = getattr(self.policy, "may_spare", False) and self.asked_for_prefetch
        assert walked == self.inside or spared, f"victims() leaves out experts {sorted(self.inside - walked)}"

    def begin(self, visit: int, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """Pass it on."""
        self.policy.begin(visit, layer, experts, weights)

    def miss(self, expert: int, demanded: bool) -> None:
        """Pass it on; the expert is outside."""
        assert expert not in self.inside
        self.asked_for_prefetch = not demanded
        self.policy.miss(expert, demanded)

    def walk(self) -> None:
        """Walk twice over all: a walk may clear marks, but loses nobody."""
        for _ in range(2):
            self.asked_for_prefetch = False
            assert sorted(self.victims()) == sorted(self.inside)


@contextmanager
def _watching(name: str) -> Iterator[list[Watched]]:
    """Have every policy of a name that is made watched; yield them."""
    pools: list[Watched] = []
    original: Any = EVICTION[name]
    watched: Any = lambda *setting: Watched(original(*setting), pools)  # noqa: E731 - stands for the class
    EVICTION[name] = watched
    try:
        yield pools
    finally:
        EVICTION[name] = original


def check_victims(name: str, inputs: Inputs, *, look: bool) -> None:
    """`victims` walks exactly the experts in memory, each once, throughout a run, and any of them may leave.

    With `look`, they are walked after every visit, too.
    """
    with _watching(name) as pools:
        manager = make_manager(inputs)
    assert pools, f"the memory manager makes no {name}"
    for _ in dispatched(inputs, manager, make_prefetch(inputs.scenario, inputs.model)):
        assert sorted(expert for pool in pools for expert in pool.inside) == sorted(manager.assigned)
        for pool in pools if look else ():
            pool.walk()
    for pool in pools:
        pool.walk()
    for expert in list(manager.assigned):
        manager.cancel(expert)
        for pool in pools:
            assert expert not in pool.victims(), f"victims() names expert {expert}, which has left"
    assert not manager.assigned


def check_same_evictions(inputs: Inputs, again: Inputs) -> None:
    """The same run, loaded twice, meets the same decisions and evictions."""
    (first, manager), (second, other) = _decide(inputs), _decide(again)
    assert first == second, "the same run is decided otherwise when it is made again"
    assert manager.evicted_copies.tolist() == other.evicted_copies.tolist()


def check_no_early_eviction(inputs: Inputs) -> None:
    """Nobody is evicted while there is room, unless the policy lets experts leave with their visit; one pool alone."""
    manager, evicted = make_manager(inputs), 0
    if any(pool.spends for pool in manager.pools):
        return
    for _ in dispatched(inputs, manager, make_prefetch(inputs.scenario, inputs.model)):
        if manager.evicted > evicted:
            # Before the last one left there was too little room for whoever came; so less is free now than it left.
            assert manager.budget_bytes - manager.assigned_bytes < max(inputs.model.expert_bytes)
        evicted = manager.evicted


def _decide(inputs: Inputs) -> tuple[list[Visit], MemoryManager]:
    manager = make_manager(inputs)
    return list(dispatched(inputs, manager, make_prefetch(inputs.scenario, inputs.model))), manager


def _check_eviction(name: str, seed: int) -> None:
    memory = {"eviction": name, "scope": "global"}
    check_victims(name, random_inputs(seed, memory=memory), look=bool(seed % 2))
    check_same_evictions(random_inputs(seed, memory=memory), random_inputs(seed, memory=memory))
    check_no_early_eviction(random_inputs(seed, memory=memory))


# Prefetching.


def check_choice(policy: Prefetch, layer: int, ranked: list[list[int]], confidences: list[list[float]]) -> None:
    """What is chosen at a layer of 4, of 5 experts each, are experts of the layers ahead; of guesses, if it needs them.

    `ranked` are guesses and `confidences` those in them, [layer ahead - 1][rank]; they are not written to, and the
    same question has the same answer.
    """
    gauge = Gauge()
    gauge.now_ns, gauge.backlog_ns = lambda: 100, lambda: 5
    moment = Moment(layer=layer, confidences=confidences, gauge=gauge)
    targets = [(layer + ahead) % 4 for ahead in range(1, policy.horizons + 1)]
    policy.observe([layer * 5, layer * 5 + 3], [2, 1])
    kept = [list(experts) for experts in ranked]
    chosen = [list(experts) for experts in policy.choose(ranked, moment)]
    assert ranked == kept, "the guesses are the predictor's: they were written to"
    assert len(chosen) <= policy.horizons, f"chooses for {len(chosen)} layers ahead, of {policy.horizons}"
    for ahead, experts in enumerate(chosen):
        for expert in experts:
            assert expert < 0 or expert // 5 == targets[ahead], f"expert {expert} is not of layer {targets[ahead]}"
            assert not policy.needs_guesses or expert in (-1, *ranked[ahead]), f"expert {expert} was not guessed"
    assert [list(experts) for experts in policy.choose(ranked, moment)] == chosen, "the same moment, another choice"


def check_no_guess(policy: Prefetch) -> None:
    """Without guesses, a policy that needs them chooses nothing."""
    moment = Moment(confidences=[[0.0, 0.0]] * policy.horizons)
    chosen = policy.choose([[-1, -1]] * policy.horizons, moment)
    assert all(expert < 0 for experts in chosen for expert in experts), "chooses where nobody guesses"


def _check_prefetch(name: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    k, lookahead, layer = int(random.integers(1, 5)), int(random.integers(1, 6)), int(random.integers(4))
    policy = PREFETCH[name](Options(k, lookahead, layers=4, experts=5, copy_ns=10))
    assert 0 <= policy.horizons <= lookahead, f"looks {policy.horizons} layers ahead, of {lookahead}"
    assert policy.guesses in (0, k), f"wants {policy.guesses} guesses, of {k}"
    size = k * int(random.integers(1, 4)) if policy.guesses else 0
    targets = [(layer + ahead) % 4 for ahead in range(1, policy.horizons + 1)]
    ranked = [random.choice([-1, *range(5 * target, 5 * target + 5)], size).tolist() for target in targets]
    check_choice(policy, layer, ranked, [random.random(size).tolist() for _ in targets])
    if policy.needs_guesses:
        check_no_guess(PREFETCH[name](Options(2, 3, layers=4, experts=5, copy_ns=10)))


# Copy orders.


def check_ranks(name: str) -> None:
    """A queue has one stream; ranks are pairs of ints, always the same, and no demand comes behind its own prefetch."""
    order = COPY_ORDERS[name]()
    if not isinstance(order, ByRank):
        return
    assert not order.prefetch_stream, "a queue by rank has one stream"
    for visit in range(5):
        copy = QueuedCopy(False, visit, 3)
        rank, demanded = order.rank(copy), order.rank(copy._replace(demanded=True))
        for given in (rank, demanded):
            assert isinstance(given, tuple) and len(given) == 2, f"rank {given!r}: must be a pair of ints"
            assert all(isinstance(part, int) for part in given), f"rank {given!r}: must be a pair of ints"
        assert order.rank(copy) == rank, "the same copy has another rank when it is asked for again"
        assert demanded <= rank, f"a copy goes back from {rank} to {demanded} when it is demanded"


def check_order_decides_nothing(name: str, seed: int) -> None:
    """An order says when bytes come; what is found, missed, fetched ahead and evicted is the same by any."""
    found = []
    for discipline in (name, "fifo"):
        inputs = random_inputs(seed, copy={"discipline": discipline})
        recording = record(inputs, "simpy")
        accesses = recording.decoded.accesses
        found.append((accesses["copy"].tolist(), recording.copy_reason.tolist(), recording.manager.evicted))
    assert found[0] == found[1], f"{name} and fifo come to different decisions"


def _check_copy_order(name: str, seed: int) -> None:
    check_ranks(name)
    check_order_decides_nothing(name, seed)


# Predictors.

#: Predictors that may use the future: it is what they are for.
LOOKS_AHEAD: Collection[str] = ("oracle",)


def check_guesses(guesses: Guesses, trace: RoutingTrace, steps: Sequence[Step]) -> None:
    """Guesses are ranked distinct experts of the trace, -1 for none, in frozen arrays; confidences lie beside them."""
    assert guesses.rows.tolist() == [row for step in steps for row in step.rows]
    assert guesses.experts.shape[:2] == (len(guesses.rows), trace.layers)
    assert guesses.experts.dtype == np.int16, f"experts are {guesses.experts.dtype}: must be int16"
    assert guesses.experts.min(initial=-1) >= -1
    assert guesses.experts.max(initial=-1) < trace.num_experts, "guesses an expert that is not there"
    for ranked in guesses.experts.reshape(-1, guesses.experts.shape[3]):
        real = ranked[ranked >= 0].tolist()
        assert len(set(real)) == len(real), f"guesses an expert twice: {real}"
    if guesses.confidences is not None:
        assert guesses.confidences.shape == guesses.experts.shape
        assert guesses.confidences.dtype == np.float32
        assert (guesses.confidences[guesses.experts < 0] == 0).all(), "is confident of no guess"
    assert not guesses.experts.flags.writeable, "guesses can be written to"


def check_no_look_ahead(
    name: str, trace: RoutingTrace, steps: Sequence[Step], seed: int, **options: Any
) -> None:  # fmt: skip
    """Another future of the same shape, from a random layer of a random step on, changes no guess made before it."""
    random = np.random.default_rng(seed)
    now, layer = int(random.integers(len(steps))), int(random.integers(trace.layers))
    changed = _with_another_future(trace, steps, now, layer, random)
    before, after = (
        make_predictor(name, seed=3, **options).guess(one, steps, HORIZONS, GUESSES) for one in (trace, changed)
    )
    past = sum(len(step.rows) for step in steps[:now])
    going_on = slice(past, past + len(steps[now].rows))
    for old, new in ((before.experts, after.experts), (before.confidences, after.confidences)):
        if old is not None and new is not None:
            assert np.array_equal(old[:past], new[:past]), "a guess knows a later step"
            same = np.array_equal(old[going_on, : layer + 1], new[going_on, : layer + 1])
            assert same, "a guess knows a later layer of its own step"


def _with_another_future(
    trace: RoutingTrace, steps: Sequence[Step], now: int, layer: int, random: np.random.Generator
) -> RoutingTrace:
    experts = trace.experts.copy()
    present = np.ones(experts.shape, dtype=bool) if trace.made is None else trace.made.copy()
    predictions = None if trace.predictions is None else trace.predictions.copy()
    for number, step in enumerate(steps[now:], now):
        first = layer + 1 if number == now else 0
        for row in step.rows:
            experts[row, first:] = distinct(random, (trace.layers - first,), trace.k, trace.num_experts)
            present[row, first:] = (random.random(trace.layers - first) < 0.85)[:, None]
            if predictions is not None:
                predictions[row, first:] = np.roll(predictions[row, first:], 1, axis=-1)
    return replace(trace, experts=experts, present=present, predictions=predictions)


def _check_predictor(name: str, seed: int, **options: Any) -> None:
    trace = random_trace(seed)
    steps = plan_steps(trace.sequence, trace.phase, batch=2, prefill="chunked", chunk_tokens=2)
    guesses, again = (make_predictor(name, seed=3, **options).guess(trace, steps, HORIZONS, GUESSES) for _ in range(2))
    check_guesses(guesses, trace, steps)
    assert guesses.experts.shape[2:] == (HORIZONS, GUESSES)
    assert guesses.digest == again.digest, "the same question has other guesses when it is asked again"
    if name not in LOOKS_AHEAD:
        check_no_look_ahead(name, trace, steps, seed, **options)


# Placements.


def check_owners(name: str, request: Request) -> None:
    """Every expert has owners among the GPUs, each named once and in order, and the same request the same ones.

    Of a layer, no GPU has more experts than an equal share, and what `replica_bytes` have room for.
    """
    owners = PLACEMENT[name](request)
    experts = request.trace.num_experts
    assert [len(of_layer) for of_layer in owners] == [experts] * request.trace.layers, "not an owner for every expert"
    for of_layer, size_bytes in zip(owners, request.expert_bytes, strict=True):
        for gpus in of_layer:
            assert gpus and list(gpus) == sorted(set(gpus)), f"owners {gpus}: must be some GPUs, each once, in order"
            assert gpus[0] >= 0 and gpus[-1] < request.gpus, f"owners {gpus}: the GPUs are 0 to {request.gpus - 1}"
            assert len(gpus) <= max(1, request.replicas), f"owners {gpus}: at most {request.replicas} of an expert"
        most = -(-experts // request.gpus) + request.replica_bytes // size_bytes
        held = [sum(gpu in gpus for gpus in of_layer) for gpu in range(request.gpus)]
        assert max(held) <= most, f"a GPU has {max(held)} experts of a layer: at most {most}"
    assert PLACEMENT[name](request) == owners, "the same request has other owners when it is made again"


def _check_placement(name: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    trace = random_trace(seed, int(random.integers(1, 4)), int(random.integers(3, 10)))
    gpus, batch, replica_bytes = int(random.integers(1, 6)), int(random.integers(1, 5)), int(random.integers(61))
    sizes = [10] * trace.layers
    check_owners(name, Request(gpus, trace, sizes, batch=batch, replicas=3, replica_bytes=replica_bytes))


@dataclass(frozen=True)
class Asked:
    """A family: its table, and what one random run, by number, asks of a member."""

    names: Collection[str]
    check: Callable[..., None]


#: The families that can be checked.
CONFORMANCE = {
    "eviction": Asked(EVICTION, _check_eviction),
    "prefetch": Asked(PREFETCH, _check_prefetch),
    "copy_order": Asked(COPY_ORDERS, _check_copy_order),
    "predictor": Asked(PREDICTORS, _check_predictor),
    "placement": Asked(PLACEMENT, _check_placement),
}
