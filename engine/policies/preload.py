"""Preloading: which experts lie in GPU memory before a run starts, the most wanted first. It takes no time of the run.

With an eviction policy that keeps them (`static`) and misses that are computed on the CPU this is static placement: by
popularity as Fiddler (Kamahori et al., arXiv:2402.07033) has it, or by layers as llama.cpp's `--n-cpu-moe N`, which
leaves the experts of the first N layers to the CPU. KTransformers calls its ways `frequency`, `front-loading` and
`uniform`. To add one: write a function, name it in PRELOAD.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .eviction_base import Setting
from .eviction_informed import popularity

#: Given what is known before the run and the first layer whose experts may be preloaded, the experts by wish.
Preload = Callable[[Setting, int], Sequence[int]]


def nothing(setting: Setting, first_layer: int) -> Sequence[int]:
    """Leave the memory empty."""
    return ()


def most_popular(setting: Setting, first_layer: int) -> Sequence[int]:
    """Take the experts by their popularity, ties to the lower number."""
    popular = popularity(setting)
    return sorted(range(len(popular)), key=lambda expert: -popular[expert])


def last_layers(setting: Setting, first_layer: int) -> Sequence[int]:
    """Take whole layers, from the last back to the first that may be taken."""
    layers = range(setting.known_trace().layers - 1, first_layer - 1, -1)
    return [layer * setting.experts + index for layer in layers for index in range(setting.experts)]


def first_layers(setting: Setting, first_layer: int) -> Sequence[int]:
    """Take whole layers, from the first that may be taken on: "front-loading" of KTransformers' expert placement."""
    return range(first_layer * setting.experts, setting.known_trace().layers * setting.experts)


def even(setting: Setting, first_layer: int) -> Sequence[int]:
    """Take as many experts of every layer, by index: "uniform" of KTransformers' expert placement."""
    layers = range(first_layer, setting.known_trace().layers)
    return [layer * setting.experts + index for index in range(setting.experts) for layer in layers]


#: By the names that a scenario uses.
PRELOAD: dict[str, Preload] = {
    "none": nothing,
    "popular": most_popular,
    "layers": last_layers,
    "front": first_layers,
    "even": even,
}
