"""How long a run could last is bounded before it runs: times are integers of 64 bits."""

from __future__ import annotations

import pytest

from prestage.engine.load import load_inputs
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.scenario import load_scenario

SMALL = (
    "model.layers=2",
    "workload.synthetic.tokens=8",
    "workload.synthetic.prefill_tokens=1",
    "memory.gpu_budget=100%",
)


def test_a_run_whose_times_do_not_fit_into_64_bits_is_refused_with_what_takes_so_long() -> None:
    # 10^12 bytes at 10^3 bytes a second are 10^9 s, 10^18 ns, each time: 2^58 ns are 2.9 x 10^17.
    slow = ("miss.policy=cpu", "miss.cpu_gb_per_s=1e-6", "model.expert_bytes=1000000000000", "memory.capacity=ignore")
    with pytest.raises(
        ScenarioError, match=r"longer than 9 years, most of it for an expert on the CPU, 2.06e\+09 s each"
    ):
        load_inputs(load_scenario("synthetic", (*SMALL, *slow)))


def test_a_slow_run_that_fits_is_none_of_it() -> None:
    # 10^9 bytes take 10^6 s: a few visits of four experts are some months.
    slow = ("miss.policy=cpu", "miss.cpu_gb_per_s=1e-6", "model.expert_bytes=1000000000")
    assert load_inputs(load_scenario("synthetic", (*SMALL, *slow, "workload.tokens=1"))).steps
