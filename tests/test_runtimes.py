"""Runtimes: what their files may say, what a scenario takes from them, and what they cost, by hand to the ns.

On the machine of round numbers a dense part takes 3 ns, an expert's kernel 7, its copy 20, and a call of the host
nothing unless it says so.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_inputs, tiny_model, tiny_profile, tiny_scenario, tiny_trace

from prestage.engine.costs.costs import Costs
from prestage.engine.costs.cpu_streams import HIGHEST, LOWEST, MIDDLE, SPREAD, CpuStream, cpu_stream
from prestage.engine.costs.offload_costs import CpuCosts
from prestage.engine.costs.runtime_costs import RuntimeCosts, launched_model
from prestage.engine.load import load_inputs
from prestage.engine.loading.deciders import make_manager
from prestage.engine.measure.recording import Recording
from prestage.engine.run import ENGINES
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.scenario import Scenario, load_scenario, make_scenario
from prestage.resources.profile import load_profile
from prestage.resources.profile_costs import TransferCost
from prestage.resources.runtime import PROMPTS, SPREADS, OwnTime, Runtime, RuntimeFileError, load_runtime, runtime_names
from prestage.resources.timeline import CPU_EXPERT, DEMAND, DENSE, EXPERT, HEAD
from prestage.testing import record
from prestage.workloads.model import load_model

ASSUMED = {"source": "assumed"}


def written(folder: Path, name: str = "own.json", **keys: Any) -> str:
    """The path of a runtime's file with these keys."""
    path = folder / name
    path.write_text(json.dumps({"name": "own", **keys}), encoding="utf-8")
    return str(path)


def own_scenario(name: str, **sections: Any) -> Scenario:
    scenario: Scenario = tiny_scenario(runtime={"name": name}, dispatch={"mode": "graph"}, **sections)
    return scenario


def ran(name: str, engine: str, *, top_k: int = 1, head_ns: int = 5, costs: Any = None, **sections: Any) -> Recording:
    """Two tokens of two layers by a runtime: at first experts 0, then 1."""
    choice = [[0, 2], [1, 3]]
    arrays = {"extra": {"popularity": np.array([[1.0, 0.0, 0.0, 0.0]] * 2)}} if top_k > 1 else {}
    trace = tiny_trace([[choice[token][:top_k]] * 2 for token in range(2)], **arrays)
    model = tiny_model(2, top_k=top_k, head_ns=head_ns)
    profile = tiny_profile(**(costs or {}))
    return record(tiny_inputs(model, profile, trace, own_scenario(name, **sections)), engine)


def starts(recording: Recording, kind: int) -> list[tuple[int, int]]:
    spans = recording.spans[recording.spans["kind"] == kind]
    spans = spans[np.argsort(spans["start_ns"], kind="stable")]
    return list(zip(spans["start_ns"].tolist(), spans["end_ns"].tolist(), strict=True))


# Files.


@pytest.mark.parametrize("name", runtime_names())
def test_a_shipped_runtime_says_what_it_is_and_where_each_cost_is_from(name: str) -> None:
    runtime = load_runtime(name)
    assert runtime.name == name and runtime.title and runtime.about
    for what, cost in runtime.costs.given().items():
        assert cost.note, f"{name}: {what} says nothing of where its number is from"
        assert cost.sigma > 0
    data: dict[str, Any] = {"runtime": {"name": name}, "workload": {"synthetic": {}}}
    scenario = make_scenario(data)
    for section, keys in runtime.defaults.items():
        for key, value in keys.items():
            assert scenario.plain()[section][key] == value


def test_a_cost_is_as_far_off_as_its_source_usually_is_unless_it_says_how_far() -> None:
    assert OwnTime(ns=1, source="assumed").sigma == SPREADS["assumed"]
    assert OwnTime(ns=1, source="assumed", spread=0.1).sigma == 0.1


def test_a_file_that_extends_another_is_that_one_with_its_keys_merged_in(tmp_path: Path) -> None:
    layer = {"ns": 10, "source": "published", "spread": 0.3, "note": "theirs"}
    base = written(tmp_path, "base.json", waits=True, costs={"layer": layer, "step": {"ns": 7, **ASSUMED}})
    changed = {"layer": {"ns": 11, "source": "measured"}, "step": None}
    runtime = load_runtime(written(tmp_path, "own.json", extends=base, costs=changed))
    assert runtime.waits and runtime.costs.step is None
    # What was said of the old number goes with it.
    assert runtime.costs.layer == OwnTime(ns=11, source="measured")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"costs": {"layr": {"ns": 1, **ASSUMED}}}, "costs.layr: no such key; did you mean 'layer'?"),
        ({"costs": {"layer": {"ns": -1, **ASSUMED}}}, "costs.layer.ns = -1"),
        ({"costs": {"layer": {"ns": 1}}}, "costs.layer.source: missing"),
        ({"costs": {"layer": {"ns": 1, "source": "guessed"}}}, "costs.layer.source = 'guessed'"),
        ({"costs": {"cpu_stream": {"share": 1.5, **ASSUMED}}}, "costs.cpu_stream.share = 1.5"),
        ({"copies": {"mover": "magic"}}, "copies.mover = 'magic'"),
        ({"extends": "nobody"}, "extends = 'nobody': choose one of"),
        ({"extends": "own.json"}, "extends itself"),
        ({"defaults": {"dispach": {}}}, "defaults.dispach = 'dispach': choose one of"),
        ({"defaults": {"dispatch": {"mod": "graph"}}}, "defaults.dispatch = 'mod': choose one of"),
        ({"defaults": {"dispatch": {"mode": "fast"}}}, "defaults.dispatch: mode = 'fast'"),
        ({"only": {"dispatch.mode": {"values": [], "why": "x"}}}, "only.dispatch.mode.values"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_key(tmp_path: Path, keys: dict[str, Any], told: str) -> None:
    name = written(tmp_path, **keys)
    with pytest.raises(ScenarioError) as refused:
        own_scenario(name, workload={"trace": "none"}) if "defaults" not in keys else make_scenario(
            {"runtime": {"name": name}, "workload": {"trace": "none"}}
        )
    assert told in str(refused.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    (tmp_path / "half.toml").write_text("name = ", encoding="utf-8")
    for name, told in (("list.json", "must be an object"), ("half.toml", "not TOML"), ("no.toml", "no such file")):
        with pytest.raises(RuntimeFileError, match=told):
            load_runtime(str(tmp_path / name))


def test_a_runtime_beside_a_scenario_is_found_from_there(tmp_path: Path) -> None:
    written(tmp_path, defaults={"dispatch": {"mode": "graph"}})
    (tmp_path / "run.toml").write_text('[runtime]\nname = "own.json"\n[workload.synthetic]\n', encoding="utf-8")
    assert load_scenario(tmp_path / "run.toml").dispatch.mode == "graph"


# What a scenario takes from it.


def test_a_runtime_sets_what_nobody_says_and_keys_of_the_scenario_go_before_it(tmp_path: Path) -> None:
    name = written(tmp_path, defaults={"dispatch": {"mode": "graph", "expert_kernel": "grouped"}})
    data = {"runtime": {"name": name}, "workload": {"trace": "none"}, "dispatch": {"mode": "eager"}}
    scenario = make_scenario(data)
    assert (scenario.dispatch.mode, scenario.dispatch.expert_kernel) == ("eager", "grouped")
    # As it is echoed it says the same again.
    assert make_scenario(scenario.plain()) == scenario


def test_a_scenario_without_a_runtime_says_which_it_took() -> None:
    assert load_scenario("default").plain()["runtime"] == {"name": "prestage"}
    assert load_runtime("prestage").neutral


def test_what_a_runtime_cannot_do_is_refused_in_one_line(tmp_path: Path) -> None:
    only = {"miss.policy": {"values": ["cpu"], "why": "computes absent experts on the CPU"}}
    name = written(tmp_path, title="Theirs", only=only)
    with pytest.raises(ScenarioError) as refused:
        own_scenario(name)
    assert "miss.policy = 'fetch': Theirs computes absent experts on the CPU: set 'cpu'" in str(refused.value)


def test_a_runtime_that_keeps_all_experts_is_refused_where_there_is_less_room() -> None:
    def inputs(gib: int) -> Any:
        return load_inputs(load_scenario("synthetic", [*settings, f"memory.total_bytes={gib}GiB"]))

    settings = ["runtime.name=vllm", "memory.gpu_budget=100%", "prefetch.lookahead=0", "workload.tokens=4"]
    make_manager(inputs(14))  # 9.5 GiB of experts, 3.3 of the rest
    with pytest.raises(ScenarioError, match=r"vLLM keeps every expert on the GPU: they take 9\.47 GiB"):
        make_manager(inputs(12))


# What it costs, by hand.


@pytest.mark.parametrize("engine", ENGINES)
def test_its_own_time_a_layer_and_a_pass_is_the_hosts(tmp_path: Path, engine: str) -> None:
    # Everything is resident and read back. A pass: 100 own, and a layer 10: the dense part 3, noticed at once, the
    # expert 7; the head 5, which the next pass waits for.
    costs = {"layer": {"ns": 10, **ASSUMED}, "step": {"ns": 100, **ASSUMED}}
    recording = ran(written(tmp_path, costs=costs, waits=True), engine, memory={"preload": "popular"})
    # The host is 10 behind the choice, the GPU 7 behind it with the expert.
    assert starts(recording, DENSE) == [(110, 113), (123, 126), (248, 251), (261, 264)]
    assert starts(recording, EXPERT) == [(113, 120), (126, 133), (251, 258), (264, 271)]
    assert starts(recording, HEAD) == [(133, 138), (271, 276)]
    without = ran(written(tmp_path, costs=costs), engine, memory={"preload": "popular"})
    # A host that does not wait begins its next pass when it has launched the head, at 126.
    assert starts(without, DENSE)[2] == (236, 239)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("copies", "kernels"),
    [
        # One copy of 20: behind the choice, at 3.
        ({}, [(23, 30), (53, 60)]),
        # Two of 10, each noticed by the host (2) before it orders the next one.
        ({"per_expert": 2, "synchronized": True}, [(27, 34), (61, 68)]),
    ],
)
def test_copies_of_a_matrix_each_wait_for_each_other(
    tmp_path: Path, engine: str, copies: dict[str, Any], kernels: list[tuple[int, int]]
) -> None:
    costs = {"synchronize_ns": 2}
    recording = ran(written(tmp_path, copies=copies), engine, costs=costs, memory={"gpu_budget": "1experts"})
    extra = 2  # noticing each choice
    shifted = [(start + extra * (n + 1), end + extra * (n + 1)) for n, (start, end) in enumerate(kernels)]
    assert starts(recording, EXPERT)[:2] == shifted


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gather_kernel_has_the_compute_stream_to_itself(tmp_path: Path, engine: str) -> None:
    # Expert 0 is there, 2 is not. A copy engine leaves the stream to expert 0; a gather kernel of 20 does not.
    memory = {"gpu_budget": "2experts", "preload": "popular"}  # expert 0 of either layer
    by_engine = ran(written(tmp_path), engine, top_k=2, memory=memory)
    assert starts(by_engine, EXPERT)[0] == (3, 10)
    gathers = ran(written(tmp_path, copies={"mover": "kernel"}), engine, top_k=2, memory=memory)
    (first, *_), (expert, *_) = starts(gathers, DEMAND), starts(gathers, EXPERT)
    assert first == (3, 23) and expert == (23, 30)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_cpu_that_blocks_the_host_is_handed_over_to_and_comes_back(tmp_path: Path, engine: str) -> None:
    # Dense 3; 50 to submit; activations 16; the expert 30 on the CPU, at which the host waits; 40 to merge; the result
    # takes 16; only then is the next layer's dense part launched.
    costs = {"cpu_submit": {"ns": 50, **ASSUMED}, "cpu_return": {"ns": 40, **ASSUMED}}
    name = written(tmp_path, costs=costs, cpu_blocks=True)
    recording = ran(name, engine, miss={"policy": "cpu"}, memory={"gpu_budget": "1experts"})
    assert starts(recording, CPU_EXPERT)[0] == (3 + 50 + 16, 3 + 50 + 16 + 30)
    assert starts(recording, DENSE)[1] == (99 + 40 + 16, 99 + 40 + 16 + 3)


def test_free_dispatch_takes_a_runtime_no_host_time() -> None:
    runtime = load_runtime("prestage").model_copy()
    costs = runtime.costs.model_copy(update={"layer": OwnTime(ns=9, source="assumed")})
    runtime = runtime.model_copy(update={"costs": costs})
    assert RuntimeCosts(runtime, free=True).layer_ns == 0 and RuntimeCosts(runtime, free=False).layer_ns == 9


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_of_so_many_tokens_is_fetched_whole_and_a_smaller_one_computed(tmp_path: Path, engine: str) -> None:
    # A prompt of two tokens, then one token, of one layer: the prompt's experts are copied, the token's is not.
    trace = tiny_trace([[[0]], [[1]], [[2]]], phase=np.array([0, 0, 1], dtype=np.uint8))
    miss = {"policy": "cpu", "fetch_from": "2tokens"}
    scenario = own_scenario(written(tmp_path), miss=miss, memory={"gpu_budget": "2experts"})
    recording = record(tiny_inputs(tiny_model(1), tiny_profile(), trace, scenario), engine)
    assert [len(starts(recording, kind)) for kind in (DEMAND, CPU_EXPERT)] == [2, 1]


def test_kernels_that_it_launches_for_one_family_of_models_go_before_those_for_all(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(
        'name = "own"\n[costs.dense_launches]\ncount = 7\nsource = "assumed"\n'
        '[[launches]]\nmodel = "gpt-oss"\nexpert = 11\nsource = "source"\n',
        encoding="utf-8",
    )
    gpt, qwen = (launched_model(load_model(name), load_runtime(str(file))) for name in ("gpt-oss-20b", "qwen3-30b-a3b"))
    assert (gpt.dense_kernels, gpt.expert_kernels) == (7, 11)
    assert (qwen.dense_kernels, qwen.expert_kernels) == (7, load_model("qwen3-30b-a3b").expert_kernels)


@pytest.mark.parametrize(("eviction", "copied", "computed"), [("preloaded", 2, 0), ("spent", 2, 1)])
def test_nothing_that_a_prompt_had_copied_is_kept_where_it_is_spent(
    tmp_path: Path, eviction: str, copied: int, computed: int
) -> None:
    # A prompt of two tokens, then one that chooses an expert of the prompt, of one layer with room for all of them.
    trace = tiny_trace([[[0]], [[1]], [[1]]], phase=np.array([0, 0, 1], dtype=np.uint8))
    miss = {"policy": "cpu", "fetch_from": "2tokens"}
    scenario = own_scenario(written(tmp_path), miss=miss, memory={"gpu_budget": "4experts", "eviction": eviction})
    recording = record(tiny_inputs(tiny_model(1), tiny_profile(), trace, scenario), "compiled")
    assert [len(starts(recording, kind)) for kind in (DEMAND, CPU_EXPERT)] == [copied, computed]


def test_tokens_from_which_all_is_fetched_may_be_counted_for_each_expert() -> None:
    def fetched(text: str) -> int | None:
        miss = make_scenario({"workload": {"trace": "none"}, "miss": {"policy": "cpu", "fetch_from": text}}).miss
        return miss.fetch_tokens(128, 8)

    assert (fetched("32tokens"), fetched("32tokens/expert")) == (32, 32 * 128 // 8)
    with pytest.raises(ScenarioError, match=r"miss\.fetch_from = '32'"):
        fetched("32")


# Experts on the CPU.


def rates(*rows: tuple[int, int, float]) -> Runtime:
    """A runtime with (bytes of an expert, threads, share) of 8-bit experts."""
    said = {"dtype": "int8", "source": "measured", "note": "by hand"}
    table = [{"expert_bytes": size, "threads": threads, "share": share, **said} for size, threads, share in rows]
    core = {"bytes_per_second": 10 * 10**9, **ASSUMED}
    return Runtime.model_validate({"name": "own", "cpu_rates": table, "costs": {"cpu_core": core}})


def test_a_share_of_stream_is_interpolated_over_the_logarithm_of_the_size_and_stays_beyond_it() -> None:
    stream = CpuStream(rates((1 << 20, 8, 0.2), (1 << 24, 8, 0.6), (1 << 20, 32, 0.9)), 100e9, 8, "here")
    shares = [stream.share("int8", 1 << power, 1)[0] for power in (10, 20, 22, 24, 30)]
    assert shares == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.6])
    # Threads: the nearest number by its ratio; 20 is nearer to 32.
    more = CpuStream(rates((1 << 20, 8, 0.2), (1 << 20, 32, 0.9)), 100e9, 20, "here")
    assert more.share("int8", 1 << 20, 1)[0] == pytest.approx(0.9)


def test_threads_reach_no_more_than_each_alone_and_no_kernel_more_than_stream() -> None:
    runtime = rates((1 << 20, 8, 1.5))
    assert CpuStream(runtime, 100e9, 8, "here").rate("int8", 1 << 20, 1)[0] == 8 * 10e9
    assert CpuStream(runtime, 100e9, 16, "here").rate("int8", 1 << 20, 1)[0] == 100e9


def test_copies_and_experts_slow_each_other_down_only_beyond_what_both_reach_together() -> None:
    stream = CpuStream(rates((1 << 20, 8, 1.5)), 100e9, 8, "here")
    assert stream.beside(40e9, 20e9) == 1.0  # 60 of 95 GB/s
    assert stream.beside(90e9, 56e9) == pytest.approx(146 / 95)


@pytest.mark.parametrize("sizes", [[1000, 64_000], [64_000, 1000]])
def test_how_copies_and_experts_slow_each_other_down_goes_by_the_largest_experts(sizes: list[int]) -> None:
    # Of 2 GB/s the large experts' kernels reach 0.6, the small ones' 0.2; a byte is copied in a ns. The memory gives 95
    # of 100 to both.
    runtime = rates((1000, 8, 0.2), (64_000, 8, 0.6))
    scenario = tiny_scenario(miss={"policy": "cpu", "cpu_gb_per_s": 2.0, "cpu_threads": 8})
    made = tiny_inputs(tiny_model(2, copy_ns=sizes), tiny_profile(), tiny_trace([[[0], [0]]]), scenario)
    costs = Costs(replace(made, runtime=runtime))
    assert CpuCosts(costs, scenario).copy_slowdown == round((1.2 + 1.0) / (0.95 * 2), 3)
    assert costs.estimates["copies beside experts on the CPU"] == (
        "both take 1.158 times as long: 1.2 and 1.0 GB/s alone, of one memory"
    )


def threaded(*cores: tuple[str, int, int]) -> Runtime:
    """A runtime whose threads read 10 GB/s and compute so many GB/s of (dtype, tokens, rate)."""
    table = [{"dtype": dtype, "tokens": tokens, "bytes_per_second": rate * 10**9, **ASSUMED}
             for dtype, tokens, rate in cores]  # fmt: skip
    costs = {"cpu_thread": {"bytes_per_second": 10 * 10**9, **ASSUMED}}
    return Runtime.model_validate({"name": "own", "cpu_cores": table, "costs": costs})


def test_copies_and_experts_at_a_given_bandwidth_do_not_slow_each_other_down_without_contention() -> None:
    miss = {"policy": "cpu", "cpu_gb_per_s": 2.0, "cpu_threads": 8}
    scenario = tiny_scenario(miss=miss, copy={"contention": False})
    made = tiny_inputs(tiny_model(1), tiny_profile(), tiny_trace([[[0]]]), scenario)
    cpu = CpuCosts(Costs(replace(made, runtime=rates((1000, 8, 0.6)))), scenario)
    assert (cpu.copy_slowdown, cpu.expert(0, 1).slowdown) == (1.0, 1.0)


def test_reading_and_computing_in_part_hide_behind_each_other() -> None:
    runtime = threaded(("int8", 1, 10))
    # Equal times of 1: the 1.5-norm is 2 ** (2/3). Eight threads read 80 of 100 GB/s, sixteen all of it.
    assert CpuStream(runtime, 100e9, 8, "here").rate("int8", 1 << 20, 1)[0] == pytest.approx(80e9 / 2 ** (2 / 3))
    both = (160**-1.5 + 100**-1.5) ** (-1 / 1.5)
    assert CpuStream(runtime, 100e9, 16, "here").rate("int8", 1 << 20, 1)[0] == pytest.approx(both * 1e9)
    # Read once for four tokens, computed four times, at the rate of so many.
    runtime = threaded(("int8", 1, 10), ("int8", 4, 20))
    four = (80**-1.5 + (8 * 20 / 4) ** -1.5) ** (-1 / 1.5)
    rate, words = CpuStream(runtime, 100e9, 8, "here").rate("int8", 1 << 20, 4)
    assert rate == pytest.approx(four * 1e9)
    assert words == (
        "8 threads that read 80.0 GB/s of 100 (here) and compute 40.0 over 4 tokens by the runtime's table, which in "
        "part hide behind each other"
    )


def test_threads_together_compute_what_lies_between_measured_numbers_of_them() -> None:
    table = [{"dtype": "int8", "threads": count, "bytes_per_second": rate * 10**9, **ASSUMED}
             for count, rate in ((4, 7), (8, 7), (16, 4))]  # fmt: skip
    every = {"dtype": "int8", "bytes_per_second": 5 * 10**9, **ASSUMED}
    runtime = Runtime.model_validate({"name": "own", "cpu_cores": [*table, every]})
    # 28, 56 and 64 GB/s of 4, 8 and 16 together: 60 of 12. Beyond them each does what it did: 2 x 7 and 32 x 4.
    computed = [CpuStream(runtime, 100e9, threads, "here").computed("int8", 1) for threads in (2, 4, 8, 12, 16, 32)]
    assert computed == pytest.approx([14e9, 28e9, 56e9, 60e9, 64e9, 128e9])
    # Of another dtype, the rate of any number of threads: as many weights, of half the bits.
    assert CpuStream(runtime, 100e9, 16, "here").computed("int4", 1) == pytest.approx(16 * 2.5e9)
    # Without one, that of as many threads, in whatever order they stand.
    runtime = Runtime.model_validate({"name": "own", "cpu_cores": table})
    assert CpuStream(runtime, 100e9, 16, "here").computed("int4", 1) == pytest.approx(16 * 2e9)


def test_of_a_dtype_between_two_as_many_weights_are_computed() -> None:
    # 10 and 40 GB/s of 8 and 32 bits are 10 G weights a second each: of 16 bits, 20 GB/s; of 4, 5.
    runtime = threaded(("int8", 1, 10), ("float32", 1, 40))
    stream = CpuStream(runtime, 100e9, 1, "here")
    assert [stream.computed(dtype, 1) for dtype in ("int4", "bfloat16")] == pytest.approx([5e9, 20e9])


def test_a_runtime_that_says_nothing_takes_what_the_machine_takes() -> None:
    costs = RuntimeCosts(Runtime.model_validate({"name": "own"}), free=False)
    assert (costs.gap_factor, costs.copy_rate, costs.launch_ns("dense", 70)) == (1.0, 1.0, 70)


def test_a_share_of_stream_that_a_runtime_names_is_said_with_its_spread() -> None:
    share = {"share": 0.5, "spread": 0.2, "source": "assumed"}
    runtime = Runtime.model_validate({"name": "own", "costs": {"cpu_stream": share}})
    rate, words = CpuStream(runtime, 100e9, None, "given").rate("int8", 1 << 20, 1)
    # Nine of ten lie within 1.645 standard deviations of the logarithm: 0.5 times e to the -0.329 and 0.329.
    assert rate == 50e9
    assert words == "0.50 of 100 GB/s (given; assumed: 0.36 to 0.69 for this runtime)"
    # Without a bandwidth of the scenario's, STREAM is what the profile says of its processor's memory.
    profile = load_profile("gpu=rtx4090, ram=2x DDR5-5600")
    stream = cpu_stream(runtime, profile, tiny_scenario(miss={"policy": "cpu"}).miss)
    assert stream is not None and profile.processor is not None
    assert stream.rate("int8", 1 << 20, 1)[0] == 0.5 * profile.processor.bytes_per_second
    assert cpu_stream(runtime, tiny_profile(), tiny_scenario(miss={"policy": "cpu"}).miss) is None


def test_a_bandwidth_alone_is_stream_and_the_result_says_by_what_it_was_derated() -> None:
    rate, words = CpuStream(load_runtime("prestage"), 100e9, None, "given").rate("int8", 1 << 20, 1)
    assert rate == pytest.approx(100e9 * MIDDLE) and LOWEST < MIDDLE < HIGHEST
    assert f"{LOWEST} to {HIGHEST}" in words and "0.48 of 100 GB/s" in words


def test_what_copies_and_experts_want_of_one_memory_beyond_what_it_has_slows_both() -> None:
    stream = CpuStream(load_runtime("prestage"), 100e9, None, "given")
    assert stream.beside(40e9, 40e9) == 1.0
    # 70 and 50 alone, of 95 together.
    assert stream.beside(70e9, 50e9) == pytest.approx(120 / 95)


def test_copies_that_reach_half_of_the_rate_take_as_much_longer_as_their_bytes_do() -> None:
    # Of 100 + 40 ns the 40 are for the bytes; at half of the rate they are 80, at a quarter 160.
    cost = TransferCost(latency_ns=100, bytes_per_second=10**9, source="measured")
    for share, ns in ((1.0, 140), (0.5, 180), (0.25, 260)):
        rate = {"copy_rate": {"share": share, "source": "assumed"}}
        costs = RuntimeCosts(Runtime.model_validate({"name": "own", "costs": rate}), free=False)
        assert costs.copy_ns(cost, 40) == ns


def test_the_spread_of_a_share_has_the_published_engines_as_its_p5_and_p95() -> None:
    assert math.log(HIGHEST / LOWEST) / 2 / 1.645 == pytest.approx(SPREAD, abs=0.01)


def validated(name: str) -> list[dict[str, Any]]:
    """The rows of a committed report."""
    folder = Path(__file__).parent.parent / "calibration" / "validation"
    rows: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return rows


def rms_of_logs(rows: list[dict[str, Any]]) -> float:
    return math.sqrt(sum(math.log(row["predicted_ns"] / row["measured_ns"]) ** 2 for row in rows) / len(rows))


def test_how_far_software_is_off_is_what_the_committed_runs_were_off() -> None:
    llama_cpp = validated("h200-llama.cpp")
    held_out = [row for row in llama_cpp if row["model"] in ("gpt-oss-20b", "olmoe-1b-7b")]
    # Its file says why it is the larger one, of before.
    assert len(held_out) == 20 and 0 < load_runtime("llama.cpp").structure - rms_of_logs(held_out) < 0.06
    prompts = validated("h200-llama.cpp-prompts")
    assert len(prompts) == 36 and pytest.approx(rms_of_logs(prompts), abs=0.005) == PROMPTS
    decoded = validated("h200-decode")
    later = validated("h200-decode-2026-12-01")
    off = max(rms_of_logs(decoded), rms_of_logs(later))
    # These reports' repeats are those that nobody disturbed; its file says why it is larger.
    assert len(decoded) == len(later) == 31 and 0 < load_runtime("transformers").structure - off < 0.1
