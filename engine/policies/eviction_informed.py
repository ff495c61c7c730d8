"""Eviction policies that know more than what was used: the router's weights, sequences, guesses, or the future.

They read the run's trace and steps, so a `MemoryManager` that is made by hand needs a `Setting` with both.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from heapq import merge

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...workloads.batches import DECODE, PulledSteps, Step, columns_of
from ...workloads.trace_checks import POPULARITY
from .eviction_base import NO_SETTING, Eviction, Ranking, Setting, add_decayed


class Static(Eviction):
    """Keep the most popular experts, whatever is used: what is demanded of the others takes turns in what is left.

    As Fiddler (Kamahori et al., arXiv:2402.07033) places experts. Popularity is the trace's array `popularity`
    (layers, experts), if it has one; else the uses in the first tenth of the steps. Ties go to who came first.
    """

    def __init__(self, setting: Setting = NO_SETTING) -> None:
        super().__init__(setting)
        #: By expert.
        self.popularity = popularity(setting)
        self._order = Ranking()

    def admit(self, expert: int, demanded: bool) -> None:
        """Rank it by its popularity."""
        self._order.put(expert, self.popularity[expert])

    def use(self, expert: int, weight: float) -> None:
        """Do nothing."""

    def evict(self, expert: int) -> None:
        """Take it out of the order."""
        self._order.remove(expert)

    def victims(self) -> Iterator[int]:
        """Walk from the least to the most popular."""
        return iter(self._order)


#: Popularity that no trace states is learned in the first of so many parts of the steps.
LEARNED_PART = 10


def popularity(setting: Setting) -> list[float]:
    """Returns the popularity of every expert of the model: given by the trace, or learned in a part of the steps."""
    trace = setting.known_trace()
    popular: list[float]
    if POPULARITY not in trace.extra:
        learned = setting.steps[: -(-len(setting.steps) // LEARNED_PART)]
        if isinstance(setting.steps, PulledSteps):  # nobody knows them before they run
            learned = [Step(DECODE, np.arange(-(-trace.tokens // LEARNED_PART)))]
        used, _ = _accesses(replace(setting, steps=learned))
        popular = np.bincount(used, minlength=trace.layers * trace.num_experts).tolist()
        return popular
    given = np.asarray(trace.extra[POPULARITY], dtype=float)
    if given.shape != (trace.layers, trace.num_experts) or np.isnan(given).any():
        raise InputError(
            f"trace array popularity {given.shape}: must be numbers (layers, experts) = "
            f"({trace.layers}, {trace.num_experts})"
        )
    popular = (given.sum(axis=0) if setting.shared else given.reshape(-1)).tolist()
    return popular


class GateWeight(Eviction):
    """Evict the expert with the least gate weight of late; weights fade by half every HALF_LIFE_STEPS forward passes.

    After the score-aware caching of HybriMoE (Zhong et al., arXiv:2504.05897), S <- a s + (1 - a) S over a layer's
    router scores s; a trace knows those of the chosen experts only. Absent experts keep their score.
    """

    HALF_LIFE_STEPS = 8.0

    def __init__(self, setting: Setting = NO_SETTING) -> None:
        super().__init__(setting)
        self._clock = _StepClock(setting)
        self._score: dict[int, float] = {}
        self._order = Ranking()

    def begin(self, visit: int, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """Add the visit's weights."""
        now = self._clock.step_of(visit) / self.HALF_LIFE_STEPS
        for expert, weight in zip(experts, weights, strict=True):
            score = self._score[expert] = add_decayed(self._score.get(expert, -math.inf), now, weight)
            if expert in self._order:
                self._order.put(expert, score)

    def admit(self, expert: int, demanded: bool) -> None:
        """Rank it by its score."""
        self._order.put(expert, self._score.get(expert, -math.inf))

    def use(self, expert: int, weight: float) -> None:
        """Do nothing: the visit's beginning has counted it."""

    def evict(self, expert: int) -> None:
        """Take it out of the order."""
        self._order.remove(expert)

    def victims(self) -> Iterator[int]:
        """Walk from the least score to the greatest."""
        return iter(self._order)


class Heat(GateWeight):
    """Evict the coldest expert: every use heats it by one, and heat fades by half every HALF_LIFE_STEPS forward passes.

    Least frequently used with dynamic aging (Arlitt et al., "Evaluating content management techniques for web proxy
    caches", 2000), by forward passes; of absent experts, too, so that one that returns is as hot as its uses made it.
    """

    def begin(self, visit: int, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """Heat the visit's experts."""
        super().begin(visit, layer, experts, [1.0] * len(experts))


class PayBack(Heat):
    """As heat, and nobody leaves for a prefetch or an upload that is not hotter: it finds no room, and is dropped.

    The admission of TinyLFU (Einziger, Friedman & Manes, "TinyLFU: a highly efficient cache admission policy", ACM
    Transactions on Storage 13, 2017). What is demanded gets its room.
    """

    may_spare = True

    def __init__(self, setting: Setting = NO_SETTING) -> None:
        super().__init__(setting)
        self._wants: int | None = None  # the prefetch that room is being made for

    def miss(self, expert: int, demanded: bool) -> None:
        """Remember whom room is made for."""
        self._wants = None if demanded else expert

    def admit(self, expert: int, demanded: bool) -> None:
        """Rank it by its heat."""
        self._wants = None
        super().admit(expert, demanded)

    def victims(self) -> Iterator[int]:
        """Walk from the coldest to the hottest; for a prefetch, only who is colder than it."""
        wants, self._wants = self._wants, None
        bound = math.inf if wants is None else self._score.get(wants, -math.inf)
        for expert in super().victims():
            if wants is not None and self._score.get(expert, -math.inf) >= bound:
                return
            yield expert


class LeastStale(Eviction):
    """Evict stale experts first, which this forward pass has not touched; of those, the layers that come round last.

    Least-Stale of SpecMD (Hoang et al., arXiv:2602.03921): experts of earlier passes before those of this one, by the
    layers' fixed order. The layers that come round last are those just passed, which an LRU keeps while it evicts those
    about to run. Its code is not public; that the order runs back from the layer just passed, and within a layer from
    the one touched longest ago, is our reading.
    """

    def __init__(self, setting: Setting = NO_SETTING) -> None:
        super().__init__(setting)
        self._clock = _StepClock(setting)
        self._step = -1
        self._layer = 0
        layers = range(max(setting.layers) + 1)
        self._stale: list[OrderedDict[int, None]] = [OrderedDict() for _ in layers]
        self._fresh: list[OrderedDict[int, None]] = [OrderedDict() for _ in layers]

    def begin(self, visit: int, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """Make all stale when a forward pass begins."""
        self._layer = layer
        step = self._clock.step_of(visit)
        if step != self._step:
            self._step = step
            for stale, fresh in zip(self._stale, self._fresh, strict=True):
                stale.update(fresh)
                fresh.clear()

    def admit(self, expert: int, demanded: bool) -> None:
        """Put it last among the fresh ones of its layer."""
        self._fresh[expert // self.setting.experts][expert] = None

    def use(self, expert: int, weight: float) -> None:
        """Make it fresh, and the last."""
        layer = expert // self.setting.experts
        self._stale[layer].pop(expert, None)
        self._fresh[layer][expert] = None
        self._fresh[layer].move_to_end(expert)

    def evict(self, expert: int) -> None:
        """Take it out."""
        layer = expert // self.setting.experts
        group = self._stale if expert in self._stale[layer] else self._fresh
        del group[layer][expert]

    def victims(self) -> Iterator[int]:
        """Walk the stale, then the fresh; layer by layer, back from the one before this."""
        for group in (self._stale, self._fresh):
            for layer in range(self._layer - 1, self._layer - 1 - len(group), -1):
                yield from group[layer]


class ActivationAware(Eviction):
    """Evict the expert least activated by the sequences in flight, and rather in late layers than in early ones.

    MoE-Infinity (Xue et al., arXiv:2401.14361): a sequence's expert activation matrix counts the tokens that it sent
    to each expert; an expert's priority is (its share of its layer's tokens + epsilon) * (1 - layer / layers), because
    prefetching has least time for early layers. A sequence in flight has begun and not ended; their counts are summed.
    """

    needs_future = True

    EPSILON = 1e-3

    def __init__(self, setting: Setting = NO_SETTING) -> None:
        super().__init__(setting)
        trace = setting.known_trace()
        self._clock = _StepClock(setting)
        self._last_step = {int(name): i for i, step in enumerate(setting.steps) for name in trace.sequence[step.rows]}
        self._counted = (-1, -1)  # the latest step and layer whose tokens are counted
        self._of: dict[int, Counter[int]] = {}  # sequence -> expert -> tokens
        self._tokens: Counter[int] = Counter()  # expert -> tokens of all sequences in flight
        self._of_layer = [0] * trace.layers
        # A share's denominator is its layer's: within a layer the order is that of the counts.
        self._order = [Ranking() for _ in range(trace.layers)]

    def begin(self, visit: int, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """Count the tokens of the step at this layer; forget the sequences that have ended."""
        step = self._clock.step_of(visit)
        if self._counted == (step, layer):
            return
        if self._counted[0] != step:
            for name in [name for name in self._of if self._last_step[name] < step]:
                self._add(self._of.pop(name), -1)
        self._counted = (step, layer)
        for name, used in _chosen(self.setting, step, layer):
            self._of.setdefault(name, Counter()).update(used)
            self._add(Counter(used), 1)

    def _add(self, tokens: Counter[int], sign: int) -> None:
        experts = self.setting.experts
        for expert, count in tokens.items():
            layer = expert // experts
            self._tokens[expert] += sign * count
            self._of_layer[layer] += sign * count
            if expert in self._order[layer]:
                self._order[layer].put(expert, self._tokens[expert])

    def admit(self, expert: int, demanded: bool) -> None:
        """Rank it in its layer."""
        self._order[expert // self.setting.experts].put(expert, self._tokens[expert])

    def use(self, expert: int, weight: float) -> None:
        """Do nothing: the visit's beginning has counted it."""

    def evict(self, expert: int) -> None:
        """Take it out of its layer's order."""
        self._order[expert // self.setting.experts].remove(expert)

    def victims(self) -> Iterator[int]:
        """Walk from the lowest to the highest priority, ties to the earlier layer."""
        for _, _, expert in merge(*map(self._by_priority, range(len(self._order)))):
            yield expert

    def _by_priority(self, layer: int) -> Iterator[tuple[float, int, int]]:
        """Yields (priority, layer, expert) of a layer's experts in memory, lowest first."""
        early = 1.0 - layer / len(self._order)
        for expert in self._order[layer]:
            share = self._tokens[expert] / max(1, self._of_layer[layer])
            yield (share + self.EPSILON) * early, layer, expert


def _chosen(setting: Setting, step: int, layer: int) -> Iterator[tuple[int, list[int]]]:
    """Yields (sequence, its experts) for every token that a step routes at a layer."""
    trace = setting.known_trace()
    rows = setting.steps[step].rows
    made = trace.made
    if trace.routed is not None:
        rows = rows[trace.routed[rows, layer]]
    offset = 0 if setting.shared else layer * setting.experts
    chosen = (trace.experts[rows, layer].astype(np.int64) + offset).tolist()
    if made is not None:
        chosen = [each[:count] for each, count in zip(chosen, made[rows, layer].sum(axis=1).tolist(), strict=True)]
    return zip(trace.sequence[rows].tolist(), chosen, strict=True)


class Predictive(Eviction):
    """Evict whom the predictor does not expect, least recently used first; then whom it expects latest.

    Every visit's guesses say which experts the layers ahead will use; one that its layer's visit proves wrong is
    dropped. The guide's smart eviction; as the predictive caching of ExpertFlow (He et al., arXiv:2410.17954). Without
    guesses it is LRU.
    """

    needs_guesses = True

    def __init__(self, setting: Setting = NO_SETTING) -> None:
        super().__init__(setting)
        self._layers = setting.known_trace().layers
        self._clock = _StepClock(setting)
        self._now = -1  # in layer visits, also where every pair is looked up by itself
        self._uses = 0
        self._expected: dict[int, int] = {}  # expert -> when
        self._due: dict[int, list[int]] = {}  # when -> experts that may be expected then
        self._last_use: dict[int, int] = {}  # of the experts in memory
        self._order = Ranking()

    def begin(self, visit: int, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """Drop the guesses for the layers up to here and take those made here."""
        step = self._clock.step_of(visit)
        now = step * self._layers + layer
        if now == self._now:
            return
        for when in range(self._now + 1, now + 1):
            for expert in self._due.pop(when, ()):
                if self._expected.get(expert) == when:
                    del self._expected[expert]
                    self._rank(expert)
        self._now = now
        if self.setting.guesses is not None:
            self._expect(step, layer)

    def _expect(self, step: int, layer: int) -> None:
        """Take the guesses that a step's tokens make at a layer, for layers of this pool."""
        guesses = self.setting.guesses
        assert guesses is not None
        by_horizon = np.moveaxis(guesses.experts[guesses.places(self.setting.steps[step].rows), layer], 1, 0)
        for ahead, guessed in enumerate(by_horizon.reshape(len(by_horizon), -1).tolist(), 1):
            target = (layer + ahead) % self._layers
            if target not in self.setting.layers:
                continue
            offset = 0 if self.setting.shared else target * self.setting.experts
            when = self._now + ahead
            for index in guessed:
                expert = offset + index
                if index >= 0 and self._expected.get(expert, when + 1) > when:
                    self._expected[expert] = when
                    self._due.setdefault(when, []).append(expert)
                    self._rank(expert)

    def _rank(self, expert: int) -> None:
        """Rank an expert, if it is in memory: by when it is expected, or by its last use."""
        if expert in self._last_use:
            when = self._expected.get(expert)
            self._order.put(expert, (0, self._last_use[expert]) if when is None else (1, -when))

    def admit(self, expert: int, demanded: bool) -> None:
        """Rank it; a prefetch comes as the latest."""
        self.use(expert, 1.0)

    def use(self, expert: int, weight: float) -> None:
        """Note its last use."""
        self._uses += 1
        self._last_use[expert] = self._uses
        self._rank(expert)

    def evict(self, expert: int) -> None:
        """Take it out of the order; what is expected of it remains."""
        self._order.remove(expert)
        del self._last_use[expert]

    def victims(self) -> Iterator[int]:
        """Walk the unexpected, then from the latest expected to the next."""
        return iter(self._order)


class Belady(Eviction):
    """Evict the expert whose next use is farthest away: the fewest misses on demand, where experts are of one size.

    Where sizes differ that is no bound: two small ones may be worth more than the large one that comes sooner.

    Belady, "A study of replacement algorithms for a virtual-storage computer" (1966). It reads the future off the
    trace, so it needs a setting with trace and steps. Experts never used again go first, ties to who was put there
    first. A prefetched expert's next use is the one after the visit that fetched it.
    """

    needs_future = True

    def __init__(self, setting: Setting = NO_SETTING) -> None:
        super().__init__(setting)
        self._now = -1  # the pool's own visits, counted
        self._uses, self._next, self._end = _uses(setting)
        self._never = max(self._uses, default=0) + 1  # visits, which may be more than uses: some are of nobody
        self._order = Ranking()

    def begin(self, visit: int, layer: int, experts: Sequence[int], weights: Sequence[float]) -> None:
        """Move on by one visit."""
        self._now += 1

    def admit(self, expert: int, demanded: bool) -> None:
        """Rank it by its next use."""
        at, end, now = self._next[expert], self._end[expert], self._now
        while at < end and self._uses[at] <= now:
            at += 1
        self._next[expert] = at
        self._order.put(expert, -self._uses[at] if at < end else -self._never)

    def use(self, expert: int, weight: float) -> None:
        """Rank it by its next use."""
        self.admit(expert, True)

    def evict(self, expert: int) -> None:
        """Take it out of the order."""
        self._order.remove(expert)

    def victims(self) -> Iterator[int]:
        """Walk from the farthest next use to the nearest."""
        return iter(self._order)


def _uses(setting: Setting) -> tuple[array[int], list[int], list[int]]:
    """Returns the visits (of the pool's layers, counted from 0) that use each expert, expert by expert, ascending.

    Beside them, for every expert of the model, where its own begin and where they end.
    """
    experts, visits = _accesses(setting)
    order = np.argsort(experts, kind="stable")
    layers = 1 + max(setting.layers, default=0)
    count = np.bincount(experts, minlength=layers * setting.experts)
    ends = np.cumsum(count)
    return array("q", visits[order].astype(np.int64).tobytes()), (ends - count).tolist(), ends.tolist()


def _accesses(setting: Setting) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns all (token, expert) pairs that the pool's layers will look up, in order: experts, and visits from 0."""
    trace = setting.known_trace()
    starts, rows, *_ = columns_of(setting.steps)
    step = np.repeat(np.arange(len(setting.steps)), np.diff(starts))
    layers = np.array(setting.layers, dtype=np.int64)
    offset = 0 if setting.shared else layers * setting.experts
    chosen = trace.experts[rows][:, layers].astype(np.int64) + np.reshape(offset, (1, -1, 1))
    visit = step[:, None] * len(layers) + np.arange(len(layers))
    # Dispatch goes step by step, layer by layer, then token by token.
    order = np.argsort(visit, axis=None, kind="stable")
    chosen, visits = chosen.reshape(-1, trace.k)[order], np.repeat(visit.reshape(-1)[order], trace.k)
    if trace.made is None:
        experts = chosen.reshape(-1)
    else:
        made = trace.made[rows][:, layers].reshape(-1, trace.k)[order]
        experts, visits = chosen[made], visits[made.reshape(-1)]
    return experts, np.arange(len(experts)) if setting.single else visits


class _StepClock:
    """Says which step a visit belongs to; visits are asked for in order."""

    def __init__(self, setting: Setting) -> None:
        trace = setting.known_trace()
        self._layers = 0 if setting.single else trace.layers
        self._ends: list[int] = []
        if setting.single:  # a visit is a (token, expert) pair
            pairs = np.full(trace.tokens, trace.layers * trace.k)
            if trace.made is not None:
                pairs = trace.made.sum(axis=(1, 2))
            self._ends = np.cumsum([int(pairs[step.rows].sum()) for step in setting.steps]).tolist()
        self._step = 0

    def step_of(self, visit: int) -> int:
        """Returns the step of a visit."""
        if self._layers:
            return visit // self._layers
        while visit >= self._ends[self._step]:
            self._step += 1
        return self._step
