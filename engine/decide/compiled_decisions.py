"""Compiled decisions of a run: which runs have them, how they are laid out, and what becomes of their counts.

The memory manager, the prefetch policy and the trace are the run's own; what they know at first is laid out in words
and tables, and what was decided is written back into the manager.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from ...workloads.stacks import next_visits
from ..policies.compiled_eviction import (
    BELADY,
    NEXT,
    admit,
    make_state,
)
from ..policies.eviction_informed import Static
from ..policies.prefetch import Popularity
from . import decision_words as w
from .compiled_program import next_portion
from .compiled_shared import next_shared_portion
from .decision_words import Memory, Tables, addresses
from .guessed import later_steps
from .lookups import list_lookups
from .program import Gpu
from .sources import EVICTIONS, PREFETCHES, Source
from .visit_commands import (
    COLUMNS,
    COPIED_COLUMNS,
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
_FAR = 1 << 60


@dataclass(frozen=True, eq=False)
class Part:
    """What one GPU decides by, and what it is to do with its steps (as `program.Stage` has it).

    `resolved` is told what needs no copy, an array of (visit, expert, way, tokens, gate), the last as bits of a float.
    """

    source: Source
    gpu: Gpu
    resolved: Callable[[Array], None]
    has_head: bool = True
    receives: Sequence[int] | None = None
    sends: Sequence[int] | None = None


@dataclass(frozen=True, eq=False)
class Shared:
    """How GPUs share the experts of every layer: the only owner of each (layers * experts,).

    `laid_out(first, end)` returns, of these steps, the tokens of each GPU (steps, GPUs), who serves any (steps, layers,
    GPUs), and what exchanges take, in ns (steps, layers).
    """

    owner: Array
    one_thread: bool
    laid_out: Callable[[int, int], tuple[Array, Array, Array]]


#: What GPUs that share experts have in common of the steps that are laid out.
_IN_COMMON = (
    w.D_CHOSEN, w.D_STEPS, w.D_LATER, w.D_LATER_COLUMNS, w.D_GUESSES, w.D_CONFIDENCES, w.D_FIRST_STEP, w.D_END_STEP,
)  # fmt: skip


class Decisions:
    """The decisions of a run's GPUs, laid out; `threads` are the GPUs of each host thread.

    With `shared`, one thread goes through every layer on all GPUs together.
    """

    def __init__(self, parts: Sequence[Part], threads: Sequence[Sequence[int]], shared: Shared | None = None) -> None:
        self._parts, self._shared = parts, shared
        self._memory = memory = Memory()
        memory.allocate(w.HEADER)
        registers = parts[0].gpu.registers
        self._steps = parts[0].source.steps
        rows = [len(step.rows) for step in self._steps]
        self._rows, self._most_tokens = np.cumsum([0, *rows]), max(rows, default=0)
        self.gpus = [memory.allocate(w.D_WORDS) for _ in parts]
        self._areas: dict[tuple[int, int], tuple[int, int]] = {}
        most = sum(map(self._most_copies, parts))
        self._set(0, {
            w.X_REGISTERS: registers.count, w.X_ROOM_FOR: 0, w.X_VISIT: memory.allocate(VISIT_COLUMNS),
        })  # fmt: skip
        firsts = np.cumsum([0, *(len(part.source.manager.size_of) for part in parts)]).tolist()
        experts = np.zeros((firsts[-1], w.E_COLUMNS), dtype=np.int64)
        states: list[Array] = []
        for number, part in enumerate(parts):
            self._lay_out_terms(number, part)
            self._lay_out_memory(number, part, experts, firsts[number], states)
        self._experts, self._states = experts, np.concatenate(states)
        self._following = [self._next_uses(number) for number in range(len(parts))]
        self._later = [self._later_visits(part) for part in (parts[:1] if shared else parts)]
        self._make_registers(max(1024, registers.count + 2 * most))
        self.threads = [memory.allocate(w.THREAD_WORDS) for _ in threads]
        for at, numbers in zip(self.threads, threads, strict=True):
            gpus = memory.put_list(self.gpus[number] for number in numbers)
            self._set(at, {
                w.H_GPUS: gpus, w.H_LAYER: -1, w.H_STEPS: len(self._steps), w.H_SHARES: shared is not None,
                w.H_ONE: shared is not None and shared.one_thread,
            })  # fmt: skip
        self._leaving = np.zeros(2 * max(len(part.source.manager.size_of) for part in parts), dtype=np.int64)
        self._make_scratch()

    def _set(self, at: int, values: dict[int, int]) -> None:
        for word, value in values.items():
            self._memory.words[at + word] = value

    # What is laid out before the run.

    def _most_accesses(self, part: Part) -> int:
        return min(self._most_tokens * part.source.trace.k, part.source.trace.num_experts)

    def _most_copies(self, part: Part) -> int:
        """Returns the most copies that a visit may come to."""
        options, guesses = part.source.prefetch.options, part.source.guesses
        asked = part.source.prefetch.horizons * part.source.trace.num_experts
        if guesses is not None and part.source.prefetch.guesses:
            asked = min(asked, part.source.prefetch.horizons * guesses.experts.shape[3] * self._most_tokens)
        elif isinstance(part.source.prefetch, Popularity):
            asked = min(asked, part.source.prefetch.horizons * options.k)
        return self._most_accesses(part) + asked

    def _lay_out_terms(self, number: int, part: Part) -> None:
        """Lay out what a scenario says of a GPU's decisions."""
        source, memory, at = part.source, self._memory, self.gpus[number]
        manager, prefetch = source.manager, source.prefetch
        options, trace, miss = prefetch.options, source.trace, source.miss
        guesses = source.guesses if prefetch.guesses else None
        most = None if miss is None else miss.terms.cpu_max_tokens
        fetch_from = None if miss is None else miss.terms.fetch_from
        memory_words = len(manager.size_of)
        popular = memory_words if isinstance(prefetch, Popularity) else 0
        protected = 2 * (memory_words + self._most_copies(part)) if manager.drop_after_visit else 0
        self._set(at, {
            w.D_SETTINGS: memory.put(part.gpu.settings), w.D_LAYERS: trace.layers,
            w.D_LAYER_EXPERTS: trace.num_experts, w.D_SHARED: manager.shared, w.D_PER_TOKEN: trace.k,
            w.D_EVICTION: EVICTIONS[type(manager.pools[0].policy)], w.D_PREFETCH: PREFETCHES[type(prefetch)],
            w.D_HORIZONS: prefetch.horizons, w.D_K: options.k, w.D_COPY_NS: options.copy_ns,
            w.D_POPULAR: memory.allocate(popular), w.D_PROTECTS: manager.protects, w.D_DROPS: manager.drop_after_visit,
            w.D_UNPIN_FIRST: source.issue == "after_launch", w.D_WATCHES: manager.watches_unused,
            w.D_ON_CPU: miss is not None, w.D_CPU_MOST: -1 if most is None else most, w.D_WAVE: 1,
            w.D_FETCH_FROM: -1 if fetch_from is None else fetch_from,
            w.D_PROTECTED: memory.allocate(protected), w.D_RESULTS: part.gpu.results, w.D_HAS_HEAD: part.has_head,
            w.D_RECEIVES: -1 if part.receives is None else memory.put(part.receives),
            w.D_SENDS: -1 if part.sends is None else memory.put(part.sends),
            w.D_MOST_COPIES: self._most_copies(part),
            w.D_MOST_EVICTED: len(manager.size_of) + self._most_copies(part) + 1,
            w.D_RECENCY: memory.allocate(self._most_accesses(part) + 1),
            w.D_ASKED: memory.allocate(prefetch.horizons * trace.num_experts + 1),
            w.D_RANKS: 0 if guesses is None else guesses.experts.shape[3], w.D_GATES: -1, w.D_BUDGETS: -1,
            w.D_FILTERS: self._shared is not None,
        })  # fmt: skip
        floats = memory.floats
        floats[at + w.D_LEAST], floats[at + w.D_DECAY] = options.threshold, options.decay
        for place, words, most_records in (
            (w.D_ADMITTED, w.ADMITTED_WORDS, 2 * self._most_copies(part)),
            (w.D_EVICTED, w.EVICTED_WORDS, 2 * (len(manager.size_of) + self._most_copies(part))),
            (w.D_RESOLVED, w.RESOLVED_WORDS, 2 * self._most_copies(part) if miss is not None else 0),
        ):
            capacity = max(1 << 12, most_records) if most_records else 0
            region = memory.put([memory.allocate(capacity * words), 0, capacity or _FAR])
            self._set(at, {place: region})

    def _lay_out_memory(self, number: int, part: Part, experts: Array, first: int, states: list[Array]) -> None:
        """Lay out the memory as it is: who has room, what is free, and what the policies know of it."""
        manager, at, kind = part.source.manager, self.gpus[number], EVICTIONS[type(part.source.manager.pools[0].policy)]
        own = experts[first : first + len(manager.size_of)]
        own[:, [w.E_WAVE, w.E_UNTIL, w.E_COPY, w.E_ROOM]] = -1
        own[:, w.E_SIZE] = manager.size_of
        own[:, w.E_OWNED] = 1 if self._shared is None else self._shared.owner == number
        for expert, copy in manager.assigned.items():
            own[expert, w.E_COPY], own[expert, w.E_ROOM] = copy, part.gpu.rooms.of(copy).register
        per_pool = len(manager.size_of) // len(manager.pools)
        pools = []
        capacity = self._ring_capacity(part)
        for place, pool in enumerate(manager.pools):
            state = make_state(per_pool, pool.policy.setting.capacity)
            if isinstance(pool.policy, Static):
                popular: Array = np.array(pool.policy.popularity, dtype=np.float64)
                ranks = np.unique(popular, return_inverse=True)[1]
                state[:per_pool, NEXT] = ranks.reshape(-1)[place * per_pool :][:per_pool]
            row = sum(map(len, states))
            states.append(state)
            ring = self._memory.allocate(2 * capacity)
            for count, (size_bytes, copy) in enumerate(pool.free):
                self._memory.words[ring + 2 * count] = size_bytes
                self._memory.words[ring + 2 * count + 1] = -1 if copy < 0 else part.gpu.rooms.of(copy).register
            pools.append(self._memory.put([
                pool.budget_bytes, pool.free_bytes, ring, capacity, 0, len(pool.free), row, place * per_pool, per_pool,
            ]))  # fmt: skip
        if kind != BELADY:  # which needs to know the next uses first
            self._admit_preloaded(part, states[len(states) - len(pools) :], per_pool)
        self._set(at, {
            w.D_EXPERTS: first, w.D_POOLS: self._memory.put_list(pools), w.D_COPIES: manager.copies,
            w.D_ASSIGNED: manager.assigned_bytes, w.D_BUDGET: manager.budget_bytes, w.D_FULLEST: 1,
        })  # fmt: skip

    def _admit_preloaded(self, part: Part, states: Sequence[Array], per_pool: int) -> None:
        kind = EVICTIONS[type(part.source.manager.pools[0].policy)]
        for expert in part.source.manager.assigned:
            admit(kind, states[expert // per_pool], expert % per_pool, 0)

    def _ring_capacity(self, part: Part) -> int:
        return 2 * (len(part.source.manager.size_of) + self._most_copies(part)) + 8

    def _next_uses(self, number: int) -> Array | None:
        """Returns when each look-up's expert is used next, for the policy that knows, which is told the first uses."""
        part, at, words = self._parts[number], self.gpus[number], self._memory.words
        if words[at + w.D_EVICTION] != BELADY:
            return None
        source, count = part.source, len(part.source.manager.size_of)
        lookups = list_lookups(source.trace, source.steps, "batch", shared=part.source.manager.shared)
        visits = np.repeat(np.arange(len(lookups.starts) - 1), np.diff(lookups.starts))
        first = np.full(count, len(lookups.starts) - 1)
        first[lookups.experts[::-1]] = visits[::-1]
        pools = int(words[at + w.D_POOLS])
        states = []
        for place in range(int(words[pools])):
            p = int(words[pools + 1 + place])
            row, expert, experts = (int(words[p + field]) for field in (w.P_STATE, w.P_EXPERT, w.P_EXPERTS))
            state = self._states[row : row + experts + 4]
            state[:experts, NEXT] = first[expert : expert + experts]
            states.append(state)
        self._admit_preloaded(part, states, count // len(states))
        following = next_visits(lookups.experts, lookups.starts, count)
        return np.asarray(following)

    def _later_visits(self, part: Part) -> Array | None:
        horizons, layers = part.source.prefetch.horizons, part.source.trace.layers
        if not horizons:
            return None
        most = (layers - 1 + horizons) // layers
        return np.array(later_steps(part.source.trace, self._steps, most), dtype=np.int64).reshape(-1, most + 1)

    def _make_scratch(self) -> None:
        """Make the tables of a visit as large as any may need them."""
        parts = self._parts
        served = max(map(self._most_accesses, parts)) + 1
        copies = max(map(self._most_copies, parts)) + 1
        taken = copies
        if not all(part.source.manager.uniform for part in parts):
            taken += max(int(self._memory.words[at + w.D_MOST_EVICTED]) for at in self.gpus) + self._most_extents()
        copied = np.full((copies, COPIED_COLUMNS), -1, dtype=np.int64)
        copied[:, O_REQUESTS:] = 0  # nothing is read from a drive
        rows = 2 * _SOME_ROWS + _ROWS_EACH * (2 * served + 2 * copies) + _ROWS_TAKEN * taken
        rows *= 1 if self._shared is None else len(parts)
        words = self._memory.words
        self.tables = Tables(
            words, words.view(np.float64), self._states, self._experts,
            np.full((served, SERVED_COLUMNS), -1, dtype=np.int64), copied,
            np.full((taken, TAKEN_COLUMNS), -1, dtype=np.int64),
            np.full((served, RESOLVED_COLUMNS), -1, dtype=np.int64),
            np.zeros((rows, COLUMNS), dtype=np.int64), self._leaving,
        )  # fmt: skip
        self.at: Any = addresses(self.tables)

    def _most_extents(self) -> int:
        return max(self._ring_size(at) for at in self.gpus)

    def _ring_size(self, at: int) -> int:
        words = self._memory.words
        return int(words[words[words[at + w.D_POOLS] + 1] + w.P_CAPACITY])

    def _renew(self) -> None:
        """Let the tables have the words that have moved."""
        words = self._memory.words
        self.tables = self.tables._replace(words=words, floats=words.view(np.float64))
        self.at = addresses(self.tables)

    # What is laid out as the run goes.

    @property
    def registers(self) -> int:
        """How many registers have room."""
        return int(self._memory.words[w.X_ROOM_FOR])

    def lay_out_steps(self) -> None:
        """Lay out the next steps of the GPU that asks for them."""
        number = self.gpus.index(int(self._memory.words[w.X_ASKS]))
        part, at, words = self._parts[number], self.gpus[number], self._memory.words
        first = int(words[at + w.D_END_STEP])
        end = self._last_step(part, first)
        source, steps = part.source, self._steps[first:end]
        first_row, end_row = int(self._rows[first]), int(self._rows[end])
        rows = np.concatenate([step.rows for step in steps])
        chosen: Array = source.trace.experts[rows].astype(np.int64)
        if source.trace.present is not None:
            chosen[~source.trace.present[rows]] = -1
        self._put(number, w.D_CHOSEN, chosen)
        places = self._rows[first:end] - first_row
        laid = [
            [int(place), len(step.rows), step.phase, step.sampled] for place, step in zip(places, steps, strict=True)
        ]
        self._put(number, w.D_STEPS, np.array(laid, dtype=np.int64))
        later, guesses = self._later[number], source.guesses
        if later is not None:
            self._put(number, w.D_LATER, later[first:end])
            self._set(at, {w.D_LATER_COLUMNS: later.shape[1]})
        if guesses is not None and part.source.prefetch.guesses:
            self._put(number, w.D_GUESSES, guesses.experts[first_row:end_row])
            if guesses.confidences is not None and part.source.prefetch.needs_confidences:
                self._put(number, w.D_CONFIDENCES, guesses.confidences[first_row:end_row])
        self._put_budgets(number, first, end)
        following = self._following[number]
        if following is not None:
            used = int(self._memory.words[at + w.D_FOLLOWED])
            self._following[number] = following = following[used:]
            self._put(number, w.D_FOLLOWING, following[: chosen.size])
        if source.trace.weights is not None and self._memory.words[at + w.D_ON_CPU]:
            self._put(number, w.D_GATES, source.trace.weights[rows])
        self._set(at, {w.D_FIRST_STEP: first, w.D_END_STEP: end, w.D_FOLLOWED: 0})
        if self._shared is not None:
            self._lay_out_shared(self._shared, first, end)
        self._renew()

    def _lay_out_shared(self, shared: Shared, first: int, end: int) -> None:
        """Lay out what GPUs that share experts have in common of some steps, and what each has by itself."""
        words, thread = self._memory.words, self.threads[0]
        for number, at in enumerate(self.gpus[1:], 1):
            for place in _IN_COMMON:
                words[at + place] = words[self.gpus[0] + place]
            self._put_budgets(number, first, end)
        for place, values in zip((w.H_LIVES, w.H_SERVES, w.H_EXCHANGES), shared.laid_out(first, end), strict=True):
            self._set(thread, {place: self._area(thread, place, values)})

    def _last_step(self, part: Part, first: int) -> int:
        """Returns the step before which so many numbers are laid out as are at once; one step at least."""
        trace, guesses = part.source.trace, part.source.guesses
        each = trace.k
        if guesses is not None and part.source.prefetch.guesses:
            each += guesses.experts.shape[2] * guesses.experts.shape[3]
        most_rows = self._rows[first] + _NUMBERS_AT_ONCE // (each * trace.layers)
        end = min(int(np.searchsorted(self._rows, most_rows)), first + _VISITS_AT_ONCE // trace.layers)
        return min(max(end, first + 1), len(self._steps))

    def _put_budgets(self, number: int, first: int, end: int) -> None:
        """Lay out the budgets of a GPU's pools in some steps, where they change."""
        source = self._parts[number].source
        if source.budgets is not None:
            divided = [source.manager.divide(budget) for budget in source.budgets[first:end]]
            self._put(number, w.D_BUDGETS, np.array(divided, dtype=np.int64))

    def _put(self, number: int, place: int, values: Array) -> None:
        """Put values where a GPU has them."""
        self._set(self.gpus[number], {place: self._area(self.gpus[number], place, values)})

    def _area(self, owner: int, place: int, values: Array) -> int:
        """Returns where values lie now, floats as such, in an area that is used again."""
        at, capacity = self._areas.get((owner, place), (0, -1))
        if values.size > capacity:
            at = self._memory.allocate(values.size)
            self._areas[owner, place] = at, values.size
        words = self._memory.floats if values.dtype.kind == "f" else self._memory.words
        words[at : at + values.size] = values.reshape(-1)
        return at

    def make_room(self) -> None:
        """Write out what was recorded, and make more room where that is not enough, for the GPU that asks for it."""
        self.flush()
        words, at = self._memory.words, int(self._memory.words[w.X_ASKS])
        if words[w.X_REGISTERS] + words[at + w.D_MOST_COPIES] > words[w.X_ROOM_FOR]:
            self._make_registers(2 * int(words[w.X_REGISTERS] + words[at + w.D_MOST_COPIES]))
        pools = int(words[at + w.D_POOLS])
        places = [int(words[pools + 1 + number]) for number in range(int(words[pools]))]
        fullest = max(int(words[p + w.P_COUNT]) for p in places)
        self._set(at, {w.D_FULLEST: fullest})
        if fullest + words[at + w.D_MOST_EVICTED] >= self._ring_size(at):
            for p in places:
                self._grow_ring(p)
            self._make_scratch()
        self._renew()

    def _grow_ring(self, p: int) -> None:
        words = self._memory.words
        ring, capacity, first, count = (int(words[p + word]) for word in (w.P_RING, w.P_CAPACITY, w.P_FIRST, w.P_COUNT))
        extents = words[ring : ring + 2 * capacity].reshape(-1, 2)
        kept = np.roll(extents, -first, axis=0)[:count]
        to = self._memory.allocate(4 * capacity)
        self._memory.words[to : to + 2 * count] = kept.reshape(-1)
        self._set(p, {w.P_RING: to, w.P_CAPACITY: 2 * capacity, w.P_FIRST: 0})

    def _make_registers(self, count: int) -> None:
        """Make room for so many registers."""
        memory, old = self._memory, self.registers
        for at, place in product(self.gpus, (w.D_FREE, w.D_ROOMS)):
            before = int(memory.words[at + place])
            kept = memory.words[before : before + old].copy()
            to = memory.allocate(count)
            memory.words[to : to + old] = kept
            self._set(at, {place: to})
        self._set(0, {w.X_ROOM_FOR: count})

    # What comes of it.

    def _records(self, at: int, place: int, words: int) -> Array:
        """Returns the records of a region (records, words), and forget them."""
        memory = self._memory.words
        region = int(memory[at + place])
        first, count = int(memory[region + w.R_AT]), int(memory[region + w.R_COUNT])
        memory[region + w.R_COUNT] = 0
        return memory[first : first + count * words].reshape(-1, words)

    def flush(self) -> None:
        """Write what was recorded into the memory managers."""
        for part, at in zip(self._parts, self.gpus, strict=True):
            admitted = self._records(at, w.D_ADMITTED, w.ADMITTED_WORDS)
            part.source.manager.record(admitted, self._records(at, w.D_EVICTED, w.EVICTED_WORDS)[:, 0])
            resolved = self._records(at, w.D_RESOLVED, w.RESOLVED_WORDS)
            if len(resolved):
                part.resolved(resolved)

    def finish(self) -> None:
        """Write what remains to be known of the run into the memory managers."""
        self.flush()
        words = self._memory.words
        for part, at in zip(self._parts, self.gpus, strict=True):
            manager = part.source.manager
            first = int(words[at + w.D_EXPERTS])
            own = self._experts[first : first + len(manager.size_of)]
            manager.dropped += int(words[at + w.D_DROPPED])
            manager.guessed += int(words[at + w.D_GUESSED])
            manager.unique_guesses += int(words[at + w.D_UNIQUE])
            saved = np.flatnonzero(own[:, w.E_SAVED])
            manager.saved_copies += Counter(dict(zip(saved.tolist(), own[saved, w.E_SAVED].tolist(), strict=True)))
            manager.assigned_bytes, manager.budget_bytes = (
                int(words[at + place]) for place in (w.D_ASSIGNED, w.D_BUDGET)
            )
            held = np.flatnonzero(own[:, w.E_COPY] >= 0)
            held = held[np.argsort(own[held, w.E_COPY])]
            manager.assigned = dict(zip(held.tolist(), own[held, w.E_COPY].tolist(), strict=True))

    def done(self) -> int:
        """Returns how many visits are decided, of all GPUs together."""
        return sum(int(self._memory.words[at + w.H_DONE]) for at in self.threads)

    def portion(self, thread: int, now_ns: int = 0, backlog_ns: int = 0) -> Array | None:
        """Returns a thread's next portion of commands (commands, columns), decided now; None at the end.

        It is valid until the next is asked for.
        """
        for at in self.gpus:
            self._set(at, {w.D_NOW: now_ns, w.D_BACKLOG: backlog_ns})
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
