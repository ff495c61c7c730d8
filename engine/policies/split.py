"""Where the layers of a model are divided into the stages of a pipeline.

Each way sees what `Layers` holds and returns how many layers each stage takes. To add one: write a function, name it
in SPLITS, describe it in tests/test_split.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from ...errors import InputError
from ...workloads.batches import evenly


class SplitError(InputError):
    """Layers that cannot be divided so."""


@dataclass(frozen=True)
class Layers:
    """What layers are divided by: into how many stages, what weighs on each, and what a division comes to.

    `expert_bytes` (layers,) are those of one expert; `compute_ns` returns the kernels' time of each layer in the run's
    first steps (layers,), the head's with the last layer. `makespan_ns` simulates these steps with so many layers in
    each stage; None if one of the stages could not run.
    """

    stages: int
    expert_bytes: Sequence[int]
    compute_ns: Callable[[], Sequence[int]]
    makespan_ns: Callable[[tuple[int, ...]], int | None]


def divide(split: str | list[int], layers: Layers) -> tuple[int, ...]:
    """Returns the layers of each stage (stages,). Raises SplitError if they do not fit the model."""
    count = len(layers.expert_bytes)
    if layers.stages > count:
        raise SplitError(f"parallel.stages = {layers.stages}: choose at most {count}, the layers of the model")
    if isinstance(split, str):
        return SPLITS[split](layers)
    if sum(split) != count:
        raise SplitError(f"parallel.split = {split}: these are {sum(split)} layers, the model has {count}")
    return tuple(split)


def _equal(layers: Layers) -> tuple[int, ...]:
    return tuple(evenly(len(layers.expert_bytes), layers.stages))


def _by_compute(layers: Layers) -> tuple[int, ...]:
    return balanced(layers.compute_ns(), layers.stages)


def _by_memory(layers: Layers) -> tuple[int, ...]:
    return balanced(layers.expert_bytes, layers.stages)


def _searched(layers: Layers) -> tuple[int, ...]:
    """Move one layer over one border at a time, from the division by compute, as long as the run gets shorter."""
    makespan_ns = cache(layers.makespan_ns)
    best = _by_compute(layers)
    best_ns = makespan_ns(best)
    while True:
        tried = [(ns, counts) for counts in _moved(best) if (ns := makespan_ns(counts)) is not None]
        if not tried or (best_ns is not None and min(tried)[0] >= best_ns):
            return best
        best_ns, best = min(tried)


#: How layers are divided, by name.
SPLITS: dict[str, Callable[[Layers], tuple[int, ...]]] = {
    "equal": _equal,
    "compute": _by_compute,
    "memory": _by_memory,
    "searched": _searched,
}


def _moved(counts: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yields the divisions with one layer moved to a neighbor."""
    for left in range(len(counts) - 1):
        for shift in (-1, 1):
            moved = (*counts[:left], counts[left] + shift, counts[left + 1] - shift, *counts[left + 2 :])
            if min(moved) > 0:
                yield moved


def balanced(weights: Sequence[int], stages: int) -> tuple[int, ...]:
    """Returns how many neighboring weights each stage takes, so that the heaviest stage is as light as can be.

    Of several such divisions it is the one with the least sum of squares, and of these the one with most at the front.
    """
    before = [0, *accumulate(weights)]
    heaviest, _ = _cheapest(before, stages, lambda so_far, weight: max(so_far, weight))
    _, counts = _cheapest(
        before, stages, lambda so_far, weight: so_far + (weight**2 if weight <= heaviest else float("inf"))
    )
    return counts


def _cheapest(before: Sequence[int], stages: int, join: Callable[[float, int], float]) -> tuple[float, tuple[int, ...]]:
    """Returns the least cost of dividing (and how), where `join` adds a stage of some weight to the cost so far.

    `before` are the sums of the weights before each place, by dynamic programming over the ends of the stages.
    """
    places = range(len(before))
    best: list[tuple[float, tuple[int, ...]] | None] = [(0, ()), *[None] * (len(before) - 1)]
    for _ in range(stages):
        following: list[tuple[float, tuple[int, ...]] | None] = [None] * len(before)
        for end in places:
            options = [
                (join(known[0], before[end] - before[start]), (*known[1], end - start))
                for start in range(end)
                if (known := best[start]) is not None
            ]
            if options:
                following[end] = min(options, key=lambda option: (option[0], [-count for count in option[1]]))
        best = following
    found = best[-1]
    assert found is not None  # there are as many weights as stages at least
    return found
