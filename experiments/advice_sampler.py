"""What advice tries next: a Gaussian process over all trials so far, fitted anew each time, so that it keeps no state.

A proposal follows from the space, the trials before, the seed and the trial's number, and from nothing else. The first
ones are a Latin hypercube; then Optuna's sampler, which goes by expected improvement of the logarithms of the goals'
figures (of hypervolume, with several goals), takes turns with neighbors of the best trial and, once those are used up,
of the best trial of each value of an unordered key. What cannot run is taken to be worse than all that can.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..workloads.torch_threads import one_thread

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

#: So many trials come before the Gaussian process has a say.
FIRST = 12
#: Every so many trials look beside the best ones.
_TURNS = 2
#: How much worse than the worst a trial is taken to be that cannot run, in the range of all figures.
_WORSE = 0.25

#: Where a trial lies, by key, and how good it is in each goal, more being better; None: it cannot run.
Tried = tuple[tuple[int, ...], tuple[float, ...] | None]


@dataclass(frozen=True)
class Axes:
    """How many values each key has, and whether they are in an order."""

    sizes: Sequence[int]
    ordered: Sequence[bool]

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The axes as Optuna knows them, by their number: places 0, 1, … of an order, or without one."""
        from optuna.distributions import CategoricalDistribution, IntDistribution

        return {
            str(number): IntDistribution(0, size - 1) if ordered else CategoricalDistribution(range(size))
            for number, (size, ordered) in enumerate(zip(self.sizes, self.ordered, strict=True))
        }


def propose(axes: Axes, tried: Sequence[Tried], seed: int, number: int) -> tuple[int, ...]:
    """Returns the places that trial `number` is to try; none that was tried, while there are others."""
    known = [each for each in tried if each[1] is not None]
    if number < FIRST:
        places = _hypercube(axes, seed, number)
    elif not known:
        places = _anywhere(axes, _luck(seed, number))
    elif number % _TURNS:
        places = _by_process(axes, tried, seed, number)
    else:
        places = _beside_best(axes, known, {place for place, _ in tried}, _luck(seed, number))
    return _untried(axes, places, {place for place, _ in tried}, _luck(seed, number))


def _luck(seed: int, number: int) -> random.Random:
    return random.Random(f"{seed} {number}")


def _anywhere(axes: Axes, luck: random.Random) -> tuple[int, ...]:
    return tuple(luck.randrange(size) for size in axes.sizes)


def _beside_best(
    axes: Axes, known: Sequence[Tried], seen: set[tuple[int, ...]], luck: random.Random
) -> tuple[int, ...]:
    """Returns the places of a neighbor of the best trial that was not tried; of several goals, one is drawn.

    What fits barely is often best, which a process that takes all that does not fit for bad shies away from. Once all
    neighbors were tried, those of the best trial of each value of an unordered key follow, ends of orders included:
    another policy may need another threshold, so that changing one of the two is worse than changing neither.
    """
    goal = luck.randrange(len(known[0][1] or ()))
    by_goal = sorted(known, key=lambda each: each[1][goal] if each[1] is not None else 0.0, reverse=True)
    ranked = [places for places, _ in by_goal]
    fresh = [places for places in _beside(axes, ranked[0]) if places not in seen]
    if fresh:
        return luck.choice(fresh)
    unordered = [axis for axis, ordered in enumerate(axes.ordered) if not ordered]
    leaders = {(axis, places[axis]): places for places in reversed(ranked) for axis in unordered}
    starts = list(dict.fromkeys([ranked[0], *leaders.values()]))
    for start in luck.sample(starts, len(starts)):
        fresh = [places for places in _beside(axes, start, ends=True) if places not in seen]
        if fresh:
            return luck.choice(fresh)
    return ranked[0]


def _beside(axes: Axes, start: tuple[int, ...], ends: bool = False) -> list[tuple[int, ...]]:
    """Returns the neighbors of a trial: one key else, the next values of an order, and with `ends` also its ends."""
    beside = []
    for axis, size in enumerate(axes.sizes):
        near = {start[axis] - 1, start[axis] + 1} | ({0, size - 1} if ends else set())
        places = sorted(near) if axes.ordered[axis] else range(size)
        beside += [(*start[:axis], place, *start[axis + 1 :]) for place in places if 0 <= place < size]
    return beside


def _hypercube(axes: Axes, seed: int, number: int) -> tuple[int, ...]:
    """Returns the places of one of the first trials: of each key one of FIRST strata, in an order of its own."""
    places = []
    for axis, size in enumerate(axes.sizes):
        order = list(range(FIRST))
        random.Random(f"{seed} strata {axis}").shuffle(order)
        places.append(min(size - 1, int((order[number] + _luck(seed, number).random()) / FIRST * size)))
    return tuple(places)


def _by_process(axes: Axes, tried: Sequence[Tried], seed: int, number: int) -> tuple[int, ...]:
    """Returns the places of most expected improvement, by Optuna's Gaussian process over what was tried."""
    import optuna
    from optuna.trial import create_trial

    distributions = axes.distributions
    study = optuna.create_study(directions=["maximize"] * len(next(goods for _, goods in tried if goods is not None)))
    values = _with_refused([goods for _, goods in tried])
    for (places, _), goods in zip(tried, values, strict=True):
        params = {str(axis): place for axis, place in enumerate(places)}
        study.add_trial(create_trial(params=params, distributions=distributions, values=goods))
    chance = _luck(seed, number).getrandbits(31)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # that it knows runs to be repeatable
        study.sampler = optuna.samplers.GPSampler(seed=chance, n_startup_trials=1, deterministic_objective=True)
    with one_thread():
        params = study.ask(distributions).params
    return tuple(int(params[name]) for name in distributions)


def _with_refused(goods: Sequence[tuple[float, ...] | None]) -> list[list[float]]:
    """Returns how good each trial is, those that cannot run somewhat worse than the worst."""
    known = [each for each in goods if each is not None]
    bounds = [(min(values), max(values)) for values in zip(*known, strict=True)]
    refused = [low - _WORSE * max(high - low, 1.0) for low, high in bounds]
    return [refused if each is None else list(each) for each in goods]


def _untried(axes: Axes, places: tuple[int, ...], seen: set[Any], luck: random.Random) -> tuple[int, ...]:
    """Returns the places, or the nearest others that were not tried: of one key, then of more and more of them."""
    found = places
    for attempt in range(1000):
        if found not in seen:
            return found
        changed = list(places)
        for axis in luck.sample(range(len(changed)), min(len(changed), 1 + attempt // 20)):
            size = axes.sizes[axis]
            near = axes.ordered[axis] and attempt < 10
            changed[axis] = (
                min(size - 1, max(0, changed[axis] + luck.choice((-1, 1)))) if near else luck.randrange(size)
            )
        found = tuple(changed)
    return found
