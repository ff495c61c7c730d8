"""The surface of a GPU that was not measured: that of one that was, scaled by what their datasheets say.

Of a kernel's time, what its bytes take at the rate of the quickest kernel (of weights in fewer than 16 bits: of the
quickest of any dtype) goes with memory bandwidth, or what its operations take with those a second of its dtype,
whichever is more; the rest is latency and stays. How far such a surface can be off is more than the measured one:
`off` says by how much more, as a relative standard deviation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot

import numpy as np
import numpy.typing as npt

from ..dtypes import bits_of
from .facts import Uncertainty
from .surface import AttentionTable, GroupCosts, GroupsByDispatch, ProductTable, PromptTable, SmallTable, Surface

_Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scale:
    """How many times the measured GPU's memory bandwidth, and operations a second by dtype, another GPU has.

    `device` is the measured one; `off` how far what is scaled can be off besides, as a relative standard deviation.
    """

    device: str
    memory: float
    flops: Mapping[str, float]
    off: float


def scaled_surface(surface: Surface, scale: Scale) -> Surface:
    """Returns a surface for another GPU; its source is `assumed`, and its device the one that was measured."""
    bytes_per_ns = max(map(_bytes_per_ns, surface.products))
    return Surface(
        source="assumed",
        device=surface.device or scale.device,
        note=f"that of an {surface.device or scale.device}, scaled by datasheets: {scale.memory:.3g} times its memory "
        f"bandwidth, {', '.join(f'{times:.3g} times its {dtype} FLOP/s' for dtype, times in scale.flops.items())}",
        products=tuple(_products(table, scale, bytes_per_ns) for table in surface.products),
        small=tuple(_small(table, scale) for table in surface.small),
        attention=tuple(_attention(table, scale) for table in surface.attention),
        prompts=tuple(_prompts(table, scale) for table in surface.prompts),
        groups={
            part: GroupsByDispatch(eager=_group(groups.eager, scale), graph=_group(groups.graph, scale))
            for part, groups in surface.groups.items()
        },
        beside_copy_ns_per_mib=surface.beside_copy_ns_per_mib / scale.memory,
        launches=surface.launches,
    )


def _products(table: ProductTable, scale: Scale, bytes_per_ns: float) -> ProductTable:
    weights, tokens = _weights(table)
    ns = np.array(table.ns, dtype=np.float64)
    read_bytes = weights * float(bits_of(table.dtype)) / 8
    # Kernels that unpack may all be held back by that on the measured GPU, and not by its memory.
    by_memory = read_bytes / bytes_per_ns if bits_of(table.dtype) < 16 else _at_most(read_bytes, ns)
    by_operations = _at_most(weights * tokens, ns)
    memory_bound = by_memory >= by_operations
    times = np.where(memory_bound, scale.memory, scale.flops.get(table.dtype, scale.memory))
    return table.model_copy(update={"ns": _quicker(ns, np.maximum(by_memory, by_operations), times)})


def _weights(table: ProductTable) -> tuple[_Numbers, _Numbers]:
    """Returns how many weights and tokens each of a table's products has."""
    rows, columns, tokens = (
        each.ravel() for each in np.meshgrid(table.rows, table.columns, table.tokens, indexing="ij")
    )
    return 1.0 * rows * columns, 1.0 * tokens


def _bytes_per_ns(table: ProductTable) -> float:
    return _rate(_weights(table)[0] * float(bits_of(table.dtype)) / 8, np.array(table.ns, dtype=np.float64))


def _small(table: SmallTable, scale: Scale) -> SmallTable:
    ns = np.array(table.ns, dtype=np.float64)
    bound_ns = _at_most(np.array(table.elements, dtype=np.float64), ns)
    return table.model_copy(update={"ns": _quicker(ns, bound_ns, np.full(ns.shape, scale.memory))})


def _attention(table: AttentionTable, scale: Scale) -> AttentionTable:
    streams, widths, positions = np.meshgrid(table.streams, table.head_dims, table.positions, indexing="ij")
    ns = np.array(table.ns, dtype=np.float64).reshape(streams.shape)
    bound_ns = _at_most(1.0 * streams * widths * positions, ns)
    return table.model_copy(update={"ns": _quicker(ns, bound_ns, np.full(ns.shape, scale.memory))})


def _prompts(table: PromptTable, scale: Scale) -> PromptTable:
    heads, widths, tokens = np.meshgrid(table.heads, table.head_dims, table.tokens, indexing="ij")
    ns = np.array(table.ns, dtype=np.float64).reshape(heads.shape)
    times = np.full(ns.shape, scale.flops.get(table.dtype, scale.memory))
    return table.model_copy(update={"ns": _quicker(ns, _at_most(1.0 * heads * widths * tokens**2, ns), times)})


def _at_most(work: _Numbers, ns: _Numbers) -> _Numbers:
    """Returns what so much work takes at the rate of the quickest kernel of all, in ns."""
    return work / _rate(work, ns)


def _rate(work: _Numbers, ns: _Numbers) -> float:
    """Returns the work a ns of the quickest kernel."""
    return float((work[ns > 0] / ns[ns > 0]).max())


def _quicker(ns: _Numbers, bound_ns: _Numbers, times: _Numbers) -> tuple[int, ...]:
    """Returns durations of which `bound_ns` is so many times as quick; 0 stays 0."""
    scaled = np.where(ns > 0, np.maximum(1.0, ns - bound_ns + bound_ns / times), 0.0)
    return tuple(np.rint(scaled).astype(int).ravel().tolist())


def _group(group: GroupCosts, scale: Scale) -> GroupCosts:
    known = group.uncertainty or Uncertainty(run_spread=0.0, scatter=0.0, held_back_error=0.0)
    unsure = known.model_copy(update={"held_back_error": round(hypot(known.held_back_error, scale.off), 5)})
    return group.model_copy(update={"source": "assumed", "device": scale.device, "uncertainty": unsure})
