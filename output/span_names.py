"""Spans in words: their names and categories as profilers have them, their layers, and the order of lanes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..resources.timeline import (
    COLLECTIVE,
    COMBINE,
    DECOMPRESS,
    DISPATCH,
    EXPERT,
    HEAD,
    KINDS,
    PREFETCH,
    Timeline,
)  # fmt: skip

Array = npt.NDArray[Any]

#: What a slice of each kind is called; {at} becomes " L3", or " L3/E17" where one expert is meant, and {memory} the
#: kind of host memory. Readers tell a copy, and collective communication, by how these names begin.
NAMES = {
    "dense": "dense{at}",
    "expert": "expert{at}",
    "head": "head",
    "demand": "Memcpy HtoD ({memory} -> Device)",
    "prefetch": "Memcpy HtoD ({memory} -> Device)",
    "readback": "Memcpy DtoH (Device -> Pinned)",
    "predict": "predict{at}",
    "launch": "dispatch{at}",
    "activation": "Memcpy PtoP (Device -> Device)",
    "dispatch": "ncclDevKernel_SendRecv (dispatch{at})",
    "combine": "ncclDevKernel_SendRecv (combine{at})",
    "peer": "Memcpy PtoP (Device -> Device)",
    "cpu_expert": "expert{at} (CPU)",
    "decompress": "decompress{at}",
    "read": "read{at} (NVMe)",
    "kernel": "kernel",
    "copy": "Memcpy",
    "collective": "ncclDevKernel",
    "guesses": "Memcpy DtoH (Device -> Pinned)",
    "swap": "Memcpy HtoD ({memory} -> Device)",
    "demotion": "Memcpy DtoH (Device -> {memory})",
}
#: The category of each kind on a GPU's stream; on any other lane all is `cpu_op`.
CATEGORIES = {
    "dense": "kernel",
    "expert": "kernel",
    "head": "kernel",
    "demand": "gpu_memcpy",
    "prefetch": "gpu_memcpy",
    "readback": "gpu_memcpy",
    "predict": "kernel",
    "launch": "cpu_op",
    "activation": "gpu_memcpy",
    "dispatch": "kernel",
    "combine": "kernel",
    "peer": "gpu_memcpy",
    "cpu_expert": "cpu_op",
    "decompress": "kernel",
    "read": "cpu_op",
    "kernel": "kernel",
    "copy": "gpu_memcpy",
    "collective": "kernel",
    "guesses": "gpu_memcpy",
    "swap": "gpu_memcpy",
    "demotion": "gpu_memcpy",
}
#: The kinds that are communication between GPUs, though kernels.
COLLECTIVES = (DISPATCH, COMBINE, COLLECTIVE)

#: Roles in the order in which tracks are shown, from the top: the way that a decision takes.
TRACK_ORDER = ("host", "cpu", "nvme", "predictor", "h2d", "d2h", "peer", "side", "compute")

_NAMES = [NAMES[kind] for kind in KINDS]


def track_order(timeline: Timeline) -> list[int]:
    """Returns all lane numbers in the order in which they are shown: the host, then each device by TRACK_ORDER."""
    names = dict.fromkeys(lane.device for lane in timeline.lanes)
    devices = {device: place for place, device in enumerate(names)}

    def place(number: int) -> tuple[bool, int, int, int]:
        lane = timeline.lanes[number]
        return lane.device != "host", devices[lane.device], TRACK_ORDER.index(lane.role), number

    return sorted(range(len(timeline.lanes)), key=place)


def layers_of(spans: Array, experts_per_layer: int) -> int | None:
    """Returns how many layers a run had, or None if its spans (dtype SPAN) do not say.

    The first head follows the first visit of the last layer; without a head, the last layer with an expert counts.
    """
    heads = spans["visit"][spans["kind"] == HEAD]
    if len(heads) and heads.min() >= 0:
        return int(heads.min()) + 1
    experts = int(spans["expert"].max(initial=-1))
    return experts // experts_per_layer + 1 if experts >= 0 else None


def layer_of_each(spans: Array, experts_per_layer: int, layers: int | None) -> Array:
    """Returns the layer of each span (spans,): that of its visit, or of its expert if it may be ahead of the visit.

    Prefetches and decompressions may. Where layers share experts, a prefetch names none. -1 if neither tells.
    """
    of_expert = np.where(spans["expert"] >= 0, spans["expert"] // experts_per_layer, -1)
    if not layers:
        return of_expert
    of_visit = np.where(spans["visit"] >= 0, spans["visit"] % layers, -1)
    layer: Array = np.where(np.isin(spans["kind"], (PREFETCH, DECOMPRESS)) | (of_visit < 0), of_expert, of_visit)
    return layer


def span_name(kind: int, layer: int, index: int, *, pinned: bool = True) -> str:
    """Returns what a span is called, such as "expert L3/E17"; `layer` and `index` (within the layer) may be -1.

    `pinned`: the host memory that copies leave is.
    """
    if layer < 0:
        at = ""
    elif index < 0:
        at = f" L{layer}" if kind != EXPERT else f"s L{layer}"  # one kernel for all experts of the layer
    else:
        at = f" L{layer}/E{index}"
    return _NAMES[kind].format(at=at, memory="Pinned" if pinned else "Pageable")
