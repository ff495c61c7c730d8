"""The trained predictor's network: attention from a layer visit to the visits before it, as one function of weights.

The visits of a sequence, token by token and layer by layer, form one line. A visit is described by the experts that
were chosen there and by its layer. The state of the visit at hand looks back over the last `context` x layers visits:
for each of the coming layers these hold that layer's last `context` choices. Looking back is attention with a learned
bias for every distance, so that "the same layer, one token ago" is a thing that a head can point at; what it looks at
are the described visits, never other states, so that nothing reaches farther back than the context. From the state a
head for each horizon makes a vector, whose products with the target layer's expert vectors are the logits.

Weights are a plain dictionary of arrays; torch is imported where it computes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..bounded import check_memory
from ..errors import InputError
from .trace_limits import MAX_TOP_K, check_total_experts

if TYPE_CHECKING:
    from torch import Tensor

#: Far beyond what anybody trains; what is larger is a mistake, and would be made of arrays without end.
_MOST = {"top_k": MAX_TOP_K, "horizons": 1024, "context": 1024, "width": 1 << 14, "blocks": 256}
_MOST_CHOICES = 1 << 22
#: Attention to what is out of reach.
_NEVER = -1e9


@dataclass(frozen=True)
class Shape:
    """What the network is made for (layers, experts, top_k), how far it looks (horizons, context), and its size."""

    layers: int
    experts: int
    top_k: int
    horizons: int = 3
    context: int = 3
    width: int = 64
    heads: int = 4
    blocks: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} = {value!r}: must be an integer, at least 1")
            if name in _MOST and value > _MOST[name]:
                raise InputError(f"{name} = {value:,}: must be at most {_MOST[name]:,}")
        check_total_experts("network", self.layers, self.experts, InputError)
        if self.top_k > self.experts or self.span * self.top_k > _MOST_CHOICES:
            raise InputError(
                f"context = {self.context} of {self.layers} layers, top-{self.top_k} of {self.experts} experts: must "
                f"be at most {_MOST_CHOICES:,} choices in reach, and of a layer no more than it has experts"
            )
        if self.width % self.heads:
            raise InputError(f"width = {self.width}: must be a multiple of heads = {self.heads}")

    @property
    def span(self) -> int:
        """How many layer visits are in reach, the one at hand among them."""
        return self.context * self.layers

    def arrays(self) -> dict[str, tuple[int, ...]]:
        """Returns the name and the shape of every array of the weights."""
        layers, experts, width = self.layers, self.experts, self.width
        shapes: dict[str, tuple[int, ...]] = {
            # What a choice and a layer look like; the first expert of each layer stands for "none".
            "chosen": (layers, experts + 1, width),
            "layer": (layers, width),
        }
        for block in range(self.blocks):
            shapes |= {
                f"block{block}.look.norm": (2, width),
                f"block{block}.look.query": (width, width),
                f"block{block}.look.key_value": (width, 2 * width),
                f"block{block}.look.distance": (self.heads, self.span),
                f"block{block}.look.out": (width, width),
                f"block{block}.think.norm": (2, width),
                f"block{block}.think.up": (width, 4 * width),
                f"block{block}.think.up_bias": (4 * width,),
                f"block{block}.think.down": (4 * width, width),
            }
        return shapes | {
            "norm": (2, width),
            "horizon": (width, self.horizons * width),
            "horizon_bias": (self.horizons * width,),
            "expert": (layers, experts, width),
            "expert_bias": (layers, experts),
        }


def initial_weights(shape: Shape, seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """Returns untrained weights: matrices keep the variance of what goes through them, biases are 0, norms are 1."""
    random = np.random.default_rng(seed)
    weights = {}
    sizes = shape.arrays()
    # The gradients and the optimizer's two moments of each, and the best of the epochs so far.
    check_memory("a network of this shape", 5 * 4 * sum(math.prod(size) for size in sizes.values()))
    for name, size in sizes.items():
        array = np.zeros(size, dtype=np.float32)
        if name.endswith("norm"):
            array[0] = 1
        elif not name.endswith(("bias", "distance")):
            spread = {"chosen": 0.3, "layer": 0.1, "expert": 0.05}.get(name, size[0] ** -0.5)
            array[:] = random.standard_normal(size) * spread
        weights[name] = array
    return weights


def logits(
    weights: dict[str, Tensor],
    shape: Shape,
    chosen: Tensor,
    context: Tensor,
    layers: slice = slice(None),
    horizons: int | None = None,
) -> Tensor:
    """Returns the logits (tokens, layers, horizons, experts) of the experts that each layer ahead will use.

    chosen   int64 (rows, layers, k), the experts of some tokens, -1 for none.
    context  int64 (tokens, context + 1), rows of `chosen`: each token itself and those before it, latest first; -1
             for none.
    layers   the layers whose visits guess.
    horizons how many layers ahead they guess, at most and without it as many as the network was made for.
    """
    import torch
    import torch.nn.functional as F

    visits = _described(weights, shape, chosen)
    state = visits[context[:, 0], layers]
    distance, reach = _reach(shape, context, layers, visits.dtype)
    for block in range(shape.blocks):
        part = {name.partition(".")[2]: value for name, value in weights.items() if name.startswith(f"block{block}.")}
        state = state + _look_back(part, shape, state, visits, context, distance, reach)
        thought = F.gelu(_norm(state, part["think.norm"]) @ part["think.up"] + part["think.up_bias"])
        state = state + thought @ part["think.down"]
    horizons = shape.horizons if horizons is None else horizons
    made = slice(horizons * shape.width)
    ahead = _norm(state, weights["norm"]) @ weights["horizon"][:, made] + weights["horizon_bias"][made]
    ahead = ahead.view(*ahead.shape[:2], horizons, shape.width)
    here = torch.arange(shape.layers, device=chosen.device)[layers]
    target = (here[:, None] + torch.arange(1, horizons + 1, device=chosen.device)) % shape.layers
    return torch.stack(
        [
            torch.einsum("tlw,lew->tle", ahead[:, :, h], weights["expert"][target[:, h]])
            + weights["expert_bias"][target[:, h]]
            for h in range(horizons)
        ],
        dim=2,
    )


def _described(weights: dict[str, Tensor], shape: Shape, chosen: Tensor) -> Tensor:
    """Returns the vectors (rows, layers, width) of visits."""
    import torch
    import torch.nn.functional as F

    first = torch.arange(shape.layers, device=chosen.device)[:, None] * (shape.experts + 1)
    vectors = F.embedding(chosen + 1 + first, weights["chosen"].flatten(0, 1))
    return vectors.sum(dim=2) + weights["layer"]


def _reach(shape: Shape, context: Tensor, layers: slice, dtype: Any) -> tuple[Tensor, Tensor]:
    """Returns how many visits ago each visit of the context is, from each layer, and what bars those out of reach.

    Shapes (layers, (context + 1) x all layers) and (tokens, 1, layers, the same).
    """
    import torch

    every = torch.arange(shape.layers, device=context.device)
    tokens_ago = torch.arange(shape.context + 1, device=context.device)
    ago = (every[layers, None, None] + tokens_ago[:, None] * shape.layers - every).flatten(1)
    visible = ((ago >= 0) & (ago < shape.span)) & (context >= 0).repeat_interleave(shape.layers, dim=1)[:, None]
    barred = torch.zeros(visible.shape, dtype=dtype, device=context.device).masked_fill(~visible, _NEVER)
    return ago.clamp(0, shape.span - 1), barred[:, None]


def _look_back(
    part: dict[str, Tensor],
    shape: Shape,
    state: Tensor,
    visits: Tensor,
    context: Tensor,
    distance: Tensor,
    reach: Tensor,
) -> Tensor:
    """Returns what the states (tokens, layers, width) find among the visits of their contexts."""
    import torch.nn.functional as F

    def by_head(vectors: Tensor) -> Tensor:
        return vectors.view(*vectors.shape[:2], shape.heads, -1).transpose(1, 2)

    key, value = (visits @ part["look.key_value"])[context].flatten(1, 2).chunk(2, dim=-1)
    query = _norm(state, part["look.norm"]) @ part["look.query"]
    bias = part["look.distance"][:, distance] + reach
    found = F.scaled_dot_product_attention(by_head(query), by_head(key), by_head(value), attn_mask=bias)
    return found.transpose(1, 2).flatten(2) @ part["look.out"]


def _norm(vectors: Tensor, scale_and_shift: Tensor) -> Tensor:
    import torch.nn.functional as F

    return F.layer_norm(vectors, vectors.shape[-1:], scale_and_shift[0], scale_and_shift[1])
