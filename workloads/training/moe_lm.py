"""A small Mixture-of-Experts language model: pre-norm transformer blocks, each with attention and routed experts.

All experts of a layer run as one batched product: tokens are sorted by expert into slots, and in training what finds
no slot is dropped, as in Switch Transformer; when the model is evaluated there is room for all. Tokens are moved by
reads alone, backward too, so that no sum depends on the order in which threads arrive.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Slots of an expert come in multiples of this, the tile of a tensor core's product.
_SLOTS_TOGETHER = 16


@dataclass(frozen=True)
class MoeConfig:
    """What a model is made of.

    `balance` names how the load of the experts is kept even:

    - "aux_loss": softmax scores, whose value is the weight of the chosen; a loss of `balance_rate` x experts x
      sum(share of tokens x mean score). Fedus et al., "Switch Transformers", 2021, equations 4 to 6.
    - "bias": sigmoid scores, the chosen ones normalized to weights; a bias, added for choosing alone, goes up by
      `balance_rate` each step where an expert had less than its share, and down where it had more. Wang et al.,
      "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", 2024, as in DeepSeek-V3.
    """

    vocabulary: int
    layers: int
    experts: int
    top_k: int
    balance: Literal["aux_loss", "bias"]
    balance_rate: float
    width: int = 256
    heads: int = 4
    expert_width: int = 512
    context: int = 512
    #: Slots of an expert while training, over its even share of the batch.
    capacity_factor: float = 2.0


class Routing(NamedTuple):
    """What a router said of a batch of tokens."""

    scores: Tensor
    """What the choice was made by, (tokens, experts) float32."""
    experts: Tensor
    """The chosen, best first, (tokens, top_k) int64."""
    weights: Tensor
    """Of the chosen ones' outputs, (tokens, top_k) float32."""
    load: Tensor
    """How many tokens chose each expert, (experts,) int64."""
    balance_loss: Tensor
    """To add to the loss; 0 where there is none."""


#: Is told, at each layer, its number, the hidden state that its router saw (tokens, width), and what it said.
Watch = Callable[[int, Tensor, Routing], None]


class _Plan(NamedTuple):
    """Where tokens go. A pair is (token, rank of the choice), numbered token * top_k + rank."""

    slot: Tensor
    """The slot of each pair, (tokens, top_k); any, where dropped."""
    kept: Tensor
    """Which pairs have a slot, (tokens, top_k)."""
    pair: Tensor
    """The pair in each slot, (experts * capacity,); tokens * top_k where none."""


def _plan(chosen: Tensor, load: Tensor, capacity: int) -> _Plan:
    """Give each expert's tokens its slots, first come, first served. `load` is the tokens of each expert."""
    pairs, slots = chosen.numel(), len(load) * capacity
    order = chosen.reshape(-1).argsort(stable=True)
    expert = chosen.reshape(-1)[order]
    place = torch.arange(pairs, device=chosen.device) - (load.cumsum(0) - load)[expert]
    target = torch.where(place < capacity, expert * capacity + place, slots)
    # One slot too many takes what is dropped.
    pair = torch.full((slots + 1,), pairs, dtype=torch.int64, device=chosen.device)
    pair[target] = order
    slot = torch.empty_like(order)
    slot[order] = target
    slot = slot.view_as(chosen)
    return _Plan(slot.clamp(max=slots - 1), slot < slots, pair[:-1])


def _as_multiplied(x: Tensor) -> Tensor:
    """Returns x in the precision of matrix products, so that no more bytes than they need are moved."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class _Dispatch(torch.autograd.Function):
    """Copy tokens (tokens, width) into the slots (slots, width); a slot without one holds any other token."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, slot: Tensor, kept: Tensor, pair: Tensor) -> Tensor:
        ctx.save_for_backward(slot, kept)
        return tokens[(pair // slot.shape[1]).clamp(max=len(tokens) - 1)]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        slot, kept = ctx.saved_tensors
        (grad,) = grads
        return (grad[slot] * kept.unsqueeze(-1)).sum(1), None, None, None


class _Combine(torch.autograd.Function):
    """Sum the outputs in the slots (slots, width) into tokens (tokens, width), times `weights` (tokens, top_k)."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, weights: Tensor, slot: Tensor, kept: Tensor, pair: Tensor) -> Tensor:
        weights = (weights * kept).to(outputs.dtype)
        ctx.save_for_backward(outputs, weights, slot, kept, pair)
        return (outputs[slot] * weights.unsqueeze(-1)).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        outputs, weights, slot, kept, pair = ctx.saved_tensors
        (grad,) = grads
        of_slot = F.pad(weights.reshape(-1), (0, 1))[pair]
        token = (pair // slot.shape[1]).clamp(max=len(grad) - 1)
        grad_weights = (outputs[slot] * grad.unsqueeze(1)).sum(-1) * kept
        return grad[token] * of_slot.unsqueeze(-1), grad_weights, None, None, None


class _Attention(nn.Module):
    """Causal multi-head attention with rotary positions (Su et al., "RoFormer", 2021)."""

    turn: Tensor

    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.inner = nn.Linear(config.width, 3 * config.width, bias=False)
        self.outer = nn.Linear(config.width, config.width, bias=False)
        half = config.width // config.heads // 2
        angle = torch.outer(torch.arange(config.context), 10_000.0 ** -(torch.arange(half) / half))
        self.register_buffer("turn", torch.stack([angle.cos(), angle.sin()]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.inner(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        cos, sin = self.turn[:, :length].to(q.dtype)

        def turned(y: Tensor) -> Tensor:
            a, b = y.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

        mixed = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
        out: Tensor = self.outer(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


class Experts(nn.Module):
    """A router and its experts, each of three matrices (Shazeer, "GLU Variants Improve Transformer", 2020)."""

    bias: Tensor
    load: Tensor
    dropped: Tensor

    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.RMSNorm(config.width)
        self.gate = nn.Linear(config.width, config.experts, bias=False)
        self.inner = nn.Parameter(torch.empty(config.experts, config.width, 2 * config.expert_width))
        self.outer = nn.Parameter(torch.empty(config.experts, config.expert_width, config.width))
        self.register_buffer("bias", torch.zeros(config.experts))
        self.register_buffer("load", torch.zeros(config.experts, dtype=torch.int64), persistent=False)
        self.register_buffer("dropped", torch.zeros(()), persistent=False)

    def route(self, state: Tensor) -> Routing:
        """Say which experts a hidden state (tokens, width) goes to; it may be another layer's."""
        config = self.config
        with torch.autocast(state.device.type, enabled=False):
            logits = F.linear(self.norm(state), self.gate.weight)
            if config.balance == "bias":
                affinity = logits.sigmoid()
                scores = affinity + self.bias
                experts = scores.topk(config.top_k).indices
                weights = affinity.gather(1, experts)
                weights = weights / weights.sum(1, keepdim=True)
                return Routing(scores, experts, weights, self._load(experts), logits.new_zeros(()))
            scores = logits.softmax(dim=-1)
            weights, experts = scores.topk(config.top_k)
            load = self._load(experts)
            share = load / experts.numel()
            balance_loss = config.balance_rate * config.experts * (share * scores.mean(0)).sum()
            return Routing(scores, experts, weights, load, balance_loss)

    def _load(self, chosen: Tensor) -> Tensor:
        # Whole numbers: their sum is the same in whatever order it is taken. (bincount would wait for the device.)
        flat = chosen.reshape(-1)
        return flat.new_zeros(self.config.experts).scatter_add_(0, flat, torch.ones_like(flat))

    def forward(self, state: Tensor, routing: Routing) -> Tensor:
        """Returns what the chosen experts add to the state (tokens, width)."""
        capacity = self._capacity(len(state)) if self.training else int(routing.load.max())
        plan = _plan(routing.experts, routing.load, capacity)
        if self.training:
            self.load.copy_(routing.load)
            self.dropped.copy_(1 - plan.kept.float().mean())
        inputs: Tensor = _Dispatch.apply(  # type: ignore[no-untyped-call]
            _as_multiplied(self.norm(state)), plan.slot, plan.kept, plan.pair
        )
        gate, up = torch.bmm(inputs.view(self.config.experts, capacity, -1), self.inner).chunk(2, dim=-1)
        outputs = torch.bmm(F.silu(gate) * up, self.outer).flatten(0, 1)
        combined: Tensor = _Combine.apply(  # type: ignore[no-untyped-call]
            outputs, routing.weights, plan.slot, plan.kept, plan.pair
        )
        return combined

    def _capacity(self, tokens: int) -> int:
        even_share = tokens * self.config.top_k / self.config.experts
        return math.ceil(self.config.capacity_factor * even_share / _SLOTS_TOGETHER) * _SLOTS_TOGETHER

    def rebalance(self) -> None:
        """Move the bias against the load of the last training step; nothing, where a loss does the balancing."""
        if self.config.balance == "bias":
            load = self.load.float()
            self.bias += self.config.balance_rate * torch.sign(load.mean() - load)


class Block(nn.Module):
    """Attention, then experts, each after a norm of its own."""

    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.width)
        self.attention = _Attention(config)
        self.experts = Experts(config)


class MoeLm(nn.Module):
    """The language model; its weights are drawn from torch's current generator.

    Input and output embeddings are one (Press, Wolf, 2017). Matrices that write to the residual stream begin smaller by
    sqrt(2 x layers), as in GPT-2.
    """

    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                writes = name.endswith(("outer.weight", "outer"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers) if writes else 0.02)

    def forward(self, tokens: Tensor, watch: Watch | None = None) -> tuple[Tensor, Tensor]:
        """Returns the logits of the next tokens (batch, length, vocabulary) and the balance loss."""
        x = self.embedding(tokens)
        balance_loss = x.new_zeros(())
        for layer, block in enumerate(self._blocks):
            x = x + block.attention(block.norm(x))
            state = x.flatten(0, 1)
            routing = block.experts.route(state)
            if watch is not None:
                watch(layer, state, routing)
            balance_loss = balance_loss + routing.balance_loss
            x = x + block.experts(state, routing).view_as(x)
        return F.linear(self.norm(x), self.embedding.weight), balance_loss

    @property
    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    @property
    def experts(self) -> list[Experts]:
        """The routers with their experts, by layer."""
        return [block.experts for block in self._blocks]

    def rebalance(self) -> None:
        """Move every router's bias against its load; call it after each training step."""
        for each in self.experts:
            each.rebalance()

    def dropped(self) -> Tensor:
        """Returns which part of all choices found no slot in the last training step, a number on the device."""
        return torch.stack([each.dropped for each in self.experts]).mean()
