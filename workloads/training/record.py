"""Recording a model of our own: what its routers choose over held-out text, and what the next layers' gates would.

A guess for the layer h ahead is what that layer's own router makes of this layer's hidden state (after attention,
before the experts), before any layer between has added to it: Eliseev, Mazur, "Fast Inference of
Mixture-of-Experts Language Models with Offloading", 2023. Past the last layer it is the first layers' routers, for
the sequence's next token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from ..trace import RoutingTrace
from .corpus import Corpus
from .moe_lm import MoeLm, Routing

#: How far ahead gates guess, and how many experts each guess lists.
HORIZONS = 3
GUESSES = 16
#: Sequences that pass through the model together.
_BATCH = 16


class Recording(NamedTuple):
    """What one pass over held-out text says."""

    trace: RoutingTrace
    """Every layer of every token, `predictions` among it; `extra["domain"]` is uint8 by sequence."""
    loss_nats: npt.NDArray[np.float64]
    """The mean loss of a token, by domain."""
    bits_per_byte: npt.NDArray[np.float64]
    """The same, over the bytes of text, by domain."""


class _Watch:
    """Collects what the routers say of one batch, and asks the next ones."""

    def __init__(self, model: MoeLm) -> None:
        self._experts = model.experts
        self.experts: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.guesses: list[Tensor] = []

    def __call__(self, layer: int, state: Tensor, routing: Routing) -> None:
        self.experts.append(routing.experts)
        self.weights.append(routing.weights)
        ahead = [self._experts[(layer + h) % len(self._experts)] for h in range(1, HORIZONS + 1)]
        n = min(GUESSES, routing.scores.shape[1])
        self.guesses.append(torch.stack([each.route(state).scores.topk(n).indices for each in ahead], dim=1))


def held_out_windows(corpus: Corpus, length: int, per_domain: int) -> npt.NDArray[np.int64]:
    """Returns windows (sequences, length + 1) of held-out text, the domains taking turns: sequence i is of i % domains.

    A window takes up where the last one of its domain ended. Raises ValueError if a domain has too little text.
    """
    domains = len(corpus.domains)
    windows = np.empty((per_domain, domains, length + 1), dtype=np.int64)
    for domain, name in enumerate(corpus.domains):
        text = corpus.stream(domain, held_out=True)
        if len(text) <= per_domain * length:
            raise InputError(
                f"held-out text of {name}: {len(text)} tokens: {per_domain} sequences of {length} need one more than "
                f"{per_domain * length}"
            )
        starts = np.arange(per_domain)[:, None] * length
        windows[:, domain] = text[starts + np.arange(length + 1)]
    return windows.reshape(per_domain * domains, length + 1)


@torch.no_grad()
def record(model: MoeLm, corpus: Corpus, per_domain: int, meta: dict[str, Any]) -> Recording:
    """Run so many held-out sequences of each domain through the model and record every layer.

    Each token sees the true text before it, which is what a decoder would have in its cache: the phase is decode.
    """
    model.eval()
    length = model.config.context
    windows = held_out_windows(corpus, length, per_domain)
    parts: list[tuple[npt.NDArray[Any], ...]] = []
    losses: list[npt.NDArray[np.float32]] = []
    for batch in _batches(windows, next(model.parameters()).device):
        watch = _Watch(model)
        with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=batch.device.type == "cuda"):
            logits, _ = model(batch[:, :-1], watch)
        losses.append(
            F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none").cpu().numpy()
        )
        parts.append((
            torch.stack(watch.experts, 1).to(torch.int16).cpu().numpy(),
            torch.stack(watch.weights, 1).to(torch.float16).cpu().numpy(),
            torch.stack(watch.guesses, 1).to(torch.int16).cpu().numpy(),
        ))  # fmt: skip
    experts, weights, guesses = (np.concatenate(each) for each in zip(*parts, strict=True))
    sequences, domains = len(windows), len(corpus.domains)
    trace = RoutingTrace(
        experts=experts,
        num_experts=model.config.experts,
        weights=weights,
        sequence=np.repeat(np.arange(sequences), length),
        position=np.tile(np.arange(length), sequences),
        predictions=guesses,
        meta={**meta, "domains": corpus.domains},
        extra={"domain": (np.arange(sequences) % domains).astype(np.uint8)},
    )
    trace.check()
    loss = np.concatenate(losses).astype(np.float64).reshape(per_domain, domains, length)
    text_bytes = corpus.token_bytes[windows[:, 1:]].reshape(loss.shape)
    nats = loss.sum(axis=(0, 2))
    return Recording(trace, loss.mean(axis=(0, 2)), nats / np.log(2) / text_bytes.sum(axis=(0, 2)))


def _batches(windows: npt.NDArray[np.int64], device: torch.device) -> Iterator[Tensor]:
    for first in range(0, len(windows), _BATCH):
        yield torch.from_numpy(windows[first : first + _BATCH]).to(device)
