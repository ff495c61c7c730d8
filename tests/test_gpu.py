"""Executions on a CUDA GPU, where there is one: what test_execute asks of a device on the CPU, asked of a real one."""

from __future__ import annotations

import pytest
import torch
from test_execute import EXPERT_BYTES, EXPERTS, LAYERS, VARIANTS, expect_the_simulations_spans, small_inputs
from test_execute_beside import VARIANTS as BESIDE
from test_execute_beside import inputs_of
from test_execute_shared_layers import VARIANTS as TOGETHER
from test_execute_shared_layers import expect_the_spans_of_both

from prestage.calibration.device.cuda import Gpu
from prestage.calibration.executor.execute import Execution, execute
from prestage.calibration.executor.shared import Shared
from prestage.calibration.measure.exchanges import measure_collectives
from prestage.engine.costs.costs import part_costs
from prestage.engine.run import prepared, run_all
from prestage.resources.timeline import LAUNCH

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return Gpu()


@pytest.fixture(scope="module")
def shared(gpu: Gpu) -> Shared:
    return Shared(gpu, LAYERS * EXPERTS * EXPERT_BYTES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_execution_makes_the_spans_that_the_simulation_makes(variant: str, gpu: Gpu, shared: Shared) -> None:
    expect_the_simulations_spans(gpu, variant, shared)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_stays_in_a_slot_are_the_bytes_of_its_expert(variant: str, gpu: Gpu, shared: Shared) -> None:
    execution = Execution([gpu], small_inputs(**VARIANTS[variant]), shared)
    execution.run()
    (part,) = execution.parts
    assert part.plan.resident
    assert all(part.holds_right_bytes(expert, slot) for expert, slot in part.plan.resident.items())


@pytest.mark.parametrize("variant", BESIDE)
def test_what_runs_beside_makes_the_spans_that_its_simulation_makes(
    variant: str, gpu: Gpu, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pool = Shared(gpu, LAYERS * EXPERTS * 8192, drive=tmp_path_factory.mktemp("drive") / "experts")
    inputs = inputs_of(variant)
    measured = execute([gpu], inputs, variant, pool, repeats=1)  # and its results are right
    pool.close()
    (simulated,) = run_all(inputs, prepared(inputs, part_costs(inputs)))
    assert len(measured.timelines()[0].spans()) >= len(simulated.spans[simulated.spans["kind"] != LAUNCH])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("variant", TOGETHER)
def test_gpus_that_share_experts_make_the_spans_that_their_simulation_makes(variant: str, gpu: Gpu) -> None:
    expect_the_spans_of_both([gpu, gpu.sibling(1)], variant, Shared(gpu, LAYERS * EXPERTS * 8192))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_larger_all_to_alls_take_longer() -> None:
    series = measure_collectives(2, (65536, 2**26), rounds=1)
    small, large = (min(one.rounds_ns[0]) for one in series if one.key["mode"] == "in a row")
    assert 0 < small < large
