"""What runtimes do that their source or others' measurements tell, each by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from prestage.engine.costs.costs import part_costs
from prestage.engine.load import load_inputs
from prestage.engine.loading.offloading import pinned_experts
from prestage.engine.scenario.scenario import load_scenario
from prestage.errors import InputError
from prestage.resources.profile import load_profile


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


def test_what_a_runtime_moves_of_the_cache_takes_a_share_of_the_rate_that_weights_are_read_with(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    moves = {
        "none": "",
        "all": '[[cache_moves]]\ntimes = 2\nshare = 0.5\nsource = "source"\n',
        "heads": '[[cache_moves]]\nmodel = "gpt-oss"\ntimes_heads = 1\nshare = 0.25\nsource = "source"\n',
        "other": '[[cache_moves]]\nmodel = "olmoe"\ntimes = 2\nshare = 0.5\nsource = "source"\n',
    }
    scenario = ["model.preset=gpt-oss-20b", "memory.capacity=ignore", "workload.context=4000", "machine.profile=h200",
                f"runtime.name={file}", "workload.synthetic.prefill_tokens=0", "workload.synthetic.tokens=5",
                "workload.synthetic.sequences=1"]  # fmt: skip
    took = {}
    for name, text in moves.items():
        file.write_text(f'extends = "prestage"\nname = "own"\n{text}', encoding="utf-8")
        (costs,) = part_costs(load_inputs(load_scenario("synthetic", scenario)))
        attention = costs.attention
        took[name] = {costs.model.attention_of(layer)[0].most: added.ns
                      for layer, added in zip(attention.firsts, attention.by_kind(4), strict=True)}  # fmt: skip
    rate = load_profile("h200").compute.rule.bytes_per_second
    key_bytes = 2 * 8 * 64 * 2
    for window, keys in ((0, 4005), (128, 128)):
        ns = key_bytes * keys * 1e9 / rate
        assert took["all"][window] - took["none"][window] == pytest.approx(2 / 0.5 * ns, abs=1)
        assert took["heads"][window] - took["none"][window] == pytest.approx(64 / 8 / 0.25 * ns, abs=1)
    assert took["other"] == took["none"]


def test_transformers_moves_the_cache_as_long_as_the_kernels_of_a_profile_took() -> None:
    # Of a full layer of gpt-oss-20b, 4 sequences of 8,000 (the shares name their times): cat, repeat_kv,
    # two products, and six kernels over the scores.
    settings = ["runtime.name=transformers", "model.preset=gpt-oss-20b", "machine.profile=h200", "workload.batch=4",
                "workload.context=8000", "workload.synthetic.sequences=4", "workload.prefill=skip"]  # fmt: skip
    added = {}
    for name in ("transformers", "prestage"):
        (costs,) = part_costs(load_inputs(load_scenario("synthetic", [*settings, f"runtime.name={name}"])))
        added[name] = max(each.ns for each in costs.attention.by_kind(0))
    assert added["transformers"] - added["prestage"] == pytest.approx(1_000_000, rel=0.05)


def test_accelerate_keeps_the_layers_that_leave_room_for_two() -> None:
    settings = ["runtime.name=accelerate", "model.preset=olmoe-1b-7b", "machine.gpu=rtx3090"]
    inputs = load_inputs(load_scenario("synthetic", [*settings, "memory.gpu_budget=50%"]))
    layers = {expert // 64 for expert in pinned_experts(inputs)}
    assert layers == set(range(10, 16)), "of 16 layers 8 fit, and two of those are the room of the others"
    with pytest.raises(InputError, match="preload"):
        load_scenario("synthetic", ["memory.pinned=layers"])
