"""Compressed experts: how they lie in memory, and the kernel that makes bfloat16 weights of them.

One byte a weight, in groups that share a scale in bfloat16, which come behind all weights.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ..device.cuda import Call

#: Weights that share a scale.
GROUP = 128


def packed_bytes(size_bytes: int) -> int:
    """Returns the bytes that an expert of so many in bfloat16 takes compressed."""
    weights = size_bytes // 2
    return weights + 2 * -(-weights // GROUP)


def unpacking(packed: Any, into: Any) -> Call:
    """Returns the call that makes an expert's weights (bytes,) of what lies compressed (bytes or more,).

    A last group that is not whole is left as it is.
    """
    import torch

    weights = into.view(torch.bfloat16)
    groups = len(weights) // GROUP
    scales_at = len(weights) + len(weights) % 2
    values = packed[: groups * GROUP].view(torch.int8).view(groups, GROUP)
    scales = packed[scales_at : scales_at + 2 * groups].view(torch.bfloat16).view(groups, 1)
    return partial(torch.mul, out=weights[: groups * GROUP].view(groups, GROUP)), (values, scales)
