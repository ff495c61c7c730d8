"""Sequences that join and leave, packed into one row: a KV cache by positions, and the attention mask over it.

All rows of a step are one sequence to the model; a mask lets each see the positions of its own request alone, up to its
own. What a position takes in the cache is a place of its own, given back when its request leaves.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import numpy.typing as npt

from ...units import bytes_words
from .models import DecodeError, Loaded

Array = npt.NDArray[np.int64]
#: What is seen of the cache is so many places, or a multiple: kernels for few shapes.
_PLACES = 64


class PackedCache:
    """A KV cache of so many places, each of any request's position, in every layer; what models call their cache."""

    #: What transformers asks of a cache.
    is_compileable, is_sliding = False, (False,)

    def __init__(self, gpu: Any, loaded: Loaded, places: int) -> None:
        config = loaded.model.config
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dtype = str(loaded.layout.dtype).split(".")[-1]
        size_bytes = 2 * config.num_hidden_layers * heads * places * width * loaded.layout.dtype.itemsize
        if size_bytes > gpu.free_bytes():
            raise DecodeError(
                f"requests: {places:,} positions in the KV cache take {bytes_words(size_bytes)}, and "
                f"{bytes_words(gpu.free_bytes())} of the GPU are free: cut the lengths, max_num_seqs or "
                "memory.gpu_budget"
            )
        self._layers = [
            tuple(gpu.empty(1, heads, places, width, dtype=dtype).zero_() for _ in range(2))
            for _ in range(config.num_hidden_layers)
        ]
        self._request = np.full(places, -1, dtype=np.int64)
        self._position = np.zeros(places, dtype=np.int64)
        self._free = list(range(places))
        self._places_of: dict[int, list[int]] = {}
        self._at: Any = None
        self._places = places
        self.used = 0

    def keep(self, requests: set[int]) -> None:
        """Give back the places of all other requests."""
        for gone in [request for request in self._places_of if request not in requests]:
            for place in self._places_of.pop(gone):
                self._request[place] = -1
                heapq.heappush(self._free, place)

    def lay_out(self, request: Array, position: Array) -> Array:
        """Give each row of a step a place; return which places each row sees, bool (rows, `used` places).

        `request` and `position` are (rows,). A request's positions come in order, each once.
        """
        import torch

        places = [heapq.heappop(self._free) for _ in request]
        for place, owner in zip(places, request.tolist(), strict=True):
            self._places_of.setdefault(owner, []).append(place)
        self._request[places], self._position[places] = request, position
        last = max(max(own) for own in self._places_of.values())
        self.used = min((last // _PLACES + 1) * _PLACES, self._places)
        self._at = torch.tensor(places).to(self._layers[0][0].device)
        seen: Array = self._request[None, : self.used] == request[:, None]
        seen &= self._position[None, : self.used] <= position[:, None]
        return seen

    def within(self, seen: Array, position: Array, window: int) -> Array:
        """Returns which of the places that rows see are among the last so many positions."""
        return seen & (self._position[None, : self.used] > position[:, None] - window)

    def update(self, keys: Any, values: Any, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Put what a step's rows have in a layer into their places; return all that may be seen."""
        for kept, new in zip(self._layers[layer], (keys, values), strict=True):
            kept.index_copy_(2, self._at, new)
        kept_keys, kept_values = self._layers[layer]
        return kept_keys[:, :, : self.used], kept_values[:, :, : self.used]

    def get_seq_length(self, layer: int = 0) -> int:
        """Returns how many places there may be something in."""
        return self.used


def masks(loaded: Loaded, cache: PackedCache, seen: Array, position: Array) -> Any:
    """Returns what a model is to be given as mask: one, or one for each kind of layer if some have a window."""
    import torch

    device, dtype = loaded.model.device, loaded.layout.dtype
    least = torch.finfo(dtype).min

    def mask(sees: Array) -> Any:
        hidden = torch.from_numpy(~sees).to(device)
        return torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(hidden, least)[None, None]

    config = loaded.model.config
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return mask(seen)
    window = cache.within(seen, position, config.sliding_window)
    return {"full_attention": mask(seen), "sliding_attention": mask(window)}
