"""KV blocks: how many each request holds, and which of them hold a prefix that other requests may share.

A block holds so many positions of one request, or, shared, of several with the same prefix. Blocks that nobody holds
are free; with prefix caching they keep what they hold until they are taken, the one that was freed first first, and of
one request the last one first (vLLM, "Automatic prefix caching", design document of version 1).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from ...errors import InputError
from .request import Request


class KvBlocks:
    """So many blocks of so many positions, counted for each holder; no prefix is shared."""

    def __init__(self, blocks: int, block_tokens: int) -> None:
        if blocks < 1 or block_tokens < 1:
            raise InputError(f"KV cache: {blocks} blocks of {block_tokens} positions: must be at least 1 of 1")
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.free_blocks = blocks
        self._held: dict[int, int] = {}

    @property
    def used_blocks(self) -> int:
        """How many blocks somebody holds."""
        return self.blocks - self.free_blocks

    def needed(self, positions: int) -> int:
        """Returns how many blocks hold so many positions."""
        return -(-positions // self.block_tokens)

    def held(self, holder: int) -> int:
        """Returns how many blocks a request holds."""
        return self._held.get(holder, 0)

    def cached(self, keys: Sequence[Hashable]) -> int:
        """Returns how many blocks, from the first on, hold what these keys stand for."""
        return 0

    def take(self, holder: int, positions: int, keys: Sequence[Hashable] = ()) -> bool:
        """Give a request blocks for so many positions in all; False, and nothing is given, if there are too few.

        The first blocks of a new holder are those that hold what `keys` stand for: `cached()` has found them all.
        """
        new = self.needed(positions) - self.held(holder)
        if new > self.free_blocks:
            return False
        if new > 0:
            self.free_blocks -= new
            self._held[holder] = self.held(holder) + new
        return True

    def name(self, holder: int, keys: Sequence[Hashable]) -> None:
        """Say what the first blocks of a request hold, so that others may go on from them."""

    def trim(self, holder: int, positions: int) -> None:
        """Take back what a request holds beyond so many positions."""
        beyond = self.held(holder) - self.needed(positions)
        if beyond > 0:
            self.free_blocks += beyond
            self._held[holder] -= beyond

    def release(self, holder: int) -> None:
        """Take back all that a request holds."""
        self.free_blocks += self._held.pop(holder, 0)

    def check(self) -> None:
        """Raise AssertionError unless every block is held or free."""
        assert sum(self._held.values()) + self.free_blocks == self.blocks
        assert self.free_blocks >= 0


class PrefixBlocks(KvBlocks):
    """Blocks by number, each with how many hold it and the key of its content, so that prefixes are shared."""

    def __init__(self, blocks: int, block_tokens: int) -> None:
        super().__init__(blocks, block_tokens)
        self._tables: dict[int, list[int]] = {}
        self._holders: dict[int, int] = {}
        self._block_of: dict[Hashable, int] = {}
        self._key_of: dict[int, Hashable] = {}
        # Those that were held before, first to be taken first; those never held are taken before, and have no content.
        self._freed: OrderedDict[int, None] = OrderedDict()
        self._never_held = 0
        self._named: dict[int, int] = {}

    def held(self, holder: int) -> int:
        """Returns how many blocks a request holds, shared ones too."""
        return len(self._tables.get(holder, ()))

    def cached(self, keys: Sequence[Hashable]) -> int:
        """Returns how many blocks, from the first on, hold what these keys stand for."""
        return next((at for at, key in enumerate(keys) if key not in self._block_of), len(keys))

    def take(self, holder: int, positions: int, keys: Sequence[Hashable] = ()) -> bool:
        """Give a request blocks for so many positions in all; False, and nothing is given, if there are too few."""
        table = self._tables.get(holder, [])
        shared = [] if table else [self._block_of[key] for key in keys]
        new = self.needed(positions) - len(table) - len(shared)
        revived = sum(block in self._freed for block in shared)
        if new > self.free_blocks - revived:
            return False
        for block in shared:
            self._freed.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1
        table = [*table, *shared] if shared else table
        table.extend(self._fresh() for _ in range(new))
        self.free_blocks -= revived + max(0, new)
        self._tables[holder] = table
        return True

    def name(self, holder: int, keys: Sequence[Hashable]) -> None:
        """Say what the first blocks of a request hold, so that others may go on from them."""
        table = self._tables[holder]
        for at in range(self._named.get(holder, 0), len(keys)):
            if keys[at] not in self._block_of and table[at] not in self._key_of:
                self._block_of[keys[at]] = table[at]
                self._key_of[table[at]] = keys[at]
        self._named[holder] = len(keys)

    def _fresh(self) -> int:
        """Take the free block that is to go first, and forget what it holds."""
        if self._never_held < self.blocks:
            block = self._never_held
            self._never_held += 1
        else:
            block, _ = self._freed.popitem(last=False)
            self._block_of.pop(self._key_of.pop(block, None), None)
        self._holders[block] = 1
        return block

    def trim(self, holder: int, positions: int) -> None:
        """Take back what a request holds beyond so many positions."""
        table = self._tables.get(holder, [])
        while len(table) > self.needed(positions):
            self._give_back(table.pop())

    def release(self, holder: int) -> None:
        """Take back all that a request holds, its last block first."""
        self._named.pop(holder, None)
        for block in reversed(self._tables.pop(holder, [])):
            self._give_back(block)

    def _give_back(self, block: int) -> None:
        self._holders[block] -= 1
        if not self._holders[block]:
            self._freed[block] = None
            self.free_blocks += 1

    def check(self) -> None:
        """Raise AssertionError unless every block is held, by as many as list it, or free."""
        listed: dict[int, int] = {}
        for table in self._tables.values():
            for block in table:
                listed[block] = listed.get(block, 0) + 1
        assert {block: count for block, count in self._holders.items() if count} == listed
        assert len(listed) + len(self._freed) + self.blocks - self._never_held == self.blocks
        assert self.free_blocks == self.blocks - len(listed)
        assert all(self._key_of[block] == key for key, block in self._block_of.items())


def prompt_keys(request: Request, block_tokens: int) -> list[Hashable]:
    """Returns the keys of a prompt's full blocks, in order: none where its hashes are not known.

    A hash stands for all that comes before it, so a block is known by the hash at its end and its place. The last hash
    may be of a part: blocks in it are the same in prompts that have this very hash, and no more is known.
    """
    if not request.hashes:
        return []
    ends = range(block_tokens, request.prompt_tokens + 1, block_tokens)
    return [(request.hashes[(end - 1) // request.hash_tokens], at) for at, end in enumerate(ends)]
