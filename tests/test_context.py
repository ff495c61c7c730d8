"""Context as a key: what is cached before a sequence begins takes room, and time in attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_surface import attention_data
from tiny import ASSUMED, HIDDEN, tiny_model, tiny_profile, tiny_scenario, tiny_trace

from prestage.engine.costs.costs import Costs
from prestage.engine.costs.values import KernelCost
from prestage.engine.load import load_inputs, steps_of
from prestage.engine.loading.capacity import kv_cache_bytes
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import load_scenario, make_scenario
from prestage.engine.simulate import simulate
from prestage.resources.profile import Profile, load_profile, make_profile
from prestage.resources.timeline import DENSE
from prestage.testing import record
from prestage.workloads.batches import DECODE, PREFILL, Step
from prestage.workloads.model import Attending, Cached
from prestage.workloads.requests.request import Part, RequestStep

# One layer; a token adds 10 bytes to its cache. The tiny machine reads a byte in a ns, and operations take no time.
MODEL = replace(tiny_model(1), kv_bytes_per_token=10)


def inputs(context: int | None, **keys: Any) -> Inputs:
    """One sequence of so many tokens, positions 0, 1, 2, …, decoded one by one or a prompt; `context` came before."""
    tokens, phase = keys.pop("tokens", 3), keys.pop("phase", DECODE)
    workload: dict[str, Any] = {} if context is None else {"context": context}
    scenario = tiny_scenario(workload=workload | ({"prefill": "skip"} if phase == DECODE else {}))
    trace = tiny_trace([[[0]]] * tokens, sequence=np.zeros(tokens, dtype=int), phase=np.full(tokens, phase))
    model, profile = keys.pop("model", MODEL), keys.pop("profile", None) or tiny_profile()
    steps = keys.pop("steps", None) or steps_of(scenario, trace)
    return Inputs(scenario, model, profile, trace, steps, 0, None, **keys)


def added(context: int | None, step: int = 0, **keys: Any) -> int:
    """What attention adds to the dense part of layer 0 in a step."""
    costs = Costs(inputs(context, **keys))
    plain = costs.dense(0, 1)
    return costs.attending(plain, 0, step).ns - plain.ns


def named(context: int, **keys: Any) -> str | None:
    costs = Costs(inputs(context, **keys))
    costs.attending(costs.dense(0, 1), 0, 0)
    return costs.estimates.get("attention over the context")


def test_without_the_key_attention_takes_no_longer_for_what_is_cached() -> None:
    assert added(None) == 0
    costs = Costs(inputs(None))
    costs.attending(costs.dense(0, 1), 0, 0)
    assert "attention over the context" not in costs.estimates


def test_decoding_reads_what_is_cached_at_each_step() -> None:
    # The steps attend to 1, 2, 3 positions of 10 bytes, and to 100 that were there before.
    assert [added(0, step) for step in range(3)] == [10, 20, 30]
    assert [added(100, step) for step in range(3)] == [1010, 1020, 1030]
    assert "bytes of the cache / 1 GB/s" in str(named(100))


def test_each_sequence_of_a_step_has_its_own_cache() -> None:
    together = [Step(DECODE, np.array([0, 1]))]
    trace = tiny_trace([[[0]], [[0]]], sequence=np.array([0, 1]), position=np.array([4, 8]))
    scenario = tiny_scenario(workload={"context": 100})
    costs = Costs(Inputs(scenario, MODEL, tiny_profile(), trace, together, 0, None))
    assert costs.attention_in(0)[0].ns == (105 + 109) * 10


def test_a_request_attends_to_its_own_positions_whatever_row_stands_for_it() -> None:
    # Request 0 has 7 positions cached and decodes; of request 1's prompt positions 4 and 5 come: by the rule, a tile of
    # rows reads the cache once, (5 + 6) / 2 positions in the mean.
    parts = (Part(0, 7, 1, 1), Part(1, 4, 2, 0))
    steps: list[Step] = [RequestStep(PREFILL, np.zeros(3, dtype=int), parts=parts)]
    trace = tiny_trace([[[0]]], sequence=np.array([0]), position=np.array([30]))
    plain = Inputs(tiny_scenario(), MODEL, tiny_profile(), trace, steps, 0, None)
    assert not Costs(plain).attention.counts, "a fixed batch without a context"
    served = tiny_scenario(requests={"rate": 1.0})
    costs = Costs(replace(plain, scenario=served))
    assert costs.attention_in(0)[0].ns == 8 * 10 + 55


def test_what_a_step_adds_is_worked_out_once_and_anew_where_another_step_takes_its_place() -> None:
    steps: list[Step] = [RequestStep(DECODE, np.array([0]), parts=(Part(0, first, 1, 1),)) for first in (10, 20)]
    attention = Costs(inputs(0, steps=steps)).attention
    first = attention.by_kind(0)
    assert first[0].ns == 11 * 10
    assert attention.by_kind(1)[0].ns == 21 * 10
    assert attention.by_kind(0) is first
    steps[0] = RequestStep(DECODE, np.array([0]), parts=(Part(0, 30, 1, 1),))  # the source thought better of it
    assert attention.by_kind(0)[0].ns == 31 * 10


def test_a_window_ends_what_is_read_and_states_never_grow() -> None:
    windowed = replace(MODEL, caches=((Cached(6, window=50), Cached(4)), ()))
    # 6 bytes of the last 50 positions, 4 of all 101.
    assert added(100, model=windowed) == 6 * 50 + 4 * 101
    nothing = replace(MODEL, caches=((Cached(state_bytes=7),), ()))  # linear attention keeps a state, whatever came
    assert added(100, model=nothing) == added(10**6, model=nothing) == 0
    half = replace(MODEL, attention=((Attending(1, 1, 4, 8, most=100, ratio=4),),))
    assert (added(39, model=half), added(10**6, model=half)) == (8 * 10, 8 * 25)  # a key for four positions, 25 at most


def prompt(context: int, tokens: int, **keys: Any) -> int:
    return added(context, tokens=tokens, phase=PREFILL, **keys)


def test_a_prompt_reads_the_cache_once_a_tile() -> None:
    # Rows attend to 101, 102, … positions: the mean of them, for each 128 rows.
    assert prompt(100, 3) == 102 * 10
    assert prompt(100, 128) == round(164.5 * 10)
    assert prompt(100, 129) == 2 * 165 * 10


def slow() -> Profile:
    data = tiny_profile().model_dump()
    data["compute"]["rule"]["flops_per_second"] = 10**9
    return make_profile(data, "slow")


def test_operations_bound_a_long_prompt_and_grow_with_its_square() -> None:
    # An operation a ns, 4 x hidden of them for each pair of positions: 1 + 2 + … + n pairs.
    for tokens in (64, 640):
        assert prompt(0, tokens, profile=slow()) == 4 * HIDDEN * tokens * (tokens + 1) // 2
    # Of a chunk behind 100 positions, each row has 100 more.
    assert prompt(100, 64, profile=slow()) == 4 * HIDDEN * (64 * 65 // 2 + 6400)
    # Through a window of 4 the pairs grow with the tokens alone.
    narrow = replace(MODEL, attention=((Attending(3, 1, 5, 10, most=4),),))
    assert prompt(0, 100, profile=slow(), model=narrow) == 4 * 3 * 5 * (1 + 2 + 3 + 97 * 4)


def test_a_compressed_cache_is_decoded_in_its_own_width() -> None:
    model = replace(MODEL, attention=((Attending(10, 1, 3, 1, latent_dim=7),),))
    assert added(99, model=model, profile=slow()) == 4 * 10 * 7 * 100
    assert prompt(0, 100, model=model, profile=slow()) == 4 * 10 * 3 * 5050


def surfaced(**more: Any) -> Profile:
    data = tiny_profile().model_dump()
    data["compute"] |= {"experts": [], "surface": attention_data()}
    return make_profile(data, "with a surface")


def test_the_surface_goes_before_the_rule() -> None:
    # 1 ns for each KV head of 64 (256 bytes) and position: two of them, 1,000 positions and more.
    model = replace(MODEL, attention=((Attending(1, 2, 64, 512),),))
    assert added(999, model=model, profile=surfaced()) == pytest.approx(2000, rel=1e-3)
    assert added(31_999, model=model, profile=surfaced()) == pytest.approx(64_000, rel=1e-3)
    assert "surface of single kernels" in str(named(999, model=model, profile=surfaced()))
    # Prompts take their tokens squared / 100 ns a head; a chunk what a whole prompt of as many pairs takes.
    assert prompt(0, 2000, model=model, profile=surfaced()) == pytest.approx(40_000, rel=2e-3)
    pairs = 1000 * 1000 + 1000 * 1001 / 2
    assert prompt(1000, 1000, model=model, profile=surfaced()) == pytest.approx(2 * pairs / 100, rel=2e-3)
    # A few rows behind a long context read all of it.
    assert prompt(10**6, 2, model=model, profile=surfaced()) == pytest.approx(2 * 10**6, rel=1e-3)


def test_beside_a_copy_attention_takes_longer_by_what_it_reads() -> None:
    model = replace(MODEL, attention=((Attending(1, 1, 64, 1024),),))
    found = Costs(inputs(1023, model=model, profile=surfaced())).attention_in(0)[0]
    assert found.beside_copy_ns - found.ns == pytest.approx(1000, abs=1)  # 1,000 ns for the MiB that 1,024 keys are


def eager(attends: bool, runtime: str = "prestage", **host: Any) -> KernelCost:
    """What the dense part of a layer with one attention costs on `h200`, launched kernel by kernel."""
    settings: dict[str, Any] = {
        "model": {"preset": "mixtral-8x7b", "layers": 1}, "machine": {"profile": "h200"}, "runtime": {"name": runtime},
        "dispatch": {"mode": "eager"}, "workload": {"synthetic": {"tokens": 1}, "prefill": "skip"},
    }  # fmt: skip
    settings["workload"] |= {"context": 100_000} if attends else {}
    loaded = load_inputs(make_scenario(settings))
    profile = loaded.profile.model_copy(update={"host": loaded.profile.host.model_copy(update=host)})
    costs = Costs(replace(loaded, profile=profile))
    return costs.attending(costs.dense(0, 1), 0, 0)


def test_an_eager_call_of_attention_takes_the_host_what_a_products_does_or_what_was_measured() -> None:
    host, plain = load_profile("h200").host, eager(attends=False)
    call = host.product_launches["bfloat16"]
    assert eager(attends=True).host_ns - plain.host_ns == call.ns - host.launch.ns > 0
    assert eager(attends=True).launches == plain.launches, "it is among the kernels that the model counts"
    measured = call.model_copy(update={"ns": 50_000})
    assert eager(attends=True, attention_launch=measured).host_ns - plain.host_ns == 50_000 - host.launch.ns
    # A runtime's own costs have it in them.
    own = [eager(attends, "transformers").host_ns for attends in (False, True)]
    assert own[0] == own[1]


def test_a_long_kernel_in_the_middle_starts_when_what_is_launched_before_it_is_done() -> None:
    # Ten kernels of 10 ns, whose calls take 100 ns each: the last call is the latest, and 90 ns are done before.
    assert KernelCost(100, 1.0, 10, 1000).issue_ns == 1000 - 90
    # One of 2,000 ns behind half of them: it begins behind 500 ns of calls, with 50 ns done before.
    long = KernelCost(2100, 1.0, 10, 1000, long_ns=2000)
    assert long.issue_ns == 500 - 50
    assert KernelCost(2100, 1.0, 10, 1000).issue_ns == 100, "as if it were spread over all of them"
    assert KernelCost(2100, 1.0, 1, 1000, 7, long_ns=2000).issue_ns == 1007, "a graph is one call"


@pytest.mark.slow
def test_both_engines_start_a_long_attention_alike() -> None:
    data: dict[str, Any] = {
        "model": {"preset": "mixtral-8x7b", "layers": 2}, "machine": {"profile": "h200"}, "dispatch": {"mode": "eager"},
        "workload": {"synthetic": {"tokens": 6}, "prefill": "skip", "context": 200_000},
    }  # fmt: skip
    loaded = load_inputs(make_scenario(data))
    spans = [record(loaded, engine=engine).spans.tolist() for engine in ("simpy", "compiled")]
    assert spans[0] == spans[1] and any(span for span in spans[0])


def test_measured_contexts_go_before_all_else() -> None:
    data = tiny_profile().model_dump()
    shape = {"hidden": HIDDEN, "weight_bytes": MODEL.dense_bytes[0], "dtype": MODEL.dense_dtype, "tokens": 1}
    shape |= {"kernels": MODEL.dense_kernels, "dispatch": "graph", **ASSUMED}
    times = {0: 50, 100: 60, 300: 100}
    data["compute"]["dense"] = [{**shape, "context": c, "ns": ns, "beside_copy_ns": ns} for c, ns in times.items()]
    profile = make_profile(data, "measured")

    def over(context: int) -> int:
        found = inputs(context, tokens=1, profile=profile)
        costs = Costs(replace(found, scenario=tiny_scenario(workload={"context": context}, dispatch={"mode": "graph"})))
        ns = costs.attending(costs.dense(0, 1), 0, 0).ns
        assert "attention over the context" not in costs.estimates
        return ns

    assert over(49) == 55  # 50 positions: half of the way to 60
    assert over(199) == 80
    assert over(399) == 120  # beyond: 20 more for each 100
    assert over(99) == 60


@pytest.mark.parametrize("engine", ["simpy", "compiled"])
def test_steps_of_a_run_take_longer_as_the_context_grows(engine: str) -> None:
    found = inputs(100, tokens=4)
    spans = record(replace(found, budget_bytes=10**6), engine=engine).spans
    dense = np.sort(spans[spans["kind"] == DENSE], order="start_ns")
    assert np.diff(dense["end_ns"] - dense["start_ns"]).tolist() == [10, 10, 10]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-oss-20b", "pipeline-2", "placement-8"])
def test_both_engines_agree_on_how_the_context_grows(name: str) -> None:
    short, long = (
        [
            simulate(
                load_scenario(name, ["workload.tokens=4", f"workload.context={context}"]),
                baselines=False,
                engine=engine,
            )
            for engine in ("compiled", "simpy")
        ]
        for context in (0, 8000)
    )
    for compiled, by_simpy in (short, long):
        assert compiled.timeline.spans().tobytes() == by_simpy.timeline.spans().tobytes()
    assert long[0].data["makespan_ms"] > short[0].data["makespan_ms"]


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
