"""What a runtime takes beyond the machine: its own time, its launches and kernels, how it copies.

Kernels that a runtime launches in place of the model's make another model of it: what they take follows from their
number. All else is added to the machine's costs, or multiplies them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from ...resources.profile_costs import TransferCost
from ...resources.runtime import CacheMove, OwnCost, Runtime
from ...workloads.model import Model


class OwnAttention(NamedTuple):
    """What a runtime's attention costs beyond the machine's: ns a position of sparse attention, and what is moved."""

    indexed_ns: int = 0
    moves: tuple[CacheMove, ...] = ()


class RuntimeCosts:
    """A runtime's own costs; with `free` dispatch the host's calls take nothing.

    A forward pass that has `begun` elsewhere does not take the host's time of one again.
    """

    def __init__(self, runtime: Runtime, *, free: bool, begun: bool = False) -> None:
        self._costs, self.copies, self._free, self._moves = runtime.costs, runtime.copies, free, runtime.cache_moves
        #: The costs that count in every run: of the host thread, in ns.
        self.layer_ns, self.step_ns = self._time("layer"), 0 if begun else self._time("step")
        self.cpu_submit_ns, self.cpu_return_ns = self._time("cpu_submit"), self._time("cpu_return")
        self.copy_call_ns, self._expert_ns = self._time("copy_call"), self._time("expert")
        #: Whether the host waits for the end of a forward pass, and is held while the CPU computes experts.
        self.waits, self.cpu_blocks = runtime.waits, runtime.cpu_blocks
        launch = runtime.costs.launch
        self._launch_factor = 1.0 if launch is None else launch.factor
        gap, rate = runtime.costs.gap, runtime.costs.copy_rate
        self.gap_factor = 1.0 if gap is None else gap.factor
        #: What its copies reach of the machine's rate.
        self.copy_rate = 1.0 if rate is None else rate.share

    def _time(self, name: str) -> int:
        cost = getattr(self._costs, name)
        return 0 if cost is None or self._free else int(cost.ns)

    def attention_of(self, model: Model) -> OwnAttention:
        """Returns what attention of a model costs besides; the GPU waits for the host's time of sparse attention."""
        return OwnAttention(
            self._time("indexed"), tuple(each for each in self._moves if model.name.startswith(each.model))
        )

    @property
    def own_kernels(self) -> bool:
        """Whether its kernels of weights in fewer bits are its own, and told beside 16-bit ones of as many bytes."""
        return self._costs.gpu_kernels is not None

    @property
    def holds_host(self) -> bool:
        """Whether the host waits for the end of every copy."""
        return self.copies.synchronized or self.copies.mover == "cpu"

    def copy_ns(self, cost: TransferCost, size_bytes: int) -> int:
        """Returns what one copy of so many bytes takes; a rate that it does not reach takes longer by what is lost."""
        ns = cost.ns(size_bytes)
        return ns if self.copy_rate == 1 else ns + round((ns - cost.ns(0)) * (1 / self.copy_rate - 1))

    def kernel_ns(self, part: str, ns: float) -> float:
        """Returns what kernels of a part ('dense part', 'expert', 'head') take that take the machine ns."""
        costs = self._costs
        if costs.gpu_kernels is not None:
            ns *= costs.gpu_kernels.factor
        if part == "expert" and costs.gpu_experts is not None:
            ns *= costs.gpu_experts.factor
        return ns

    def launch_ns(self, part: str, ns: int) -> int:
        """Returns the host's time to launch a group of kernels of a part, which is ns beside this runtime."""
        return round(ns * self._launch_factor) + (self._expert_ns if part == "expert" else 0)


def launched_model(model: Model, runtime: Runtime) -> Model:
    """Returns a model of as many kernels as the runtime launches for its parts."""
    costs, dense, expert = runtime.costs, model.dense_kernels, model.expert_kernels
    dense = dense if costs.dense_launches is None else costs.dense_launches.count
    expert = expert if costs.expert_launches is None else costs.expert_launches.count
    for own in runtime.launches:
        if model.name.startswith(own.model):
            dense, expert = own.dense or dense, own.expert or expert
    return replace(model, dense_kernels=dense, expert_kernels=expert)


def unsure(runtime: Runtime) -> dict[str, OwnCost]:
    """Returns the costs of a runtime that nobody measured, by name."""
    costs = runtime.costs.given().items()
    return {name: cost for name, cost in costs if cost.source not in ("measured", "fitted")}


def token_bucket(tokens: int) -> int:
    """Returns the tokens of the CUDA graph that serves a decode step of so many: the next power of two.

    Serving engines capture graphs for batch sizes; a prompt runs over the tokens that it has.
    """
    return 1 << (tokens - 1).bit_length()


def pieces_of(size_bytes: int, chunk_bytes: int) -> int:
    """Returns in how many pieces of at most `chunk_bytes` a copy is made; 0 stands for one piece of any size."""
    return -(-size_bytes // chunk_bytes) if chunk_bytes else 1
