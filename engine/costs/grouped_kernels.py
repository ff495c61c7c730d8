"""Grouped kernels over several experts by a GPU's surface: a product over the rows of all of them, in one launch.

Such kernels (MegaBlocks, Gale et al. 2022, arXiv:2211.15841; vLLM) give each tile of rows the weights of its
expert, so that what they read streams as one large matrix does, however small an expert is. So they are priced as the
product of as many rows. It takes a constant, and for each expert its share of what all of a layer's take over as many
tokens as it has itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, cached_property

from ...workloads.model import Model
from .surface_costs import Kernels
from .values import KernelCost

#: What the result says of it.
GROUPED_BY_SURFACE = "each expert's share of one product over the rows of all experts of its layer"


class GroupedKernels:
    """What each of several experts takes in one kernel.

    `kernels_of` says what an expert of a layer launches, and `price` what kernels over so many tokens take.
    """

    def __init__(
        self, model: Model, kernels_of: Callable[[int], Kernels], price: Callable[[Kernels, int], KernelCost]
    ) -> None:
        self._model, self._price = model, price
        self._kernels_of = cache(lambda layer, experts: kernels_of(layer).of_experts(experts))

    @cached_property
    def constant_ns(self) -> int:
        """What a kernel takes however many experts it has: a line through a token's experts and all of a layer's."""
        routed = self._model.routed(0)
        few = min(routed.top_k, routed.experts - 1)
        if not few:
            return 0
        few_ns, all_ns = (self._of(0, count, 1).ns for count in (few, routed.experts))
        return max(0, round(few_ns - few * (all_ns - few_ns) / (routed.experts - few)))

    def expert(self, layer: int, tokens: int) -> KernelCost:
        """Returns what one expert over so many tokens takes, the constant with it."""
        experts = self._model.routed(layer).experts
        cost = self._of(layer, experts, tokens)
        return replace(cost, ns=self.constant_ns + max(0, round((cost.ns - self.constant_ns) / experts)))

    def _of(self, layer: int, experts: int, tokens: int) -> KernelCost:
        """Returns a kernel over so many experts of a layer, of so many tokens each."""
        return self._price(self._kernels_of(layer, experts), tokens)
