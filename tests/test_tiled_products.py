"""Products of quantized weights by a runtime's own kernels: the operations of their tiles, at a rate of the GPU's."""

from __future__ import annotations

import numpy as np
import pytest

from prestage.calibration.observe.prompts import prompts, scenario_of
from prestage.engine.costs.tiled_products import TiledProducts
from prestage.engine.load import load_inputs
from prestage.engine.prediction import middles
from prestage.engine.scenario.scenario import make_scenario
from prestage.engine.simulate import simulate_inputs
from prestage.resources.parts.tables import gpu_of_device
from prestage.resources.runtime import OwnProducts
from prestage.workloads.batches import DECODE, PREFILL, Step

#: Twice what an RTX 3090 computes in float32, 35.58 TFLOP/s.
OWN = OwnProducts(of_float32=2, tile=128, source="assumed")
RTX3090 = "NVIDIA GeForce RTX 3090 (24 GB), PCIe 4.0 x16"


def tiled(own: OwnProducts | None = OWN, device: str = RTX3090, prompt: int = 500, batch: int = 1) -> TiledProducts:
    steps = [Step(PREFILL, np.arange(prompt)), Step(DECODE, np.arange(batch))]
    return TiledProducts(own, device, steps)


@pytest.mark.parametrize(
    ("prompt", "tokens", "columns"),
    [
        (500, 1, 128),  # a tile is as wide as the whole step's tokens, 128 at most, however few an expert has
        (500, 129, 256),
        (60, 3, 64),  # 60 tokens, rounded up to whole eights
        (60, 65, 128),
    ],
)
def test_an_experts_tokens_are_computed_in_whole_tiles_of_the_steps_width(
    prompt: int, tokens: int, columns: int
) -> None:
    # A MB of weights of 4 bits: two million, each two operations a token.
    ns = tiled(prompt=prompt).least_ns("int4", 10**6, tokens, PREFILL)
    assert ns == pytest.approx(2 * 2 * 10**6 * columns / (2 * 35.58e12) * 1e9)


@pytest.mark.parametrize(
    ("products", "dtype", "tokens"),
    [
        (tiled(), "int4", 1),  # a token of a decode step: products with vectors
        (tiled(batch=8), "int4", 8),
        (tiled(), "bfloat16", 500),  # not quantized
        (tiled(own=None), "int4", 500),
        (tiled(device="machine of round numbers"), "int4", 500),  # nobody knows what it computes in float32
    ],
)
def test_other_products_take_what_the_machine_says(products: TiledProducts, dtype: str, tokens: int) -> None:
    assert products.least_ns(dtype, 10**6, tokens) == 0


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("2 x NVIDIA GeForce RTX 4090, AMD Ryzen 9 7950X (from parts)", "rtx4090"),
        (RTX3090, "rtx3090"),
        ("machine of round numbers", None),
    ],
)
def test_a_profiles_device_names_its_gpu(device: str, name: str | None) -> None:
    gpu = gpu_of_device(device)
    assert (gpu and gpu.name) == name


@pytest.mark.slow
def test_prompts_wholly_on_an_h200_take_within_half_of_what_llama_bench_measured() -> None:
    # Nothing was fitted to them: without the rate of such products they came out ten times too quick.
    for name, row, samples in prompts():
        if row["n_cpu_moe"] == 0:
            result = simulate_inputs(load_inputs(make_scenario(scenario_of(name, row))), baselines=False)
            ns = middles(result.data)["time_to_first_token_ms"] * 1e6
            assert 1 / 1.5 < ns / float(np.median(samples)) < 1.5, name
