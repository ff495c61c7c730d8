"""Grouped kernels: one launch for all experts of a wave, wherever they lie, by Triton on a GPU.

A graph is captured once for a number of tokens and serves every wave: its kernels look up which experts theirs are, in
a table in GPU memory, by a counter that the last of them moves on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from ...workloads.model import Model
from ..device.cuda import Calls, expert_matrices, run
from .entries import Entry


class Grouped:
    """The grouped kernels of a plan's waves, in order; `outputs` (members, tokens, hidden) are those of the last.

    `x` (tokens, hidden) is what they begin with, `slots` (slots, bytes) where experts lie. Without a CUDA GPU, the same
    products are made one after the other.
    """

    def __init__(self, gpu: Any, model: Model, slots: Any, x: Any, waves: Sequence[Entry]) -> None:
        import torch

        self._gpu, self._model, self._slots, self._x = gpu, model, slots, x
        most = max(len(wave.members) for wave in waves)
        tokens = max(count for wave in waves for _, count in wave.members)
        table = torch.full((len(waves), most), -1, dtype=torch.int32)
        for row, wave in zip(table, waves, strict=True):
            row[: len(wave.members)] = torch.tensor([slot for slot, _ in wave.members], dtype=torch.int32)
        self._table = gpu.empty(len(waves), most, dtype="int32")
        self._table.copy_(table)
        self._next = gpu.empty(1, dtype="int32")
        dtype = model.expert_dtype
        self._between = gpu.empty(most, tokens, model.expert_ff, dtype=dtype)
        self.outputs = gpu.empty(most, tokens, model.hidden, dtype=dtype)
        self._on_gpu = slots.device.type == "cuda"
        self._graphs: dict[int, Calls] = {}
        self.begin()

    def begin(self) -> None:
        """Begin with the first wave."""
        self._next.zero_()

    def calls(self, wave: Entry) -> Calls:
        """Returns the calls of the next wave."""
        tokens = max(count for _, count in wave.members)
        if not self._on_gpu:
            return ((self._one_by_one, (tokens,)),)
        if tokens not in self._graphs:
            graph = self._gpu.capture(self._kernels(tokens), self._gpu.graph_pool())
            self._graphs[tokens] = ((graph.replay, ()),)
            self.begin()
        return self._graphs[tokens]

    def _kernels(self, tokens: int) -> Calls:
        from .grouped_kernels import first_products, last_product

        model, members = self._model, self._table.shape[1]
        weights = self._slots.view(self._x.dtype)
        launch = (self._table, self._next, weights, self._slots.shape[1] // self._x.element_size())
        shape = (model.hidden, model.expert_ff, members, tokens)
        first = partial(first_products, *launch, self._x, self._between, *shape, gated=model.expert_matrices == 3)
        last = partial(last_product, *launch, self._between, self.outputs, *shape, matrices=model.expert_matrices)
        return ((first, ()), (last, ()), (self._next.add_, (1,)))

    def wrong_by(self, wave: Entry) -> float:
        """Returns how far the outputs of the last wave are off, relative to the same products one after the other."""
        import torch

        found, wanted = [], []
        for member, (slot, tokens) in enumerate(wave.members):
            first, *others, last = (matrix.float() for matrix in expert_matrices(self._model, self._slots[slot]))
            x = self._x[:tokens].float()
            between = (x @ first.t()).relu_()
            wanted.append((between * (x @ others[0].t()) if others else between) @ last.t())
            found.append(self.outputs[member, :tokens].float())
        one, other = torch.cat(found), torch.cat(wanted)
        return float((one - other).norm() / other.norm())

    def _one_by_one(self, tokens: int) -> None:
        row = self._table[int(self._next)]
        for member, slot in enumerate(row.tolist()):
            if slot >= 0:
                first, *others, last = expert_matrices(self._model, self._slots[slot])
                between = (self._x[:tokens] @ first.t()).relu_()
                if others:
                    between *= self._x[:tokens] @ others[0].t()
                self.outputs[member, :tokens] = between @ last.t()
        run(((self._next.add_, (1,)),))
