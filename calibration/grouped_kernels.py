"""Triton kernels of grouped experts: each program makes some rows of one expert's product, weights read once."""

from __future__ import annotations

from typing import Any

import triton  # type: ignore[import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,unused-ignore]

#: Rows of a matrix that a program makes, and columns that it takes at once.
_ROWS, _COLUMNS, _WARPS = 16, 256, 4


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _first(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    table, following, weights, slot_stride, x, between, hidden, inner, members, tokens_stride,
    TOKENS: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    member = tl.program_id(0)
    slot = tl.load(table + tl.load(following) * members + member)
    if slot >= 0:
        rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        tokens = tl.arange(0, TOKENS)
        base = weights + slot.to(tl.int64) * slot_stride
        gate = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
        up = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
        for first in range(0, hidden, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            within = (rows[:, None] < inner) & (columns[None, :] < hidden)
            there = rows[:, None] * hidden + columns[None, :]
            given = tl.load(
                x + tokens[:, None] * hidden + columns[None, :], mask=columns[None, :] < hidden, other=0.0
            ).to(tl.float32)
            one = tl.load(base + there, mask=within, other=0.0).to(tl.float32)
            gate += tl.sum(one[None, :, :] * given[:, None, :], axis=2)
            if GATED:
                two = tl.load(base + inner * hidden + there, mask=within, other=0.0).to(tl.float32)
                up += tl.sum(two[None, :, :] * given[:, None, :], axis=2)
        made = tl.maximum(gate, 0.0)
        if GATED:
            made = made * up
        place = between + (member * tokens_stride + tokens[:, None]) * inner + rows[None, :]
        tl.store(place, made.to(between.dtype.element_ty), mask=rows[None, :] < inner)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _last(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    table, following, weights, slot_stride, between, outputs, hidden, inner, members, tokens_stride,
    TOKENS: tl.constexpr, MATRICES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    member = tl.program_id(0)
    slot = tl.load(table + tl.load(following) * members + member)
    if slot >= 0:
        rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        tokens = tl.arange(0, TOKENS)
        base = weights + slot.to(tl.int64) * slot_stride + (MATRICES - 1) * inner * hidden
        total = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
        for first in range(0, inner, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            within = (rows[:, None] < hidden) & (columns[None, :] < inner)
            given = tl.load(
                between + (member * tokens_stride + tokens[:, None]) * inner + columns[None, :],
                mask=columns[None, :] < inner, other=0.0,
            ).to(tl.float32)  # fmt: skip
            one = tl.load(base + rows[:, None] * inner + columns[None, :], mask=within, other=0.0).to(tl.float32)
            total += tl.sum(one[None, :, :] * given[:, None, :], axis=2)
        place = outputs + (member * tokens_stride + tokens[:, None]) * hidden + rows[None, :]
        tl.store(place, total.to(outputs.dtype.element_ty), mask=rows[None, :] < hidden)


def first_products(
    table: Any, following: Any, weights: Any, slot_stride: int, x: Any, between: Any, hidden: int, inner: int,
    members: int, tokens: int, *, gated: bool,
) -> None:  # fmt: skip
    """Launch the products of the first matrices of every member, over `tokens` tokens (a power of two)."""
    _first[(members, triton.cdiv(inner, _ROWS))](
        table, following, weights, slot_stride, x, between, hidden, inner, members, between.shape[1],
        TOKENS=tokens, GATED=gated, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS,
    )  # fmt: skip


def last_product(
    table: Any, following: Any, weights: Any, slot_stride: int, between: Any, outputs: Any, hidden: int, inner: int,
    members: int, tokens: int, *, matrices: int,
) -> None:  # fmt: skip
    """Launch the product of the last matrix of every member."""
    _last[(members, triton.cdiv(hidden, _ROWS))](
        table, following, weights, slot_stride, between, outputs, hidden, inner, members, between.shape[1],
        TOKENS=tokens, MATRICES=matrices, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS,
    )  # fmt: skip
