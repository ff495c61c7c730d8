"""Triton kernels of grouped experts: each program makes some rows of one expert's product, weights read once."""

from __future__ import annotations

from typing import Any

import triton  # type: ignore[import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,unused-ignore]

#: Rows of a matrix that a program makes, and columns that it takes at once; tokens are filled up to what a matrix unit
#: takes, so that any number below takes as long.
_ROWS, _COLUMNS, _TOKENS, _WARPS, _STAGES = 32, 128, 16, 4, 4


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _first(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    table, following, weights, slot_stride, x, between, members, tokens_stride, count,
    hidden: tl.constexpr, inner: tl.constexpr, TOKENS: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
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
            within = (rows[None, :] < inner) & (columns[:, None] < hidden)
            there = rows[None, :] * hidden + columns[:, None]
            given = tl.load(
                x + tokens[:, None] * hidden + columns[None, :],
                mask=(tokens[:, None] < count) & (columns[None, :] < hidden), other=0.0,
            )  # fmt: skip
            gate = tl.dot(given, tl.load(base + there, mask=within, other=0.0), gate)
            if GATED:
                up = tl.dot(given, tl.load(base + inner * hidden + there, mask=within, other=0.0), up)
        made = tl.maximum(gate, 0.0)
        if GATED:
            made = made * up
        place = between + (member * tokens_stride + tokens[:, None]) * inner + rows[None, :]
        kept = (tokens[:, None] < count) & (rows[None, :] < inner)
        tl.store(place, made.to(between.dtype.element_ty), mask=kept)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _last(  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    table, following, weights, slot_stride, between, outputs, members, tokens_stride, count,
    hidden: tl.constexpr, inner: tl.constexpr, TOKENS: tl.constexpr, MATRICES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
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
            within = (rows[None, :] < hidden) & (columns[:, None] < inner)
            given = tl.load(
                between + (member * tokens_stride + tokens[:, None]) * inner + columns[None, :],
                mask=(tokens[:, None] < count) & (columns[None, :] < inner), other=0.0,
            )  # fmt: skip
            total = tl.dot(
                given, tl.load(base + rows[None, :] * inner + columns[:, None], mask=within, other=0.0), total
            )
        place = outputs + (member * tokens_stride + tokens[:, None]) * hidden + rows[None, :]
        kept = (tokens[:, None] < count) & (rows[None, :] < hidden)
        tl.store(place, total.to(outputs.dtype.element_ty), mask=kept)


def first_products(
    table: Any, following: Any, weights: Any, slot_stride: int, x: Any, between: Any, hidden: int, inner: int,
    members: int, tokens: int, *, gated: bool,
) -> None:  # fmt: skip
    """Launch the products of the first matrices of every member, over `tokens` tokens, at most 16."""
    _first[(members, triton.cdiv(inner, _ROWS))](
        table, following, weights, slot_stride, x, between, members, between.shape[1], tokens,
        hidden=hidden, inner=inner, TOKENS=_TOKENS, GATED=gated, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS,
        num_stages=_STAGES,
    )  # fmt: skip


def last_product(
    table: Any, following: Any, weights: Any, slot_stride: int, between: Any, outputs: Any, hidden: int, inner: int,
    members: int, tokens: int, *, matrices: int,
) -> None:  # fmt: skip
    """Launch the product of the last matrix of every member."""
    _last[(members, triton.cdiv(hidden, _ROWS))](
        table, following, weights, slot_stride, between, outputs, members, between.shape[1], tokens,
        hidden=hidden, inner=inner, TOKENS=_TOKENS, MATRICES=matrices, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS,
        num_stages=_STAGES,
    )  # fmt: skip
