"""The guide's state machine, event log and two clocks, kept beside the memory manager that decides.

The log drives `MemoryManager` in the guide's order, one token at one layer at a time with the guesses for that visit
prefetched before it, and tells every decision to one table: what the table does not allow raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..decide.memory_manager import MemoryManager

#: Where an expert can be, by the guide's names.
CPU_MEMORY, PREFETCH, GPU_MEMORY, CACHE, COMPUTATION = "CPU memory", "prefetch", "GPU memory", "cache", "computation"
#: What the log holds.
EVENTS = ("prefetch", "hit", "cache_hit", "miss", "evict")
#: The guide's state machine: what may happen to an expert in each state, and the state that follows. Besides the
#: logged events, a prefetch arrives in GPU memory, and a used expert is kept in the cache (without one it is evicted).
TRANSITIONS = {
    (CPU_MEMORY, "prefetch"): PREFETCH,
    (PREFETCH, "arrive"): GPU_MEMORY,
    (GPU_MEMORY, "hit"): COMPUTATION,
    (CACHE, "cache_hit"): COMPUTATION,
    (CPU_MEMORY, "miss"): COMPUTATION,
    (COMPUTATION, "keep"): CACHE,
    (COMPUTATION, "evict"): CPU_MEMORY,
    (CACHE, "evict"): CPU_MEMORY,
    (GPU_MEMORY, "evict"): CPU_MEMORY,
}

_MIB = 2**20


class TransitionError(RuntimeError):
    """Something happened to an expert that the state machine does not allow."""


class MemoryEvent(NamedTuple):
    """One line of the log.

    `event` is one of EVENTS, `expert` the index within its layer. With prefetches hidden it began at `time_ms`, and
    `latency_ms` is the copy of a prefetch, or what an access took: the device copy of a hit, the host copy of a miss.
    With every copy charged it began at `charged_time_ms`, and `charged_latency_ms` of an access includes its wait,
    before that, for the prefetches ordered since the last access. `memory_mb` (MiB) is in use after the event.
    """

    time_ms: float
    event: str
    expert: int
    layer: int
    token: int
    latency_ms: float
    memory_mb: float
    charged_time_ms: float
    charged_latency_ms: float


@dataclass(frozen=True)
class Prices:
    """What one expert costs, in ns: a copy from the host alone, one right behind another, and a hit."""

    alone_ns: int
    queued_ns: int
    hit_ns: int

    def copy_ns(self, before: int) -> int:
        """Returns what a copy from the host takes with so many ordered just before it."""
        return self.queued_ns if before else self.alone_ns


def next_state(event: str, state: str, expert: int) -> str:
    """Returns the state that follows; raise TransitionError naming event, state and expert if none may."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        allowed = ", ".join(name for where, name in TRANSITIONS if where == state)
        raise TransitionError(f"event {event!r}, state {state!r}, expert {expert}: allowed there: {allowed}") from None


class MemoryLog:
    """One run of a memory manager whose experts are all of `expert_bytes`, as events and on two clocks.

    `keeps` is false if the manager drops experts after their visit; then wrong guesses leave with their layer too.
    `shared`: the manager has one layer, whose experts every layer of the model uses.
    """

    def __init__(self, manager: MemoryManager, expert_bytes: int, prices: Prices, *, keeps: bool, shared: bool) -> None:
        self._manager = manager
        self._expert_bytes = expert_bytes
        self._prices = prices
        self._keeps = keeps
        self._shared = shared
        self._slots = manager.budget_bytes // expert_bytes
        self.events: list[MemoryEvent] = []
        #: Time in ns with prefetches hidden, and with every copy charged; and if every access missed, nothing else.
        self.now_ns = self.charged_now_ns = self.baseline_ns = 0
        #: How many accesses were among the guesses prefetched for them.
        self.foretold = 0
        #: Prefetched experts that nobody has used yet, with the layer that each was brought for.
        self.unused: dict[int, int] = {}
        self._state: dict[int, str] = {}  # of the experts that are not in CPU memory: it checks, it never decides
        self._guessed: set[int] = set()  # since the last visit
        self._queued = 0  # prefetches ordered since the last visit
        self._visits = self._evictions_noted = self._last_access_end_ns = 0

    @property
    def dropped(self) -> int:
        """How many prefetches found no room."""
        return self._manager.dropped

    def prefetch(self, guesses: Sequence[int], layer: int, token: int) -> int:
        """Prefetch experts (-1: none) for the next visit, each once; return what their copies take, in ns."""
        total_ns = 0
        for expert in guesses:
            if expert < 0 or expert in self._guessed:
                continue
            self._guessed.add(expert)
            if self._manager.prefetch(expert, self._visits) is None:
                continue
            self._tell_room_made(layer, token)
            self._move("prefetch", expert)
            self._move("arrive", expert)
            self.unused[expert] = layer
            cost_ns = self._prices.copy_ns(self._queued)
            self._queued += 1
            self._tell("prefetch", expert, layer, token, cost_ns, cost_ns)
            self.charged_now_ns += cost_ns
            total_ns += cost_ns
        return total_ns

    def visit(self, experts: Sequence[int], weights: Sequence[float], layer: int, token: int) -> list[MemoryEvent]:
        """Use the experts of one token at one layer, with their gate weights; return their accesses, found first."""
        self.foretold += len(self._guessed.intersection(experts))
        home = 0 if self._shared else layer
        waves = self._manager.visit(self._visits, home, experts, experts, weights)
        self._manager.unpin()
        prices = self._prices
        accesses: list[MemoryEvent] = []
        misses = 0
        for wave in waves:
            for expert in wave.found:
                found = "cache_hit" if self._state.get(expert) == CACHE else "hit"
                accesses.append(self._access(found, expert, layer, token, prices.hit_ns, prices.hit_ns))
            for admission in wave.admitted:
                self._tell_room_made(layer, token)
                cost_ns, charged_ns = prices.copy_ns(misses), prices.copy_ns(misses + self._queued)
                accesses.append(self._access("miss", admission.expert, layer, token, cost_ns, charged_ns))
                misses += 1
            self._finish([*wave.found, *(admission.expert for admission in wave.admitted)], layer, token)
        if self._keeps:  # but for what is spent, which the manager let go at the visit's end
            self._tell_evictions(len(self._manager.evicted_copies) - self._evictions_noted, layer, token)
        else:
            self._drop_unused(layer, token)
        self.baseline_ns += sum(prices.copy_ns(number) for number in range(len(experts)))
        self._visits += 1
        self._queued = 0
        self._guessed.clear()
        return accesses

    def _access(self, event: str, expert: int, layer: int, token: int, cost_ns: int, charged_ns: int) -> MemoryEvent:
        """Tell one access and let both clocks run; with copies charged it began when the last access ended."""
        self._move(event, expert)
        self.unused.pop(expert, None)
        waited_ns = self.charged_now_ns - self._last_access_end_ns
        self._tell(event, expert, layer, token, cost_ns, waited_ns + charged_ns)
        self.now_ns += cost_ns
        self.charged_now_ns += charged_ns
        self._last_access_end_ns = self.charged_now_ns
        return self.events[-1]

    def _finish(self, served: Sequence[int], layer: int, token: int) -> None:
        """Let a wave's experts go from computation into the cache, or out."""
        if not self._keeps:
            self._tell_evictions(len(served), layer, token)
            return
        for expert in served:
            self._move("keep", expert)

    def _drop_unused(self, layer: int, token: int) -> None:
        unused = [expert for expert, brought_for in self.unused.items() if brought_for == layer]
        for expert in unused:
            self._manager.cancel(expert)
        self._tell_evictions(len(unused), layer, token)

    def _tell_room_made(self, layer: int, token: int) -> None:
        """Tell the eviction that made room for one expert: all are of one size, so it is one once memory is full."""
        if len(self._state) == self._slots:
            self._tell_evictions(1, layer, token)

    def _tell_evictions(self, count: int, layer: int, token: int) -> None:
        """Tell the manager's next evictions; an expert that layers share is evicted by the layer being served."""
        first = self._evictions_noted
        self._evictions_noted += count
        for copy in self._manager.evicted_copies[first : self._evictions_noted]:
            expert = int(self._manager.copy_expert[copy])
            self._move("evict", expert)
            self.unused.pop(expert, None)
            own = layer if self._shared else expert // self._manager.experts
            self._tell("evict", expert, own, token, 0, 0)

    def _move(self, event: str, expert: int) -> None:
        state = next_state(event, self._state.get(expert, CPU_MEMORY), expert)
        if state == CPU_MEMORY:
            del self._state[expert]
        else:
            self._state[expert] = state

    def _tell(self, event: str, expert: int, layer: int, token: int, cost_ns: int, charged_ns: int) -> None:
        self.events.append(
            MemoryEvent(
                self.now_ns / 1e6,
                event,
                expert % self._manager.experts,
                layer,
                token,
                cost_ns / 1e6,
                len(self._state) * self._expert_bytes / _MIB,
                self.charged_now_ns / 1e6,
                charged_ns / 1e6,
            )
        )
