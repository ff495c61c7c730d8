"""Compiled decisions of a run: Python's part, which lays out steps as the run goes and takes over what was counted.

The memory manager, the prefetch policy and the trace are the run's own; what they know at first is laid out in words
and tables (`decision_layout`), and what was decided is written back into the manager.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from ...workloads.batches import Step, some_columns
from ...workloads.requests.request import Wait
from ..policies.prefetch import Gauge
from . import decision_words as w
from .compiled_program import next_portion
from .compiled_shared import next_shared_portion
from .decision_layout import Layout, Part, Shared
from .decision_words import Tables, addresses
from .host_memory import HostMemory
from .pulled import Pulled
from .visit_commands import (
    COLUMNS,
    COPIED_COLUMNS,
    LENDS,
    O_REQUESTS,
    RESOLVED_COLUMNS,
    SERVED_COLUMNS,
    TAKEN_COLUMNS,
    VISIT_COLUMNS,
)

Array = npt.NDArray[Any]

#: How many choices and guesses are laid out at once, and how many visits at most.
_NUMBERS_AT_ONCE, _VISITS_AT_ONCE = 1 << 16, 1 << 12
#: Rows of commands that any visit needs besides those of its accesses, copies and rooms, and the most for each.
_SOME_ROWS, _ROWS_EACH, _ROWS_TAKEN = 64, 8, 2
#: More steps than any run has.
_FAR = 1 << 60

#: What GPUs that share experts have in common of the steps that are laid out.
_IN_COMMON = (
    w.D_CHOSEN, w.D_STEPS, w.D_LATER, w.D_LATER_COLUMNS, w.D_GUESSES, w.D_CONFIDENCES, w.D_FIRST_STEP, w.D_END_STEP,
)  # fmt: skip


class Decisions:
    """The decisions of a run's GPUs, laid out; `threads` are the GPUs of each host thread.

    With `shared`, one thread goes through every layer on all GPUs together.
    """

    def __init__(
        self, parts: Sequence[Part], threads: Sequence[Sequence[int]], shared: Shared | None = None,
        pulls: tuple[Pulled, Gauge] | None = None,
    ) -> None:  # fmt: skip
        self._parts, self._shared, self._pulls = parts, shared, pulls
        self._repeats = 0
        self._layout = layout = Layout(parts, shared, None if pulls is None else pulls[0])
        memory, registers = layout.memory, parts[0].gpu.registers
        self.gpus = layout.gpus
        self._areas: dict[tuple[int, int], tuple[int, int]] = {}
        self._layout.memory.set(0, {
            w.X_REGISTERS: registers.count, w.X_ROOM_FOR: 0, w.X_VISIT: memory.allocate(VISIT_COLUMNS),
        })  # fmt: skip
        most = max(int(memory.words[at + w.D_MOST_REGISTERS]) for at in self.gpus)
        self._make_registers(max(1024, registers.count + 2 * most))
        self.threads = [memory.allocate(w.THREAD_WORDS) for _ in threads]
        for at, numbers in zip(self.threads, threads, strict=True):
            gpus = memory.put_list(self.gpus[number] for number in numbers)
            self._layout.memory.set(at, {
                w.H_GPUS: gpus, w.H_LAYER: -1, w.H_STEPS: _FAR if pulls else len(parts[0].source.steps),
                w.H_SCHEDULE_NS: pulls[0].schedule_ns if pulls else 0, w.H_SHARES: shared is not None,
                w.H_ONE: shared is not None and shared.one_thread,
            })  # fmt: skip
        if shared is not None:
            self._lay_out_loans(int(memory.words[self.threads[0] + w.H_GPUS]))
            only = np.where(shared.owned.sum(axis=0) == 1, shared.owned.argmax(axis=0), -1)
            memory.set(self.threads[0], {w.H_OWNERS: memory.put(only)})
        most_experts = max(len(manager.size_of) for _, _, manager in layout.memories)
        self._leaving = np.zeros(2 * most_experts, dtype=np.int64)
        #: By memory: of every expert, the copies that merging saved.
        self._saved = {at: np.zeros(len(manager.size_of), dtype=np.int64) for at, _, manager in layout.memories}
        self._make_scratch()

    def _lay_out_loans(self, gpus: int) -> None:
        """Let GPUs that share experts know each other, and the registers of rooms that they have before the run."""
        for part, at in zip(self._parts, self.gpus, strict=True):
            self._layout.memory.set(at, {w.D_GPUS: gpus})
            for copy in part.source.manager.assigned.values() if part.gpu.settings[LENDS] else ():
                room, words = part.gpu.rooms.of(copy), self._layout.memory.words
                for place, register in ((w.D_LANDED, room.landed), (w.D_LENT, room.lent)):
                    words[words[at + place] + room.register] = register

    def _make_scratch(self) -> None:
        """Make the tables of a visit as large as any may need them."""
        parts = self._parts
        served = max(map(self._layout.most_accesses, parts)) + 1
        copies = max(self._layout.most_copies(part) + self._layout.most_demoted(part) for part in parts) + 1
        taken = copies
        words = self._layout.memory.words
        for at, _, manager in self._layout.memories:
            if not manager.uniform:
                taken += int(words[at + w.D_MOST_EVICTED]) + self._ring_size(at)
            elif at in self._layout.hosts:
                taken += copies
        copied = np.full((copies, COPIED_COLUMNS), -1, dtype=np.int64)
        copied[:, O_REQUESTS:] = 0  # nothing is read from a drive
        rows = 2 * _SOME_ROWS + _ROWS_EACH * (2 * served + 2 * copies) + _ROWS_TAKEN * taken
        rows += copies * max((max(part.gpu.host.requests) for part in parts if part.gpu.host is not None), default=0)
        rows *= 1 if self._shared is None else len(parts)
        self.tables = Tables(
            words, words.view(np.float64), self._layout.states, self._layout.experts,
            np.full((served, SERVED_COLUMNS), -1, dtype=np.int64), copied,
            np.full((taken, TAKEN_COLUMNS), -1, dtype=np.int64),
            np.full((served, RESOLVED_COLUMNS), -1, dtype=np.int64),
            np.zeros((rows, COLUMNS), dtype=np.int64), self._leaving,
        )  # fmt: skip
        self.at: Any = addresses(self.tables)

    def _ring_size(self, at: int) -> int:
        words = self._layout.memory.words
        return int(words[words[words[at + w.D_POOLS] + 1] + w.P_CAPACITY])

    def _renew(self) -> None:
        """Let the tables have the words that have moved."""
        words = self._layout.memory.words
        self.tables = self.tables._replace(words=words, floats=words.view(np.float64))
        self.at = addresses(self.tables)

    # What is laid out as the run goes.

    @property
    def registers(self) -> int:
        """How many registers have room."""
        return int(self._layout.memory.words[w.X_ROOM_FOR])

    def lay_out_steps(self) -> None:
        """Lay out the next steps of the GPU that asks for them: of a scheduler, the one that it makes now, if any."""
        if self._pulls is not None and not self._pull(*self._pulls):
            return
        number = self.gpus.index(int(self._layout.memory.words[w.X_ASKS]))
        first = int(self._layout.memory.words[self.gpus[number] + w.D_END_STEP])
        apart = self._shared is not None and not self._shared.in_common
        numbers = range(len(self.gpus)) if apart else [number]
        end = first + 1 + self._repeats if self._pulls else min(self._last_step(each, first) for each in numbers)
        for each in numbers:
            self._lay_out_own_steps(each, first, end)
        if self._shared is not None:
            self._lay_out_shared(self._shared, first, end)
        self._renew()

    def _lay_out_own_steps(self, number: int, first: int, end: int) -> None:
        """Lay out some steps of a GPU."""
        part, at = self._parts[number], self.gpus[number]
        source = part.source
        steps = some_columns(source.steps, first, end)
        common = steps if self._shared is None else some_columns(self._shared.steps, first, end)
        rows = steps.rows
        chosen: Array = source.trace.experts[rows].astype(np.int64)
        if source.trace.made is not None:
            chosen[~source.trace.made[rows]] = -1
        self._put(number, w.D_CHOSEN, chosen)
        sampled = np.maximum(common.sampled, 1)
        laid = np.stack([steps.starts[:-1], np.diff(steps.starts), steps.phases, sampled], axis=1)
        self._put(number, w.D_STEPS, laid)
        later, guesses = self._layout.later[number], source.guesses
        if later is not None:
            following_steps = later(first, end)
            self._put(number, w.D_LATER, following_steps)
            self._layout.memory.set(at, {w.D_LATER_COLUMNS: following_steps.shape[1]})
        if guesses is not None and part.source.prefetch.guesses:
            places = guesses.places(rows)
            self._put(number, w.D_GUESSES, guesses.experts[places])
            if guesses.confidences is not None and part.source.prefetch.needs_confidences:
                self._put(number, w.D_CONFIDENCES, guesses.confidences[places])
        self._put_budgets(number, first, end)
        for owner in (at, self._layout.hosts[number]):
            self._put_following(owner, chosen.size)
        if source.trace.weights is not None and self._layout.memory.words[at + w.D_ON_CPU]:
            self._put(number, w.D_GATES, source.trace.weights[rows])
        self._layout.memory.set(at, {w.D_FIRST_STEP: first, w.D_END_STEP: end})

    def _pull(self, pulled: Pulled, gauge: Gauge) -> bool:
        """Whether the scheduler makes a step now; if not, its thread idles for a while, or is at its end."""
        thread = self.threads[0]
        if self._repeats:
            self._end_repeats(pulled, thread)
        found = pulled.next(gauge.now_ns(), gauge.link_busy_ns())
        if found is None:
            self._layout.memory.set(thread, {w.H_STEPS: len(self._parts[0].source.steps)})
        elif isinstance(found, Wait):
            self._layout.memory.set(thread, {w.H_IDLE_UNTIL: found.until_ns})
        else:
            self._repeats, until_ns = pulled.ahead()
            ends = self._area(thread, w.H_ENDS, np.zeros(1 + self._repeats, dtype=np.int64))
            out_ns, in_ns = pulled.swaps_ns(found)
            self._layout.memory.set(thread, {
                w.H_UNTIL: until_ns if self._repeats else 0, w.H_ENDS: ends, w.H_SWAP_OUT: out_ns, w.H_SWAP_IN: in_ns,
            })  # fmt: skip
        return isinstance(found, Step)

    def _end_repeats(self, pulled: Pulled, thread: int) -> None:
        """Tell the scheduler when the steps that it knew have ended, but for the last that ran."""
        words, (gpu,) = self._layout.memory.words, self.gpus
        ran = int(words[gpu + w.D_END_STEP] - words[gpu + w.D_FIRST_STEP])
        ends = int(words[thread + w.H_ENDS])
        pulled.repeated(words[ends : ends + ran - 1].tolist())
        self._repeats = 0

    def _lay_out_shared(self, shared: Shared, first: int, end: int) -> None:
        """Lay out what GPUs that share experts have in common of some steps, and what each has by itself."""
        words, thread = self._layout.memory.words, self.threads[0]
        for number, at in enumerate(self.gpus[1:] if shared.in_common else (), 1):
            for place in _IN_COMMON:
                words[at + place] = words[self.gpus[0] + place]
            self._put_budgets(number, first, end)
        places = (w.H_LIVES, w.H_SERVES, w.H_EXCHANGES, w.H_SERVERS)
        for place, values in zip(places, shared.laid_out(first, end), strict=True):
            self._layout.memory.set(thread, {place: -1 if values is None else self._area(thread, place, values)})

    def _last_step(self, number: int, first: int) -> int:
        """Returns the step before which so many numbers of a GPU are laid out as are at once; one step at least."""
        source, all_rows = self._parts[number].source, self._layout.rows[number]
        trace, guesses = source.trace, source.guesses
        each = trace.k
        if guesses is not None and source.prefetch.guesses:
            each += guesses.experts.shape[2] * guesses.experts.shape[3]
        most_rows = all_rows[first] + _NUMBERS_AT_ONCE // (each * trace.layers)
        end = min(int(np.searchsorted(all_rows, most_rows)), first + _VISITS_AT_ONCE // trace.layers)
        return min(max(end, first + 1), len(source.steps))

    def _put_budgets(self, number: int, first: int, end: int) -> None:
        """Lay out the budgets of a GPU's pools in some steps, where they change."""
        source = self._parts[number].source
        if source.budgets is not None:
            divided = [source.manager.divide(budget) for budget in source.budgets[first:end]]
            self._put(number, w.D_BUDGETS, np.array(divided, dtype=np.int64))

    def _put_following(self, at: int, most: int) -> None:
        """Lay out when the experts of the coming look-ups are used next, `most` of them, for the policy that knows."""
        following = self._layout.following.get(at)
        if following is not None:
            used = int(self._layout.memory.words[at + w.D_FOLLOWED])
            self._layout.following[at] = following = following[used:]
            values = self._area(at, w.D_FOLLOWING, following[:most])
            self._layout.memory.set(at, {w.D_FOLLOWING: values, w.D_FOLLOWED: 0})

    def _put(self, number: int, place: int, values: Array) -> None:
        """Put values where a GPU has them."""
        self._layout.memory.set(self.gpus[number], {place: self._area(self.gpus[number], place, values)})

    def _area(self, owner: int, place: int, values: Array) -> int:
        """Returns where values lie now, floats as such, in an area that is used again."""
        at, capacity = self._areas.get((owner, place), (0, -1))
        if values.size > capacity:
            at = self._layout.memory.allocate(values.size)
            self._areas[owner, place] = at, values.size
        words = self._layout.memory.floats if values.dtype.kind == "f" else self._layout.memory.words
        words[at : at + values.size] = values.reshape(-1)
        return at

    def make_room(self) -> None:
        """Write out what was recorded, and make more room where that is not enough, for the GPU that asks for it."""
        self.flush()
        words, at = self._layout.memory.words, int(self._layout.memory.words[w.X_ASKS])
        if words[w.X_REGISTERS] + words[at + w.D_MOST_REGISTERS] > words[w.X_ROOM_FOR]:
            self._make_registers(2 * int(words[w.X_REGISTERS] + words[at + w.D_MOST_REGISTERS]))
        grown = [self._grow_rings(owner) for owner in (at, self._layout.hosts[self.gpus.index(at)]) if owner >= 0]
        if any(grown):
            self._make_scratch()
        self._renew()

    def _grow_rings(self, at: int) -> bool:
        """Give the lists of what is free in a memory twice the room, if the fullest may become too full."""
        words = self._layout.memory.words
        pools = int(words[at + w.D_POOLS])
        places = [int(words[pools + 1 + number]) for number in range(int(words[pools]))]
        fullest = max(int(words[p + w.P_COUNT]) for p in places)
        self._layout.memory.set(at, {w.D_FULLEST: fullest})
        if fullest + words[at + w.D_MOST_EVICTED] < self._ring_size(at):
            return False
        for p in places:
            self._grow_ring(p)
        return True

    def _grow_ring(self, p: int) -> None:
        words = self._layout.memory.words
        ring, capacity, first, count = (int(words[p + word]) for word in (w.P_RING, w.P_CAPACITY, w.P_FIRST, w.P_COUNT))
        extents = words[ring : ring + 2 * capacity].reshape(-1, 2)
        kept = np.roll(extents, -first, axis=0)[:count]
        to = self._layout.memory.allocate(4 * capacity)
        self._layout.memory.words[to : to + 2 * count] = kept.reshape(-1)
        self._layout.memory.set(p, {w.P_RING: to, w.P_CAPACITY: 2 * capacity, w.P_FIRST: 0})

    def _make_registers(self, count: int) -> None:
        """Make room for so many registers."""
        memory, old = self._layout.memory, self.registers
        every = product([at for at, _, _ in self._layout.memories], (w.D_FREE, w.D_ROOMS))
        lending = product([at for at in self.gpus if memory.words[at + w.D_LENDS]], (w.D_LANDED, w.D_LENT))
        for at, place in (*every, *lending):
            before = int(memory.words[at + place])
            kept = memory.words[before : before + old].copy()
            to = memory.allocate(count)
            memory.words[to : to + old] = kept
            self._layout.memory.set(at, {place: to})
        self._layout.memory.set(0, {w.X_ROOM_FOR: count})

    # What comes of it.

    def _records(self, at: int, place: int, words: int) -> Array:
        """Returns the records of a region (records, words), and forget them."""
        memory = self._layout.memory.words
        region = int(memory[at + place])
        first, count = int(memory[region + w.R_AT]), int(memory[region + w.R_COUNT])
        memory[region + w.R_COUNT] = 0
        return memory[first : first + count * words].reshape(-1, words)

    def flush(self) -> None:
        """Write what was recorded into the memory managers."""
        for at, _, manager in self._layout.memories:
            admitted = self._records(at, w.D_ADMITTED, w.ADMITTED_WORDS)
            manager.record(admitted, self._records(at, w.D_EVICTED, w.EVICTED_WORDS)[:, 0])
            some = np.flatnonzero(admitted[:, 2])
            np.add.at(self._saved[at], admitted[some, 0], admitted[some, 2])
        for part, at in zip(self._parts, self.gpus, strict=True):
            resolved = self._records(at, w.D_RESOLVED, w.RESOLVED_WORDS)
            if len(resolved):
                part.resolved(resolved)

    def finish(self) -> None:
        """Write what remains to be known of the run into the memory managers."""
        self.flush()
        words = self._layout.memory.words
        for at, _, manager in self._layout.memories:
            first = int(words[at + w.D_EXPERTS])
            own = self._layout.experts[first : first + len(manager.size_of)]
            manager.dropped += int(words[at + w.D_DROPPED])
            manager.guessed += int(words[at + w.D_GUESSED])
            manager.unique_guesses += int(words[at + w.D_UNIQUE])
            saved = np.flatnonzero(self._saved[at])
            manager.saved_copies.update(dict(zip(saved.tolist(), self._saved[at][saved].tolist(), strict=True)))
            manager.assigned_bytes, manager.budget_bytes = (
                int(words[at + place]) for place in (w.D_ASSIGNED, w.D_BUDGET)
            )
            held = np.flatnonzero(own[:, w.E_COPY] >= 0)
            held = held[np.argsort(own[held, w.E_COPY])]
            manager.assigned = dict(zip(held.tolist(), own[held, w.E_COPY].tolist(), strict=True))
        for part, at in zip(self._parts, self._layout.hosts, strict=True):
            if part.source.host_memory is not None:
                self._count_reads(part.source.host_memory, at)

    def _count_reads(self, host: HostMemory, at: int) -> None:
        """Let host memory know what it has counted."""
        words = self._layout.memory.words
        host.hits += int(words[at + w.D_FOUND])
        host.misses += int(words[at + w.D_MISSES])
        host.read_bytes += int(words[at + w.D_READ_BYTES])

    def done(self) -> int:
        """Returns how many visits are decided, of all GPUs together."""
        return sum(int(self._layout.memory.words[at + w.H_DONE]) for at in self.threads)

    def portion(self, thread: int, now_ns: int = 0, backlog_ns: int = 0) -> Array | None:
        """Returns a thread's next portion of commands (commands, columns), decided now; None at the end.

        It is valid until the next is asked for.
        """
        for at in self.gpus:
            self._layout.memory.set(at, {w.D_NOW: now_ns, w.D_BACKLOG: backlog_ns})
        decide = next_portion if self._shared is None else next_shared_portion
        while True:
            why = decide(self.at, self.threads[thread])
            if why == w.STEPS:
                self.lay_out_steps()
            elif why == w.ROOM:
                self.make_room()
            elif why == w.END:
                return None
            else:
                return self.tables.rows[1 : int(self.tables.rows[0, 0]) + 1]
