"""Record the routing of a running transformers model: hooks on its routers, nothing else changed.

FAMILIES says where each family keeps its routers and what they return; to add one, add a row and a tiny
configuration to tests/test_recorder.py. The choice is taken from the router's own output, never recomputed, so that
biased, grouped and capacity-limited routers come out as the model used them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .batches import DECODE, PREFILL
from .trace import RoutingTrace, by_sequence
from .trace_checks import RUNNERS_UP, RUNNERS_UP_WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Array = npt.NDArray[Any]

#: Before, the routers of switch_transformers returned other things; those of all other families did not since 5.17.
_TRANSFORMERS = ">=5.24"
#: How many experts a recorded guess ranks.
GUESSES = 16


class RecordError(InputError):
    """A model or a run that cannot be recorded: one line naming what was met and what would do."""


class _Family(NamedTuple):
    """The class of a family's routers, and the place in their output of each thing; `one_hot`: of the experts.

    Gate weights are a softmax of logits, or, `sigmoid`, each by itself.
    """

    router: str
    logits: int = 0
    weights: int = 1
    experts: int = 2
    one_hot: bool = False
    sigmoid: bool = False


#: By `config.model_type`.
FAMILIES = {
    "mixtral": _Family("MixtralTopKRouter"),
    "qwen2_moe": _Family("Qwen2MoeTopKRouter"),
    "qwen3_moe": _Family("Qwen3MoeTopKRouter"),
    "deepseek_v2": _Family("DeepseekV2TopkRouter"),
    "deepseek_v3": _Family("DeepseekV3TopkRouter", sigmoid=True),
    "olmoe": _Family("OlmoeTopKRouter"),
    "gpt_oss": _Family("GptOssTopKRouter"),
    "phimoe": _Family("PhimoeTopKRouter"),
    # An expert beyond its capacity takes no more tokens: their row of the one-hot mask is then all 0.
    "switch_transformers": _Family("SwitchTransformersTop1Router", logits=2, experts=0, one_hot=True),
}


def family_of(config: Any) -> _Family:
    """Returns the row of FAMILIES for a transformers configuration; RecordError if there is none."""
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise RecordError(
            f"model type {kind!r} has no routers that can be recorded: choose a model of {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def cache_name(model: Any) -> str:
    """Returns what a model's forward pass, and its output, call the KV cache: `cache` since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@contextmanager
def record(model: Any, *, guesses: int = 0, until_end: bool = True, runners_up: int = 0) -> Iterator[RoutingTrace]:
    """Record every token that `model`, a transformers model of one of the FAMILIES, routes inside the block.

    Yields a trace that is empty until the block ends, and then holds one row per token that is not padding:

    - `experts`, `weights`: the router's own, in its order. `present` is False where a capacity limit left the token
      out, and for the layers of the other stack of an encoder-decoder model (encoder layers come first).
    - `sequence`: each row of each batch is one, numbered as they come. `position` counts its tokens; those of a
      decoder follow those of its encoder.
    - `phase`: a step of one token that continues a cache is decode, so is all that a decoder beside an encoder does;
      everything else is prefill. A row that is fed an end-of-sequence token in decode has ended, and what `generate`
      feeds it while others go on is left out; `until_end` = False records it.
    - with `guesses` = H, `predictions` (tokens, layers, H, 16): the router of the layer h ahead applied to what this
      layer's router saw, its own choice first, the others by logit; -1 where there is no such layer. This costs H
      more router calls a layer.
    - with `runners_up` = n, `runners_up` (tokens, layers, n), the experts that the router ranked next behind its
      choice, by logit, and `runners_up_weights`, their gates on the scale of `weights`.

    A step that continues a cache must continue the one of the step before; beam search reorders rows, and is not
    followed. Raises RecordError for a model without routers, and for a step that cannot be told apart.
    """
    if guesses < 0:
        raise RecordError(f"guesses = {guesses}: must be at least 0")
    recorder = _Recorder(model, guesses, until_end, runners_up)
    trace = recorder.empty_trace()
    handles = recorder.attach()
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()
    # The trace was handed out before its rows were known; it is given them once, here.
    RoutingTrace.__init__(trace, **recorder.fields())


@dataclass
class _Batch:
    """The sequences that run together: their numbers, tokens so far, columns fed by stack, and who has ended."""

    sequence: Array
    tokens: Array
    ended: Array
    columns: dict[int, int] = field(default_factory=dict)


class _Step(NamedTuple):
    """The tokens of one forward pass, padding included: each (batch * columns,)."""

    real: Array
    sequence: Array
    position: Array
    phase: int


class _Chunk(NamedTuple):
    """What one step of one stack routed; arrays (real tokens, layers of the stack, ...)."""

    stack: int
    step: _Step
    experts: Array
    weights: Array
    present: Array
    predictions: Array | None
    runners_up: Array | None = None
    runners_up_weights: Array | None = None


class _Recorder:
    """The hooks and what they have seen."""

    def __init__(self, model: Any, guesses: int, until_end: bool, runners_up: int) -> None:
        self._model, self._guesses = model, guesses
        self._family = family_of(getattr(model, "config", None))
        self._stacks = _stacks(model)
        self._routers = [self._routers_of(stack) for stack in self._stacks]
        self._names = [name for stack in self._routers for name, _ in stack]
        if not self._names:
            raise RecordError(
                f"model type {model.config.model_type!r}: no layer of this model has a router ({self._family.router})"
            )
        router = next(router for stack in self._routers for _, router in stack)
        self._experts = int(router.num_experts)  # type: ignore[arg-type]
        self._k = int(getattr(router, "top_k", 1))
        if not 0 <= runners_up <= min(GUESSES, self._experts) - self._k:
            raise RecordError(
                f"runners_up = {runners_up}: must be 0..{max(0, min(GUESSES, self._experts) - self._k)}, behind the "
                f"{self._k} of {self._experts} experts that the router chooses"
            )
        self._runners_up = runners_up
        self._ends = _end_tokens(model) if until_end else []
        self._batch: _Batch | None = None
        self._step: _Step | None = None
        self._routed: list[tuple[Tensor, Tensor, list[Tensor], tuple[Tensor, Tensor] | None] | None] = []
        self._guessing = False
        self._chunks: list[_Chunk] = []
        self._sequences = 0

    def _routers_of(self, stack: Module) -> list[tuple[str, Module]]:
        names = {id(module): name for name, module in self._model.named_modules()}
        return [
            (names.get(id(module), name), module)
            for name, module in stack.named_modules()
            if type(module).__name__ == self._family.router
        ]

    def empty_trace(self) -> RoutingTrace:
        """Returns a trace of this model's shape, without tokens."""
        return RoutingTrace(np.zeros((0, len(self._names), self._k), dtype=np.uint8), self._experts)

    def attach(self) -> list[Any]:
        """Put the hooks in place; return their handles."""
        handles: list[Any] = []
        for number, (stack, routers) in enumerate(zip(self._stacks, self._routers, strict=True)):
            if not routers:
                continue

            def begin(_: Module, args: Any, kwargs: Any, number: int = number) -> None:
                self._begin(number, args, kwargs)

            def end(*_: Any, number: int = number) -> None:
                self._end(number)

            handles.append(stack.register_forward_pre_hook(begin, with_kwargs=True))
            handles.append(stack.register_forward_hook(end))
            for layer, (_, router) in enumerate(routers):

                def route(_: Module, args: Any, output: Any, number: int = number, layer: int = layer) -> None:
                    if not self._guessing:
                        self._route(number, layer, args[0], output)

                handles.append(router.register_forward_hook(route))
        return handles

    def _begin(self, stack: int, args: Any, kwargs: Any) -> None:
        """Find out which tokens this step runs."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        shape = tuple((kwargs["inputs_embeds"] if ids is None else ids).shape[:2])
        real = _mask(kwargs.get("attention_mask"), shape)
        past = kwargs.get("cache", kwargs.get("past_key_values"))  # its name since transformers 5.24, and before
        before = 0 if past is None else int(past.get_seq_length())
        batch = self._join(stack, shape[0], before)
        is_decoder = stack > 0
        phase = DECODE if is_decoder or (before and shape[1] == 1) else PREFILL
        if before and shape[1] == 1 and ids is not None:
            batch.ended |= np.isin(_array(ids[:, 0]), self._ends)
        real &= ~batch.ended[:, None]
        batch.columns[stack] = before + shape[1]
        position = batch.tokens[:, None] + np.cumsum(real, axis=1) - 1
        batch.tokens = batch.tokens + real.sum(axis=1)
        sequence = np.broadcast_to(batch.sequence[:, None], shape)
        self._step = _Step(real.reshape(-1), sequence.reshape(-1), position.reshape(-1), phase)
        self._routed = [None] * len(self._routers[stack])

    def _join(self, stack: int, rows: int, before: int) -> _Batch:
        """Returns the batch that this step belongs to: the one of the step before, or a new one."""
        batch = self._batch
        if before == 0 and (stack == 0 or batch is None):
            new = np.arange(self._sequences, self._sequences + rows)
            self._sequences += rows
            self._batch = _Batch(new, np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.bool_))
            return self._batch
        fed = 0 if batch is None else batch.columns.get(stack, 0)
        if batch is None or len(batch.sequence) != rows or fed != before:
            raise RecordError(
                f"a step of {rows} rows continues a cache of {before} tokens, but the step before it left "
                f"{0 if batch is None else len(batch.sequence)} rows of {fed}: record whole runs, one after the other"
            )
        return batch

    def _route(self, stack: int, layer: int, hidden: Tensor, output: Any) -> None:
        """Keep what a router returned, and what the routers ahead make of the same hidden state."""
        if self._step is None:
            return  # called outside of a forward pass of its stack
        guesses = []
        routers = self._routers[stack]
        for _, ahead in routers[layer + 1 : layer + 1 + self._guesses]:
            self._guessing = True
            try:
                guesses.append(self._rank(ahead(hidden)))
            finally:
                self._guessing = False
        experts, weights = output[self._family.experts], output[self._family.weights]
        width = self._experts if self._family.one_hot else self._k
        if experts.is_floating_point() or experts.shape[-1] != width:
            raise RecordError(
                f"router {routers[layer][0]} returned {experts.dtype} {tuple(experts.shape)}, not its choice: "
                f"transformers {_TRANSFORMERS} is what this was made for"
            )
        self._routed[layer] = (
            experts.detach().reshape(-1, width),
            weights.detach().float().reshape(-1, self._k),
            guesses,
            self._next_ranked(output) if self._runners_up else None,
        )

    def _next_ranked(self, output: Any) -> tuple[Tensor, Tensor]:
        """Returns who comes next behind the choice (tokens, n), and with which gates, on the scale of the weights."""
        ranked = self._rank(output)
        behind = ranked[:, self._k : self._k + self._runners_up]
        gates = output[self._family.logits].detach().float().reshape(-1, self._experts)
        if gates.min() < 0 or gates.sum(dim=-1).sub(1).abs().max() > 1e-3:  # some routers return the softmax itself
            gates = gates.sigmoid() if self._family.sigmoid else gates.softmax(dim=-1)
        chosen = gates.gather(1, ranked[:, : self._k]).sum(dim=-1, keepdim=True)
        weights = output[self._family.weights].detach().float().reshape(-1, self._k).sum(dim=-1, keepdim=True)
        return behind, gates.gather(1, behind) * (weights / chosen)

    def _rank(self, output: Any) -> Tensor:
        """Returns the best guesses (tokens, up to 16): the router's choice, then the others, each by logit."""
        logits = output[self._family.logits].detach().float().reshape(-1, self._experts)
        if not self._family.one_hot:
            chosen = output[self._family.experts].reshape(-1, self._k)
            spread = logits.amax(dim=-1, keepdim=True) - logits.amin(dim=-1, keepdim=True) + 1
            logits = logits.scatter_add(1, chosen, spread.expand(-1, self._k))
        best: Tensor = logits.topk(min(GUESSES, self._experts), dim=-1).indices
        return best

    def _end(self, stack: int) -> None:
        """Bring what the step routed to the host, at once, and keep the rows that are tokens."""
        step, self._step = self._step, None
        assert step is not None
        missing = [name for (name, _), seen in zip(self._routers[stack], self._routed, strict=True) if seen is None]
        if missing:
            raise RecordError(f"router {missing[0]} was not called in a step: turn fused MoE kernels off")
        routed = [seen for seen in self._routed if seen is not None]
        experts = _gather([seen[0] for seen in routed])[step.real]
        weights = _gather([seen[1] for seen in routed])[step.real]
        present: Array = np.ones(experts.shape[:2], dtype=np.bool_)
        if self._family.one_hot:
            present = experts.astype(np.bool_).max(axis=-1)
            experts = experts.argmax(axis=-1)[..., None]
        self._chunks.append(
            _Chunk(
                stack,
                step._replace(sequence=step.sequence[step.real], position=step.position[step.real]),
                experts,
                np.where(present[..., None], weights, 0),
                present,
                self._guessed([seen[2] for seen in routed], step.real) if self._guesses else None,
                *(
                    _gather([seen[3][part] for seen in routed if seen[3]])[step.real]
                    for part in (0, 1)
                    if self._runners_up
                ),
            )
        )

    def _guessed(self, guesses: list[list[Tensor]], real: Array) -> Array:
        """Returns the step's predictions (real tokens, layers, horizons, n), -1 where no layer is that far ahead."""
        shape = (int(real.sum()), len(guesses), self._guesses, min(GUESSES, self._experts))
        predictions = np.full(shape, -1, dtype=np.int16)
        for layer, ahead in enumerate(guesses):
            if ahead:
                predictions[:, layer, : len(ahead)] = _gather(ahead)[real]
        return predictions

    def fields(self) -> dict[str, Any]:
        """Returns the fields of the whole trace, each sequence's rows together."""
        chunks = self._chunks
        if not sum(len(chunk.experts) for chunk in chunks):
            raise RecordError("no token ran through the model while it was recorded: run it inside the block")
        first = np.cumsum([0, *(len(routers) for routers in self._routers)])
        order = by_sequence(np.concatenate([chunk.step.sequence for chunk in chunks]))

        def spread(name: str, fill: int, dtype: npt.DTypeLike) -> Array:
            parts = []
            for chunk in chunks:
                value = getattr(chunk, name)
                part = np.full((len(value), len(self._names), *value.shape[2:]), fill, dtype=dtype)
                part[:, first[chunk.stack] : first[chunk.stack + 1]] = value
                parts.append(part)
            return np.concatenate(parts)[order]

        present = spread("present", False, np.bool_)
        return {
            "experts": spread("experts", 0, np.uint8 if self._experts <= 256 else np.uint16),
            "num_experts": self._experts,
            "weights": spread("weights", 0, np.float16),
            "sequence": np.concatenate([chunk.step.sequence for chunk in chunks])[order],
            "position": np.concatenate([chunk.step.position for chunk in chunks])[order],
            "phase": np.concatenate([np.full(len(c.experts), c.step.phase, np.uint8) for c in chunks])[order],
            "present": None if present.all() else present,
            "predictions": spread("predictions", -1, np.int16) if self._guesses else None,
            "extra": self._extra(spread),
            "meta": self._meta(),
        }

    def _extra(self, spread: Callable[[str, int, npt.DTypeLike], Array]) -> dict[str, Array]:
        if not self._runners_up:
            return {}
        return {
            RUNNERS_UP: spread(RUNNERS_UP, 0, np.uint8 if self._experts <= 256 else np.uint16),
            RUNNERS_UP_WEIGHTS: spread(RUNNERS_UP_WEIGHTS, 0, np.float16),
        }

    def _meta(self) -> dict[str, Any]:
        config = self._model.config
        meta = {
            "model": getattr(config, "_name_or_path", "") or config.model_type,
            "arch": config.model_type,
            "num_experts": self._experts,
            "source": f"recorded from transformers {metadata.version('transformers')}",
            "routers": self._names,
        }
        if self._guesses:
            meta["predictions"] = f"the routers of the next {self._guesses} layers on this layer's router input"
        return meta


def _stacks(model: Any) -> list[Module]:
    """Returns the modules whose forward pass is one step: the base model, or its encoder and decoder."""
    base = model.base_model
    if getattr(model.config, "is_encoder_decoder", False):
        return [getattr(base, name) for name in ("encoder", "decoder") if hasattr(base, name)]
    return [base]


def _end_tokens(model: Any) -> list[int]:
    config = getattr(model, "generation_config", None) or model.config
    end = getattr(config, "eos_token_id", None)
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def _mask(mask: Any, shape: tuple[int, ...]) -> Array:
    """Returns which tokens (batch, columns) are not padding; a mask also covers the columns before."""
    if mask is None:
        return np.ones(shape, dtype=np.bool_)
    if not hasattr(mask, "shape") or mask.ndim != 2:
        raise RecordError("attention_mask: padding can only be read from a mask (batch, tokens): give that one")
    return _array(mask[:, -shape[1] :]).astype(np.bool_)


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().cpu().numpy()
    return array


def _gather(tensors: Sequence[Tensor]) -> Array:
    """Returns tensors (tokens, ...) of several layers as one array (tokens, layers, ...), in one copy to the host."""
    import torch

    return _array(torch.stack([tensor.to(tensors[0].device) for tensor in tensors], dim=1))
