"""What compiled decisions start from, laid out in words and tables: settings, memories, and what policies know.

A memory is a GPU's, or the host's where that is a cache above a drive; both have rooms, and a policy that says who
leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...machine_words import WordMemory, zeros
from ...workloads.batches import Step, columns_of
from ...workloads.stacks import next_visits
from ..policies.compiled_eviction import BELADY
from ..policies.compiled_orders import COLUMNS, NEXT
from ..policies.compiled_policies import RANDOM, REALS_BESIDE, begin_state, luck, rows_beside
from ..policies.eviction_base import Setting
from ..policies.eviction_informed import Static
from ..policies.prefetch import Popularity
from . import decision_words as w
from .compiled_rooms import admit_preloaded
from .guessed import later_steps, later_table
from .lookups import list_lookups
from .memory_manager import MemoryManager
from .program import Gpu
from .pulled import Pulled
from .sources import EVICTIONS, PREFETCHES, Source
from .visit_commands import LENDS

Array = npt.NDArray[Any]

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
    """How GPUs share the experts of every layer: whether each owns any (GPUs, layers * experts).

    `in_common`: all go through the same steps, each with what it serves; else each with its own tokens alone.
    `from_peers`: copies come from another GPU that has the expert. `steps` are the run's.
    """

    owned: Array
    one_thread: bool
    in_common: bool
    from_peers: bool
    steps: Sequence[Step]
    laid_out: Callable[[int, int], Together]


class Together(NamedTuple):
    """What GPUs that share experts do together in some steps.

    The tokens of each GPU (steps, GPUs), who serves any (steps, layers, GPUs), what exchanges take, in ns (steps,
    layers), and which GPU serves each expert (steps, layers, experts); None: its only owner.
    """

    lives: Array
    serves: Array
    exchanges: Array
    servers: Array | None = None


class Layout:
    """The memories of a run's GPUs, laid out: where `gpus` are, and the `hosts` of each (-1: it holds every expert)."""

    def __init__(self, parts: Sequence[Part], shared: Shared | None, pulled: Pulled | None = None) -> None:
        self.parts, self.shared, self._pulled = parts, shared, pulled
        self.memory = memory = WordMemory(len(parts) << 20)
        memory.allocate(w.HEADER)
        #: By GPU: the first row of each step, and the end of the last; of all, the most rows of one.
        columns = [columns_of(part.source.steps) for part in parts]
        self.rows = [own.starts for own in columns]
        self._most_tokens = max(own.most_rows for own in columns) if pulled is None else pulled.most_tokens
        self.gpus = [memory.allocate(w.D_WORDS) for _ in parts]
        self.hosts = [-1 if part.source.host_memory is None else memory.allocate(w.D_WORDS) for part in parts]
        #: Every memory: where it is, whose it is, and what managed it so far.
        self.memories = [(at, part, part.source.manager) for at, part in zip(self.gpus, parts, strict=True)]
        for at, part in zip(self.hosts, parts, strict=True):
            if part.source.host_memory is not None:
                self.memories.append((at, part, part.source.host_memory.manager))
        firsts = np.cumsum([0, *(len(manager.size_of) for _, _, manager in self.memories)]).tolist()
        self.experts = zeros(firsts[-1] * w.E_COLUMNS).reshape(-1, w.E_COLUMNS)
        pools = [
            len(manager.size_of) + rows_beside(_kind_of(manager), _layers_of(manager)) * len(manager.pools)
            for _, _, manager in self.memories
        ]
        self.states = zeros(sum(pools) * COLUMNS).reshape(-1, COLUMNS)
        rows = np.cumsum([0, *pools]).tolist()
        for number, part in enumerate(parts):
            self._lay_out_terms(number, part)
        for (at, part, manager), first, row in zip(self.memories, firsts, rows, strict=False):
            self._lay_out_memory(at, part, manager, first, row)
        #: By memory: when each look-up's expert is used next, for the policy that knows.
        self.following = {at: self._next_uses(at, part, manager) for at, part, manager in self.memories}
        self.later = [self._later_visits(part) for part in (parts[:1] if shared and shared.in_common else parts)]

    def most_accesses(self, part: Part) -> int:
        """Returns the most experts that a visit may look up."""
        return min(self._most_tokens * part.source.trace.k, part.source.trace.num_experts)

    def most_copies(self, part: Part) -> int:
        """Returns the most copies that a visit may come to."""
        options, guesses = part.source.prefetch.options, part.source.guesses
        asked = part.source.prefetch.horizons * part.source.trace.num_experts
        if guesses is not None and part.source.prefetch.guesses:
            asked = min(asked, part.source.prefetch.horizons * guesses.experts.shape[3] * self._most_tokens)
        elif isinstance(part.source.prefetch, Popularity):
            asked = min(asked, part.source.prefetch.horizons * options.k)
        return self.most_accesses(part) + asked

    def most_demoted(self, part: Part) -> int:
        """Returns the most experts that may come back from the GPU at a visit: all that are there, or come there."""
        host = part.source.host_memory
        if host is None or not host.exclusive:
            return 0
        return len(part.source.manager.size_of) + self.most_copies(part)

    def _most_registers(self, part: Part) -> int:
        """Returns the most registers that a visit may take."""
        rooms = 3 if part.source.host_memory is not None or part.gpu.settings[LENDS] else 1
        return rooms * self.most_copies(part) + 2 * self.most_demoted(part)

    def _lay_out_terms(self, number: int, part: Part) -> None:
        """Lay out what a scenario says of a GPU's decisions."""
        source, memory, at = part.source, self.memory, self.gpus[number]
        manager, prefetch = source.manager, source.prefetch
        options, trace, miss = prefetch.options, source.trace, source.miss
        guesses = source.guesses if prefetch.guesses else None
        most = None if miss is None else miss.terms.cpu_max_tokens
        fetch_from = None if miss is None else miss.terms.fetch_from
        memory_words = len(manager.size_of)
        popular = memory_words if isinstance(prefetch, Popularity) else 0
        protected = 2 * (memory_words + self.most_copies(part)) if manager.drop_after_visit else 0
        self.memory.set(at, {
            w.D_SETTINGS: memory.put(part.gpu.settings), w.D_LAYERS: trace.layers,
            w.D_SHARED: manager.shared, w.D_PER_TOKEN: trace.k, w.D_PREFETCH: PREFETCHES[type(prefetch)],
            w.D_HORIZONS: prefetch.horizons, w.D_K: options.k, w.D_COPY_NS: options.copy_ns,
            w.D_POPULAR: memory.allocate(popular), w.D_PROTECTS: manager.protects, w.D_DROPS: manager.drop_after_visit,
            w.D_UNPIN_FIRST: source.issue == "after_launch", w.D_WATCHES: manager.watches_unused,
            w.D_ON_CPU: miss is not None, w.D_CPU_MOST: -1 if most is None else most,
            w.D_DEFERRED: 0 if miss is None else miss.terms.deferred,
            w.D_FETCH_FROM: -1 if fetch_from is None else fetch_from,
            w.D_PROTECTED: memory.allocate(protected), w.D_RESULTS: part.gpu.results, w.D_HAS_HEAD: part.has_head,
            w.D_RECEIVES: -1 if part.receives is None else memory.put(part.receives),
            w.D_SENDS: -1 if part.sends is None else memory.put(part.sends),
            w.D_RECENCY: memory.allocate(self.most_accesses(part) + 1),
            w.D_ASKED: memory.allocate(prefetch.horizons * trace.num_experts * w.ASKED_WORDS + 1),
            w.D_RANKS: 0 if guesses is None else guesses.experts.shape[3], w.D_GATES: -1, w.D_BUDGETS: -1,
            **self._own_lists(source),
            w.D_OWNED: -1 if self.shared is None else memory.put(self.shared.owned[number]),
            w.D_AWAITS_TOKENS: self._pulled is not None,
            w.D_FROM_PEERS: self.shared is not None and self.shared.from_peers,
            w.D_LENDS: part.gpu.settings[LENDS], w.D_TIER: self.hosts[number], w.D_STAGES: source.to_host,
            w.D_MOST_REGISTERS: sum(map(self._most_registers, self.parts if self.shared else [part])),
        })  # fmt: skip
        floats = memory.floats
        floats[at + w.D_LEAST], floats[at + w.D_DECAY] = options.threshold, options.decay
        capacity = max(1 << 12, 2 * self.most_copies(part)) if miss is not None else 0
        region = memory.put([memory.allocate(capacity * w.RESOLVED_WORDS), 0, capacity or _FAR])
        self.memory.set(at, {w.D_RESOLVED: region})

    def _own_lists(self, source: Source) -> dict[int, int]:
        """Returns where a GPU that serves some experts finds those of the common choices and guesses, if it does."""
        if self.shared is None or not self.shared.in_common:
            return {w.D_FILTERS: 0, w.D_WANTED: -1}
        memory, most, wanted, guesses = self.memory, self._most_tokens, -1, source.guesses
        if guesses is not None and PREFETCHES[type(source.prefetch)] in (w.TOP_K, w.MULTI_STEP):
            wanted = memory.allocate(1 + 2 * source.prefetch.horizons * guesses.experts.shape[3] * most)
        return {w.D_FILTERS: 1, w.D_OWN: memory.allocate(1 + source.trace.k * most), w.D_WANTED: wanted}

    def _lay_out_memory(self, at: int, part: Part, manager: MemoryManager, first: int, row: int) -> None:
        """Lay out a memory as it is: who has room, what is free, and what the policies know of it, from a row on."""
        kind, sizes, count = _kind_of(manager), manager.size_of, len(manager.pools)
        layers = _layers_of(manager)
        own = self.experts[first : first + len(sizes)]
        own[:, w.E_WAVE : w.E_UNTIL + 1] = own[:, w.E_COPY : w.E_ROOM + 1] = -1
        own[:, w.E_SIZE] = sizes[0] if manager.uniform else sizes
        if manager.assigned:
            held, copies = list(manager.assigned), list(manager.assigned.values())
            own[held, w.E_COPY], own[held, w.E_ROOM] = copies, part.gpu.rooms.registers_of(copies)
        per_pool = len(sizes) // count
        states = self.states[row : row + len(sizes) + rows_beside(kind, layers) * count].reshape(count, -1, COLUMNS)
        most_copies = self.most_copies(part) + (self.most_demoted(part) if at in self.hosts else 0)
        most_evicted = len(sizes) + most_copies + 1
        capacity = 2 * most_evicted + 6
        pools = []
        for place, pool in enumerate(manager.pools):
            reals, luck = self._begin_policy(kind, states[place], pool.policy.setting, layers, per_pool // layers)
            if isinstance(pool.policy, Static):
                popular: Array = np.array(pool.policy.popularity, dtype=np.float64)
                ranks = np.unique(popular, return_inverse=True)[1]
                states[place, :per_pool, NEXT] = ranks.reshape(-1)[place * per_pool :][:per_pool]
            ring = self.memory.allocate(2 * capacity)
            for number, (size_bytes, copy) in enumerate(pool.free):
                self.memory.words[ring + 2 * number] = size_bytes
                self.memory.words[ring + 2 * number + 1] = -1 if copy < 0 else part.gpu.rooms.of(copy).register
            pools.append(self.memory.put([
                pool.budget_bytes, pool.free_bytes, ring, capacity, 0, len(pool.free), row + place * states.shape[1],
                place * per_pool, per_pool, states.shape[1], reals, luck,
            ]))  # fmt: skip
        if kind != BELADY:  # which needs to know the next uses first
            self._admit_preloaded(manager, kind, pools)
        self.memory.set(at, {
            w.D_EXPERTS: first, w.D_LAYER_EXPERTS: part.source.trace.num_experts, w.D_EVICTION: kind,
            w.D_POOLS: self.memory.put_list(pools), w.D_COPIES: manager.copies, w.D_WAVE: 1,
            w.D_ASSIGNED: manager.assigned_bytes, w.D_BUDGET: manager.budget_bytes, w.D_FULLEST: 1,
            w.D_MOST_COPIES: most_copies, w.D_MOST_EVICTED: most_evicted,
            w.D_FRESH: self.memory.allocate(len(sizes) if manager.watches_unused else 0),
        })  # fmt: skip
        for record, words, most in (
            (w.D_ADMITTED, w.ADMITTED_WORDS, most_copies), (w.D_EVICTED, w.EVICTED_WORDS, most_evicted)
        ):  # fmt: skip
            room = max(1 << 12, 2 * most)
            self.memory.set(at, {record: self.memory.put([self.memory.allocate(room * words), 0, room])})
        host = part.source.host_memory
        if part.gpu.host is not None and host is not None and at in self.hosts:
            self.memory.set(at, {
                w.D_REQUESTS: self.memory.put(part.gpu.host.requests), w.D_EXCLUSIVE: host.exclusive,
                w.D_KEPT_FREE: host.free_bytes, w.D_BACK_NS: self.memory.put(part.gpu.host.back_ns),
            })  # fmt: skip

    def _begin_policy(self, kind: int, state: Array, setting: Setting, layers: int, experts: int) -> tuple[int, int]:
        """Lay out what a policy knows at first of a pool's layers, of so many experts; return its reals and luck."""
        count = layers * experts + REALS_BESIDE
        reals = self.memory.allocate(count)
        begin_state(kind, state, self.memory.floats[reals : reals + count], setting.capacity, layers, experts)
        return reals, self.memory.put(luck(setting)) if kind == RANDOM else 0

    def _admit_preloaded(self, manager: MemoryManager, kind: int, pools: Sequence[int]) -> None:
        """Let a policy know who has room in its pools before the run."""
        words, floats, held = self.memory.words, self.memory.floats, np.fromiter(manager.assigned, dtype=np.int64)
        for p in pools:
            row, rows, first, count, reals = (
                int(words[p + field]) for field in (w.P_STATE, w.P_ROWS, w.P_EXPERT, w.P_EXPERTS, w.P_REALS)
            )
            own = held[(held >= first) & (held < first + count)] - first
            states, beside = self.states[row : row + rows], floats[reals : reals + count + REALS_BESIDE]
            admit_preloaded(kind, states, beside, own, len(own))

    def _next_uses(self, at: int, part: Part, manager: MemoryManager) -> Array | None:
        """Returns when each look-up's expert is used next, for the policy that knows, which is told the first uses."""
        words = self.memory.words
        if words[at + w.D_EVICTION] != BELADY:
            return None
        source, count = part.source, len(manager.size_of)
        lookups = list_lookups(source.trace, source.steps, "batch", shared=manager.shared)
        visits = np.repeat(np.arange(len(lookups.starts) - 1), np.diff(lookups.starts))
        first = np.full(count, len(lookups.starts) - 1)
        first[lookups.experts[::-1]] = visits[::-1]
        pools = int(words[at + w.D_POOLS])
        places = words[pools + 1 : pools + 1 + words[pools]].tolist()
        for p in places:
            row, expert, experts = (int(words[p + field]) for field in (w.P_STATE, w.P_EXPERT, w.P_EXPERTS))
            self.states[row : row + experts, NEXT] = first[expert : expert + experts]
        self._admit_preloaded(manager, BELADY, places)
        following = next_visits(lookups.experts, lookups.starts, count)
        return np.asarray(following)

    def _later_visits(self, part: Part) -> Callable[[int, int], Array] | None:
        horizons, layers = part.source.prefetch.horizons, part.source.trace.layers
        if not horizons:
            return None
        most = (layers - 1 + horizons) // layers
        if self._pulled is not None:
            later = later_steps(part.source.trace, part.source.steps, most)
            return lambda first, end: np.array([later[step] for step in range(first, end)], dtype=np.int64)
        table = later_table(part.source.trace, part.source.steps, most)
        return lambda first, end: table[first:end]


def _layers_of(manager: MemoryManager) -> int:
    """Returns how many layers each pool of a memory has: one, where layers share experts."""
    return len(manager.size_of) // manager.experts // len(manager.pools)


def _kind_of(manager: MemoryManager) -> int:
    """Returns which policy a memory goes by, as compiled code knows it."""
    return EVICTIONS[type(manager.pools[0].policy)]
