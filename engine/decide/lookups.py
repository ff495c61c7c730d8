"""The look-ups of a run as flat arrays, visit after visit: the input of compiled replays and stack algorithms.

One pool's look-ups never touch another's, so each pool has its own and is replayed by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...machine_code import compiled
from ...workloads.batches import Step, columns_of
from ...workloads.trace import RoutingTrace

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Lookups:
    """The look-ups of one pool in order, n in v visits; a visit without any is left out.

    `experts` int32 (n,) are `layer * experts + index`, unique within a visit, in access order; `recency` int32 (n,) the
    same of each visit in the order of their last appearance; visit i is `starts[i]` to `starts[i + 1]`, int64 (v + 1,).
    `cells` int64 (n,) is each one's place in the flattened trace (tokens, layers, k); None if they fill it in order.
    The largest visit looks `largest_visit` experts up.
    """

    experts: npt.NDArray[np.int32]
    recency: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    cells: npt.NDArray[np.int64] | None
    largest_visit: int


def list_lookups(
    trace: RoutingTrace, steps: Sequence[Step], lookup: str, layer: int | None = None, *, shared: bool
) -> Lookups:
    """Lay the look-ups of a run out, of all layers or of one; `lookup` "single" makes each its own visit.

    With `shared`, layers share the experts of the same index: all are those of layer 0.
    """
    stride = 0 if shared else trace.num_experts
    single = lookup == "single"
    if layer is None and in_file_order(trace, steps):
        experts = _number_in_order(trace.experts, stride)
        size = 1 if single else trace.k
        return Lookups(experts, experts, np.arange(0, len(experts) + 1, size), None, size)
    ends, rows, *_ = columns_of(steps)
    one_by_one = len(rows) == len(steps)
    layers = range(trace.layers) if layer is None else range(layer, layer + 1)
    made = np.ones((1, 1, 1), dtype=bool) if trace.made is None else np.ascontiguousarray(trace.made)
    most = len(rows) * len(layers) * trace.k
    experts, cells = np.empty(most, dtype=np.int32), np.empty(most, dtype=np.int64)
    # A token never names an expert twice: without a batch, the first appearance is the last.
    recency = experts if single or one_by_one else np.empty(most, dtype=np.int32)
    starts = np.zeros(most + 1 if single else len(steps) * len(layers) + 1, dtype=np.int64)
    visits = _list(
        trace.experts,
        made,
        trace.made is not None,
        rows,
        ends,
        layers.start,
        layers.stop,
        trace.num_experts,
        stride,
        single,
        recency is not experts,
        experts,
        recency,
        cells,
        starts,
    )
    n, starts = starts[visits], starts[: visits + 1]
    largest = 1 if single else int(np.diff(starts).max(initial=0))
    return Lookups(experts[:n], recency[:n], starts, cells[:n], largest)


def in_file_order(trace: RoutingTrace, steps: Sequence[Step]) -> bool:
    """Whether the run looks up all that is in the trace, one token after the other in the order of the file."""
    if trace.present is not None or len(steps) != trace.tokens:
        return False
    rows = columns_of(steps).rows
    return len(rows) == trace.tokens and bool((rows == np.arange(trace.tokens)).all())


@compiled
def _number_in_order(chosen: Array, stride: int) -> Array:
    """Returns `layer * stride + index` of every (token, layer, rank), flat, int32."""
    tokens, layers, k = chosen.shape
    experts = np.empty(tokens * layers * k, dtype=np.int32)
    n = 0
    for token in range(tokens):
        for layer in range(layers):
            for rank in range(k):
                experts[n] = layer * stride + int(chosen[token, layer, rank])
                n += 1
    return experts


@compiled
def _list(
    chosen: Array,
    made: Array,
    has_gaps: bool,
    rows: Array,
    ends: Array,
    first_layer: int,
    last_layer: int,
    num_experts: int,
    stride: int,
    single: bool,
    has_recency: bool,
    experts: Array,
    recency: Array,
    cells: Array,
    starts: Array,
) -> int:
    """Fill in the arrays of a Lookups; return how many visits there are."""
    layers, k = chosen.shape[1], chosen.shape[2]
    first_seen = np.full(num_experts, -1, dtype=np.int64)  # the visit an index was last seen in, walking forward
    last_seen = np.full(num_experts, -1, dtype=np.int64)  # and walking back
    n = visits = 0
    for step in range(len(ends) - 1):
        for layer in range(first_layer, last_layer):
            start = n
            for at in range(ends[step], ends[step + 1]):
                row = rows[at]
                for rank in range(k):
                    if has_gaps and not made[row, layer, rank]:
                        break
                    index = int(chosen[row, layer, rank])
                    if not single:
                        if first_seen[index] == visits:
                            continue
                        first_seen[index] = visits
                    experts[n] = layer * stride + index
                    cells[n] = (row * layers + layer) * k + rank
                    n += 1
                    if single:
                        visits += 1
                        starts[visits] = n
            if single or n == start:
                continue
            back = n
            for at in range(ends[step + 1] - 1, ends[step] - 1, -1) if has_recency else range(0):
                row = rows[at]
                for rank in range(k - 1, -1, -1):
                    if has_gaps and not made[row, layer, rank]:
                        continue
                    index = int(chosen[row, layer, rank])
                    if last_seen[index] != visits:
                        last_seen[index] = visits
                        back -= 1
                        recency[back] = layer * stride + index
            visits += 1
            starts[visits] = n
    return visits
