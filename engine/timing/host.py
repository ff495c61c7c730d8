"""The host thread as a SimPy process: it carries out commands, each of which takes host time.

Its clock, `GpuState.now_ns`, may run ahead of SimPy's. Between two decisions it submits work to the lanes without
waiting, each piece stamped with the instant at which it is issued; before every decision it waits until SimPy's clock
has caught up. `CARRY_OUT`, at the end, maps each command of `decide/commands.py` to the method that carries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy.typing as npt
import simpy
from simpy.events import ProcessGenerator

from ...resources.timeline import ACTIVATION, CPU_EXPERT, DECOMPRESS, EXPERT, PEER, PREDICT, PREFETCH
from ..costs.values import KernelCost
from ..decide.commands import COMPUTE, FIXED_REGISTERS, H2D, SIDE, TOKENS, Command, Op
from ..policies.copy_order import QueuedCopy
from .host_state import Exchanges, Gate, GpuState
from .lanes import HOSTS, Instant, Lane, QueueLane, Work
from .records import pack_access, pack_visit


class Thread:
    """A host thread that dispatches to one GPU or several.

    `registers` (what commands name), `exchanges` and `gate` are shared by the threads of a run.
    """

    def __init__(
        self,
        env: simpy.Environment,
        instant: Instant,
        gpus: dict[int, GpuState],
        registers: dict[int, tuple[Work, ...]],
        exchanges: Exchanges | None = None,
        gate: Gate | None = None,
    ) -> None:
        self._exchanges, self._gate = exchanges, gate or Gate()
        self._env, self._instant, self._gpus, self._registers = env, instant, gpus, registers
        self._number = min(gpus)  # its turn among host threads at one instant
        self._current: GpuState | None = None  # the GPU that it is at
        # Of a thread that carries out a part of a program: the threads of the other parts, by GPU; how many commands it
        # has carried out; and what to wake when it has carried out another.
        self._siblings: dict[int, Thread] = {}
        self._carried = 0
        self._watchers: list[simpy.Event] = []

    def run(self, program: Iterable[Iterator[npt.NDArray[Any]]], ended: Callable[[], None]) -> ProcessGenerator:
        """Carry out a program, step by step, portion by portion; `ended` is called at the end of each step."""
        for step in program:
            for portion in step:
                yield from self._carry_out([Command._make(row) for row in portion.tolist()])
            ended()
        for gpu in self._gpus.values():
            gpu.end_busy()

    def _carry_out(self, commands: Sequence[Command]) -> ProcessGenerator:
        """Carry out commands in order; those of consecutive PARTs side by side, each by a thread of its own."""
        parts: dict[int, Thread] = {}
        processes: list[simpy.Process] = []
        at = 0
        while at < len(commands):
            command = commands[at]
            at += 1
            if command.op == Op.PART:
                own = {command.gpu: self._gpus[command.gpu]}
                part = Thread(self._env, self._instant, own, self._registers, self._exchanges)
                part._siblings = parts
                parts[command.gpu] = part
                processes.append(self._env.process(part._carry_out(commands[at : at + command.extra])))
                at += command.extra
                continue
            if processes:
                yield self._env.all_of(processes)
                processes, parts = [], {}
            todo = CARRY_OUT[command.op](self, self._gpus[command.gpu], command)
            if todo is not None:
                yield from todo
            self._carried += 1
            while self._watchers:
                self._watchers.pop().succeed()
        if processes:
            yield self._env.all_of(processes)

    def _behind(self, gpu: GpuState, command: Command) -> ProcessGenerator:
        """Wait until another GPU's thread has carried out the first `extra` commands of its part."""
        other = self._siblings[command.peer]
        while other._carried < command.extra:
            moves = self._env.event()
            other._watchers.append(moves)
            yield moves
            yield self._instant.turn(HOSTS, self._number)
            gpu.now_ns = max(gpu.now_ns, int(self._env.now))

    def _enter(self, gpu: GpuState, command: Command) -> ProcessGenerator:
        """Wait until no other thread is between ENTER and EXIT."""
        gate = self._gate
        while gate.taken:
            comes_out = self._env.event()
            gate.waiting.append(comes_out)
            yield comes_out
            yield self._instant.turn(HOSTS, self._number)
            gpu.now_ns = max(gpu.now_ns, int(self._env.now))
        gate.taken = True

    def _exit(self, gpu: GpuState, command: Command) -> None:
        self._gate.taken = False
        while self._gate.waiting:
            self._gate.waiting.pop().succeed()

    # The clock.

    def _catch_up(self, gpu: GpuState, command: Command) -> ProcessGenerator:
        """Wait until SimPy's clock has caught up with the host's."""
        now_ns = min(gpu.now_ns for gpu in self._gpus.values()) if command.extra == 1 else gpu.now_ns
        if now_ns > self._env.now:
            yield self._env.timeout(now_ns - self._env.now)
        yield self._instant.turn(HOSTS, self._number)

    def _turn(self, gpu: GpuState, command: Command) -> None:
        """Turn to this GPU from another one; the clock goes along."""
        at = self._current
        if at is not None and at is not gpu:
            at.end_busy()
            gpu.now_ns = gpu.busy_since_ns = at.now_ns
            gpu.now_ns += command.extra * gpu.lanes.costs.turn_ns
        self._current = gpu

    def _wait_for(self, gpu: GpuState, works: Iterable[Work]) -> ProcessGenerator:
        for work in works:
            if work.end_ns is None:
                yield work.done
                yield self._instant.turn(HOSTS, self._number)
            gpu.now_ns = max(gpu.now_ns, work.end_ns or 0)

    def _place_in_queue(self, gpu: GpuState, launches: int) -> ProcessGenerator:
        """Block while the launch queue is too full for `launches` more, as the CUDA driver does."""
        while gpu.launched and gpu.launched_count + launches > gpu.queue_depth:
            work, count = gpu.launched.popleft()
            gpu.launched_count -= count
            yield from self._wait_for(gpu, [work])

    # Registers.

    def _wait(self, gpu: GpuState, command: Command) -> None:
        gpu.after += self._registers.get(command.register, ())
        gpu.calls += command.extra

    def _reclaim(self, gpu: GpuState, command: Command) -> None:
        waits = self._registers.get(command.register, ())
        queue = gpu.lanes.copies[H2D]
        if isinstance(queue, QueueLane) and len(waits) == 1:
            waits = queue.give_up(waits[0])
        self._registers[command.register] = waits if command.tokens else ()
        gpu.after += waits
        gpu.calls += command.extra

    def _touch(self, gpu: GpuState, command: Command) -> None:
        assert gpu.last is not None
        self._registers[command.register] = (gpu.last,)

    def _join(self, gpu: GpuState, command: Command) -> None:
        assert gpu.last is not None
        self._join_register(command.register, gpu.last)

    def _join_register(self, register: int, work: Work) -> None:
        """Let a register stand for one more piece of work; of those that have ended it keeps the last."""
        others = self._registers.get(register, ())
        ended = [other for other in others if other.end_ns is not None]
        kept = [other for other in others if other.end_ns is None]
        self._registers[register] = (*kept, *sorted(ended, key=lambda other: other.end_ns or 0)[-1:], work)

    def _leave(self, gpu: GpuState, command: Command) -> None:
        """Let a room of host memory wait for the last copy out of it, until that has ended or is cancelled."""
        copy = gpu.last
        assert copy is not None
        if isinstance(gpu.lanes.copies[H2D], QueueLane):
            copy.leaves = Work(self._env.event(), 0, 0, 0, (), copy.kind, copy.visit)
        self._join_register(command.register, copy.leaves or copy)

    def _output(self, gpu: GpuState, command: Command) -> None:
        assert gpu.last_kernel is not None
        self._registers[command.register] = (gpu.last_kernel,)

    # Work.

    def _submit(
        self, gpu: GpuState, lane: Lane, kind: int, ns: tuple[int, int], issued_ns: int, command: Command, **more: Any
    ) -> Work:
        """Submit work that starts after all that was waited for; the command's register, if any, then stands for it.

        `ns` are its durations: right behind other work, and on an idle lane.
        """
        work = Work(
            self._env.event(), *ns, issued_ns, tuple(gpu.after), kind, gpu.visit, command.expert, command.copy,
            timeline=gpu.lanes.timeline, **{"held_back": lane.serves_all, **more},
        )  # fmt: skip
        gpu.after.clear()
        gpu.last = work
        if command.register >= 0:
            self._registers[command.register] = (work,)
        lane.submit(work)
        return work

    def _pay_waits(self, gpu: GpuState) -> None:
        gpu.now_ns += gpu.calls * gpu.lanes.costs.wait_ns
        gpu.calls = 0

    def _visit(self, gpu: GpuState, command: Command) -> None:
        """Begin a visit; at the first of a forward pass, other work that has had the GPU delays the next kernel."""
        gpu.visit += 1
        own = gpu.lanes.costs.runtime
        gpu.now_ns += own.layer_ns + (own.step_ns if command.extra == 1 else 0)
        other = gpu.lanes.costs.interruptions
        if other is not None and command.extra:
            due = (gpu.now_ns - gpu.interrupted_ns) // other.every_ns
            gpu.interrupted_ns += due * other.every_ns
            gpu.held_ns = due * other.ns

    def _launch(self, gpu: GpuState, command: Command) -> ProcessGenerator:
        cost = self._kernel_cost(gpu, command)
        if gpu.watches_queue:
            yield from self._place_in_queue(gpu, cost.launches)
        self._pay_waits(gpu)
        work = self._launch_kernel(gpu, cost, command.kind, command)
        if command.kind != DECOMPRESS:
            gpu.last_kernel = work
        if command.kind == EXPERT and command.copy >= 0 and command.tokens >= 0:
            gpu.accesses += pack_access(gpu.visit, command.copy, command.tokens)

    def _launch_kernel(self, gpu: GpuState, cost: KernelCost, kind: int, command: Command) -> Work:
        issued_ns = gpu.now_ns + cost.issue_ns
        gpu.now_ns += cost.host_ns
        gpu.after += gpu.kernel_after
        gpu.kernel_after.clear()
        ns = (cost.ns, cost.ns)
        work = self._submit(gpu, gpu.lanes.compute, kind, ns, issued_ns, command, slowdown=cost.slowdown)
        if gpu.watches_queue:
            gpu.launched.append((work, cost.launches))
            gpu.launched_count += cost.launches
        return work

    def _kernel_cost(self, gpu: GpuState, command: Command) -> KernelCost:
        cost = gpu.lanes.launched(command, gpu.members)
        gpu.members = []
        if gpu.held_ns:
            cost, gpu.held_ns = replace(cost, ns=cost.ns + gpu.held_ns), 0
        return cost

    def _member(self, gpu: GpuState, command: Command) -> None:
        gpu.members.append(command.tokens)
        gpu.accesses += pack_access(gpu.visit, command.copy, command.tokens)

    def _copy(self, gpu: GpuState, command: Command) -> None:
        lanes = gpu.lanes
        cost, lane = lanes.copied(command.expert), lanes.copies[command.lane]
        if command.tokens != 1:
            gpu.now_ns += cost.host_ns
        self._pay_waits(gpu)
        issued_ns = gpu.now_ns + lanes.costs.copy_latency_ns
        more: dict[str, Any] = {"slowdown": lanes.copy_slowdown, "transfer": lanes.transfer(command.expert)}
        ns = (cost.queued_ns, cost.alone_ns)
        if isinstance(lane, QueueLane):
            ns = (cost.piece_queued_ns, cost.piece_alone_ns)
            more |= {
                "wanted": QueuedCopy(command.kind != PREFETCH, command.extra, command.expert),
                "pieces": cost.pieces,
                "held_back": lanes.drive is not None,
            }
        self._submit(gpu, lane, command.kind, ns, issued_ns, command, **more)

    def _promote(self, gpu: GpuState, command: Command) -> None:
        queue = gpu.lanes.copies[H2D]
        assert isinstance(queue, QueueLane)
        for work in self._registers.get(command.register, ()):
            queue.promote(work, command.extra)

    def _read(self, gpu: GpuState, command: Command) -> None:
        """Submit a request to the drive, on the I/O lane with the shortest backlog."""
        drive = gpu.lanes.drive
        assert drive is not None
        cost = gpu.lanes.read_cost(command.expert)
        if command.extra:
            gpu.now_ns += cost.host_ns
        else:
            assert gpu.last is not None
            gpu.after = [*gpu.last.after]
        lane = min(drive.lanes, key=Lane.backlog_ns)
        ns = (cost.request_ns, cost.request_ns)
        request = self._submit(gpu, lane, command.kind, ns, gpu.now_ns, command._replace(register=-1))
        if command.extra:
            self._registers[command.register] = (request,)
        else:
            self._join_register(command.register, request)

    def _hold(self, gpu: GpuState, command: Command) -> ProcessGenerator:
        yield from self._wait_for(gpu, self._registers[command.register])

    def _read_back(self, gpu: GpuState, command: Command) -> None:
        costs = gpu.lanes.costs
        gpu.now_ns += costs.readback_enqueue_ns
        gpu.end_busy()
        issued_ns, ns = gpu.now_ns + costs.readback_latency_ns, (costs.readback_ns, costs.readback_ns)
        self._submit(gpu, gpu.lanes.d2h, command.kind, ns, issued_ns, command, slowdown=costs.readback_slowdown)

    def _notice(self, gpu: GpuState, command: Command) -> ProcessGenerator:
        """Wait for the router's choice, or for guesses, and pay what noticing takes (a synchronization)."""
        gpu.end_busy()
        yield from self._wait_for(gpu, self._registers[command.register])
        costs = gpu.lanes.costs
        beside = gpu.lanes.d2h.disturbed
        gpu.now_ns += costs.synchronize_beside_copy_ns if beside else costs.synchronize_ns
        gpu.busy_since_ns = gpu.now_ns
        if command.extra == 1:
            gpu.now_ns += costs.copy_resume_ns if command.tokens else costs.resume_ns
            return
        gpu.launched.clear()
        gpu.launched_count = 0

    def _decide(self, gpu: GpuState, command: Command) -> None:
        gpu.decided += pack_visit(gpu.now_ns, *gpu.assigned)
        if gpu.lanes.reads_back:
            costs = gpu.lanes.costs
            gpu.now_ns += costs.copy_resume_ns if command.tokens else costs.resume_ns

    def _predict(self, gpu: GpuState, command: Command) -> ProcessGenerator:
        lanes, cost = gpu.lanes, gpu.lanes.costs.predict
        ns = cost.ns
        if command.lane == COMPUTE:
            if gpu.watches_queue:
                yield from self._place_in_queue(gpu, cost.launches)
            self._launch_kernel(gpu, cost, PREDICT, command)
        elif command.lane == SIDE:
            self._pay_waits(gpu)
            issued_ns = gpu.now_ns + cost.issue_ns
            gpu.now_ns += cost.host_ns
            self._submit(gpu, lanes.side, PREDICT, (ns, ns), issued_ns, command)
        else:
            gpu.end_busy()
            start_ns = gpu.now_ns
            gpu.now_ns = gpu.busy_since_ns = start_ns + ns
            lanes.timeline.record(start_ns, gpu.now_ns, start_ns, -1, gpu.visit, -1, lanes.host, PREDICT)

    # What needs no copy, or comes in fewer bytes.

    def _to_cpu(self, gpu: GpuState, command: Command) -> None:
        lanes = gpu.lanes
        gpu.now_ns += lanes.costs.beside.to_cpu_ns + lanes.costs.runtime.cpu_submit_ns
        ns = lanes.cpu_costs.activations_ns(command.tokens)
        self._submit(gpu, lanes.d2h, ACTIVATION, (ns, ns), gpu.now_ns, command)

    def _cpu(self, gpu: GpuState, command: Command) -> None:
        lanes = gpu.lanes
        cost = lanes.cpu_costs.expert(command.layer, command.tokens)
        ns = (cost.ns, cost.ns)
        self._submit(gpu, lanes.cpu, CPU_EXPERT, ns, gpu.now_ns, command, slowdown=cost.slowdown)

    def _from_cpu(self, gpu: GpuState, command: Command) -> None:
        lanes = gpu.lanes
        ns = lanes.cpu_costs.results_ns(command.tokens)
        gpu.now_ns += lanes.costs.beside.from_cpu_ns + lanes.costs.runtime.cpu_return_ns
        self._submit(gpu, lanes.back, ACTIVATION, (ns, ns), gpu.now_ns, command, slowdown=lanes.copy_slowdown)

    def _unpack(self, gpu: GpuState, command: Command) -> None:
        """Decompress an expert on a side stream."""
        cost = gpu.lanes.decompress(command.expert)
        self._pay_waits(gpu)
        gpu.now_ns += cost.host_ns
        self._submit(gpu, gpu.lanes.unpacking, DECOMPRESS, (cost.ns, cost.ns), gpu.now_ns, command)

    # Several GPUs.

    def _receive(self, gpu: GpuState, command: Command) -> None:
        """Let the next kernel, of this kind, wait for what another GPU sends."""
        if command.register >= 0:
            arrivals = self._registers[command.register]
        else:
            assert gpu.receives is not None
            arrivals = (gpu.receives.of(command.extra),)
        gpu.calls += 1
        gpu.kernel_after += arrivals
        gpu.promised.extend((gpu.visit, command.kind, arrival) for arrival in arrivals)
        gpu.record_arrivals()

    def _send(self, gpu: GpuState, command: Command) -> None:
        """Copy what was waited for to the next stage."""
        way = gpu.sends
        assert way is not None
        costs, size_bytes = way.costs, way.size_bytes[command.extra]
        self._pay_waits(gpu)
        gpu.now_ns += costs.host_ns
        ns = (costs.queued_ns(size_bytes), costs.alone_ns(size_bytes))
        more = {"slowdown": costs.slowdown(size_bytes), "transfer": costs.transfer(size_bytes)}
        sent = self._submit(gpu, way.lane, ACTIVATION, ns, gpu.now_ns + costs.latency_ns, command, **more)
        self._env.process(way.arrivals.follow(command.extra, sent))

    def _call(self, gpu: GpuState, command: Command) -> None:
        gpu.now_ns += gpu.lanes.costs.beside.exchange_call_ns

    def _exchange(self, gpu: GpuState, command: Command) -> None:
        """Exchange tokens between all GPUs: work on a lane of each, behind the same causes."""
        exchanges = self._exchanges
        assert exchanges is not None
        ns, after = exchanges.ns(), tuple(gpu.after)
        issued_ns = max(each.now_ns for each in self._gpus.values())
        for number, each in self._gpus.items():
            each.after[:] = after
            own = command._replace(gpu=number, register=number * FIXED_REGISTERS + TOKENS)
            self._submit(each, exchanges.lanes[number], command.kind, (ns, ns), issued_ns, own)

    def _move(self, gpu: GpuState, source: int, target: int, command: Command) -> None:
        """Copy an expert from one GPU to another."""
        exchanges = self._exchanges
        assert exchanges is not None
        costs = exchanges.peer(source, target)
        size_bytes = exchanges.size_bytes[command.expert // gpu.lanes.costs.model.experts]
        self._pay_waits(gpu)
        gpu.now_ns += costs.host_ns
        ns = (costs.queued_ns(size_bytes), costs.alone_ns(size_bytes))
        lane, issued_ns = exchanges.lane_from(source, target), gpu.now_ns + costs.latency_ns
        self._submit(gpu, lane, PEER, ns, issued_ns, command, transfer=costs.transfer(size_bytes))

    def _fetch(self, gpu: GpuState, command: Command) -> None:
        self._move(gpu, command.peer, command.gpu, command)

    def _store(self, gpu: GpuState, command: Command) -> None:
        self._move(gpu, command.gpu, command.peer, command)

    # Steps of a scheduler.

    def _idle(self, gpu: GpuState, command: Command) -> None:
        """Let the host be idle until the instant `extra`."""
        gpu.end_busy()
        gpu.now_ns = gpu.busy_since_ns = max(gpu.now_ns, command.extra)

    def _schedule(self, gpu: GpuState, command: Command) -> None:
        gpu.now_ns += command.extra

    def _swap(self, gpu: GpuState, command: Command) -> None:
        """Copy KV blocks, or an evicted expert, to the host or back; in a queue by rank, for the next visit."""
        lanes, back = gpu.lanes, command.lane == H2D
        gpu.now_ns += lanes.costs.readback_enqueue_ns
        self._pay_waits(gpu)
        issued_ns, ns = gpu.now_ns + lanes.costs.copy_latency_ns, (command.extra, command.extra)
        more: dict[str, Any] = {"slowdown": lanes.copy_slowdown}
        lane = lanes.copies[H2D] if back else lanes.d2h
        if isinstance(lane, QueueLane):
            more |= {"wanted": QueuedCopy(True, gpu.visit + 1, -1)}
        self._submit(gpu, lane, command.kind, ns, issued_ns, command, **more)


Carry = Callable[[Thread, GpuState, Command], ProcessGenerator | None]
#: How each command is carried out: by a call, or by a generator where the thread has to wait.
CARRY_OUT: dict[int, Carry] = {
    Op.VISIT: Thread._visit,
    Op.WAIT: Thread._wait,
    Op.RECLAIM: Thread._reclaim,
    Op.TOUCH: Thread._touch,
    Op.JOIN: Thread._join,
    Op.OUTPUT: Thread._output,
    Op.LAUNCH: Thread._launch,
    Op.MEMBER: Thread._member,
    Op.COPY: Thread._copy,
    Op.READBACK: Thread._read_back,
    Op.NOTICE: Thread._notice,
    Op.DECIDE: Thread._decide,
    Op.HOLD: Thread._hold,
    Op.PREDICT: Thread._predict,
    Op.PROMOTE: Thread._promote,
    Op.TO_CPU: Thread._to_cpu,
    Op.CPU: Thread._cpu,
    Op.FROM_CPU: Thread._from_cpu,
    Op.UNPACK: Thread._unpack,
    Op.READ: Thread._read,
    Op.CATCH_UP: Thread._catch_up,
    Op.TURN: Thread._turn,
    Op.RECEIVE: Thread._receive,
    Op.SEND: Thread._send,
    Op.CALL: Thread._call,
    Op.EXCHANGE: Thread._exchange,
    Op.FETCH: Thread._fetch,
    Op.STORE: Thread._store,
    Op.LEAVE: Thread._leave,
    Op.BEHIND: Thread._behind,
    Op.ENTER: Thread._enter,
    Op.EXIT: Thread._exit,
    Op.IDLE: Thread._idle,
    Op.SCHEDULE: Thread._schedule,
    Op.SWAP: Thread._swap,
}
