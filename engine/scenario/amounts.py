"""Amounts of memory as a scenario writes them: bytes with a unit, shares and numbers of experts."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence

from ...errors import InputError
from ...units import BYTES, NUMBER
from ...workloads.model import MOST_BYTES

AMOUNT = re.compile(rf"\s*({NUMBER})\s*(%|experts|{'|'.join(BYTES)})\s*")


class ScenarioError(InputError):
    """A scenario that cannot run; the message names the file, the key, the value and what would be right."""


def parse_budget(text: str, expert_bytes: Iterable[int], experts: int | Sequence[int], scope: str = "global") -> int:
    """Returns the bytes of '25%' (of all experts), '4GiB' or '512experts' (of the largest); ScenarioError else.

    `experts` are those of every layer, or (layers,) where they differ. With the scope shared, all are those of one.
    """
    match = AMOUNT.fullmatch(text)
    if match is None:
        raise ScenarioError(f"budget {text!r}: write it as '25%', '4GiB' or '512experts'")
    number, unit = match.groups()
    sizes = list(expert_bytes)[: 1 if scope == "shared" else None]
    whole, _, decimals = number.partition(".")
    value, scale = int(whole + decimals), int(10 ** len(decimals))
    counts = [experts] * len(sizes) if isinstance(experts, int) else experts
    all_bytes = sum(map(operator.mul, sizes, counts))
    factor: int = {"%": all_bytes, "experts": max(sizes), **BYTES}[unit]
    budget_bytes = value * factor // (scale * (100 if unit == "%" else 1))
    if budget_bytes > MOST_BYTES:
        raise ScenarioError(f"budget {text!r}: more than any machine has: at most {MOST_BYTES} bytes")
    return budget_bytes


def parse_bytes(text: str) -> int:
    """Returns the bytes of '24GiB'; ScenarioError else."""
    match = AMOUNT.fullmatch(text)
    if match is None or match[2] not in BYTES:
        raise ScenarioError(f"{text!r}: write bytes as '24GiB'")
    return parse_budget(text, [1], 1)
