"""Context as a key: what is cached before a sequence begins takes room, and time in attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny import ASSUMED, HIDDEN, tiny_model, tiny_profile, tiny_scenario, tiny_trace

from prestage.engine.costs.costs import Costs
from prestage.engine.loading.capacity import kv_cache_bytes
from prestage.engine.loading.loading import load_inputs, steps_of
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.simulate import simulate
from prestage.resources.profile import Profile, make_profile
from prestage.workloads.batches import DECODE, PREFILL
from prestage.workloads.model import Cached, Model

# One layer; a token adds 10 bytes to its cache. The tiny machine reads a byte in a ns, and operations take no time.
MODEL = replace(tiny_model(1), kv_bytes_per_token=10)


def costs(context: int | None, model: Model = MODEL, profile: Profile | None = None, tokens: int = 3) -> Costs:
    """The costs of a sequence of so many decode tokens, positions 0, 1, 2, …, of which `context` came before."""
    workload: dict[str, Any] = {"prefill": "skip"} | ({} if context is None else {"context": context})
    scenario = tiny_scenario(workload=workload)
    trace = tiny_trace([[[0]]] * tokens, sequence=np.zeros(tokens, dtype=int))
    inputs = Inputs(scenario, model, profile or tiny_profile(), trace, steps_of(scenario, trace), 0, None)
    return Costs(inputs)


def added(context: int | None, tokens: int = 1, phase: int = DECODE, **keys: Any) -> int:
    model = keys.get("model", MODEL)
    return costs(context, **keys).dense(0, tokens, phase).ns - costs(None, model=model).dense(0, tokens, phase).ns


def test_without_the_key_attention_takes_no_longer_for_what_is_cached() -> None:
    assert added(None) == 0
    assert costs(None).estimates.get("attention over the context") is None


def test_decoding_reads_every_rows_cache() -> None:
    # Positions 0, 1, 2 attend to 1, 2, 3: 2 x 10 bytes in the mean, and as much more for 100 that were there before.
    assert added(0) == 20
    assert added(100) == 20 + 1000
    assert added(100, tokens=4) == 4 * (20 + 1000)  # each of four sequences has its own
    assert "bytes of the cache / 1000000000 B/s" in named(100)


def named(context: int) -> str:
    found = costs(context)
    found.dense(0, 1)
    return found.estimates["attention over the context"]


def test_a_window_ends_what_is_read() -> None:
    windowed = replace(MODEL, caches=((Cached(6, window=50), Cached(4)), ()))
    # 6 bytes of the last 50 positions, 4 of all of 101, 102, 103.
    assert added(100, model=windowed) == 6 * 50 + 4 * 102
    nothing = replace(MODEL, caches=((Cached(state_bytes=7),), ()))  # linear attention keeps a state, whatever came
    assert added(100, model=nothing) == 0


def test_a_prompt_reads_the_cache_once_a_tile() -> None:
    scenario = tiny_scenario(workload={"context": 100})
    trace = tiny_trace([[[0]]] * 3, sequence=np.zeros(3, dtype=int), phase=np.full(3, PREFILL))
    inputs = Inputs(scenario, MODEL, tiny_profile(), trace, steps_of(scenario, trace), 0, None)
    found, plain = Costs(inputs), costs(None)
    for tokens, tiles in ((3, 1), (128, 1), (129, 2)):
        ns = found.dense(0, tokens, PREFILL).ns - plain.dense(0, tokens, PREFILL).ns
        assert ns == tiles * 102 * 10


def test_operations_bound_a_long_prompt() -> None:
    data = tiny_profile().model_dump()
    data["compute"]["rule"]["flops_per_second"] = 10**9
    scenario = tiny_scenario(workload={"context": 100})
    trace = tiny_trace([[[0]]] * 3, sequence=np.zeros(3, dtype=int), phase=np.full(3, PREFILL))
    inputs = Inputs(scenario, MODEL, make_profile(data, "slow"), trace, steps_of(scenario, trace), 0, None)
    bare = Inputs(tiny_scenario(), MODEL, make_profile(data, "slow"), trace, inputs.steps, 0, None)
    ns = Costs(inputs).dense(0, 64, PREFILL).ns - Costs(bare).dense(0, 64, PREFILL).ns
    assert ns == 4 * 64 * HIDDEN * 102  # an operation a ns


def test_measured_contexts_go_before_the_rule() -> None:
    data = tiny_profile().model_dump()
    shape = {"hidden": HIDDEN, "weight_bytes": MODEL.dense_bytes[0], "dtype": MODEL.dense_dtype, "tokens": 1}
    shape |= {"kernels": MODEL.dense_kernels, "dispatch": "graph", **ASSUMED}
    times = {0: 50, 100: 60, 300: 100}
    data["compute"]["dense"] = [{**shape, "context": c, "ns": ns, "beside_copy_ns": ns} for c, ns in times.items()]
    profile = make_profile(data, "measured")

    def over(context: int) -> int:
        scenario = tiny_scenario(workload={"context": context}, dispatch={"mode": "graph"})
        trace = tiny_trace([[[0]]], sequence=np.zeros(1, dtype=int))
        inputs = Inputs(scenario, MODEL, profile, trace, steps_of(scenario, trace), 0, None)
        found = Costs(inputs)
        ns = found.dense(0, 1).ns
        assert "attention over the context" not in found.estimates
        return ns

    assert over(49) == 55  # 50 positions: half of the way to 60
    assert over(199) == 80
    assert over(399) == 120  # beyond: 20 more for each 100
    assert over(99) == 60


def test_the_cache_holds_what_was_there_before_until_a_sequence_leaves() -> None:
    trace = tiny_trace([[[0]]] * 4, sequence=np.array([0, 0, 1, 1]))
    steps = steps_of(tiny_scenario(), trace)
    assert kv_cache_bytes(MODEL, trace, steps).tolist() == [10, 20, 10, 20]
    assert kv_cache_bytes(MODEL, trace, steps, 100).tolist() == [1010, 1020, 1010, 1020]


SMALL = ["model.preset=gpt-oss-20b", "workload.tokens=4", "workload.synthetic.prefill_tokens=4"]


def test_experts_get_what_the_context_leaves_of_a_total() -> None:
    settings = [*SMALL, "memory.total_bytes=8GiB"]
    without, along = (load_inputs(load_scenario("one-gpu", [*settings, f"workload.context={c}"])) for c in (0, 1000))
    assert without.budgets is not None and along.budgets is not None
    kept = without.model.cached_bytes(np.array([4, 1004]))  # the prompt is the first step
    assert without.budgets[0] - along.budgets[0] == kept[1] - kept[0] > 0


def test_a_context_that_does_not_fit_is_refused_and_one_that_does_is_slower() -> None:
    with pytest.raises(ScenarioError, match="KV cache"):
        load_inputs(load_scenario("one-gpu", [*SMALL, "workload.context=1000000"]))
    short, long = (
        simulate(load_scenario("one-gpu", [*SMALL, f"workload.context={context}"]), baselines=False).data
        for context in (0, 65536)
    )
    assert long["makespan_ms"] > short["makespan_ms"]
    kept = [next(m for m in data["capacity"]["memories"] if m["kind"] == "gpu")["parts"] for data in (short, long)]
    assert kept[1]["KV cache"] > 1000 * kept[0]["KV cache"]


@pytest.mark.parametrize("context", ["-1", "99999999999", "many"])
def test_a_context_is_a_number_of_positions(context: str) -> None:
    with pytest.raises(ScenarioError, match=r"workload\.context"):
        load_scenario("one-gpu", [f"workload.context={context}"])
