"""An expert budget that shrinks as the KV cache grows (`memory.total_bytes`), worked by hand."""

import re
from dataclasses import replace

import numpy as np
import pytest
from tiny import tiny_model, tiny_profile, tiny_scenario, tiny_trace

from prestage.engine.decide.memory_manager import MemoryManager
from prestage.engine.load import expert_budgets, load_inputs
from prestage.engine.policies.eviction import Lru
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import load_scenario, make_scenario
from prestage.engine.simulate import simulate_inputs
from prestage.workloads.batches import plan_steps

# One layer of four experts of 20 bytes; 3 bytes of dense weights, 2 of head, 10 bytes of KV cache a token.
MODEL = replace(tiny_model(1, head_ns=2), kv_bytes_per_token=10)


def budgets_of(total: str, sequence: list[int], **memory: str) -> list[int] | None:
    trace = tiny_trace([[[0]]] * len(sequence), sequence=np.array(sequence))
    steps = plan_steps(trace.sequence, trace.phase, batch=2)
    scenario = tiny_scenario(memory={"gpu_budget": "100%", "total_bytes": total, **memory}, workload={"batch": 2})
    return expert_budgets(Inputs(scenario, MODEL, tiny_profile(), trace, steps, budget_bytes=80, guesses=None))


def test_experts_get_what_weights_cache_and_workspace_leave_and_no_more_than_their_budget() -> None:
    # 3 tokens of one sequence: total - 3 - 2 - 10 per token so far. 80 bytes are all experts.
    assert budgets_of("100B", [0, 0, 0]) == [80, 75, 65]
    assert budgets_of("100B", [0, 0, 0], workspace_bytes="20B") == [65, 55, 45]


def test_a_finished_sequence_leaves_the_kv_cache() -> None:
    # Two places: sequence 0 has one token, 1 has three. Step 1 holds 1 + 1 tokens; then 0 is gone, and 1 holds 2, 3.
    assert budgets_of("100B", [0, 1, 1, 1]) == [75, 75, 65]


def test_a_budget_that_shrinks_evicts_in_the_policys_order() -> None:
    manager = MemoryManager([20], 4, 80, Lru)
    for expert in (2, 0, 3):
        manager.visit(0, 0, [expert], [expert], [1.0])
        manager.unpin()
    manager.resize(45)  # room for two: 2, the least recent, leaves
    assert sorted(manager.assigned) == [0, 3]
    assert manager.budget_bytes == 40  # what whole experts can use
    manager.resize(80)
    assert sorted(manager.assigned) == [0, 3]
    assert manager.visit(1, 0, [1], [1], [1.0])[0].admitted[0].former == ()  # new room, no reader to wait for


def test_a_run_never_holds_more_than_the_budget_of_its_step_and_says_so() -> None:
    trace = tiny_trace([[[token % 4]] for token in range(6)])
    steps = plan_steps(trace.sequence, trace.phase)
    scenario = tiny_scenario(memory={"gpu_budget": "100%", "total_bytes": "100B"})
    bare = Inputs(scenario, MODEL, tiny_profile(), trace, steps, budget_bytes=80, guesses=None)
    inputs = replace(bare, budgets=expert_budgets(bare))
    result = simulate_inputs(inputs, baselines=False)
    visits = result.recording.decoded.visits
    # 85, 75, 65, 55, 45 and 35 bytes, in whole experts of 20 and 80 at most.
    assert visits["budget_bytes"].tolist() == [80, 60, 60, 40, 40, 20]
    assert (visits["assigned_bytes"] <= visits["budget_bytes"]).all()
    # Experts 0, 1, 2 come; the budgets of two evict 0 for itself, 1 for 3 and 2 for 0 again, that of one evicts 3.
    assert result.data["counts"]["miss"] == 6
    assert result.data["budget_bytes"] == 80


def test_a_total_that_cannot_hold_an_expert_to_the_end_is_refused_before_the_run() -> None:
    scenario = make_scenario(
        {
            "model": {"preset": "mixtral-8x7b"},
            "workload": {"synthetic": {"tokens": 2}},
            "memory": {"total_bytes": "2GiB"},
        }
    )
    # 32 layers of attention and router take 2.50 GiB in 16 bits, head and input embedding 32000 x 4096 x 2 bytes each.
    told = (
        "memory.total_bytes = '2GiB': less dense weights 2.50 GiB + head 250.01 MiB + input embedding 250.00 MiB + KV "
        "cache 256.00 KiB, too little is left: the expert budget is "
    )
    with pytest.raises(ScenarioError, match=f"^{re.escape(told)}"):
        load_inputs(scenario)


def test_a_total_may_be_a_share_of_what_the_gpu_holds() -> None:
    settings = ["model.preset=gpt-oss-20b", "workload.tokens=4", "memory.total_bytes=50%", "memory.capacity=ignore"]
    for machine, memory_bytes in (("gpu=rtx4090", 24 * 2**30), ("rtx4090-x4", 24 * 2**30), ("h200", 150109880320)):
        inputs = load_inputs(load_scenario("one-gpu", [*settings, f"machine.profile={machine}"]))
        assert inputs.scenario.memory.total_bytes == f"{memory_bytes // 2}B"
    with pytest.raises(ScenarioError, match=r"total_bytes = '101%': write it as '24GiB', or a share of the GPU's"):
        load_scenario("one-gpu", ["memory.total_bytes=101%"])
    with pytest.raises(ScenarioError, match=r"workspace_bytes = '5%': write it as '24GiB'$"):
        load_scenario("one-gpu", ["memory.workspace_bytes=5%"])
