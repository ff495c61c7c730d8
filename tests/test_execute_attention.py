"""Attention over a context in executions: what each visit looks at, and that it is among the dense part's kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cpu_device import CpuDevice
from test_execute import EXPERT_BYTES, EXPERTS, HIDDEN, LAYERS, TOP_K, small_model
from tiny import tiny_inputs, tiny_profile, tiny_scenario

from prestage.calibration.device.attention import Attended
from prestage.calibration.device.cuda import Workload, run
from prestage.calibration.executor.attending import Attends
from prestage.calibration.executor.entries import ExecutionError
from prestage.calibration.executor.executable import check_executable
from prestage.calibration.executor.execute import execute
from prestage.calibration.executor.shared import Shared
from prestage.calibration.fit.in_schedule import samples
from prestage.engine.scenario.inputs import Inputs
from prestage.workloads.model import Attending, Model
from prestage.workloads.synthetic import synthesize

#: Two KV heads of 8 for each four query heads, in 16 bits: 4 x 2 x 8 bytes a key.
FULL = Attending(heads=4, kv_heads=2, head_dim=8, key_bytes=64)
WINDOW = replace(FULL, most=12)
CONTEXT = {"trace": "none", "batch": 2, "context": 10, "prefill": "skip"}


def model_with(*layers: tuple[Attending, ...]) -> Model:
    attention = (*layers, *((FULL,),) * (LAYERS - len(layers)))
    dense_bytes = (4 * HIDDEN * 32 * 2,) * LAYERS
    model: Model = replace(small_model(), dense_dtype="bfloat16", dense_bytes=dense_bytes, attention=attention)
    return model


def inputs_with(model: Model, sequences: int = 2, tokens: int = 6, **sections: Any) -> Inputs:
    trace = synthesize(
        tokens, LAYERS, EXPERTS, TOP_K, skew=0.3, working_set=EXPERTS, reuse=0.3, sequences=sequences, seed=4
    )
    chosen = {"memory": {"gpu_budget": "12experts"}, "dispatch": {"mode": "graph"}, "workload": CONTEXT} | sections
    inputs: Inputs = tiny_inputs(model, tiny_profile(), trace, tiny_scenario(**chosen))
    return inputs


def test_a_visit_looks_at_all_keys_of_its_sequences_or_at_those_of_a_window() -> None:
    attends = Attends(inputs_with(model_with((FULL,), (WINDOW, FULL))))
    # Three steps of two sequences behind a context of 10: their rows look at 11, 12 and 13 positions with themselves.
    full = [attends.of(step * LAYERS) for step in range(3)]
    assert [[(each.sequences, each.keys) for each in visit] for visit in full] == [[(2, 11)], [(2, 12)], [(2, 13)]]
    assert [each.keys for each in attends.of(2 * LAYERS + 1)] == [12, 13]
    assert {each.most_keys for each in attends.of(0)} == {13}


def test_without_a_context_nothing_is_attended_to() -> None:
    attends = Attends(inputs_with(small_model(), workload={"trace": "none", "batch": 2}))
    assert attends.of(0) == ()


def test_attention_is_one_of_the_kernels_that_a_dense_part_has_and_looks_at_so_many_keys() -> None:
    slots = torch.zeros(2, EXPERT_BYTES, dtype=torch.uint8)
    workload = Workload(CpuDevice(), model_with(), slots, most_tokens=4, graphs=False)
    calls = workload.dense(0, 2, (Attended(0, 4, 2, 8, 2, 11, 13),))
    assert len(calls) == len(workload.dense(0, 2)) == 7
    ((function, (queries, keys, values)),) = [call for call in calls if len(call[1]) == 3]
    assert (queries.shape, keys.shape) == ((2, 4, 1, 8), (2, 2, 11, 8))
    # Worked out by hand: query heads 0 and 1 share the first KV head.
    weights = (queries.float() @ keys.float().repeat_interleave(2, 1).mT / 8**0.5).softmax(-1)
    expected = weights @ values.float().repeat_interleave(2, 1)
    torch.testing.assert_close(function(queries, keys, values).float(), expected, rtol=0.05, atol=0.05)
    run(calls)


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_an_execution_with_a_context_makes_the_same_decisions_and_says_nothing_of_plain_dense_parts(mode: str) -> None:
    shared = Shared(CpuDevice(), LAYERS * EXPERTS * EXPERT_BYTES)
    measured, plain = (
        execute([CpuDevice()], inputs_with(model_with(), dispatch=way, workload=each), mode, shared, repeats=1)
        for way, each in (({"mode": mode}, CONTEXT), ({"mode": mode}, {"trace": "none", "batch": 2}))
    )
    assert measured.gpus[0].counts == plain.gpus[0].counts
    assert {row["cost"] for row in samples([plain])} >= {"host:dense"}
    assert not [row for row in samples([measured]) if row["cost"] in ("dense", "host:dense")]


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        (inputs_with(model_with(), sequences=3, tokens=7), "different positions"),
        (inputs_with(small_model()), "dense_dtype = 'float32'"),
        (inputs_with(model_with((replace(FULL, key_bytes=32),))), "1 of its kinds of attention"),
        (inputs_with(model_with((replace(FULL, latent_dim=32),))), "1 of its kinds of attention"),
    ],
)
def test_what_has_no_kernels_is_refused_by_name(inputs: Inputs, named: str) -> None:
    with pytest.raises(ExecutionError, match=named):
        check_executable(inputs)
