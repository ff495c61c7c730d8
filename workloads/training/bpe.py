"""Byte-pair encoding: any text to small whole numbers and back.

Token 0..255 is that byte, 256 ends a document, 257 and on are the merges in the order in which they were learned.
Merges never cross a word, which is a run of letters, digits or signs with the space before it, so that each
different word is encoded once and looked up afterwards.

Sennrich, Haddow, Birch, "Neural Machine Translation of Rare Words with Subword Units", ACL 2016; over bytes as in
Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ...errors import InputError

Pair = tuple[int, int]

END_OF_DOCUMENT = 256
FIRST_MERGE = 257

# Letters, up to three digits, signs, and white space, of which the last blank goes to the word that follows.
_WORD = re.compile(r" ?[^\W\d_]+| ?\d{1,3}| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+")


def learn(texts: Iterable[str], vocabulary: int) -> list[Pair]:
    """Returns the merges, most frequent pair first, that bring the vocabulary to this size; ties by smaller tokens.

    Fewer are returned once no pair occurs twice. Words seen once teach nothing and are left out. Raises ValueError
    for a vocabulary that has no room for the bytes and the end of a document, or does not fit 16 bits.
    """
    if not FIRST_MERGE <= vocabulary <= 1 << 16:
        raise InputError(f"vocabulary = {vocabulary}: must be {FIRST_MERGE}..{1 << 16}")
    counted = Counter(word for text in texts for word in _WORD.findall(text))
    kept = [(list(word.encode()), count) for word, count in sorted(counted.items()) if count > 1]
    words, counts = [word for word, _ in kept], [count for _, count in kept]
    frequency: Counter[Pair] = Counter()
    found_in: defaultdict[Pair, set[int]] = defaultdict(set)
    for number, word in enumerate(words):
        for pair in pairwise(word):
            frequency[pair] += counts[number]
            found_in[pair].add(number)
    heap = [(-count, pair) for pair, count in frequency.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and FIRST_MERGE + len(merges) < vocabulary:
        count, pair = heapq.heappop(heap)
        # Entries go stale when a merge takes pairs away or adds some; the latest entry of each pair is true.
        if -count != frequency[pair] or -count < 2:
            continue
        token = FIRST_MERGE + len(merges)
        merges.append(pair)
        changed: set[Pair] = set()
        for number in found_in.pop(pair):
            before, after = words[number], _join(words[number], pair, token)
            for sign, tokens in ((-1, before), (1, after)):
                for each in pairwise(tokens):
                    frequency[each] += sign * counts[number]
                    changed.add(each)
            for each in pairwise(after):
                found_in[each].add(number)
            words[number] = after
        for each in changed:
            if frequency[each] > 0:
                heapq.heappush(heap, (-frequency[each], each))
    return merges


def _join(word: Sequence[int], pair: Pair, token: int) -> list[int]:
    """Returns the word with each occurrence of the pair, from the left, made one token."""
    joined: list[int] = []
    at = 0
    while at < len(word):
        if word[at] == pair[0] and at + 1 < len(word) and word[at + 1] == pair[1]:
            joined.append(token)
            at += 2
        else:
            joined.append(word[at])
            at += 1
    return joined


class Encoder:
    """Encodes text by these merges, and decodes tokens."""

    def __init__(self, merges: Sequence[Pair]) -> None:
        rank = {pair: number for number, pair in enumerate(merges)}
        self._bytes = [bytes([value]) for value in range(256)] + [b""]
        for left, right in merges:
            self._bytes.append(self._bytes[left] + self._bytes[right])

        @cache
        def encode_word(word: str) -> list[int]:
            tokens = list(word.encode())
            while len(tokens) > 1:
                first = min(pairwise(tokens), key=lambda pair: rank.get(pair, len(rank)))
                if first not in rank:
                    break
                tokens = _join(tokens, first, FIRST_MERGE + rank[first])
            return tokens

        self._encode_word = encode_word

    @property
    def token_bytes(self) -> npt.NDArray[np.int64]:
        """How many bytes of text each token stands for, (vocabulary,)."""
        return np.array([len(each) for each in self._bytes])

    def encode(self, text: str) -> npt.NDArray[np.uint16]:
        """Returns the text as tokens, (tokens,)."""
        tokens = [token for word in _WORD.findall(text) for token in self._encode_word(word)]
        return np.array(tokens, dtype=np.uint16)

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Returns the text of the tokens; the end of a document is nothing, broken characters become U+FFFD."""
        return b"".join(self._bytes[token] for token in np.asarray(tokens).tolist()).decode("utf-8", "replace")
