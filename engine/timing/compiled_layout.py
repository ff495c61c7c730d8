"""The machine that SimPy processes make up, laid out in memory for compiled code.

It is laid out from the same lanes, costs and links as the SimPy engine has, none of which runs here: so the two cannot
differ in what is coupled to what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from ...resources.network import Crowd, CrowdShare, Network, Share
from ...resources.timeline import DENSE, EXPERT, HEAD
from ...workloads.batches import DECODE, PREFILL
from ..costs.scatter import SCATTERED, Scatter
from ..costs.values import KernelCost
from ..decide.commands import H2D, PREFETCH_LANE
from ..decide.program import Program
from . import memory as w
from .compiled_agenda import BLOCK, FEW, GOES_ON, KIND_BITS
from .compiled_prices import ROW_WORDS
from .lanes import ArrivalLane, Lane, QueueLane

#: What the memory begins with; what fills up is made larger.
_WORK, _NODES, _RECORDS, _ARRIVALS, _RATES, _ROWS = 1 << 11, 1 << 12, 1 << 13, 1 << 12, 1 << 10, 1 << 9
#: Factors of a kind that are drawn ahead.
_FEWEST_DRAWN, _MOST_DRAWN = 1 << 10, 1 << 14
#: What is recorded of a GPU, and the words of a record.
RECORDED = {w.G_SPANS: w.SPAN_WORDS, w.G_ACCESSES: w.NOTE_WORDS, w.G_DECISIONS: w.NOTE_WORDS}


@dataclass(frozen=True)
class Driven:
    """A host thread: its program, the numbers of its GPUs, and what is called at the end of a step."""

    program: Program
    gpus: Sequence[int]
    ended: Callable[[], None]


@dataclass(eq=False)
class Machine:
    """What the engine is laid out from: GPUs, all lanes in order of creation, and what passes between GPUs.

    `exchange` are the lanes of exchanges, and `exchange_ns` says what one of the tokens of the last visit takes;
    `peers` are the ways between GPUs that lend each other experts, by (source, target): costs, what gives the lane its
    place in a timeline, and the lane.
    """

    gpus: Sequence[Any]
    lanes: Sequence[Lane]
    network: Network | None
    exchange: Sequence[Lane] = ()
    exchange_ns: Callable[[], int] | None = None
    peers: dict[tuple[int, int], tuple[Any, Callable[[], Lane], Lane]] = field(default_factory=dict)


class Factors:
    """The factors of a GPU's events of one kind: those to come next are in memory, more are drawn as they are used."""

    def __init__(self, scatter: Scatter, what: str, at: int) -> None:
        self._scatter, self._what, self._at = scatter, what, at
        self._drawn, self._place, self._room = 0, 0, 0

    def draw(self, memory: w.Memory, number: int) -> None:
        """Draw until there are so many, and as many again as have been, for the next time."""
        first, end = (int(memory.words[self._at + field]) for field in (w.F_NEXT, w.F_END))
        left = end - first
        if left >= number:
            return
        count = number - left + min(max(self._drawn, _FEWEST_DRAWN), _MOST_DRAWN)
        if left + count > self._room:
            self._room = 2 * (left + count)
            self._place = memory.allocate(self._room)
        floats, factors = memory.floats, self._scatter.factors(self._what, self._drawn, count)
        floats[self._place : self._place + left + count] = np.concatenate([floats[first:end], factors])
        self._drawn += count
        memory.words[self._at + w.F_NEXT], memory.words[self._at + w.F_END] = self._place, self._place + left + count


def _most_lag(lane: Lane) -> int:
    """Returns the longest time that a lane lets pass between a cause and what waits for it."""
    return max(0, lane.lags.after_other_ns, lane.lags.after_other_disturbed_ns)


def _nodes_of_lists(machine: Machine) -> int:
    """Returns how many nodes a command may take for lists: by the requests that an expert is read in; 0 if none."""
    reads = [one.lanes.costs.reads for one in machine.gpus]
    most = max((cost.requests for known in reads if known is not None for cost in known.by_layer), default=0)
    return w.NODES_OF_LISTS + w.NODES_A_REQUEST * most if most else 0


class Layout:
    """A machine laid out in memory; `prices` are what shapes cost, by number, and `transfers` what transfers are."""

    def __init__(self, machine: Machine, threads: Sequence[Driven]) -> None:
        self._machine = machine
        self.memory = w.Memory(len(machine.gpus))
        self.prices: list[Callable[[int], KernelCost]] = []
        self.transfers: list[tuple[Any, int]] = []
        self._transfer_of: dict[tuple[int, int, int], int] = {}
        self._crowds: dict[Crowd, int] = {}
        #: By the costs of GPUs whose experts are of one size in a layer: their shapes.
        self._shapes_of: dict[int, dict[int, int]] = {}
        self._scatters: dict[int, list[Factors]] = {}
        memory = self.memory
        memory.allocate(w.HEADER)
        self.lanes = [memory.allocate(w.LANE_WORDS) for _ in machine.lanes]
        self._lane_of = {id(lane): at for lane, at in zip(machine.lanes, self.lanes, strict=True)}
        self.gpus = [memory.allocate(w.GPU_WORDS) for _ in machine.gpus]
        self.threads = [memory.allocate(w.THREAD_WORDS) for _ in threads]
        parts = [memory.allocate(w.THREAD_WORDS) for _ in machine.gpus]
        lists = _nodes_of_lists(machine)
        queued = sum(len(one.lanes.sizes) for one in machine.gpus)  # all may be dropped at once
        header = {
            w.LANES: memory.put_list(self.lanes), w.THREADS: memory.put_list([*self.threads, *parts]),
            w.GPUS: memory.put_list(self.gpus), w.REGISTERS: memory.put([-1] * (1 << 10)),
            w.RECORD_ROOM: _RECORDS, w.ARRIVALS: memory.put_region(_ARRIVALS, w.ARRIVAL_WORDS),
            w.DROPPED: memory.put_region(64 + queued, w.DROPPED_WORDS), w.FREE_WORK: -1, w.FREE_NODE: -1,
            w.NODES_COMMAND: lists, w.RESUMES: -1,
            w.MOST_LAG: max((_most_lag(lane) for lane in machine.lanes), default=0),
        }  # fmt: skip
        self.memory.set(0, header)
        self.registers = 1 << 10
        self._space = 1
        self.add_space(lists)
        for number, (at, driven) in enumerate(zip(self.threads, threads, strict=True)):
            gpus = memory.put_list(self.gpus[gpu] for gpu in driven.gpus)
            rows = memory.allocate(_ROWS * ROW_WORDS)
            self.memory.set(
                at,
                {w.T_NUMBER: number, w.T_ROWS: rows, w.T_CAPACITY: _ROWS, w.T_GPU: -1, w.T_GPUS: gpus, w.T_PART_OF: -1},
            )
        for at, gpu in zip(parts, self.gpus, strict=True):
            self.memory.set(at, {w.T_GPU: gpu, w.T_GPUS: memory.put_list([gpu]), w.T_PART_OF: -1})
            self.memory.set(gpu, {w.G_THREAD: at})
        self._lay_out_agenda([*self.threads, *(parts if machine.exchange else ())])  # else none has a part
        self.slots: dict[int, int] = {}
        #: By slot: the most that one transfer at a time asks of each link, in bytes a second.
        self._asked: dict[int, dict[str, Fraction]] = {}
        self._lay_out_network()
        for lane, at in zip(machine.lanes, self.lanes, strict=True):
            self._lay_out_lane(lane, at)
        for number, at in enumerate(self.gpus):
            self._lay_out_gpu(number, at)
        self._group_slots()
        most_tokens = max((one.most_tokens for one in machine.gpus), default=1)
        kernels = memory.allocate(len(self.prices) * (most_tokens + 1) * w.KERNEL_WORDS)
        self.memory.set(0, {w.KERNELS: kernels, w.KERNEL_TOKENS: most_tokens + 1})

    def _set_floats(self, at: int, values: dict[int, float]) -> None:
        floats = self.memory.floats
        for word, value in values.items():
            floats[at + word] = value

    def add_space(self, more_nodes: int = 0) -> None:
        """Add free work and nodes, as much as there is, and so many nodes more."""
        self.memory.add_free(w.FREE_WORK, w.WORK_WORDS, w.W_NEXT, _WORK * self._space)
        self.memory.add_free(w.FREE_NODE, w.NODE_WORDS, w.N_NEXT, _NODES * self._space + more_nodes)
        self._space *= 2

    def add_registers(self, count: int) -> None:
        """Make room for so many registers, at least."""
        old, kept = int(self.memory.words[w.REGISTERS]), self.registers
        self.registers = 2 * count
        to = self.memory.allocate(self.registers)
        words = self.memory.words
        words[to : to + kept], words[to + kept : to + self.registers] = words[old : old + kept], -1
        self.memory.set(0, {w.REGISTERS: to})

    def _lay_out_agenda(self, threads: Sequence[int]) -> None:
        """Lay out the words that say what each lane and thread does next: the threads of the run begin now."""
        owners = [*self.lanes, *threads]
        count = -(-len(owners) // BLOCK) * BLOCK if len(owners) > FEW else len(owners)
        keys = self.memory.put([w.NEVER << KIND_BITS] * count)
        self.memory.put([*owners, *[-1] * (count - len(owners))])  # the last block may have words of nobody
        self.memory.set(0, {w.KEYS: keys, w.KEY_COUNT: count})
        for number, at in enumerate(self.lanes):
            self.memory.set(at, {w.L_KEY: keys + number})
        for number, at in enumerate(threads, len(self.lanes)):
            self.memory.set(at, {w.T_KEY: keys + number})
        for at in self.threads:
            self.memory.set(int(self.memory.words[at + w.T_KEY]), {0: GOES_ON})
        if len(owners) > FEW:
            blocks = self.memory.words[keys : keys + count].reshape(-1, BLOCK)
            places = keys + BLOCK * np.arange(len(blocks)) + blocks.argmin(axis=1)
            self.memory.set(0, {w.FIRSTS: self.memory.put(np.stack([blocks.min(axis=1), places], axis=1).ravel())})

    def _lay_out_network(self) -> None:
        """Lay out a slot for each lane that has a part of the network."""
        joined = sorted(
            (lane.share.slot, at)
            for lane, at in zip(self._machine.lanes, self.lanes, strict=True)
            if isinstance(lane.share, Share)
        )
        for slot, lane in joined:
            at = self.slots[slot] = self.memory.allocate(w.SLOT_WORDS)
            self.memory.set(at, {w.S_LANE: lane, w.S_MOVING: -1})
            self._set_floats(at, {w.S_STRETCH: 1.0})

    def _group_slots(self) -> None:
        """Let each slot know those of all lanes that may share out a link with it, or with one of these."""
        groups: list[tuple[set[int], set[str]]] = []
        network = self._machine.network
        scarce = set() if network is None else network.scarce(self._asked.values())
        for slot in self.slots.values():
            slots, links = {slot}, scarce.intersection(self._asked.get(slot, ()))
            for group in [group for group in groups if group[1] & links]:
                groups.remove(group)
                slots |= group[0]
                links |= group[1]
            groups.append((slots, links))
        for slots, _ in groups:
            at = self.memory.put_list(sorted(slots))
            for slot in slots:
                self.memory.set(slot, {w.S_GROUP: at})
        width = w.V_MOVING + 2 * max((len(slots) for slots, _ in groups), default=0)
        rates = self.memory.allocate(_RATES * width)
        self.memory.set(0, {w.RATE_ROWS: _RATES, w.RATE_WORDS: width, w.RATES: rates})

    def _lay_out_lane(self, lane: Lane, at: int) -> None:
        lags, memory = lane.lags, self.memory
        lists = {
            place: memory.put_list(self._lane_of[id(other)] for other in others)
            for place, others in (
                (w.L_SHARING, lane.sharing), (w.L_TURNS, lane.turns), (w.L_DISTURBERS, lane.disturbers),
                (w.L_NEIGHBORS, lane.neighbors),
            )
        }  # fmt: skip
        slowed = memory.put([len(lane.slowed_by), *[0] * (2 * len(lane.slowed_by))])
        for number, (other, factor) in enumerate(lane.slowed_by):
            memory.words[slowed + 1 + 2 * number] = self._lane_of[id(other)]
            memory.floats[slowed + 2 + 2 * number] = factor
        kind = w.BY_RANK if isinstance(lane, QueueLane) else w.AS_READY if isinstance(lane, ArrivalLane) else w.IN_ORDER
        self.memory.set(at, lists | {
            w.L_KIND: kind, w.L_OPEN: kind == w.BY_RANK or bool(lane.turns),
            w.L_GAP: lags.gap_ns, w.L_GAP_DISTURBED: lags.gap_disturbed_ns,
            w.L_AFTER_OTHER: lags.after_other_ns, w.L_AFTER_OTHER_DISTURBED: lags.after_other_disturbed_ns,
            w.L_AFTER_ISSUE_DISTURBED: lags.after_issue_longer_ns, w.L_LONGER: lags.longer,
            w.L_SLOWED_BY: slowed, w.L_NUMBER: lane.number,
            w.L_SLOT: self.slots[lane.share.slot] if isinstance(lane.share, Share) else -1,
            w.L_CROWD: self._crowd_of(lane), w.L_GPU: -1 if lane.serves_all else self.gpus[self.gpu_of(lane)],
            w.L_FIRST: -1, w.L_LAST: -1, w.L_ENTERING: -1, w.L_LAST_ENTERING: -1, w.L_NEXT: -1, w.L_ACTIVE: -1,
            w.L_FREE: -(10**18), w.L_END: w.NEVER, w.L_WAKE: w.NEVER, w.L_KEEPS: w.NEVER, w.L_ENTERS: w.NEVER,
        })  # fmt: skip
        self._set_floats(at, {w.L_STRETCH: 1.0, w.L_SHARING_FACTOR: lane.sharing_factor})

    def _crowd_of(self, lane: Lane) -> int:
        """Returns the address of what lanes share alike of which this is one; -1 if it is none."""
        if not isinstance(lane.share, CrowdShare):
            return -1
        crowd, memory = lane.share.crowd, self.memory
        if crowd not in self._crowds:
            of_it = [
                at
                for other, at in zip(self._machine.lanes, self.lanes, strict=True)
                if isinstance(other.share, CrowdShare) and other.share.crowd is crowd
            ]
            at = self._crowds[crowd] = memory.put([0, memory.put_list(of_it), *[0] * (1 + len(of_it))])
            self._set_floats(at, {w.CROWD_TIMES + n: times for n, times in enumerate([1.0, *crowd.times_as_long])})
        return self._crowds[crowd]

    def lane_of(self, lane: Lane) -> int:
        """Returns where a lane is laid out."""
        return self._lane_of[id(lane)]

    def gpu_of(self, lane: Lane) -> int:
        """Returns the number of the GPU in whose timeline a lane is."""
        gpus = self._machine.gpus
        return next(number for number, one in enumerate(gpus) if one.lanes.timeline is lane.timeline)

    def _lay_out_gpu(self, number: int, at: int) -> None:
        one = self._machine.gpus[number]
        lanes, costs, state, other = one.lanes, one.lanes.costs, one.state, one.lanes.costs.interruptions
        named = {
            w.G_COMPUTE: lanes.compute, w.G_H2D: lanes.copies[H2D], w.G_PREFETCH: lanes.copies[PREFETCH_LANE],
            w.G_D2H: lanes.d2h, w.G_SIDE: lanes.side, w.G_UNPACKING: getattr(lanes, "unpacking", None),
            w.G_CPU: getattr(lanes, "cpu", None), w.G_BACK: getattr(lanes, "back", None),
            w.G_EXCHANGE: self._machine.exchange[number] if self._machine.exchange else None,
        }  # fmt: skip
        places = {place: -1 if lane is None else self._lane_of[id(lane)] for place, lane in named.items()}
        self.memory.set(at, places | {
            w.G_NUMBER: number, w.G_WAIT: costs.wait_ns, w.G_READBACK_ENQUEUE: costs.readback_enqueue_ns,
            w.G_READBACK_LATENCY: costs.readback_latency_ns, w.G_READBACK: costs.readback_ns,
            w.G_SYNCHRONIZE: costs.synchronize_ns, w.G_SYNCHRONIZE_BESIDE: costs.synchronize_beside_copy_ns,
            w.G_RESUME: costs.resume_ns, w.G_COPY_RESUME: costs.copy_resume_ns,
            w.G_LAUNCH: costs.beside.exchange_call_ns,
            w.G_COPY_LATENCY: costs.copy_latency_ns, w.G_TURN: costs.turn_ns,
            w.G_TO_CPU: costs.beside.to_cpu_ns + costs.runtime.cpu_submit_ns,
            w.G_FROM_CPU: costs.beside.from_cpu_ns + costs.runtime.cpu_return_ns,
            w.G_OWN_LAYER: costs.runtime.layer_ns, w.G_OWN_STEP: costs.runtime.step_ns, w.G_PREDICT: costs.predict.ns,
            w.G_PREDICT_LAUNCHES: costs.predict.launches, w.G_PREDICT_HOST: costs.predict.host_ns,
            w.G_PREDICT_ISSUE: costs.predict.issue_ns,
            w.G_OTHERS_EVERY: other.every_ns if other else 0, w.G_OTHERS_NS: other.ns if other else 0,
            w.G_READS_BACK: lanes.reads_back, w.G_WATCHES: state.watches_queue, w.G_DEPTH: state.queue_depth,
            w.G_GROUPED_SAVED: costs.grouped_saved_ns, w.G_BY_PRIORITY: isinstance(lanes.copies[H2D], QueueLane),
            w.G_DROPS_STALE: one.drops_stale, w.G_EXPERTS: costs.model.experts, w.G_SIZED: lanes.sized,
            w.G_HOST: lanes.host, w.G_VISIT: -1, w.G_LAST: -1, w.G_LAST_KERNEL: -1, w.G_AFTER: -1,
            w.G_KERNEL_AFTER: -1, w.G_RING: self.memory.allocate(2 * (state.queue_depth + 2)),
        })  # fmt: skip
        self._set_floats(at, {w.G_COPY_SLOWDOWN: lanes.copy_slowdown, w.G_READBACK_SLOWDOWN: costs.readback_slowdown})
        self.memory.set(at, {place: self.memory.put_region(_RECORDS, words) for place, words in RECORDED.items()})
        self._lay_out_scatter(costs.scatter, at)
        sizes = self._lay_out_copies(one, at)
        self._lay_out_shapes(one, at, sizes)
        self._lay_out_moves(number, at, sizes)
        drive, reads = lanes.drive, costs.reads
        io_lanes = -1 if drive is None else self.memory.put_list(self._lane_of[id(lane)] for lane in drive.lanes)
        by_layer = [] if reads is None else [ns for cost in reads.by_layer for ns in (cost.request_ns, cost.host_ns)]
        self.memory.set(at, {w.G_IO_LANES: io_lanes, w.G_READS: self.memory.put(by_layer)})

    def _lay_out_scatter(self, scatter: Scatter | None, at: int) -> None:
        """Lay out where a GPU's factors stand, of which none is drawn yet."""
        table = -1 if scatter is None else self.memory.allocate(w.SCATTERS * w.FACTOR_WORDS)
        self.memory.set(at, {w.G_SCATTER: table})
        if scatter is not None:
            self._scatters[at] = [Factors(scatter, what, table + number * w.FACTOR_WORDS)
                                  for number, what in enumerate(SCATTERED)]  # fmt: skip

    def draw(self, gpu: int, number: int) -> None:
        """Draw a GPU's next factors, until there are so many of each."""
        for factors in self._scatters[gpu]:
            factors.draw(self.memory, number)

    def _transfer(self, transfer: Any, queued_ns: int, alone_ns: int, lanes: Iterable[Lane]) -> int:
        """Returns the number of a transfer over shared links, which takes one time behind others and one by itself.

        It is one that these lanes may make.
        """
        if transfer is None:
            return -1
        for lane in lanes:
            if isinstance(lane.share, Share):
                asked = self._asked.setdefault(self.slots[lane.share.slot], {})
                for link, rate in [*transfer.asks(queued_ns).items(), *transfer.asks(alone_ns).items()]:
                    asked[link] = max(asked.get(link, Fraction(0)), rate)
        key = (id(transfer), queued_ns, alone_ns)
        if key not in self._transfer_of:
            self._transfer_of[key] = len(self.transfers) // 2
            self.transfers += [(transfer, queued_ns), (transfer, alone_ns)]
        return self._transfer_of[key]

    def _lay_out_copies(self, one: Any, at: int) -> list[int]:
        """Lay out what copies take, by class, and the class of every expert; return the bytes of each class."""
        lanes, memory = one.lanes, self.memory
        of_layer = lanes.costs.model.expert_bytes
        sizes = list(dict.fromkeys(lanes.sizes if lanes.sized else of_layer))  # classes are numbered as they come
        classes = {}
        for number, size_bytes in enumerate(sizes):
            expert = lanes.sizes.index(size_bytes)
            cost, transfer = lanes.copy_cost(expert), lanes.transfer(expert)
            ns = (cost.queued_ns, cost.alone_ns)
            if isinstance(lanes.copies[H2D], QueueLane):
                ns = (cost.piece_queued_ns, cost.piece_alone_ns)
            transfers = self._transfer(transfer, *ns, lanes.streams)
            classes[size_bytes] = memory.put((*ns, cost.pieces, cost.host_ns, transfers, number))
        alike = len(sizes) == 1
        of_expert = memory.put(classes[size_bytes] for size_bytes in (sizes if alike else lanes.sizes))
        self.memory.set(at, {w.G_COPY_OF: of_expert, w.G_COPY_EACH: not alike})
        return sizes

    def _lay_out_shapes(self, one: Any, at: int, sizes: Sequence[int]) -> None:
        """Lay out the shapes by kind and layer, and keep what prices each of them."""
        lanes, attention = one.lanes, one.lanes.costs.attention
        alike = self._shapes_of.get(id(lanes.costs))
        if alike is None or lanes.sized:
            alike = self._shapes_of[id(lanes.costs)] = self._make_shapes(one, sizes)
        added = -1
        if attention.counts:
            added = self.memory.put([-1, *attention.kind_of, *[0] * (w.ADDED_WORDS * len(attention.firsts))])
        self.memory.set(at, alike | {w.G_ATTENTION: added})

    def _make_shapes(self, one: Any, sizes: Sequence[int]) -> dict[int, int]:
        """Returns what a GPU's words say of its shapes."""
        lanes, model = one.lanes, one.lanes.costs.model
        layers = len(model.expert_bytes)
        kinds = w.SIZED_SHAPE + len(sizes)
        shapes = np.full((2, kinds, layers), -1, dtype=np.int64)
        known: dict[tuple[int, ...], int] = {}
        alike: dict[tuple[int, ...], int] = {}  # the first layer of these sizes
        for phase, layer in product((PREFILL, DECODE), range(layers)):
            expert_bytes = model.expert_bytes[layer]
            first = alike.setdefault((phase, model.dense_bytes[layer], expert_bytes), layer)
            if first != layer:
                shapes[phase, :, layer] = shapes[phase, :, first]
                continue
            priced = {
                w.DENSE_SHAPE: (model.dense_bytes[layer], partial(lanes.kernel_of, DENSE, layer, phase)),
                w.HEAD_SHAPE: (0, partial(lanes.kernel_of, HEAD, layer, phase)),
                w.EXPERT_SHAPE: (expert_bytes, partial(lanes.kernel_of, EXPERT, layer, phase)),
                w.LOW_SHAPE: (expert_bytes, partial(lanes.low_precision, layer, phase)),
                w.UNPACK_SHAPE: (expert_bytes, partial(_always, lanes.decompress_layer, layer)),
                w.CPU_SHAPE: (expert_bytes, partial(lanes.on_cpu, layer)),
                w.TO_CPU_SHAPE: (0, lanes.to_cpu),
                w.FROM_CPU_SHAPE: (0, lanes.from_cpu),
            }
            for number, size_bytes in enumerate(sizes if lanes.sized else ()):
                priced[w.SIZED_SHAPE + number] = (expert_bytes, partial(lanes.sized_expert, size_bytes, layer, phase))
            for what, (size_bytes, price) in priced.items():
                key = (phase, what, size_bytes)
                if key not in known:
                    known[key] = len(self.prices)
                    self.prices.append(price)
                shapes[phase, what, layer] = known[key]
        return {w.G_SHAPES: self.memory.put(shapes.reshape(-1)), w.G_KINDS: kinds, w.G_LAYERS: layers}

    def _move(self, costs: Any, size_bytes: int, lane: Lane, slowdown: float, target: int) -> int:
        """Returns the address of what it takes to send so many bytes to another GPU."""
        ns = (costs.queued_ns(size_bytes), costs.alone_ns(size_bytes))
        transfer = self._transfer(costs.transfer(size_bytes), *ns, [lane]) if lane.share is not None else -1
        at = self.memory.put([
            self._lane_of[id(lane)], *ns, costs.host_ns, costs.latency_ns, transfer, costs.arrival_ns, target, 0,
        ])  # fmt: skip
        self._set_floats(at, {w.M_SLOWDOWN: slowdown})
        return at

    def _lay_out_moves(self, number: int, at: int, sizes: Sequence[int]) -> None:
        """Lay out what a GPU sends at each step, what arrives there, and experts from and to other GPUs."""
        gpus, way, memory = len(self.gpus), self._machine.gpus[number].state.sends, self.memory
        steps = 0 if way is None else len(way.size_bytes)
        moves: dict[int, int] = {}
        for size_bytes in dict.fromkeys(way.size_bytes if way else ()):
            slowdown = way.costs.slowdown(size_bytes)
            moves[size_bytes] = self._move(way.costs, size_bytes, way.lane, slowdown, (number + 1) % gpus)
        sends = memory.put(moves[size_bytes] for size_bytes in (way.size_bytes if way else ()))
        self.memory.set(at, {w.G_SENDS: sends, w.G_ARRIVALS: memory.put([-1] * steps)})
        peers = []
        for size_bytes in sizes if self._machine.peers else ():
            for other in range(gpus):
                for pair in ((other, number), (number, other)):
                    if pair in self._machine.peers:
                        costs, _, lane = self._machine.peers[pair]
                        peers.append(self._move(costs, size_bytes, lane, 1.0, pair[1]))
                    else:
                        peers.append(-1)
        self.memory.set(at, {w.G_PEERS: memory.put(peers)})


def _always(price: Callable[[int], KernelCost], layer: int, tokens: int) -> KernelCost:
    return price(layer)
