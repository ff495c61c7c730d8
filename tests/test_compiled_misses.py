"""What a cache misses by itself, decided in compiled code, against the memory manager."""

from __future__ import annotations

import numpy as np
import pytest

from prestage.engine.decide.compiled_misses import missed
from prestage.engine.decide.sources import decided_in_python
from prestage.engine.load import load_inputs
from prestage.engine.loading.deciders import dispatched, make_manager, source_of
from prestage.engine.measure.accesses import miss_keys
from prestage.engine.policies.prefetch import NoPrefetch
from prestage.engine.scenario.scenario import load_scenario

SMALL = ("workload.tokens=60",)
#: Settings that change who is absent.
CASES = {
    "as it is": (),
    "a layer each": ("memory.scope=per-layer",),
    "shared": ("memory.scope=shared",),
    "waves": ("memory.gpu_budget=5experts",),
    "no caching": ("memory.caching=false",),
    "preloaded": ("memory.preload=popular",),
    "a budget that shrinks": ("memory.total_bytes=10GiB",),
    "misses on the CPU": ("miss.policy=cpu", "miss.cpu_gb_per_s=50"),
    "few tokens on the CPU": ("miss.policy=cpu", "miss.cpu_gb_per_s=50", "miss.cpu_max_tokens=1", "workload.batch=3"),
    "deferred": ("miss.policy=cpu", "miss.cpu_gb_per_s=50", "miss.deferred_experts=2", "workload.batch=3"),
    "static": ("memory.eviction=static",),
    "what was preloaded stays": ("memory.eviction=preloaded", "memory.preload=popular", "memory.gpu_budget=10%"),
    "what was demanded goes": (
        "memory.eviction=spent",
        "memory.preload=layers",
        "memory.cpu_layers=30",
        "workload.batch=3",
    ),
    "what was demanded goes, in waves": ("memory.eviction=spent", "memory.gpu_budget=5experts", "workload.batch=3"),
    "belady": ("memory.eviction=belady",),
    "sieve": ("memory.eviction=sieve",),
    "s3fifo": ("memory.eviction=s3fifo",),
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_misses_are_those_of_the_memory_manager(settings: tuple[str, ...]) -> None:
    inputs = load_inputs(load_scenario("synthetic", [*SMALL, *settings]))
    source = source_of(inputs, make_manager(inputs), NoPrefetch())
    assert decided_in_python(source) is None
    manager = make_manager(inputs)
    wanted = miss_keys(dispatched(inputs, manager, NoPrefetch()), inputs.model.total_experts)
    found = missed(source, inputs.model.total_experts)
    assert len(wanted) and np.array_equal(np.sort(found), np.sort(wanted))
    assert source.manager.evicted == manager.evicted
