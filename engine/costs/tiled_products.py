"""What a runtime's own products of quantized weights take at least: the operations of their tiles.

Such kernels multiply blocks of weights as integers, with as many operations a cycle of a multiprocessor on one
generation of GPUs as on the next, however many more its 16-bit products have: so their rate goes with that of float32.
A tile has a width of tokens, chosen by those of the whole step; what an expert has fewer of is computed in vain.
"""

from __future__ import annotations

from ...dtypes import bits_of
from ...resources.parts.tables import gpu_of_device
from ...resources.runtime import OwnProducts
from ...workloads.batches import DECODE, PREFILL, Step

#: So many tokens of a step are products with vectors yet: no tile (ggml's MMVQ_MAX_BATCH_SIZE).
VECTORS = 8


class TiledProducts:
    """The least time of a runtime's products on a GPU of which a profile's `device` tells; `steps` are the run's."""

    def __init__(self, own: OwnProducts | None, device: str, steps: list[Step]) -> None:
        gpu = None if own is None else gpu_of_device(device)
        flops = None if gpu is None else gpu.flops_per_second.get("float32")
        self._flops_per_ns = None if own is None or flops is None else own.of_float32 * flops / 1e9
        self._tile, self._steps = 0 if own is None else own.tile, steps
        self._widths: dict[int, int] = {}

    def least_ns(self, dtype: str, size_bytes: int, tokens: int, phase: int = DECODE) -> float:
        """Returns the least time of products with weights of `size_bytes` over so many tokens of a step of a phase."""
        if self._flops_per_ns is None or bits_of(dtype) >= 16:
            return 0.0
        width = self._width(phase)
        if max(width, tokens) <= VECTORS:
            return 0.0
        weights = size_bytes * 8 / float(bits_of(dtype))
        return 2 * weights * -(-tokens // width) * width / self._flops_per_ns

    def _width(self, phase: int) -> int:
        """Returns the width of the tiles of a step of a phase: of the most tokens that one has, whole vectors."""
        if phase not in self._widths:
            most = max((len(step.rows) for step in self._steps if step.phase == phase), default=0)
            if not most:  # a scheduler makes the steps, none of which is known yet
                most = self._tile if phase == PREFILL else VECTORS
            self._widths[phase] = min(self._tile, -(-most // VECTORS) * VECTORS)
        return self._widths[phase]
