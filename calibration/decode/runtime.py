"""The runtime: what a layer visit does on the GPU, with real attention, router and KV cache around it.

A visit reads the router's choice back, lets the memory manager decide, orders the copies of absent experts on a stream
of their own, launches each expert behind its own bytes, and then orders what is prefetched: the order of dispatch that
the simulator has, call for call. The experts' products are those of the model's own module.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ...collector import collector_off
from ...engine.decide.dispatch import Visit, launch_order
from ...engine.decide.memory_manager import Admission, Wave
from ...units import bytes_words
from ...workloads.recorder import family_of
from ..device.cuda import CudaError
from .deciding import Filling, Ranked
from .models import Loaded

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
#: Tokens of a prompt that run together.
_PROMPT_TOKENS = 1024


class Decides(Protocol):
    """What is asked at each visit; `horizons` layers ahead are guessed, `guesses` a token."""

    horizons: int
    guesses: int

    def visit(self, layer: int, choice: Sequence[Sequence[int]], ranked: Ranked = ()) -> Visit:
        """Returns what is done at a visit."""


@dataclass
class Steps:
    """What decode steps took and met: ns a step, tokens (steps, batch), routing (steps, batch, layers, k).

    `guessed` (steps, batch, layers, horizons, n), -1 for none; `logits` (batch, vocabulary) a step, if they were kept.
    """

    step_ns: list[int] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    routing: list[Array] = field(default_factory=list)
    guessed: list[Array] = field(default_factory=list)
    logits: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Prompt:
    """What prompts left behind: the KV cache, and the token that follows each (batch, 1). `context`: their tokens."""

    cache: Any
    tokens: Any
    context: int


class PackedRows(NamedTuple):
    """The rows of a step of several requests: tokens, positions (rows,), the mask, and which rows get logits."""

    tokens: Array
    positions: Array
    mask: Any
    sampled: Array


class Runtime:
    """A loaded model with `slots` rooms for experts on a GPU, ready to fill a cache and to decode from it.

    From here on the model's expert modules are its own. Raises CudaError if the slots do not fit the GPU.
    """

    def __init__(self, gpu: Any, loaded: Loaded, slots: int) -> None:
        self._gpu, self._loaded = gpu, loaded
        self._slot_count = min(slots, loaded.layers * loaded.num_experts)
        size_bytes = self._slot_count * loaded.layout.expert_bytes
        if size_bytes > gpu.free_bytes():
            raise CudaError(
                f"--gpu-budget: {self._slot_count} experts of {bytes_words(loaded.layout.expert_bytes)}: only "
                f"{bytes_words(gpu.free_bytes())} of the GPU are free"
            )
        self._rooms = [gpu.empty(loaded.layout.expert_bytes) for _ in range(self._slot_count)]
        self._weights = [loaded.layout.views(room) for room in self._rooms]
        self._compute, self._copies = gpu.stream(), gpu.stream()
        family = family_of(loaded.model.config)
        self._logits_at, self._weights_at = family.logits, family.weights
        for layer, module in enumerate(loaded.modules):
            module.forward = _Forward(self, layer)
        self._decides: Decides = Filling(loaded.layers, loaded.num_experts, loaded.layout.expert_bytes, self.slots)
        self._given: tuple[Array, Any] | None = None
        self._step: _Step | None = None
        #: Whether a single row, too, goes through its experts as several do.
        self._packed = False
        self._forget()

    @property
    def slots(self) -> int:
        """How many experts have room."""
        return self._slot_count

    def _forget(self) -> None:
        """Begin with empty slots; all that was launched has ended."""
        self._gpu.synchronize()
        self._slot_of: dict[int, int] = {}
        self._ready: dict[int, Any] = {}
        self._last_use: list[Any] = [None] * self._slot_count
        self._used_slots = 0

    def fill(self, tokens: Any) -> Prompt:
        """Run prompts (batch, context) and return what they leave; the experts' slots are forgotten."""
        import torch

        layout = self._loaded.layout
        self._decides = Filling(self._loaded.layers, self._loaded.num_experts, layout.expert_bytes, self.slots)
        self._forget()
        cache, logits = None, None
        with torch.inference_mode(), self._on_compute():
            for first in range(0, tokens.shape[1], _PROMPT_TOKENS):
                cache, logits = self._forward_pass(tokens[:, first : first + _PROMPT_TOKENS], first, cache)
            assert logits is not None
            following = logits[:, -1:].argmax(dim=-1)
        self._gpu.synchronize()
        return Prompt(cache, following, tokens.shape[1])

    def decode(self, prompt: Prompt, decides: Decides, steps: int, *, routing: Array | None = None,
               forced: Any = None, keep_logits: bool = False) -> Steps:  # fmt: skip
        """Decode `steps` tokens behind prompts, each place the likeliest, beginning with no expert on the GPU.

        `routing` (steps, batch, layers, k) takes the place of the routers' choices, whose kernels still run, and
        `forced` (batch, steps) that of the tokens.
        """
        import torch

        cache, tokens = deepcopy(prompt.cache), prompt.tokens
        given = None if routing is None else torch.from_numpy(routing.astype(np.int64)).to(tokens.device)
        self._decides, taken = decides, Steps()
        self._forget()
        gc.collect()
        with torch.inference_mode(), self._on_compute(), collector_off():
            for step in range(steps):
                if forced is not None:
                    tokens = forced[:, step : step + 1]
                self._step = _Step(self._loaded, len(tokens), decides)
                self._given = None if routing is None or given is None else (routing[step], given[step])
                begun = perf_counter_ns()
                cache, logits = self._forward_pass(tokens, prompt.context + step, cache)
                tokens = logits[:, -1:].argmax(dim=-1)
                taken.tokens.append(tokens[:, 0].tolist())
                taken.step_ns.append(perf_counter_ns() - begun)
                taken.routing.append(self._step.routing)
                if self._step.guessed is not None:
                    taken.guessed.append(self._step.guessed)
                if keep_logits:
                    taken.logits.append(logits[:, -1])
        self._step = self._given = None
        self._gpu.synchronize()
        return taken

    @contextmanager
    def serving(self, decides: Decides) -> Iterator[None]:
        """Begin with no expert on the GPU, to run steps of `packed_step` by these decisions."""
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        self._decides = decides
        self._forget()
        gc.collect()
        # cuDNN's attention makes a plan for every shape that it meets, 40 ms on an H200; shapes here are ever new.
        attention = sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
        self._packed = True
        with torch.inference_mode(), attention, self._on_compute(), collector_off():
            yield
        self._given, self._packed = None, False
        self._gpu.synchronize()

    def packed_step(self, rows: PackedRows, routing: Array, cache: Any) -> list[int]:
        """Run rows of several requests as one; return the likeliest token behind each of `rows.sampled`.

        `routing` (rows, layers, k) takes the place of the routers' choices, whose kernels still run.
        """
        import torch

        device = self._loaded.model.device
        self._given = routing, torch.from_numpy(routing).to(device)
        tokens, positions, sampled = (
            torch.from_numpy(each).to(device) for each in (rows.tokens, rows.positions, rows.sampled)
        )
        output = self._loaded.model(
            input_ids=tokens[None], position_ids=positions[None], attention_mask=rows.mask, use_cache=True,
            logits_to_keep=sampled, **{self._loaded.cache_name: cache},
        )  # fmt: skip
        following: list[int] = output.logits[0].argmax(dim=-1).tolist()
        return following

    def copy_ns(self, count: int) -> int:
        """Returns what each of `count` copies of experts takes that queue behind each other, alone on the machine.

        The experts' slots are forgotten.
        """
        self._forget()
        first, last = self._gpu.event(), self._gpu.event()
        function, args = self._gpu.use(self._copies)
        function(*args)
        first.record(self._copies)
        for number in range(count):
            room, host = self._rooms[number % self._slot_count], self._loaded.host[number % len(self._loaded.host)]
            room.copy_(host, non_blocking=True)
        last.record(self._copies)
        self._gpu.synchronize()
        return int(first.elapsed_time(last) * 1e6 / count)

    @contextmanager
    def _on_compute(self) -> Iterator[None]:
        """Launch on a stream of our own, behind all that was launched before."""
        self._gpu.synchronize()
        function, args = self._gpu.use(self._compute)
        function(*args)
        yield

    def _forward_pass(self, tokens: Any, before: int, cache: Any) -> tuple[Any, Any]:
        """Returns the cache behind these tokens (batch, columns), and the last column's logits."""
        import torch

        columns = torch.arange(before, before + tokens.shape[1], device=tokens.device)
        output = self._loaded.model(
            input_ids=tokens, position_ids=columns[None].expand(len(tokens), -1), use_cache=True, logits_to_keep=1,
            **{self._loaded.cache_name: cache},
        )  # fmt: skip
        return getattr(output, self._loaded.cache_name), output.logits

    # One layer visit.

    def visit(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Returns what the experts of a layer make of hidden states (tokens, width), as the model's own module does."""
        import torch

        choice, ranked, index = self._read_back(layer, hidden, index)
        visit = self._decides.visit(layer, choice, ranked)
        output = torch.zeros_like(hidden)
        single = len(choice) == 1 and not self._packed
        chosen = _Chosen(choice, layer * self._loaded.num_experts, single)
        positions = None if single else chosen.positions(hidden.device)
        for wave in visit.waves:
            self._copy(wave.admitted)
            for expert, tokens, copy in launch_order(visit, wave, False):
                ready = self._ready.pop(copy, None)
                if ready is not None:
                    ready.wait(self._compute)
                slot, first = self._slot_of[copy], chosen.first(expert)
                if positions is None:
                    made = self._expert(layer, hidden, slot) * weights[:, first, None]
                    output += made.to(output.dtype)
                else:
                    rows, pairs = positions[:, first : first + tokens]
                    made = self._expert(layer, hidden[rows], slot) * weights.reshape(-1, 1)[pairs]
                    output.index_add_(0, rows, made.to(output.dtype))
            self._note_use(visit, wave)
        self._copy([admission for admission, _ in visit.prefetches])
        return output

    def _read_back(self, layer: int, hidden: Tensor, index: Tensor) -> tuple[list[list[int]], Ranked, Tensor]:
        """Wait for the choice, and for what the routers ahead make of this layer's input; both lists."""
        import torch

        loaded, decides = self._loaded, self._decides
        ahead = loaded.routers[layer + 1 : layer + 1 + decides.horizons] if decides.guesses else ()
        guesses = [router(hidden)[self._logits_at].topk(decides.guesses, dim=-1).indices for router in ahead]
        read = (torch.cat([index, *guesses], dim=-1) if guesses else index).tolist()
        k = index.shape[-1]
        choice = [row[:k] for row in read] if guesses else read
        if self._given is not None:
            # The router's own choice was waited for; the recorded one is the one that is used.
            choice, index = self._given[0][:, layer].tolist(), self._given[1][:, layer]
        ranked = []
        for horizon in range(1, len(ahead) + 1):
            first, at = (layer + horizon) * loaded.num_experts, k + (horizon - 1) * decides.guesses
            ranked.append([first + row[at + rank] for rank in range(decides.guesses) for row in read])
        if self._step is not None:
            self._step.note(layer, choice, [row[k:] for row in read] if guesses else None)
        return choice, ranked, index

    def _expert(self, layer: int, x: Tensor, slot: int) -> Tensor:
        """Returns an expert of x (tokens, width), by the rules of the layer's own module."""
        from torch.nn.functional import linear

        module, parts = self._loaded.modules[layer], self._weights[slot]
        transposed = module.is_transposed
        inner = x @ parts["gate_up_proj"] if transposed else linear(x, parts["gate_up_proj"])
        if "gate_up_proj_bias" in parts:
            inner = inner + parts["gate_up_proj_bias"]
        inner = module._apply_gate(inner)
        made: Tensor = inner @ parts["down_proj"] if transposed else linear(inner, parts["down_proj"])
        return made + parts["down_proj_bias"] if "down_proj_bias" in parts else made

    def _copy(self, admitted: Sequence[Admission]) -> None:
        """Order copies, each into its slot behind the last kernel that reads what lay there."""
        if not admitted:
            return
        function, args = self._gpu.use(self._copies)
        function(*args)
        for admission in admitted:
            slot = self._slot_of[admission.copy] = self._freed(admission)
            last = self._last_use[slot]
            if last is not None:
                last.wait(self._copies)
            self._rooms[slot].copy_(self._loaded.host[admission.expert], non_blocking=True)
            ready = self._ready[admission.copy] = self._gpu.event()
            ready.record(self._copies)
        function, args = self._gpu.use(self._compute)
        function(*args)

    def _freed(self, admission: Admission) -> int:
        """Returns the slot of the expert that left for a new copy, or one never used."""
        if admission.former:
            (former,) = admission.former  # experts are of one size
            self._ready.pop(former, None)
            return self._slot_of.pop(former)
        self._used_slots += 1
        return self._used_slots - 1

    def _note_use(self, visit: Visit, wave: Wave) -> None:
        """Remember behind what the slots of a wave may be written again."""
        done = self._gpu.event()
        done.record(self._compute)
        for _, _, copy in launch_order(visit, wave, False):
            self._last_use[self._slot_of[copy]] = done


class _Forward:
    """The forward pass of a layer's experts, in place of the module's own."""

    def __init__(self, runtime: Runtime, layer: int) -> None:
        self._runtime, self._layer = runtime, layer

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self._runtime.visit(self._layer, hidden, index, weights)


class _Chosen:
    """Which (token, rank) pairs of a visit chose each expert, those of an expert together."""

    def __init__(self, choice: Sequence[Sequence[int]], offset: int, single: bool) -> None:
        self._offset, self._k = offset, len(choice[0])
        if single:
            self._first = {expert: rank for rank, expert in enumerate(choice[0])}
            return
        flat = np.array(choice, dtype=np.int64).reshape(-1)
        self._order = np.argsort(flat, kind="stable")
        experts, first = np.unique(flat[self._order], return_index=True)
        self._first = dict(zip(experts.tolist(), first.tolist(), strict=True))

    def first(self, expert: int) -> int:
        """Returns where the pairs of an expert begin; of a single token, its rank."""
        return self._first[expert - self._offset]

    def positions(self, device: Any) -> Tensor:
        """Returns the token of each pair, and the pair's number, on the device (2, pairs)."""
        import torch

        return torch.from_numpy(np.stack([self._order // self._k, self._order])).to(device, non_blocking=True)


class _Step:
    """What a step met: routing (batch, layers, k), guesses (batch, layers, horizons, n), -1 where there is none."""

    def __init__(self, loaded: Loaded, batch: int, decides: Decides) -> None:
        shape = (batch, loaded.layers)
        self.routing: Array = np.zeros((*shape, loaded.top_k), dtype=np.int16)
        self.guessed: Array | None = None
        if decides.guesses and decides.horizons:
            self.guessed = np.full((*shape, decides.horizons, decides.guesses), -1, dtype=np.int16)

    def note(self, layer: int, choice: Sequence[Sequence[int]], guesses: Sequence[Sequence[int]] | None) -> None:
        """Note what was chosen at a layer, and what was guessed for the layers ahead (batch, horizons * n)."""
        self.routing[:, layer] = choice
        if guesses is not None and self.guessed is not None:
            batch, _, _, n = self.guessed.shape
            read = np.array(guesses, dtype=np.int16).reshape(batch, -1, n)
            self.guessed[:, layer, : read.shape[1]] = read
