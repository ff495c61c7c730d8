"""Grouped kernels by the surface: one product over the rows of all experts, the constant taken once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prestage.engine.costs.costs import Costs
from prestage.engine.costs.surface_costs import SurfaceCosts, expert_kernels
from prestage.engine.load import load_inputs
from prestage.engine.scenario.scenario import load_scenario
from prestage.resources.profile import load_profile
from prestage.workloads.model import Routed

#: Qwen3-30B-A3B's experts: 128 of 2048 x 768, of which a token takes 8.
EXPERT = expert_kernels(2048, 768, "bfloat16", 3, 5, 3 * 2048 * 768 * 2)


def costs_of(kernel: str = "grouped") -> Costs:
    settings = ["model.preset=qwen3-30b-a3b", "machine.profile=h200", "dispatch.mode=graph", "workload.tokens=4"]
    return Costs(load_inputs(load_scenario("one-gpu", [*settings, f"dispatch.expert_kernel={kernel}"])))


def by_surface(experts: int, tokens: int) -> float:
    """Returns what a product over the rows of so many experts takes on the H200."""
    surface = load_profile("h200").compute.surface
    assert surface is not None
    return SurfaceCosts(surface, "graph").time(EXPERT.of_experts(experts), tokens).ns


@pytest.mark.parametrize(("experts", "tokens"), [(8, 1), (128, 1), (128, 4), (128, 32)])
def test_a_tokens_experts_and_all_of_a_layers_take_what_their_rows_together_take(experts: int, tokens: int) -> None:
    assert costs_of().grouped(0, [tokens] * experts).ns == pytest.approx(by_surface(experts, tokens), abs=experts)


def test_experts_between_lie_on_a_line_and_unequal_ones_add_up() -> None:
    costs = costs_of()
    eight, all_, half = (costs.grouped(0, [1] * count).ns for count in (8, 128, 68))
    assert half == pytest.approx((eight + all_) / 2, abs=2)
    one, many = (costs.grouped(0, [tokens] * 128).ns for tokens in (1, 32))
    assert costs.grouped(0, [1] * 64 + [32] * 64).ns == pytest.approx((one + many) / 2, abs=2)


def test_all_of_a_layers_experts_take_at_least_the_time_in_which_their_weights_are_read() -> None:
    # 128 experts of 9 MiB at the H200's 4.8 TB/s are 252 us; engines' own kernels took 301 to 316 us over 64 tokens
    # (AIConfigurator 0.12.0: vLLM, SGLang and TensorRT-LLM, one H200).
    ns = costs_of().grouped(0, [4] * 128).ns
    assert ns > 128 * 3 * 2048 * 768 * 2 / 4.8e12 * 1e9
    assert ns == pytest.approx(308_000, rel=0.06)


def test_an_expert_of_a_layer_with_fewer_costs_the_same_whichever_layer_is_asked_for_first() -> None:
    settings = ["model.preset=qwen3-30b-a3b", "machine.profile=h200", "workload.tokens=4", "dispatch.mode=graph"]
    inputs = load_inputs(load_scenario("one-gpu", [*settings, "dispatch.expert_kernel=grouped"]))
    last = inputs.model.layers - 1
    by_layer = (Routed(128, 8, 768),) * last + (Routed(16, 8, 768),)
    inputs = replace(inputs, model=replace(inputs.model, by_layer=by_layer))
    alone, behind = Costs(inputs), Costs(inputs)
    assert behind.expert(0, 1).ns != alone.expert(last, 1).ns
    assert behind.expert(last, 1) == alone.expert(last, 1)


def test_only_grouped_kernels_are_told_as_such() -> None:
    grouped, separate = costs_of(), costs_of("separate")
    for costs in (grouped, separate):
        costs.expert(0, 1)
    assert "share of one product" in grouped.estimates["grouped expert kernel"]
    assert "grouped expert kernel" not in separate.estimates
