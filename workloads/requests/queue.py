"""Requests that wait and that run, and all that a scheduler may do with them.

The queue owns what every scheduler has in common: positions computed, KV blocks, preemption, drafts. A scheduler
chooses who goes on, by how many positions, and who has to leave. Each request has one part of a step at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

from .kv_blocks import KvBlocks, PrefixBlocks, prompt_keys
from .request import Part, Request


class Live:
    """A request in service: how far it is.

    `known` positions have a token, of which `computed` are in the KV cache; `reserved` positions are held for it
    whatever it needs. `swapped` blocks of it are in host memory. `cached` positions were found when it was admitted.
    """

    __slots__ = ("cached", "computed", "keys", "known", "preempted", "request", "reserved", "started_ns", "swapped")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.known = request.prompt_tokens
        self.computed = 0
        self.reserved = 0
        self.swapped = 0
        self.cached = 0
        self.preempted = 0
        self.started_ns = -1
        self.keys: list[Hashable] | None = None

    @property
    def produced(self) -> int:
        """How many tokens it was given."""
        return self.known - self.request.prompt_tokens

    @property
    def decodes(self) -> bool:
        """Whether it lacks nothing but its last token in the KV cache."""
        return self.known - self.computed == 1 and self.known > self.request.prompt_tokens

    def keys_of(self, blocks: int, block_tokens: int) -> list[Hashable]:
        """Returns the keys of its first so many blocks, all full; what is in no hash is its own."""
        if self.keys is None:
            self.keys = prompt_keys(self.request, block_tokens)
        self.keys.extend((self.request.number, at, "own") for at in range(len(self.keys), blocks))
        return self.keys[:blocks]


@dataclass(frozen=True)
class Swapping:
    """Where the KV blocks of a preempted request go: so many fit into host memory, each of so many bytes."""

    host_blocks: int = 0
    block_bytes: int = 0


class Queue:
    """What a scheduler sees and does; `parts` are those of the step that is being made."""

    def __init__(self, kv: KvBlocks, drafts: int = 0, swapping: Swapping | None = None) -> None:
        self.kv = kv
        self.drafts = drafts
        self.waiting: deque[Live] = deque()
        self.running: list[Live] = []
        self.parts: dict[int, Part] = {}
        self.link_busy = 0.0
        self.swap_in_blocks = self.swap_out_blocks = self.preempted = 0
        self._swapping = swapping or Swapping()
        self._host_blocks = self._swapping.host_blocks

    def begin(self) -> None:
        """Begin a step."""
        self.parts = {}
        self.swap_in_blocks = self.swap_out_blocks = self.preempted = 0

    @property
    def block_bytes(self) -> int:
        """How large a KV block is, where blocks are swapped."""
        return self._swapping.block_bytes

    def due(self, live: Live) -> int:
        """Returns how many positions a running request has to compute, drafts included."""
        return live.known - live.computed + (self.drafts if live.decodes else 0)

    def most_positions(self, live: Live) -> int:
        """Returns how many positions a request has in the KV cache at most, drafts included."""
        return live.request.most_positions + self.drafts

    def start(self, live: Live) -> int:
        """Returns from which position on a waiting request would go on.

        What was swapped out comes back; else full blocks that hold its prefix are found, all but its last token's,
        which has to be run for its logits.
        """
        if live.swapped or not isinstance(self.kv, PrefixBlocks):
            return live.computed
        size = self.kv.block_tokens
        return self.kv.cached(live.keys_of((live.known - 1) // size, size)) * size

    def admit(self, live: Live, count: int, reserve: int = 0) -> bool:
        """Let a waiting request go on by so many positions, and hold `reserve` for it; False if blocks are missing."""
        start = self.start(live)
        size = self.kv.block_tokens
        keys = [] if live.swapped or not start else live.keys_of(start // size, size)
        if not self.kv.take(live.request.number, max(start + count, reserve), keys):
            return False
        if live.swapped:
            self._host_blocks += live.swapped
            self.swap_in_blocks += live.swapped
            live.swapped = 0
        else:
            live.cached = max(live.cached, start)
        live.computed, live.reserved = start, reserve
        self.waiting.remove(live)
        self.running.append(live)
        self._schedule(live, count)
        return True

    def grow(self, live: Live, count: int) -> bool:
        """Let a running request go on by so many positions; False, and nothing changes, if blocks are missing."""
        if not self.kv.take(live.request.number, live.computed + count):
            return False
        self._schedule(live, count)
        return True

    def _schedule(self, live: Live, count: int) -> None:
        number, end = live.request.number, live.computed + count
        assert number not in self.parts, f"request {number}: scheduled twice in a step"
        assert count > 0, f"request {number}: {count} positions scheduled"
        drafts = max(0, end - live.known)
        self.parts[number] = Part(number, live.computed, count, 1 + drafts if end >= live.known else 0, drafts)
        if isinstance(self.kv, PrefixBlocks):
            size = self.kv.block_tokens
            self.kv.name(number, live.keys_of(min(end, live.known) // size, size))

    def preempt(self, live: Live) -> None:
        """Take a running request, which has no part of this step, off the GPU, to the head of those that wait.

        Its KV blocks go to host memory if they have room there, and are given up, to be computed again, else.
        """
        number = live.request.number
        assert number not in self.parts, f"request {number}: preempted in the step that it is in"
        held = self.kv.held(number)
        if held <= self._host_blocks:
            self._host_blocks -= held
            self.swap_out_blocks += held
            live.swapped = held
        else:
            live.computed = 0
        self.kv.release(number)
        live.preempted += 1
        self.preempted += 1
        live.reserved = 0
        self.running.remove(live)
        self.waiting.appendleft(live)

    def advance(self, live: Live, accepted: int) -> int:
        """Make what a step has computed of a request known, and return how many tokens it was given.

        `accepted` of its drafts were right; the positions of the others are given back.
        """
        part = self.parts[live.request.number]
        live.computed = part.first + part.tokens
        if not part.sampled:
            return 0
        wrong = part.drafts - accepted
        tokens = min(1 + accepted, live.request.output_tokens - live.produced)
        live.known += tokens
        if wrong:
            live.computed -= wrong
            self.kv.trim(live.request.number, max(live.computed, live.reserved))
        return tokens

    def finish(self, live: Live) -> None:
        """Let a request that has all its tokens leave."""
        self.running.remove(live)
        self.kv.release(live.request.number)
