"""Hit by hit against libCacheSim (Yang et al., https://libcachesim.com), for the policies that both have.

Every (token, expert) pair is looked up by itself and all experts are of one size, which is what that library knows. It
is under the GPL and only ever used here: these tests skip where it is not installed (`pip install libcachesim`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from prestage.engine.decide.memory_manager import MemoryManager
from prestage.engine.policies.eviction import EVICTION, Setting
from prestage.engine.replay.replay import FOUND, NOT_LOOKED_UP, replay
from prestage.workloads.batches import Step, plan_steps
from prestage.workloads.importers import open_trace
from prestage.workloads.trace import RoutingTrace

libcachesim = pytest.importorskip("libcachesim", reason="libcachesim is not installed: pip install libcachesim")

#: Our name, its class there, how many bytes an object has there, and the least capacity in objects that it takes.
#: 2Q's and S3-FIFO's queues are shares of the capacity, ARC's target moves by ratios: of bytes there, of experts here.
#: With objects of one byte both round as we do. But there 2Q refuses what its first queue, a quarter of the capacity,
#: cannot hold, and S3-FIFO what fills its small queue, a tenth: with one byte to an object that is all of them below 20
#: objects, with a hundred up to 10.
SAME: dict[str, tuple[str, int, int]] = {
    "fifo": ("FIFO", 1, 1),
    "lru": ("LRU", 1, 1),
    "lfu-incache": ("LFU", 1, 1),
    "clock": ("Clock", 1, 1),
    "sieve": ("Sieve", 1, 1),
    "s3fifo": ("S3FIFO", 100, 11),
    "arc": ("ARC", 1, 1),
    "2q": ("TwoQ", 1, 4),
    "belady": ("Belady", 1, 1),
}
#: What belongs to no entry of SAME: libCacheSim has no such policy (its LFU forgets), or draws by other luck (random).
OURS_ALONE = {
    *("lfu", "lrfu", "lfru", "random", "static", "preloaded", "spent"),
    *("least-stale", "activation-aware", "gate-weight", "heat", "payback", "predictive"),
}
NEVER = np.iinfo(np.int64).max
REAL = ["gpt-oss-20b.npz", "olmoe-1b-7b.npz", "qwen3-30b-a3b_k6.npz", "switch-base-8_encoder.npz"]


def stream(trace: RoutingTrace, steps: list[Step]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns the experts as looked up, and the flat (token, layer, rank) cell of each; one token a step."""
    rows = np.concatenate([step.rows for step in steps])
    cells = np.arange(trace.experts.size).reshape(trace.experts.shape)[rows].reshape(-1)
    experts = trace.experts.astype(np.int64) + np.arange(trace.layers)[:, None] * trace.num_experts
    return experts[rows].reshape(-1), cells


def theirs(name: str, experts: npt.NDArray[np.int64], capacity: int) -> npt.NDArray[np.bool_]:
    """Returns which accesses hit there, asked one by one."""
    kind, object_bytes, _ = SAME[name]
    cache = getattr(libcachesim, kind)(capacity * object_bytes, hashpower=12)
    following: dict[int, int] = {}
    next_use = np.empty(len(experts), dtype=np.int64)
    for at in range(len(experts) - 1, -1, -1):
        next_use[at] = following.get(int(experts[at]), NEVER)
        following[int(experts[at])] = at
    hits = np.empty(len(experts), dtype=bool)
    request = libcachesim.Request()
    request.obj_size = object_bytes
    for at, (expert, later) in enumerate(zip(experts.tolist(), next_use.tolist(), strict=True)):
        request.obj_id, request.clock_time, request.next_access_vtime = expert + 1, at, later
        hits[at] = cache.get(request)
    return hits


def ours(name: str, trace: RoutingTrace, steps: list[Step], capacity: int) -> npt.NDArray[Any]:
    """Returns the outcome of every cell here."""
    setting = Setting(trace=trace, steps=steps, single=True)
    manager = MemoryManager([1] * trace.layers, trace.num_experts, capacity, EVICTION[name], setting=setting)
    return replay(trace, steps, manager, lookup="single").outcome.reshape(-1)


def assert_same_hits(name: str, trace: RoutingTrace, steps: list[Step], capacity: int) -> None:
    experts, cells = stream(trace, steps)
    expected = theirs(name, experts, capacity)
    found = ours(name, trace, steps, capacity)
    differs = np.flatnonzero((found[cells] == FOUND) != expected)
    assert not len(differs), f"{name}, capacity {capacity}: access {differs[0]} of {len(cells)}"
    assert (np.delete(found, cells) == NOT_LOOKED_UP).all()


def test_every_policy_is_either_compared_or_said_to_be_ours_alone() -> None:
    assert sorted(EVICTION) == sorted([*SAME, *OURS_ALONE])


@pytest.mark.parametrize("name", SAME)
def test_hits_are_theirs_access_by_access_on_some_random_traces(name: str) -> None:
    assert compared(name, 6, seed=4) >= 12


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_hits_are_theirs_access_by_access_on_100_random_traces(name: str) -> None:
    assert compared(name, 100, seed=3) >= 200


def compared(name: str, count: int, seed: int) -> int:
    """Compare hits on so many random traces under up to three capacities; return of how many runs."""
    random = np.random.default_rng(seed)
    hits_matter = 0
    for _ in range(count):
        layers, experts = int(random.integers(1, 5)), int(random.integers(4, 25))
        k, tokens = int(random.integers(1, 4)), int(random.integers(20, 60))
        # Some experts are popular, so that what is worth keeping differs.
        scores = random.random((tokens, layers, experts)) ** (1.0 + np.arange(experts) * random.random())
        chosen = np.argsort(-scores, axis=2)[..., :k].astype(np.uint8)
        trace = RoutingTrace(chosen, experts)
        steps = plan_steps(trace.sequence, trace.phase)
        least, total = SAME[name][2], layers * experts
        for share in (0.1, 0.3, 0.6):
            capacity = max(least, int(share * total))
            if capacity < total:
                assert_same_hits(name, trace, steps, capacity)
                hits_matter += 1
    return hits_matter


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("file", REAL)
def test_hits_are_theirs_access_by_access_on_real_traces(traces: Path, file: str, name: str) -> None:
    trace = open_trace(traces / file)
    steps = plan_steps(trace.sequence, trace.phase, prefill="chunked", chunk_tokens=1, tokens=150)
    total = trace.layers * trace.num_experts
    for share in (0.15, 0.5):
        assert_same_hits(name, trace, steps, max(SAME[name][2], int(share * total)))
