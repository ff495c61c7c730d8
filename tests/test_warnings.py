"""Warnings: each is said where its reason holds, with figures and a remedy, and is not said where it does not."""

from __future__ import annotations

from typing import Any

import pytest

from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.scenario.warnings import WARNINGS
from prestage.engine.simulate import simulate

SMALL = ["workload.tokens=12", "workload.synthetic.tokens=12", "workload.synthetic.sequences=1"]
SMALL += ["workload.synthetic.prefill_tokens=0"]
PIPELINE = ["machine.profile=h200-x2", "parallel.stages=2", "workload.synthetic.sequences=4"]
PARTS = "machine.profile=gpu=rtx4090, ram=64GB DDR5-5600"
SHARED_UPLINK = ["machine.profile=rtx4090-x4", "parallel.gpus=4", "memory.gpu_budget=12%", "workload.batch=4"]
SHARED_UPLINK += ["workload.synthetic.sequences=4"]
#: A machine that was measured with its CPU; a trace with gate weights.
CPU = ["machine.profile=h200", "miss.policy=cpu"]
SKIP = ["model.preset=deepseek-v2-lite", "model.layers=24", "workload.trace=topk", "miss.policy=skip"]
#: For each warning, by its first words: settings with which it is said, and settings with which it is not (None: some
#: kernel of every shipped model is estimated on every shipped profile).
CASES: dict[str, tuple[list[str], list[str] | None]] = {
    "over capacity": (
        ["machine.profile=rtx3090", "memory.gpu_budget=24GiB", "memory.capacity=ignore"],
        ["machine.profile=rtx3090", "memory.capacity=ignore"],
    ),
    "idle memory": (["memory.total_bytes=9GiB"], ["memory.total_bytes=9GiB", "memory.gpu_budget=100%"]),
    "capped budget": (
        ["memory.total_bytes=9GiB", "memory.gpu_budget=95%"],
        ["memory.total_bytes=9GiB", "memory.gpu_budget=1%"],
    ),
    "short trace": (["workload.tokens=13"], ["workload.tokens=12"]),
    "empty places": (["workload.batch=2"], ["workload.batch=2", "workload.synthetic.sequences=2"]),
    "cliff": (["memory.gpu_budget=92experts"], ["memory.gpu_budget=93experts"]),
    "saturated link": (["prefetch.lookahead=2"], ["prefetch.lookahead=0"]),
    "saturated drive": (
        ["machine.profile=rtx3090-nvme", "tiers.host_budget=5%", "tiers.io_lanes=1"],
        ["machine.profile=rtx3090-nvme", "tiers.host_budget=all"],
    ),
    "turnover": (["prefetch.lookahead=6", "prefetch.k=16", "memory.gpu_budget=95experts"], ["memory.gpu_budget=50%"]),
    "host-bound": (["dispatch.mode=eager", "memory.gpu_budget=100%"], ["dispatch.mode=graph"]),
    "overloaded link": ([*SHARED_UPLINK, "copy.contention=false"], SHARED_UPLINK),
    "bubbles": (PIPELINE, [*PIPELINE, "workload.batch=4", "parallel.micro_batches=4"]),
    "prefill dominates": (
        ["workload.synthetic.tokens=60", "workload.synthetic.prefill_tokens=56", "workload.tokens=60"],
        ["workload.synthetic.prefill_tokens=2"],
    ),
    "recall below break-even": (["predictor.recall=0.1"], ["predictor.recall=1.0"]),
    "slower on the CPU": ([*CPU, "memory.preload=popular"], [*CPU, "miss.cpu_gb_per_s=500"]),
    "empty memory": ([*CPU, "prefetch.lookahead=0"], [*CPU, "prefetch.lookahead=0", "memory.preload=popular"]),
    "much is skipped": ([*SKIP, "prefetch.lookahead=0", "miss.threshold=1"], [*SKIP, "miss.threshold=0.01"]),
    "estimated cost in use": ([], None),
    "uncalibrated cost in use": ([], ["dispatch.mode=free", "dispatch.router_readback=false"]),
    "idle GPUs": (["machine.profile=h200-hgx-x8", "parallel.stages=4"], [*PIPELINE]),
    "unused keys": ([*PIPELINE, "parallel.placement=linear"], ["machine.profile=h200-x2", "parallel.gpus=2"]),
    "idle drive": ([f"{PARTS}, drive=7GB/s"], [f"{PARTS}, drive=7GB/s", "tiers.host_budget=50%"]),
    "idle CPU": ([f"{PARTS}, cpu=7950x"], [f"{PARTS}, cpu=7950x", "miss.policy=cpu"]),
    "prediction is free": ([], ["predictor.latency_us=5"]),
}


def warned(settings: list[str]) -> dict[str, str]:
    """What a run of the default scenario with these settings warns of, by the words before the colon."""
    data = simulate(load_scenario("synthetic", settings=[*SMALL, *settings]), baselines=False, check_prefetch=True).data
    return {said.partition(":")[0]: said for said in data["warnings"]}


def test_every_warning_has_its_cases() -> None:
    assert len(CASES) == len(WARNINGS) - 1  # that of a trained predictor without a GPU: see test_learned


@pytest.mark.parametrize("name", CASES)
def test_a_warning_is_said_with_its_reason_and_a_remedy(name: str) -> None:
    said = warned(CASES[name][0])[name]
    assert len(said.splitlines()) == 1
    reason, _, remedy = said.partition("; ")
    assert len(reason) > len(name) + 20
    assert any(word in remedy for word in ("use ", "set ", "lower ", "calibrate ", "trust "))


@pytest.mark.parametrize("name", [name for name, (_, without) in CASES.items() if without is not None])
def test_a_warning_is_not_said_where_its_reason_does_not_hold(name: str) -> None:
    assert name not in warned(CASES[name][1] or [])


def test_what_is_measured_is_not_told_as_uncalibrated() -> None:
    said = warned([])["uncalibrated cost in use"]
    assert "host.graph_launch (assumed)" in said and "of profile h200-pcie5" in said
    assert "h2d.pinned" not in said  # measured
    assert "pageable" not in said and "host.launch (" not in said and "eager" not in said  # not in use
    assert "h2d.pageable.queued (assumed)" in warned(["copy.host_memory=pageable"])["uncalibrated cost in use"]


def test_pageable_copies_are_told_as_what_holds_the_host() -> None:
    said = warned(["copy.host_memory=pageable"])["host-bound"]
    assert "a pageable copy holds the host's thread" in said and "copy.host_memory = pinned" in said


def test_recall_is_judged_only_when_asked() -> None:
    scenario = load_scenario("synthetic", settings=[*SMALL, "predictor.recall=0.1"])
    data: dict[str, Any] = simulate(scenario, baselines=False).data
    assert "no_prefetch_ms" not in data
    assert not [said for said in data["warnings"] if said.startswith("recall below break-even")]


def test_the_turnover_names_the_room_that_it_takes() -> None:
    said = warned(CASES["turnover"][0])["turnover"]
    # 6 layers ahead, 16 guesses each, and the 4 experts of the layer itself.
    assert "96 guessed ahead need room for 100 and there is room for 95" in said


def test_one_thread_for_all_gpus_is_told_as_what_holds_them_up() -> None:
    settings = [*PIPELINE, "workload.batch=4", "parallel.micro_batches=4", *CASES["host-bound"][0]]
    said = warned([*settings, "parallel.dispatch_threads=one"])["host-bound"]
    assert "one thread serves them all in turn" in said and "use parallel.dispatch_threads = per-gpu" in said
    assert "one thread" not in warned(settings).get("host-bound", "")


def test_idle_gpus_are_told_by_the_keys_that_put_them_to_work() -> None:
    eight = "machine.profile=h200-hgx-x8"
    said = warned([eight])["idle GPUs"]
    assert said == (
        "idle GPUs: the machine has 8, and one of them is at work; set parallel.stages = 8 or parallel.gpus = 8 to use "
        "all"
    )
    served = warned([eight, "requests.rate=100", "requests.count=3", "requests.replicas=2"])["idle GPUs"]
    assert "2 of them are at work; set requests.replicas = 8" in served
    assert "idle GPUs" not in warned(["machine.profile=h200-x2", "copy.source=peer"])


def test_keys_of_shared_experts_are_told_where_none_are_shared() -> None:
    said = warned([*PIPELINE, "parallel.placement=linear", "parallel.remote=host"])["unused keys"]
    assert said == (
        "unused keys: no GPUs share experts, so that nothing comes of parallel.placement = linear, parallel.remote = "
        "host; set parallel.gpus = 2 in place of parallel.stages to share them"
    )
    one = warned(["parallel.spare_bytes=1GiB"])["unused keys"]
    assert one.endswith("; set parallel.gpus, of a machine with several, to share them")


def test_a_processor_that_copies_wait_for_is_not_idle() -> None:
    older = "machine.profile=gpu=rtx5090, cpu=5950x, ram=64GB DDR4-3200"  # its PCIe 4 is slower than the GPU's 5
    assert "idle CPU" not in warned([older])
    assert "idle CPU" in warned([f"{older}, link=pcie4 x16"])
