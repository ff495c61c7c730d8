"""The lanes of one GPU and of the host that serves it, coupled where one slows another down, and what work takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import simpy

from ...resources.lags import Lags
from ...resources.links import HostLink
from ...resources.network import Crowd, Transfer
from ...resources.profile import Factor
from ...resources.timeline import DECOMPRESS, DENSE, EXPERT, HEAD, Timeline
from ..costs.costs import Costs
from ..costs.offload_costs import CpuCosts, ShrunkCosts
from ..costs.scatter import scattering
from ..costs.values import CopyCost, KernelCost, ReadCost, ReadCosts
from ..decide.commands import H2D, PREFETCH_LANE, Command
from ..policies.copy_order import COPY_ORDERS, ByRank
from ..policies.miss import LOW_PRECISION
from ..scenario.scenario import Scenario
from ..scenario.sections_memory import shrunk
from .lanes import ArrivalLane, Instant, Lane, QueueLane, couple


def contended(costs: Costs, scenario: Scenario) -> bool:
    """Whether copies and kernels slow each other down in a run."""
    return scenario.copy_.contention and (costs.slowed_beside_copies or costs.copy_slowdown > 1)


def _factor(known: Factor | None) -> float:
    return 1.0 if known is None else known.factor


def add_lanes(timeline: Timeline, discipline: str, device: str = "gpu0", host: str = "host") -> dict[str, int]:
    """Add the lanes of one GPU and its host thread under a copy discipline and return their numbers by name."""
    number = {
        "host": timeline.add_lane(host, "host", "host thread"),
        "predictor": timeline.add_lane(device, "predictor", "predictor (side stream)"),
        "d2h": timeline.add_lane(device, "d2h", "copy engine D2H"),
        "h2d": timeline.add_lane(device, "h2d", "copy engine H2D"),
    }
    if COPY_ORDERS[discipline].prefetch_stream:
        number["prefetch"] = timeline.add_lane(device, "h2d", "copy engine H2D, prefetch stream")
    number["compute"] = timeline.add_lane(device, "compute", "compute stream")
    return number


class Drive:
    """The I/O lanes of a drive, which what is in flight shares; if GPUs share it, see `HostLanes`."""

    def __init__(
        self, env: simpy.Environment, instant: Instant, timeline: Timeline, costs: ReadCosts, *, shared: bool
    ) -> None:
        times = costs.times_as_long
        kind = QueueLane if shared else Lane
        self.lanes = [kind(env, instant, timeline, number) for number in add_io_lanes(timeline, costs)]
        for lane in self.lanes:
            lane.serves_all = shared
        if costs.shared:
            crowd = Crowd(times)
            for lane in self.lanes:
                lane.join(crowd.share())


def add_io_lanes(timeline: Timeline, costs: ReadCosts) -> list[int]:
    """Add the I/O lanes of a drive and return their numbers."""
    return [timeline.add_lane("nvme0", "nvme", f"I/O lane {number}") for number, _ in enumerate(costs.times_as_long)]


@dataclass
class HostLanes:
    """What the GPUs of one host share, made for the first of them: the CPU that computes experts, and the drive.

    `several`: there is more than one. Then, of what is ready, what was ordered first goes first: one GPU's work does
    not hold up another's by what it waits for. The lanes have the same numbers in every GPU's timeline.
    """

    several: bool = False
    cpu: Lane | None = None
    drive: Drive | None = None

    def add_cpu(self, env: simpy.Environment, instant: Instant, timeline: Timeline, costs: Costs) -> Lane:
        """Returns the lane of the CPU, on one more timeline."""
        number = timeline.add_lane("host", "cpu", "CPU experts")
        if self.cpu is None:
            kind = QueueLane if self.several else Lane
            self.cpu = kind(env, instant, timeline, number, Lags(after_other_ns=costs.beside.notice_ns))
            self.cpu.serves_all = self.several
        assert self.cpu.number == number
        return self.cpu

    def add_drive(self, env: simpy.Environment, instant: Instant, timeline: Timeline, reads: ReadCosts) -> Drive:
        """Returns the drive, on one more timeline."""
        if self.drive is None:
            self.drive = Drive(env, instant, timeline, reads, shared=self.several)
        else:
            assert [lane.number for lane in self.drive.lanes] == add_io_lanes(timeline, reads)
        return self.drive


#: The title of a stream for decompression.
_ASIDE = "decompression (side stream)"


@dataclass(frozen=True)
class Place:
    """Where a GPU is in a run: its number, the name of its host thread, and its way to host memory, if others share it.

    `shared` is what it has in common with other GPUs. `lends`: GPUs keep experts for one another. No step has more than
    `most_tokens` tokens there.
    """

    number: int
    host: str
    link: HostLink | None
    lends: bool
    most_tokens: int
    shared: HostLanes

    @property
    def device(self) -> str:
        """The GPU's name."""
        return f"gpu{self.number}"


class GpuLanes:
    """The lanes of one GPU, and the costs of the work on them.

    `size_of` (layers * experts,) are the bytes of every expert where they differ within a layer.
    """

    def __init__(
        self, instant: Instant, timeline: Timeline, costs: Costs, scenario: Scenario, place: Place,
        size_of: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        env, device, link = instant.env, place.device, place.link
        self.timeline, self.costs = timeline, costs
        self._scenario, self._experts = scenario, costs.model.experts
        self._tables = costs.by_layer
        self._scattering = scattering(costs.scatter)
        self._shrunk = ShrunkCosts(costs, scenario)
        self._set_sizes(size_of)
        self._transfers = None if link is None else link.transfers
        self.reads_back = scenario.dispatch.router_readback
        self.copy_slowdown = costs.copy_slowdown if scenario.copy_.contention else 1.0
        number = add_lanes(timeline, scenario.copy_.discipline, device, place.host)
        self.host = number["host"]
        self._add_copies(instant, number)
        self.compute = Lane(env, instant, timeline, number["compute"], costs.kernel_lags)
        self.d2h = Lane(env, instant, timeline, number["d2h"])
        self.side = Lane(env, instant, timeline, number["predictor"])
        if scenario.compression.where != "none" and scenario.compression.lane == "side":
            # Each use has a kernel of its own, in order; what a copy brings is decompressed once it is there.
            kind = Lane if scenario.compression.where == "gpu" else ArrivalLane
            self.unpacking = kind(env, instant, timeline, timeline.add_lane(device, "side", _ASIDE))
        streams = list(dict.fromkeys(self.copies.values()))
        if scenario.uses_cpu:
            self.cpu = place.shared.add_cpu(env, instant, timeline, costs)
            self._add_results(env, instant, device, streams)
        self._couple(streams, link)
        self.drive = None if costs.reads is None else place.shared.add_drive(env, instant, timeline, costs.reads)

    def _add_copies(self, instant: Instant, number: dict[str, int]) -> None:
        """Make the streams of copies from the host, as the copy order has them."""
        env, timeline, costs = instant.env, self.timeline, self.costs
        order = self._scenario.copy_.order()
        kind = QueueLane if isinstance(order, ByRank) else Lane
        h2d = kind(env, instant, timeline, number["h2d"], costs.copy_lags)
        if isinstance(h2d, QueueLane) and isinstance(order, ByRank):
            h2d.rank = order.rank
        self.copies = {H2D: h2d, PREFETCH_LANE: h2d}
        if "prefetch" in number:
            self.copies[PREFETCH_LANE] = Lane(env, instant, timeline, number["prefetch"], costs.copy_lags)

    def _set_sizes(self, size_of: Sequence[int] | None) -> None:
        """Set what every expert is copied as, and what that takes where it differs within a layer."""
        costs, scenario = self.costs, self._scenario
        #: The bytes of every expert as it is copied (layers * experts,), and whether they differ within a layer.
        self.sized = scenario.compression.mixed is not None
        self.sizes = size_of if self.sized and size_of is not None else costs.size_of
        self._size_of = size_of if scenario.compression.mixed is not None else None
        self._copies_of = None if self._size_of is None else {size: costs.copy(size) for size in set(self._size_of)}

    def _add_results(self, env: simpy.Environment, instant: Instant, device: str, streams: list[Lane]) -> None:
        """Make a stream for the results of the CPU, which shares the host's memory with the copies.

        On the copies' own stream a result would wait for copies that wait for the kernels behind it.
        """
        costs, timeline = self.costs, self.timeline
        self.cpu_costs = CpuCosts(costs, self._scenario)
        number = timeline.add_lane(device, "h2d", "copy engine H2D, results of the CPU")
        lags = replace(costs.copy_lags, after_other_ns=costs.beside.results_ns)
        self.back = Lane(env, instant, timeline, number, lags)
        if isinstance(streams[0], QueueLane):  # whose next copy is enqueued behind what waits for the engine
            instant.put_last(streams[0])
        streams.append(self.back)
        if self._scenario.copy_.contention:
            self.cpu.disturbers = [*self.cpu.disturbers, *streams]
            for lane in streams:
                lane.slowed_by = [(self.cpu, self.cpu_costs.copy_slowdown)]

    def _couple(self, streams: list[Lane], link: HostLink | None) -> None:
        """Let copies share their engine or its link, and slow kernels and read-backs down, if this machine's do."""
        for lane in streams:
            others = [other for other in streams if other is not lane]
            if self.costs.copies_take_turns:
                lane.turns = others
            else:
                lane.sharing = others
            lane.sharing_factor = self.costs.copies_sharing
        if link is not None:
            for lane in self.streams:
                lane.join(link.network.share())
                lane.sharing = []  # the network shares the link out
        if contended(self.costs, self._scenario):
            self.compute.disturbers = self.d2h.disturbers = streams
            for lane in streams:
                lane.disturbers = [self.compute]
        beside = [getattr(self, name) for name in ("cpu", "unpacking") if hasattr(self, name)]
        self._share_gpu()
        couple([*streams, self.compute, self.d2h, self.side, *beside])

    def _share_gpu(self) -> None:
        """Let kernels of side streams and of the compute stream slow each other down, by the factors of the profile."""
        contention = self.costs.profile.contention
        if contention is None or not self._scenario.copy_.contention:
            return
        pairs = [(self.side, _factor(contention.kernels_beside_predictor), contention.predictor_beside_kernels)]
        if hasattr(self, "unpacking"):
            slows, leaves = 1.0, contention.unpacking_leaves
            if leaves is not None:
                took_ns = sum(self.decompress_layer(layer).ns for layer in range(self.costs.model.layers))
                slows = max(1.0, took_ns / self.costs.model.layers / max(1, leaves.ns))
            pairs.append((self.unpacking, slows, contention.unpacking_beside_kernels))
        for lane, slows, slowed in pairs:
            if slows != 1.0:
                self.compute.slowed_by = [*self.compute.slowed_by, (lane, slows)]
            if slowed is not None:
                lane.slowed_by = [(self.compute, slowed.factor)]

    @property
    def streams(self) -> list[Lane]:
        """The lanes of copies of experts from the host."""
        return list(dict.fromkeys(self.copies.values()))

    def backlog_ns(self) -> int:
        """Returns the copy time that is queued on the link now, in ns."""
        return sum(lane.backlog_ns() for lane in self.streams)

    def link_busy_ns(self) -> int:
        """Returns how long the copy streams to the GPU have been busy until now, in ns."""
        return sum(lane.busy_ns() for lane in self.streams)

    # What work takes.

    def kernel_of(self, kind: int, layer: int, phase: int, tokens: int) -> KernelCost:
        """Returns what a dense part, the head or an expert over so many tokens takes in a step of a phase."""
        if kind == HEAD:
            return self.costs.head(tokens)
        return self._tables[phase][int(kind == EXPERT)][layer][tokens]

    def low_precision(self, layer: int, phase: int, tokens: int) -> KernelCost:
        """Returns what an expert takes in low precision."""
        size_bytes = shrunk(self.costs.model.expert_bytes[layer], self._scenario.miss.low_ratio)
        return self._shrunk.expert(layer, tokens, size_bytes, phase)

    def sized_expert(self, size_bytes: int, layer: int, phase: int, tokens: int) -> KernelCost:
        """Returns what an expert takes that has so many bytes."""
        return self._shrunk.expert(layer, tokens, size_bytes, phase)

    def on_cpu(self, layer: int, tokens: int) -> KernelCost:
        """Returns what an expert takes on the CPU."""
        return self.cpu_costs.expert(layer, tokens)

    def to_cpu(self, tokens: int) -> KernelCost:
        """Returns what the activations of so many tokens take to the host."""
        return KernelCost(self.cpu_costs.activations_ns(tokens), 1.0, 1, 0)

    def from_cpu(self, tokens: int) -> KernelCost:
        """Returns what the results of so many tokens take to the GPU."""
        return KernelCost(self.cpu_costs.results_ns(tokens), 1.0, 1, 0)

    def decompress_layer(self, layer: int) -> KernelCost:
        """Returns what decompressing an expert of a layer takes."""
        return self._shrunk.decompress(layer)

    def launched(self, command: Command, members: list[int]) -> KernelCost:
        """Returns what the next launch takes, which may scatter; `members` as `kernel` takes them."""
        cost = self.kernel(command, members)
        return cost if self._scattering is None else self._scattering.kernel(command.kind, cost)

    def copied(self, expert: int) -> CopyCost:
        """Returns what the next copy, of this expert, takes, which may scatter."""
        cost = self.copy_cost(expert)
        return cost if self._scattering is None else self._scattering.copy(cost)

    def kernel(self, command: Command, members: list[int]) -> KernelCost:
        """Returns what such launches take; `members` are the tokens of the experts of a grouped kernel."""
        kind, layer, tokens, phase = command.kind, command.layer, command.tokens, command.peer
        if kind == DECOMPRESS:
            return self.decompress(command.expert)
        if members:
            return self.costs.grouped(layer, members, phase)
        if kind == DENSE:
            return self.costs.attending(self.kernel_of(kind, layer, phase, tokens), layer, command.extra)
        if command.extra == LOW_PRECISION:
            return self.low_precision(layer, phase, tokens)
        if self._size_of is not None and kind == EXPERT:
            return self.sized_expert(self._size_of[command.expert], layer, phase, tokens)
        return self.kernel_of(kind, layer, phase, tokens)

    def copy_cost(self, expert: int) -> CopyCost:
        """Returns what the copy of an expert takes."""
        if self._copies_of is not None and self._size_of is not None:
            return self._copies_of[self._size_of[expert]]
        return self.costs.copies[expert // self._experts]

    def transfer(self, expert: int) -> Transfer | None:
        """Returns what the copy of an expert moves over the machine's links; None where nobody shares them."""
        return None if self._transfers is None else self._transfers[expert // self._experts]

    def read_cost(self, expert: int) -> ReadCost:
        """Returns what reading an expert from the drive takes."""
        assert self.costs.reads is not None
        return self.costs.reads.by_layer[expert // self._experts]

    def decompress(self, expert: int) -> KernelCost:
        """Returns what decompressing an expert takes."""
        return self._shrunk.decompress(expert // self._experts)
