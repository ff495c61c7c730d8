"""Small random runs, drawn by number: the same number draws the same run."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.scenario.inputs import Inputs
from ..workloads.batches import DECODE, PREFILL
from ..workloads.trace import RoutingTrace
from .machine import tiny_inputs, tiny_model, tiny_profile, tiny_scenario

#: How far recorded predictions reach, and how many there are of each.
HORIZONS, GUESSES = 5, 3


def distinct(random: np.random.Generator, shape: tuple[int, ...], k: int, experts: int) -> npt.NDArray[np.uint8]:
    """Returns k distinct experts for each cell of `shape`, in random order (*shape, k)."""
    return np.argsort(random.random((*shape, experts)), axis=-1)[..., :k].astype(np.uint8)


def random_trace(seed: int, layers: int = 3, experts: int = 6, top_k: int = 2) -> RoutingTrace:
    """Returns three sequences of prompts and answers, with gaps, recorded predictions and confidences.

    With odd seeds some tokens choose fewer than `top_k` experts.
    """
    random = np.random.default_rng(seed)
    lengths, prompts = random.integers(2, 7, 3), random.integers(0, 4, 3)
    tokens = int(lengths.sum())
    predictions = distinct(random, (tokens, layers, HORIZONS), GUESSES, experts).astype(np.int16)
    predictions[random.random(predictions.shape) < 0.2] = -1
    position = np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)
    present = random.random((tokens, layers)) < 0.85
    if seed % 2:
        present = present[..., None] & (np.arange(top_k) < random.integers(1, top_k + 1, (tokens, layers, 1)))
    return RoutingTrace(
        experts=distinct(random, (tokens, layers), top_k, experts),
        num_experts=experts,
        sequence=np.repeat(np.arange(3), lengths).astype(np.int32),
        position=position,
        phase=np.where(position < np.repeat(prompts, lengths), PREFILL, DECODE).astype(np.uint8),
        present=present,
        predictions=predictions,
        confidences=random.random(predictions.shape).astype(np.float32),
    )


def random_inputs(seed: int, **sections: dict[str, Any]) -> Inputs:
    """Returns a small run on the machine of round numbers; `sections` are kept, the rest is drawn.

    It has room for some of the experts, which are of one size or of several, batches and prefetching.
    """
    random = np.random.default_rng(seed)
    layers, experts = int(random.integers(1, 4)), int(random.integers(4, 7))
    top_k = int(random.integers(1, 3))
    one_size = int(random.integers(1, 30))
    sizes = one_size if random.random() < 0.5 else random.integers(1, 30, layers).tolist()
    model = tiny_model(layers, experts, top_k, copy_ns=sizes, dense_ns=int(random.integers(0, 20)))
    budget_bytes = int(random.integers(max(model.expert_bytes), model.total_expert_bytes + 1))
    drawn: dict[str, dict[str, Any]] = {
        "workload": {"trace": "none", "batch": int(random.integers(1, 4)), "prefill": "chunked", "chunk_tokens": 2},
        "memory": {"gpu_budget": f"{budget_bytes}B"},
        "predictor": {"recall": 0.7},
        "prefetch": {"lookahead": int(random.integers(0, 4)), "k": int(random.integers(1, 4))},
        "copy": {"chunk_bytes": int(random.choice([0, 4]))},
        "dispatch": {"mode": "eager", "router_readback": bool(random.random() < 0.7)},
    }
    scenario = tiny_scenario(**{name: {**drawn.get(name, {}), **sections.get(name, {})} for name in drawn | sections})
    profile = tiny_profile(expert_ns=int(random.integers(1, 30)), launch_ns=int(random.integers(0, 6)))
    return tiny_inputs(model, profile, random_trace(seed, layers, experts, top_k), scenario)
