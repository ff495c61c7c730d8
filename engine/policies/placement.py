"""Placement policies: which GPUs own which experts, decided from a routing trace before a run.

A placement is a function of a `Request` that returns, for each layer and expert, the GPUs that own it, in ascending
order. To add one: write the function, name it in PLACEMENT, describe it in tests/test_placement.py. Every layer's
experts are spread as evenly as their number allows, so that no GPU has more to hold than another; only replicas come
on top, within their allowance. What is measured is measured on the trace itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...workloads.statistics import popularity
from ...workloads.trace import RoutingTrace

Array = npt.NDArray[Any]
#: The GPUs that own each expert: owners[layer][expert], ascending, at least one.
Owners = list[list[tuple[int, ...]]]

#: What `searched` makes small: the tokens of the busiest GPU of a visit, or the tokens that GPUs send each other.
OBJECTIVES = ("load", "bytes")
#: How many tokens `searched` looks at, evenly spread over the trace in runs of a batch.
_SEARCHED_TOKENS = 512
#: How often `searched` goes through all experts of a layer, unless it finds nothing to do before.
_ROUNDS = 4


@dataclass(frozen=True)
class Request:
    """What a placement is made from: the GPUs, the trace and its experts' sizes; each policy uses what it needs.

    `expert_bytes` are those of one expert of each layer (layers,). `batch` tokens run together. A hot expert gets up
    to `replicas` owners as long as each GPU owns at most `replica_bytes` of experts besides its own. `objective` is
    one of OBJECTIVES.
    """

    gpus: int
    trace: RoutingTrace
    expert_bytes: Sequence[int]
    batch: int = 1
    replicas: int = 2
    replica_bytes: int = 0
    objective: str = "load"


def round_robin(request: Request) -> Owners:
    """Deal the experts out one by one, going on from layer to layer."""
    layers, experts = request.trace.layers, request.trace.num_experts
    return [[((layer * experts + expert) % request.gpus,) for expert in range(experts)] for layer in range(layers)]


def linear(request: Request) -> Owners:
    """Give each GPU a block of neighbors: what serving engines do unless told otherwise."""
    experts = request.trace.num_experts
    return [[(expert * request.gpus // experts,) for expert in range(experts)] for _ in range(request.trace.layers)]


def balanced(request: Request) -> Owners:
    """Give the most popular expert left to the GPU with the fewest tokens so far, as long as that has a place free.

    Longest processing time first: Graham, "Bounds on multiprocessing timing anomalies" (SIAM J. Appl. Math. 17, 1969),
    here with equal numbers of experts on all GPUs.
    """
    return _single(np.stack([_balance(counts, request.gpus) for counts in popularity(request.trace)]))


def replicated(request: Request) -> Owners:
    """Balance, then let the hottest experts have more owners, those with the least load, within the allowance.

    The tokens of an expert with several owners count as shared out equally, as in DeepSeek-V3's redundant experts
    (arXiv:2412.19437, section 3.4).
    """
    counts, gpus = popularity(request.trace), request.gpus
    owner = np.stack([_balance(of_layer, gpus) for of_layer in counts])
    owners: list[list[list[int]]] = [[[gpu] for gpu in of_layer] for of_layer in owner.tolist()]
    load = np.stack([np.bincount(of_layer, weights, gpus) for of_layer, weights in zip(owner, counts, strict=True)])
    left_bytes = [request.replica_bytes] * gpus
    for number in np.argsort(-counts, axis=None, kind="stable").tolist():
        layer, expert = divmod(number, counts.shape[1])
        size_bytes, here = request.expert_bytes[layer], owners[layer][expert]
        if not counts[layer, expert] or max(left_bytes) < min(request.expert_bytes):
            break  # nobody chose what comes now, or nobody has room
        while len(here) < min(request.replicas, gpus):
            others = [gpu for gpu in range(gpus) if gpu not in here and left_bytes[gpu] >= size_bytes]
            if not others:
                break
            load[layer, here] -= counts[layer, expert] / len(here)
            here.append(min(others, key=lambda gpu: float(load[layer, gpu])))
            load[layer, here] += counts[layer, expert] / len(here)
            left_bytes[here[-1]] -= size_bytes
    return [[tuple(sorted(of_expert)) for of_expert in of_layer] for of_layer in owners]


def co_activated(request: Request) -> Owners:
    """Keep together what tokens choose together: each GPU in turn takes the expert that its own go with most often.

    It starts from the most popular expert left; ties go to the lower index. What counts is how much more often two
    experts are chosen together than by chance, given how often each is: the modularity of Newman, "Modularity and
    community structure in networks" (PNAS 103, 2006). A token is sent to each GPU that its experts lie on.
    """
    owner = []
    for layer in range(request.trace.layers):
        chosen = _chosen(request.trace, layer, np.arange(request.trace.tokens))
        owner.append(_cluster(chosen.T @ chosen, request.gpus))
    return _single(np.stack(owner))


def searched(request: Request) -> Owners:
    """Start balanced and swap pairs of experts of two GPUs as long as that lowers the objective.

    "load": the tokens on the busiest GPU, summed over sampled batches; "bytes": the pairs of a token and a GPU that
    its experts lie on, each of which costs one way there and back, unless it is the token's own. Each expert in turn is
    swapped with the one that lowers it most; ties go to the lower index.
    """
    trace, gpus = request.trace, request.gpus
    batches = max(1, min(trace.tokens, _SEARCHED_TOKENS) // request.batch)
    first = np.linspace(0, max(0, trace.tokens - request.batch), batches).astype(np.int64)
    rows = np.unique(first[:, None] + np.arange(min(request.batch, trace.tokens)))
    gain = _load_after if request.objective == "load" else _visits_after
    owner = []
    for layer, counts in enumerate(popularity(trace)):
        chosen = _chosen(trace, layer, rows)
        if request.objective == "load":
            starts = np.arange(0, len(chosen), request.batch)
            chosen = np.add.reduceat(chosen, starts, axis=0) if len(chosen) else chosen
        owner.append(_search(chosen, _balance(counts, gpus), gpus, gain))
    return _single(np.stack(owner))


def _single(owner: Array) -> Owners:
    """Returns owners (layers, experts) of one GPU each as tuples."""
    return [[(gpu,) for gpu in of_layer] for of_layer in owner.tolist()]


def _places(experts: int, gpus: int) -> list[int]:
    """Returns how many experts of a layer each GPU owns: as equal as can be, the first ones more."""
    return [experts // gpus + (gpu < experts % gpus) for gpu in range(gpus)]


def _balance(counts: Array, gpus: int) -> Array:
    """Returns the owner of each expert of a layer (experts,), by its tokens, as `balanced` does."""
    places, load = _places(len(counts), gpus), [0] * gpus
    owner = np.empty(len(counts), dtype=np.int64)
    for expert in np.argsort(-counts, kind="stable").tolist():
        gpu = min((gpu for gpu in range(gpus) if places[gpu]), key=load.__getitem__)
        owner[expert] = gpu
        places[gpu] -= 1
        load[gpu] += int(counts[expert])
    return owner


def _chosen(trace: RoutingTrace, layer: int, rows: Array) -> Array:
    """Returns which experts of a layer these rows chose (rows that are routed there, experts), 0 or 1."""
    if trace.routed is not None:
        rows = rows[trace.routed[rows, layer]]
    chosen = np.zeros((len(rows), trace.num_experts), dtype=np.float32)  # products of it are quick, and exact
    of_row, experts = np.arange(len(rows))[:, None], trace.experts[rows, layer]
    if trace.made is None:
        chosen[of_row, experts] = 1
    else:
        made = trace.made[rows, layer]
        chosen[np.broadcast_to(of_row, made.shape)[made], experts[made]] = 1
    return chosen


def _cluster(together: Array, gpus: int) -> Array:
    """Returns the owner of each expert (experts,) from how often pairs are chosen together (experts, experts)."""
    experts = len(together)
    popular = together.diagonal().copy()
    together = together * (1 - np.eye(experts))
    pairs = together.sum(axis=0)
    beyond_chance = together - np.outer(pairs, pairs) / max(1.0, pairs.sum())
    owner = np.full(experts, -1, dtype=np.int64)
    for gpu, places in enumerate(_places(experts, gpus)):
        affinity = popular
        for _ in range(places):
            expert = int(np.argmax(np.where(owner < 0, affinity, -np.inf)))
            owner[expert] = gpu
            affinity = beyond_chance[expert] + (0 if affinity is popular else affinity)
    return owner


#: From (chosen (rows, experts), owner, tokens by GPU (rows, GPUs), expert): the objective after each swap (experts,).
_After = Callable[[Array, Array, Array, int], Array]


def _search(chosen: Array, owner: Array, gpus: int, after: _After) -> Array:
    """Swap experts until no swap lowers the objective, or all rounds are over; return the owners (experts,)."""
    experts = chosen.shape[1]
    on_gpu = np.stack([chosen[:, owner == gpu].sum(axis=1) for gpu in range(gpus)], axis=1)
    for _ in range(_ROUNDS):
        swapped = False
        for expert in range(experts):
            value = after(chosen, owner, on_gpu, expert)
            other = int(np.argmin(value))
            if value[other] < value[expert]:  # a swap with itself changes nothing
                change = chosen[:, other] - chosen[:, expert]
                on_gpu[:, owner[expert]] += change
                on_gpu[:, owner[other]] -= change
                owner[expert], owner[other] = owner[other], owner[expert]
                swapped = True
        if not swapped:
            break
    return owner


def _load_after(chosen: Array, owner: Array, on_gpu: Array, expert: int) -> Array:
    """Returns the tokens of the busiest GPU, summed over batches, after a swap of an expert with each other one."""
    home = owner[expert]
    change = chosen - chosen[:, [expert]]  # (batches, experts): what the expert's GPU gains
    here, there = on_gpu[:, [home]] + change, on_gpu[:, owner] - change
    # The busiest of the GPUs that the swap leaves alone is among the three busiest of all.
    busiest = np.argsort(-on_gpu, axis=1, kind="stable")[:, :3]
    rest = np.zeros_like(change)
    for rank in reversed(range(busiest.shape[1])):
        gpu = busiest[:, [rank]]
        rest = np.where((gpu == home) | (gpu == owner), rest, np.take_along_axis(on_gpu, gpu, axis=1))
    after: Array = np.maximum(np.maximum(here, there), rest).sum(axis=0)
    after[owner == home] = on_gpu.max(axis=1).sum()
    return after


def _visits_after(chosen: Array, owner: Array, on_gpu: Array, expert: int) -> Array:
    """Returns the pairs of a token and a GPU that its experts lie on, after a swap of an expert with each other one.

    A token that chose just one of the two leaves a GPU where it has nothing else, and comes to one where it had none.
    """
    home, moves = owner[expert], chosen[:, [expert]]
    none, alone = on_gpu == 0, on_gpu == 1
    # By token and GPU of the other expert: what changes where the token chose the first alone, or the other alone.
    first = moves * (none.astype(np.float32) - alone[:, [home]])
    other = (1 - moves) * (none[:, [home]].astype(np.float32) - alone)
    by_gpu = (other - first).T @ chosen
    before = np.count_nonzero(on_gpu)
    after: Array = before + first.sum(axis=0)[owner] + by_gpu[owner, np.arange(len(owner))]
    after[owner == home] = before
    return after


PLACEMENT: dict[str, Callable[[Request], Owners]] = {
    "round-robin": round_robin,
    "linear": linear,
    "balanced": balanced,
    "replicated": replicated,
    "co-activated": co_activated,
    "searched": searched,
}
