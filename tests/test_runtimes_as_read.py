"""What runtimes do that their source or others' measurements tell, each by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from prestage.engine.costs.costs import part_costs
from prestage.engine.load import load_inputs
from prestage.engine.loading.offloading import pinned_experts
from prestage.engine.scenario.scenario import load_scenario
from prestage.errors import InputError


@pytest.mark.parametrize(("mode", "counted"), [("graph", 1), ("free", 0)])
def test_positions_that_sparse_attention_has_cached_take_a_time_of_the_runtimes_own(
    mode: str, counted: int, tmp_path: Path
) -> None:
    file = tmp_path / "own.toml"
    scenario = ["model.preset=qwen3.8-flash-next", "memory.capacity=ignore", "workload.context=100000",
                f"runtime.name={file}", "machine.gpu=rtx3090", "workload.synthetic.prefill_tokens=0",
                "workload.synthetic.tokens=5", "workload.synthetic.sequences=1", f"dispatch.mode={mode}"]  # fmt: skip
    added = []
    for ns in (0, 10):
        file.write_text(
            f'extends = "prestage"\nname = "own"\n[costs.indexed]\nns = {ns}\nsource = "assumed"\n', encoding="utf-8"
        )
        (costs,) = part_costs(load_inputs(load_scenario("synthetic", scenario)))
        added.append([each.ns for each in costs.attention.by_kind(costs.attention.heaviest_step())])
    sparse = [after - before for before, after in zip(*added, strict=True)]
    # Layers of a gated delta rule, and sparse ones: 10 ns for each of 100,000 positions, 4 tokens and the row's own.
    assert min(sparse) == 0 and max(sparse) == counted * 10 * 100_005


def test_accelerate_keeps_the_layers_that_leave_room_for_two() -> None:
    settings = ["runtime.name=accelerate", "model.preset=olmoe-1b-7b", "machine.gpu=rtx3090"]
    inputs = load_inputs(load_scenario("synthetic", [*settings, "memory.gpu_budget=50%"]))
    layers = {expert // 64 for expert in pinned_experts(inputs)}
    assert layers == set(range(10, 16)), "of 16 layers 8 fit, and two of those are the room of the others"
    with pytest.raises(InputError, match="preload"):
        load_scenario("synthetic", ["memory.pinned=layers"])
