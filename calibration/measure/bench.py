"""The bench of a calibration: a GPU, how much is measured on it, and the series that probes record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ...workloads.model import Model, load_model
from ..device.cuda import Calls, Workload
from ..device.timing import Beside, Timer
from .samples import Key

#: What one look sees: a term, its key, and samples in ns.
Seen = tuple[str, Key, Iterable[int]]
#: Looks once.
Probe = Callable[[], Iterator[Seen]]
MakeProbes = Callable[["Bench"], Iterable[Probe]]
KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    `models` maps presets (or files) to how many of their layers, among which are all different dense parts; `batches`
    are how many experts are copied together; `shared_bytes` the copies that are made while all GPUs load;
    `rotated_bytes` of experts take turns, so that no cache holds them.
    """

    models: Mapping[str, int]
    copy_bytes: Sequence[int]
    batches: Sequence[int]
    tokens: Sequence[int]
    contexts: Sequence[int]
    cpu_tokens: Sequence[int]
    allocation_bytes: Sequence[int]
    rounds: int
    shared_bytes: Sequence[int] = (16 * MIB, 336 * MIB)
    rotated_bytes: int = 160 * MIB
    flood_bytes: int = 32 * MIB

    @property
    def most_bytes(self) -> int:
        """The largest copy."""
        return max(self.copy_bytes)

    @property
    def expert_bytes(self) -> list[int]:
        """Sizes of the models' experts, each once."""
        return sorted({load_model(name).expert_bytes[0] for name in self.models})


#: Of a model that is added, so many layers are measured at most: their dense parts may differ.
MOST_LAYERS = 4


def with_models(extent: Extent, names: Iterable[str]) -> Extent:
    """Returns an extent with more models, by their presets or files; ModelError if one is none."""
    more = {name: min(MOST_LAYERS, load_model(name).layers) for name in names}
    return replace(extent, models={**extent.models, **more})


FLOOD_COPIES = 16
_HOST_CALLS = 100
#: Calls in one queue, two events around each group among them: fewer than the driver takes before it blocks.
_MOST_CALLS = 900


class Bench:
    """What the probes share: the GPU, its timer, streams, and memory to copy from and to."""

    def __init__(self, gpu: Any, extent: Extent) -> None:
        import torch

        self.gpu, self.extent = gpu, extent
        self.timer = Timer(gpu)
        self.compute, self.copying, self.other = gpu.stream(), gpu.stream(), gpu.stream()
        most_bytes = extent.most_bytes
        self.device = gpu.random(most_bytes // 2, dtype="bfloat16", scale=0.02, seed=5).view(torch.uint8)
        self.target = gpu.empty(most_bytes)
        self.pinned, self.back = gpu.host_empty(most_bytes), gpu.host_empty(most_bytes)
        self.pageable = gpu.host_empty(most_bytes, pinned=False)
        for host in (self.pinned, self.pageable):
            host.copy_(self.device)
        self._kept: list[Calls] = []
        self._pool = gpu.graph_pool()

    def ends(self, direction: str, memory: str) -> tuple[Any, Any]:
        """Returns (target, source) of copies in a direction."""
        host = self.pinned if memory == "pinned" else self.pageable
        return {
            "h2d": (self.target, host),
            "d2h": (self.back if memory == "pinned" else self.pageable, self.device),
            "d2d": (self.target, self.device),
        }[direction]

    def copies(self, direction: str, memory: str, size_bytes: int, count: int) -> list[Calls]:
        """Returns `count` groups of one copy each, from and to different memory as far as there is any."""
        target, source = self.ends(direction, memory)
        places = len(source) // size_bytes
        starts = [number % places * size_bytes for number in range(count)]
        return [((target[at : at + size_bytes].copy_, (source[at : at + size_bytes], True)),) for at in starts]

    def flood(self, direction: str) -> Beside:
        """Returns copies that keep a direction of the link busy."""
        groups = self.copies(direction, "pinned", self.extent.flood_bytes, FLOOD_COPIES)
        return Beside(self.other, tuple(call for calls in groups for call in calls))

    def graph(self, calls: Calls) -> Calls:
        """Returns the call that replays all of these as one CUDA graph; what they use is kept for as long as this."""
        self._kept.append(calls)
        return ((self.gpu.capture(calls, self._pool).replay, ()),)

    @cached_property
    def other_gpus(self) -> list[Any]:
        """All other GPUs of this machine."""
        return [self.gpu.sibling(index) for index in range(self.gpu.count()) if index != self.gpu.index]

    @cached_property
    def models(self) -> list[Kernels]:
        """The kernels of all measured models, with their weights on the GPU."""
        return [Kernels(self, load_model(name, layers=layers)) for name, layers in self.extent.models.items()]


class Kernels:
    """The kernels of one model, eager and as graphs, over enough slots and layers that no cache holds all weights."""

    def __init__(self, bench: Bench, model: Model) -> None:
        import torch

        self.model = model
        size_bytes = model.expert_bytes[0]
        self.slots = max(2, -(-bench.extent.rotated_bytes // size_bytes))
        weights = bench.gpu.random(self.slots * size_bytes // 2, dtype="bfloat16", scale=0.02, seed=7)
        slots = weights.view(torch.uint8).view(self.slots, size_bytes)
        most_tokens = max(bench.extent.tokens)
        self.workloads = {
            dispatch: Workload(bench.gpu, model, slots, most_tokens=most_tokens, graphs=dispatch == "graph")
            for dispatch in ("eager", "graph")
        }

    def groups(self, part: str, tokens: int, dispatch: str) -> list[tuple[int, Calls]]:
        """Returns (size, calls) of each group of a part that is to be timed in a row."""
        model, workload = self.model, self.workloads[dispatch]
        if part == "expert":
            groups = [(model.expert_ff, workload.expert(slot, tokens)) for slot in range(self.slots)]
        elif part == "head":
            groups = [(model.head_bytes, workload.head(tokens))] * 4
        else:
            groups = [(model.dense_bytes[layer], workload.dense(layer, tokens)) for layer in range(model.layers)]
        # The first of a queue is not timed: it stands at the end once more.
        return [*groups[: _MOST_CALLS // (len(groups[0][1]) + 2) - 1], groups[0]]

    def key(self, part: str, size: int, tokens: int, dispatch: str, where: str, context: int = 0) -> Key:
        """Returns the key of a kernel's series."""
        model = self.model
        kernels = {"expert": model.expert_kernels, "dense": model.dense_kernels, "head": 1}[part]
        return {
            "part": part, "hidden": model.hidden, "size": size, "tokens": tokens, "context": context,
            "dtype": model.expert_dtype if part == "expert" else model.dense_dtype,
            "kernels": kernels, "dispatch": dispatch, "where": where,
        }  # fmt: skip


def look_at_host(bench: Bench, name: str, stream: Any, calls: Calls) -> Iterator[Seen]:
    """Yields what a call takes the host, three times over."""
    yield "host", {"call": name}, [bench.timer.host(stream, calls, _HOST_CALLS) for _ in range(3)]
