"""The compiled engine: the machine that SimPy processes make up, laid out in memory, and the loop that feeds it.

It is laid out from the same lanes, costs and links as the SimPy engine has, none of which runs here: so the two cannot
differ in what is coupled to what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from ...resources.network import Crowd, CrowdShare, Network, Share
from ...resources.timeline import DENSE, EXPERT, HEAD
from ...workloads.batches import DECODE, PREFILL
from ..costs.costs import KernelCost
from ..decide.commands import H2D, PREFETCH_LANE, Command, Op
from ..decide.program import Program
from . import compiled_host as code
from .compiled_lanes import rate_row
from .lanes import ArrivalLane, Lane, QueueLane
from .memory import (
    ADDED_WORDS,
    AN_BESIDE,
    AN_NS,
    ARRIVAL_WORDS,
    ARRIVALS,
    AS_READY,
    ASKED,
    ASKED_FOR,
    AT_KINDS,
    AT_STEP,
    BY_RANK,
    CPU_SHAPE,
    CROWD_TIMES,
    DENSE_SHAPE,
    DONE,
    DROPPED,
    DROPPED_WORDS,
    EXPERT_SHAPE,
    FREE_NODE,
    FREE_WORK,
    FROM_CPU_SHAPE,
    G_ACCESSES,
    G_AFTER,
    G_ARRIVALS,
    G_ASSIGNED,
    G_ATTENTION,
    G_BACK,
    G_BUDGET,
    G_BY_PRIORITY,
    G_COMPUTE,
    G_COPY_LATENCY,
    G_COPY_OF,
    G_COPY_RESUME,
    G_COPY_SLOWDOWN,
    G_CPU,
    G_D2H,
    G_DECISIONS,
    G_DEPTH,
    G_DROPS_STALE,
    G_EXCHANGE,
    G_EXCHANGE_NS,
    G_EXPERTS,
    G_GROUPED_CONSTANT,
    G_H2D,
    G_HOST,
    G_IO_LANES,
    G_KERNEL_AFTER,
    G_KINDS,
    G_LAST,
    G_LAST_KERNEL,
    G_LAUNCH,
    G_LAYERS,
    G_NOW,
    G_NUMBER,
    G_OTHERS_EVERY,
    G_OTHERS_NS,
    G_PEERS,
    G_PREDICT,
    G_PREDICT_HOST,
    G_PREDICT_ISSUE,
    G_PREDICT_LAUNCHES,
    G_PREFETCH,
    G_READBACK,
    G_READBACK_ENQUEUE,
    G_READBACK_LATENCY,
    G_READBACK_SLOWDOWN,
    G_READS,
    G_READS_BACK,
    G_RESUME,
    G_RING,
    G_SENDS,
    G_SHAPES,
    G_SIDE,
    G_SIZED,
    G_SPANS,
    G_SYNCHRONIZE,
    G_SYNCHRONIZE_BESIDE,
    G_THREAD,
    G_TO_CPU,
    G_TURN,
    G_UNPACKING,
    G_VISIT,
    G_WAIT,
    G_WATCHES,
    GPU_WORDS,
    GPUS,
    HEAD_SHAPE,
    HEADER,
    IN_ORDER,
    K_SLOWDOWN,
    KERNEL_TOKENS,
    KERNEL_WORDS,
    KERNELS,
    L_ACTIVE,
    L_AFTER_ISSUE_DISTURBED,
    L_AFTER_OTHER,
    L_AFTER_OTHER_DISTURBED,
    L_CROWD,
    L_DISTURBERS,
    L_END,
    L_ENTERING,
    L_FIRST,
    L_FREE,
    L_GAP,
    L_GAP_DISTURBED,
    L_GPU,
    L_KEEPS,
    L_KIND,
    L_LAST,
    L_LAST_ENTERING,
    L_LONGER,
    L_NEIGHBORS,
    L_NEXT,
    L_NUMBER,
    L_SHARING,
    L_SHARING_FACTOR,
    L_SLOT,
    L_SLOWED_BY,
    L_STRETCH,
    L_TURNS,
    L_WAKE,
    LANE_WORDS,
    LANES,
    LOW_SHAPE,
    M_SLOWDOWN,
    N_NEXT,
    NEVER,
    NODE_WORDS,
    NODES_EACH,
    NODES_LEFT,
    NOTE_WORDS,
    NOW,
    PORTION,
    PRICE,
    R_AT,
    R_CAPACITY,
    R_COUNT,
    RATE,
    RATE_ROWS,
    RATE_WORDS,
    RATES,
    RATES_KNOWN,
    RECORD_ROOM,
    RECORDS,
    REGISTERS,
    S_GROUP,
    S_LANE,
    S_MOVING,
    S_STRETCH,
    SIZED_SHAPE,
    SLOT_WORDS,
    SPAN_WORDS,
    T_AT,
    T_CAPACITY,
    T_COUNT,
    T_GOES_ON,
    T_GPU,
    T_GPUS,
    T_NUMBER,
    T_PART_OF,
    T_ROWS,
    THREAD_WORDS,
    THREADS,
    TO_CPU_SHAPE,
    UNPACK_SHAPE,
    V_GROUP,
    V_MOVING,
    W_NEXT,
    WORK_EACH,
    WORK_LEFT,
    WORK_WORDS,
    Memory,
)  # fmt: skip
from .records import pack_arrival

Array = npt.NDArray[Any]

#: What the memory begins with; what fills up is made larger.
_WORK, _NODES, _RECORDS, _RATES, _ROWS = 1 << 11, 1 << 12, 1 << 14, 1 << 10, 1 << 9
_REGISTER = Command._fields.index("register")
#: What is recorded of a GPU, and the words of a record.
_RECORDED = {G_SPANS: SPAN_WORDS, G_ACCESSES: NOTE_WORDS, G_DECISIONS: NOTE_WORDS}


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


class Layout:
    """A machine laid out in memory; `prices` are what shapes cost, by number, and `transfers` what transfers are."""

    def __init__(self, machine: Machine, threads: Sequence[Driven]) -> None:
        self._machine = machine
        self.memory = Memory(len(machine.gpus))
        self.prices: list[Callable[[int], KernelCost]] = []
        self.transfers: list[tuple[Any, int]] = []
        self._transfer_of: dict[tuple[int, int, int], int] = {}
        self._crowds: dict[Crowd, int] = {}
        memory = self.memory
        memory.allocate(HEADER)
        self.lanes = [memory.allocate(LANE_WORDS) for _ in machine.lanes]
        self._lane_of = {id(lane): at for lane, at in zip(machine.lanes, self.lanes, strict=True)}
        self.gpus = [memory.allocate(GPU_WORDS) for _ in machine.gpus]
        self.threads = [memory.allocate(THREAD_WORDS) for _ in threads]
        parts = [memory.allocate(THREAD_WORDS) for _ in machine.gpus]
        queued = sum(len(one.lanes.sizes) for one in machine.gpus)  # all may be dropped at once
        header = {
            LANES: memory.put_list(self.lanes), THREADS: memory.put_list([*self.threads, *parts]),
            GPUS: memory.put_list(self.gpus), REGISTERS: memory.put([-1] * (1 << 10)),
            RECORD_ROOM: _RECORDS, ARRIVALS: memory.put_region(1 << 10, ARRIVAL_WORDS),
            DROPPED: memory.put_region(64 + queued, DROPPED_WORDS), FREE_WORK: -1, FREE_NODE: -1,
        }  # fmt: skip
        self._set(0, header)
        self.registers = 1 << 10
        self._space = 1
        self.add_space()
        for number, (at, driven) in enumerate(zip(self.threads, threads, strict=True)):
            gpus = memory.put_list(self.gpus[gpu] for gpu in driven.gpus)
            rows = memory.allocate(_ROWS * code.COLUMNS)
            self._set(at, {T_NUMBER: number, T_ROWS: rows, T_CAPACITY: _ROWS, T_GPU: -1, T_GPUS: gpus, T_PART_OF: -1})
        for at, gpu in zip(parts, self.gpus, strict=True):
            self._set(at, {T_GPU: gpu, T_GPUS: memory.put_list([gpu]), T_PART_OF: -1, T_GOES_ON: NEVER})
            self._set(gpu, {G_THREAD: at})
        self.slots: dict[int, int] = {}
        self._links: dict[int, set[str]] = {}
        self._lay_out_network()
        for lane, at in zip(machine.lanes, self.lanes, strict=True):
            self._lay_out_lane(lane, at)
        for number, at in enumerate(self.gpus):
            self._lay_out_gpu(number, at)
        self._group_slots()
        most_tokens = max((one.most_tokens for one in machine.gpus), default=1)
        kernels = memory.allocate(len(self.prices) * (most_tokens + 1) * KERNEL_WORDS)
        self._set(0, {KERNELS: kernels, KERNEL_TOKENS: most_tokens + 1})

    def _set(self, at: int, values: dict[int, int]) -> None:
        for word, value in values.items():
            self.memory.words[at + word] = value

    def _set_floats(self, at: int, values: dict[int, float]) -> None:
        floats = self.memory.floats
        for word, value in values.items():
            floats[at + word] = value

    def add_space(self) -> None:
        """Add free work and nodes, as much as there is."""
        self.memory.add_free(FREE_WORK, WORK_LEFT, WORK_WORDS, W_NEXT, _WORK * self._space)
        self.memory.add_free(FREE_NODE, NODES_LEFT, NODE_WORDS, N_NEXT, _NODES * self._space)
        self._space *= 2

    def add_registers(self, count: int) -> None:
        """Make room for so many registers, at least."""
        words, old = self.memory.words, int(self.memory.words[REGISTERS])
        kept = words[old : old + self.registers].tolist()
        self.registers = 2 * count
        self._set(0, {REGISTERS: self.memory.put([*kept, *[-1] * (self.registers - len(kept))])})

    def _lay_out_network(self) -> None:
        """Lay out a slot for each lane that has a part of the network."""
        joined = sorted(
            (lane.share.slot, at)
            for lane, at in zip(self._machine.lanes, self.lanes, strict=True)
            if isinstance(lane.share, Share)
        )
        for slot, lane in joined:
            at = self.slots[slot] = self.memory.allocate(SLOT_WORDS)
            self._set(at, {S_LANE: lane, S_MOVING: -1})
            self._set_floats(at, {S_STRETCH: 1.0})

    def _group_slots(self) -> None:
        """Let each slot know those of all lanes that may share a link with it, or with one of these."""
        groups: list[tuple[set[int], set[str]]] = []
        for slot in self.slots.values():
            slots, links = {slot}, set(self._links.get(slot, ()))
            for group in [group for group in groups if group[1] & links]:
                groups.remove(group)
                slots |= group[0]
                links |= group[1]
            groups.append((slots, links))
        for slots, _ in groups:
            at = self.memory.put_list(sorted(slots))
            for slot in slots:
                self._set(slot, {S_GROUP: at})
        width = V_MOVING + 2 * max((len(slots) for slots, _ in groups), default=0)
        rates = self.memory.allocate(_RATES * width)
        self._set(0, {RATE_ROWS: _RATES, RATE_WORDS: width, RATES: rates})

    def _lay_out_lane(self, lane: Lane, at: int) -> None:
        lags, memory = lane.lags, self.memory
        lists = {
            place: memory.put_list(self._lane_of[id(other)] for other in others)
            for place, others in (
                (L_SHARING, lane.sharing), (L_TURNS, lane.turns), (L_DISTURBERS, lane.disturbers),
                (L_NEIGHBORS, lane.neighbors),
            )
        }  # fmt: skip
        slowed = memory.put([len(lane.slowed_by), *[0] * (2 * len(lane.slowed_by))])
        for number, (other, factor) in enumerate(lane.slowed_by):
            memory.words[slowed + 1 + 2 * number] = self._lane_of[id(other)]
            memory.floats[slowed + 2 + 2 * number] = factor
        kind = BY_RANK if isinstance(lane, QueueLane) else AS_READY if isinstance(lane, ArrivalLane) else IN_ORDER
        self._set(at, lists | {
            L_KIND: kind, L_GAP: lags.gap_ns, L_GAP_DISTURBED: lags.gap_disturbed_ns,
            L_AFTER_OTHER: lags.after_other_ns, L_AFTER_OTHER_DISTURBED: lags.after_other_disturbed_ns,
            L_AFTER_ISSUE_DISTURBED: lags.after_issue_longer_ns, L_LONGER: lags.longer,
            L_SLOWED_BY: slowed, L_NUMBER: lane.number,
            L_SLOT: self.slots[lane.share.slot] if isinstance(lane.share, Share) else -1,
            L_CROWD: self._crowd_of(lane), L_GPU: self.gpus[self.gpu_of(lane)],
            L_FIRST: -1, L_LAST: -1, L_ENTERING: -1, L_LAST_ENTERING: -1, L_NEXT: -1, L_ACTIVE: -1,
            L_FREE: -(10**18), L_END: NEVER, L_WAKE: NEVER, L_KEEPS: NEVER,
        })  # fmt: skip
        self._set_floats(at, {L_STRETCH: 1.0, L_SHARING_FACTOR: lane.sharing_factor})

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
            self._set_floats(at, {CROWD_TIMES + n: times for n, times in enumerate([1.0, *crowd.times_as_long])})
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
            G_COMPUTE: lanes.compute, G_H2D: lanes.copies[H2D], G_PREFETCH: lanes.copies[PREFETCH_LANE],
            G_D2H: lanes.d2h, G_SIDE: lanes.side, G_UNPACKING: getattr(lanes, "unpacking", None),
            G_CPU: getattr(lanes, "cpu", None), G_BACK: getattr(lanes, "back", None),
            G_EXCHANGE: self._machine.exchange[number] if self._machine.exchange else None,
        }  # fmt: skip
        places = {place: -1 if lane is None else self._lane_of[id(lane)] for place, lane in named.items()}
        self._set(at, places | {
            G_NUMBER: number, G_WAIT: costs.wait_ns, G_READBACK_ENQUEUE: costs.readback_enqueue_ns,
            G_READBACK_LATENCY: costs.readback_latency_ns, G_READBACK: costs.readback_ns,
            G_SYNCHRONIZE: costs.synchronize_ns, G_SYNCHRONIZE_BESIDE: costs.synchronize_beside_copy_ns,
            G_RESUME: costs.resume_ns, G_COPY_RESUME: costs.copy_resume_ns, G_LAUNCH: costs.launch_ns,
            G_COPY_LATENCY: costs.copy_latency_ns, G_TURN: costs.turn_ns,
            G_TO_CPU: costs.enqueue_ns + costs.records_ns, G_PREDICT: costs.predict.ns,
            G_PREDICT_LAUNCHES: costs.predict.launches, G_PREDICT_HOST: costs.predict.host_ns,
            G_PREDICT_ISSUE: costs.predict.issue_ns,
            G_OTHERS_EVERY: other.every_ns if other else 0, G_OTHERS_NS: other.ns if other else 0,
            G_READS_BACK: lanes.reads_back, G_WATCHES: state.watches_queue, G_DEPTH: state.queue_depth,
            G_GROUPED_CONSTANT: costs.grouped_constant_ns, G_BY_PRIORITY: isinstance(lanes.copies[H2D], QueueLane),
            G_DROPS_STALE: one.drops_stale, G_EXPERTS: costs.model.experts, G_SIZED: lanes.sized,
            G_HOST: lanes.host, G_VISIT: -1, G_LAST: -1, G_LAST_KERNEL: -1, G_AFTER: -1,
            G_KERNEL_AFTER: -1, G_RING: self.memory.allocate(2 * (state.queue_depth + 2)),
        })  # fmt: skip
        self._set_floats(at, {G_COPY_SLOWDOWN: lanes.copy_slowdown, G_READBACK_SLOWDOWN: costs.readback_slowdown})
        self._set(at, {place: self.memory.put_region(_RECORDS, words) for place, words in _RECORDED.items()})
        sizes = self._lay_out_copies(one, at)
        self._lay_out_shapes(one, at, sizes)
        self._lay_out_moves(number, at, sizes)
        drive, reads = lanes.drive, costs.reads
        io_lanes = -1 if drive is None else self.memory.put_list(self._lane_of[id(lane)] for lane in drive.lanes)
        by_layer = [] if reads is None else [ns for cost in reads.by_layer for ns in (cost.request_ns, cost.host_ns)]
        self._set(at, {G_IO_LANES: io_lanes, G_READS: self.memory.put(by_layer)})

    def _transfer(self, transfer: Any, queued_ns: int, alone_ns: int, lanes: Iterable[Lane]) -> int:
        """Returns the number of a transfer over shared links, which takes one time behind others and one by itself.

        It is one that these lanes may make.
        """
        if transfer is None:
            return -1
        for lane in lanes:
            if isinstance(lane.share, Share):
                self._links.setdefault(self.slots[lane.share.slot], set()).update(transfer.route.links)
        key = (id(transfer), queued_ns, alone_ns)
        if key not in self._transfer_of:
            self._transfer_of[key] = len(self.transfers) // 2
            self.transfers += [(transfer, queued_ns), (transfer, alone_ns)]
        return self._transfer_of[key]

    def _lay_out_copies(self, one: Any, at: int) -> list[int]:
        """Lay out what copies take, by class, and the class of every expert; return the bytes of each class."""
        lanes, memory = one.lanes, self.memory
        _, firsts, which = np.unique(np.array(lanes.sizes), return_index=True, return_inverse=True)
        order = np.argsort(firsts)  # classes are numbered as they come
        classes = np.zeros(len(firsts), dtype=np.int64)
        for number, kind in enumerate(order.tolist()):
            expert = int(firsts[kind])
            cost, transfer = lanes.copy_cost(expert), lanes.transfer(expert)
            ns = (cost.queued_ns, cost.alone_ns)
            if isinstance(lanes.copies[H2D], QueueLane):
                ns = (cost.piece_queued_ns, cost.piece_alone_ns)
            transfers = self._transfer(transfer, *ns, lanes.streams)
            classes[kind] = memory.put((*ns, cost.pieces, cost.host_ns, transfers, number))
        self._set(at, {G_COPY_OF: memory.put(classes[which.reshape(-1)])})
        return [lanes.sizes[int(firsts[kind])] for kind in order]

    def _lay_out_shapes(self, one: Any, at: int, sizes: Sequence[int]) -> None:
        """Lay out the shapes by kind and layer, and keep what prices each of them."""
        lanes, model = one.lanes, one.lanes.costs.model
        layers = len(model.expert_bytes)
        kinds = SIZED_SHAPE + len(sizes)
        shapes = np.full((2, kinds, layers), -1, dtype=np.int64)
        known: dict[tuple[int, ...], int] = {}
        for phase, layer in product((PREFILL, DECODE), range(layers)):
            expert_bytes = model.expert_bytes[layer]
            priced = {
                DENSE_SHAPE: (model.dense_bytes[layer], partial(lanes.kernel_of, DENSE, layer, phase)),
                HEAD_SHAPE: (0, partial(lanes.kernel_of, HEAD, layer, phase)),
                EXPERT_SHAPE: (expert_bytes, partial(lanes.kernel_of, EXPERT, layer, phase)),
                LOW_SHAPE: (expert_bytes, partial(lanes.low_precision, layer, phase)),
                UNPACK_SHAPE: (expert_bytes, partial(_always, lanes.decompress_layer, layer)),
                CPU_SHAPE: (expert_bytes, partial(lanes.on_cpu, layer)),
                TO_CPU_SHAPE: (0, lanes.to_cpu),
                FROM_CPU_SHAPE: (0, lanes.from_cpu),
            }
            for number, size_bytes in enumerate(sizes if lanes.sized else ()):
                priced[SIZED_SHAPE + number] = (expert_bytes, partial(lanes.sized_expert, size_bytes, layer, phase))
            for what, (size_bytes, price) in priced.items():
                key = (phase, what, size_bytes)
                if key not in known:
                    known[key] = len(self.prices)
                    self.prices.append(price)
                shapes[phase, what, layer] = known[key]
        table = self.memory.put(shapes.ravel().tolist())
        attention, added = lanes.costs.attention, -1
        if attention.counts:
            added = self.memory.put([-1, *attention.kind_of, *[0] * (ADDED_WORDS * len(attention.firsts))])
        self._set(at, {G_SHAPES: table, G_KINDS: kinds, G_LAYERS: layers, G_ATTENTION: added})

    def _move(self, costs: Any, size_bytes: int, lane: Lane, slowdown: float, target: int) -> int:
        """Returns the address of what it takes to send so many bytes to another GPU."""
        ns = (costs.queued_ns(size_bytes), costs.alone_ns(size_bytes))
        transfer = self._transfer(costs.transfer(size_bytes), *ns, [lane]) if lane.share is not None else -1
        at = self.memory.put([
            self._lane_of[id(lane)], *ns, costs.host_ns, costs.latency_ns, transfer, costs.arrival_ns, target, 0,
        ])  # fmt: skip
        self._set_floats(at, {M_SLOWDOWN: slowdown})
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
        self._set(at, {G_SENDS: sends, G_ARRIVALS: memory.put([-1] * steps)})
        peers = []
        for size_bytes in sizes if self._machine.peers else ():
            for other in range(gpus):
                for pair in ((other, number), (number, other)):
                    if pair in self._machine.peers:
                        costs, _, lane = self._machine.peers[pair]
                        peers.append(self._move(costs, size_bytes, lane, 1.0, pair[1]))
                    else:
                        peers.append(-1)
        self._set(at, {G_PEERS: memory.put(peers)})


def _always(price: Callable[[int], KernelCost], layer: int, tokens: int) -> KernelCost:
    return price(layer)


class CompiledEngine:
    """One simulation over a machine laid out in memory."""

    def __init__(self, machine: Machine, threads: Sequence[Driven]) -> None:
        self._machine, self._threads = machine, threads
        self.layout = self._layout = Layout(machine, threads)
        self._memory = self._layout.memory
        self._steps = [iter(thread.program) for thread in threads]
        self._portions: list[Iterator[Array]] = [iter(()) for _ in threads]
        self._begun = [False] * len(threads)
        self._number_of = {at: number for number, at in enumerate(self._layout.threads)}

    def now_ns(self, gpu: int) -> int:
        """Returns the clock of the host thread at a GPU."""
        return int(self._memory.words[self._layout.gpus[gpu] + G_NOW])

    def clock_ns(self) -> int:
        """Returns the simulation's clock."""
        return int(self._memory.words[NOW])

    def backlog_ns(self, gpu: int) -> int:
        """Returns the copy time that is queued on a GPU's link now, in ns."""
        return int(code.backlogs(self._memory.words, self._memory.floats, self._layout.gpus[gpu]))

    def run(self) -> None:
        """Run until nothing is left to do."""
        memory, thread = self._memory, -1
        while True:
            why, thread = code.advance(memory.words, memory.floats, thread)
            if why == DONE:
                break
            if why == PORTION:
                thread = self._next_portion(thread)
            else:
                self.answer(why)
        self.flush()

    def answer(self, why: int) -> None:
        """Give the machine what it has come back for: a price, a rate, or space."""
        if why == PRICE:
            self._price()
        elif why == RATE:
            self._find_rates()
        else:
            self._make_space()

    def _next_portion(self, at: int) -> int:
        """Give a thread its next portion, decided now; return the thread, or -1 if it has no more to do."""
        number, words = self._number_of[at], self._memory.words
        driven = self._threads[number]
        self._drop()
        while True:
            portion = next(self._portions[number], None)
            if portion is not None:
                break
            if self._begun[number]:
                self.flush()
                driven.ended()
            step = next(self._steps[number], None)
            if step is None:
                for gpu in driven.gpus:
                    code.end_busy(words, self._layout.gpus[gpu])
                words[at + T_COUNT] = words[at + T_AT] = 0
                self._begun[number] = False
                return -1
            self._begun[number], self._portions[number] = True, step
        self._take(at, driven, portion)
        return at

    def _take(self, at: int, driven: Driven, portion: Array) -> None:
        """Copy a portion into a thread's place, with what the machine has to know of the visit that it came of."""
        layout, memory = self._layout, self._memory
        if len(portion) > memory.words[at + T_CAPACITY]:
            capacity = 2 * len(portion)
            rows = memory.allocate(capacity * code.COLUMNS)
            memory.words[at + T_ROWS], memory.words[at + T_CAPACITY] = rows, capacity
        most = int(portion[:, _REGISTER].max()) + 1
        if most > layout.registers:
            layout.add_registers(most)
        words = memory.words
        rows = int(words[at + T_ROWS])
        words[rows : rows + portion.size] = portion.ravel()
        words[at + T_COUNT], words[at + T_AT] = len(portion), 0
        for gpu in driven.gpus:
            place, state = layout.gpus[gpu], self._machine.gpus[gpu].state
            words[place + G_ASSIGNED], words[place + G_BUDGET] = state.assigned
        if self._machine.exchange_ns is not None and (portion[:, 0] == Op.EXCHANGE).any():
            words[layout.gpus[0] + G_EXCHANGE_NS] = self._machine.exchange_ns()
        if self._machine.peers:
            self._name_lanes(portion)

    def _name_lanes(self, portion: Array) -> None:
        """Give the lanes of copies between GPUs their places in the timelines, at their first use."""
        for op, gpu, peer in portion[np.isin(portion[:, 0], (Op.FETCH, Op.STORE))][:, [0, 1, 9]].tolist():
            lane = self._machine.peers[(peer, gpu) if op == Op.FETCH else (gpu, peer)][1]()
            self._memory.words[self._layout.lane_of(lane) + L_NUMBER] = lane.number

    def _drop(self) -> None:
        """Tell the memory managers which prefetches were dropped since the last decision."""
        words = self._memory.words
        region = int(words[DROPPED])
        if not words[region + R_COUNT]:
            return
        at, count = int(words[region + R_AT]), int(words[region + R_COUNT])
        for gpu, expert, copy in words[at : at + count * DROPPED_WORDS].reshape(-1, DROPPED_WORDS).tolist():
            manager = self._machine.gpus[gpu].manager
            if manager.assigned.get(expert) == copy:
                manager.cancel(expert)
        words[region + R_COUNT] = 0

    def _price(self) -> None:
        """Ask what a kernel takes that nobody has asked for yet."""
        words, floats = self._memory.words, self._memory.floats
        shape, tokens = int(words[ASKED]), int(words[ASKED_FOR])
        if shape < 0:
            self._attend(-1 - shape, tokens)
            return
        cost = self._layout.prices[shape](tokens)
        at = int(words[KERNELS] + (shape * words[KERNEL_TOKENS] + tokens) * KERNEL_WORDS)
        words[at : at + K_SLOWDOWN] = (1, cost.ns, cost.launches, cost.host_ns, cost.issue_ns)
        floats[at + K_SLOWDOWN] = cost.slowdown

    def _attend(self, number: int, step: int) -> None:
        """Put down what attention adds to the dense parts of a GPU in a step."""
        words, floats = self._memory.words, self._memory.floats
        costs = self._machine.gpus[number].lanes.costs
        at = int(words[words[words[GPUS] + 1 + number] + G_ATTENTION])
        words[at + AT_STEP] = step
        first = at + AT_KINDS + len(costs.attention.kind_of)
        for kind, added in enumerate(costs.attention_in(step)):
            words[first + kind * ADDED_WORDS + AN_NS] = added.ns
            floats[first + kind * ADDED_WORDS + AN_BESIDE] = added.beside_copy_ns

    def _find_rates(self) -> None:
        """Work out, exactly, how transfers that run at once share the links, and keep it."""
        layout, memory, network = self._layout, self._memory, self._machine.network
        assert network is not None
        words = memory.words
        slot, transfer = int(words[ASKED]), int(words[ASKED_FOR])
        group = int(words[slot + S_GROUP])
        places = words[group + 1 : group + 1 + words[group]].tolist()
        moving = [transfer if place == slot else int(words[place + S_MOVING]) for place in places]
        if 2 * words[RATES_KNOWN] >= words[RATE_ROWS]:
            words[RATE_ROWS] *= 2
            words[RATES_KNOWN] = 0
            rates = memory.allocate(int(words[RATE_ROWS] * words[RATE_WORDS]))
            words = memory.words
            words[RATES] = rates
        row = int(rate_row(words, slot, transfer))
        words[row + V_GROUP] = group
        at = row + V_MOVING
        words[at : at + len(moving)] = moving
        running = [None if number < 0 else layout.transfers[number] for number in moving]
        memory.floats[at + len(moving) : at + 2 * len(moving)] = network.stretches(running)
        words[RATES_KNOWN] += 1

    def _make_space(self) -> None:
        """Write out what was recorded, and make more room where that is not enough for every thread's portion."""
        self.flush()
        words, gpus = self._memory.words, len(self._layout.gpus)
        more = 8 + gpus * gpus + max(int(words[thread + T_COUNT]) for thread in self._layout.threads)
        if words[WORK_LEFT] <= WORK_EACH * more or words[NODES_LEFT] <= NODES_EACH * more:
            self._layout.add_space()
        for region, size in ((ARRIVALS, ARRIVAL_WORDS), (DROPPED, DROPPED_WORDS)):
            at = int(words[region])
            if words[at + R_COUNT] + more >= words[at + R_CAPACITY]:
                self._memory.grow_region(at, size)
        if more >= words[RECORD_ROOM]:
            for at, (place, size) in product(self._layout.gpus, _RECORDED.items()):
                self._memory.grow_region(int(words[at + place]), size)
            self._memory.words[RECORD_ROOM] *= 2

    def _records(self, region: int, words: int) -> Array:
        """Returns the records of a region (records, words), and forget them."""
        memory = self._memory.words
        at, count = int(memory[region + R_AT]), int(memory[region + R_COUNT])
        memory[region + R_COUNT] = 0
        return memory[at : at + count * words].reshape(-1, words)

    def flush(self) -> None:
        """Write out what was recorded, GPU by GPU."""
        memory = self._memory.words
        for at, one in zip(self._layout.gpus, self._machine.gpus, strict=True):
            spans, accesses, decisions = (
                self._records(int(memory[at + place]), words) for place, words in _RECORDED.items()
            )
            one.lanes.timeline.extend(spans.tobytes())
            one.state.accesses.extend(accesses.astype("<i4").tobytes())
            one.state.decided.extend(decisions.tobytes())
        memory[RECORDS] = 0
        region, known = int(memory[ARRIVALS]), int(code.settle_arrivals(memory))
        arrivals = self._records(region, ARRIVAL_WORDS)
        for gpu, visit, kind, ns in arrivals[:known].tolist():
            self._machine.gpus[gpu].state.arrived.extend(pack_arrival(visit, kind, ns))
        arrivals[: len(arrivals) - known] = arrivals[known:].copy()
        memory[region + R_COUNT] = len(arrivals) - known
