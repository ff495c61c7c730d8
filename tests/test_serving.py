"""Requests served in real time, on tiny models and the CPU: the model's own logits, the simulator's own schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_device import CpuDevice
from test_cli import Prestage
from test_cli import prestage as prestage

from prestage.calibration.decode.deciding import Filling
from prestage.calibration.decode.models import DecodeError, load
from prestage.calibration.decode.packed import PackedCache, masks
from prestage.calibration.decode.runtime import PackedRows, Runtime
from prestage.calibration.decode.served import compare_served, read_served
from prestage.calibration.decode.serving import ServeConfig, serve_all
from prestage.engine.load import load_inputs
from prestage.engine.scenario.scenario import make_scenario
from prestage.workloads.recorder import record

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason="transformers (the extra `record`) is not installed")

from test_decode import plain_logits  # noqa: E402 - needs transformers
from test_decode import saved as saved  # noqa: E402

SCENARIO = """
[model]
preset = "{folder}"

[machine]
profile = "h200-pcie5"

[runtime]
name = "transformers"

[workload.synthetic]
tokens = 60
sequences = 3
prefill_tokens = 8

[memory]
gpu_budget = "50%"

[prefetch]
policy = "none"

[requests]
rate = {rate}
count = 6
prompt_tokens = 7
output_tokens = 3
warmup = "0%"
cooldown = "0%"

[requests.scheduler]
max_num_batched_tokens = 10
max_num_seqs = 3

[requests.kv]
budget = "{blocks}blocks"
block_tokens = 4
"""


def scenario(tmp_path: Path, folder: str, blocks: int = 100, rate: int = 200) -> str:
    path = tmp_path / "served.toml"
    path.write_text(SCENARIO.format(folder=folder, blocks=blocks, rate=rate))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_packed_rows_have_the_logits_that_each_sequence_has_alone(saved: Any, family: str) -> None:
    """Two prompts come in chunks, one decodes beside the other's chunk, one leaves and a third takes its places."""
    model, folder = saved(family)
    if family == "gpt_oss":
        assert model.config.sliding_window >= 1
    loaded = load(CpuDevice(), folder)
    runtime = Runtime(CpuDevice(), loaded, loaded.layers * loaded.num_experts)
    texts = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(3))
    own = [routing_of(model, texts[number], loaded) for number in range(3)]
    cache = PackedCache(CpuDevice(), loaded, 16)  # of 22 rows: there are no more places than who stays has
    # Request, first position, rows of each step; all of request 0 has left before the last step.
    steps = [[(0, 0, 5)], [(0, 5, 1), (1, 0, 4)], [(1, 4, 1), (0, 6, 1)], [(2, 0, 9), (1, 5, 1)]]
    filling = Filling(loaded.layers, loaded.num_experts, loaded.layout.expert_bytes, runtime.slots)
    with runtime.serving(filling):
        for number, step in enumerate(steps):
            cache.keep({1, 2} if number == 3 else {0, 1})
            request = np.repeat([part[0] for part in step], [part[2] for part in step])
            position = np.concatenate([np.arange(first, first + rows) for _, first, rows in step])
            seen = cache.lay_out(request, position)
            tokens = np.array([int(texts[r, p]) for r, p in zip(request, position, strict=True)])
            last = np.cumsum([part[2] for part in step]) - 1
            routing = np.stack([own[r][p] for r, p in zip(request, position, strict=True)])
            rows = PackedRows(tokens, position, masks(loaded, cache, seen, position), last)
            given = runtime.packed_step(rows, routing, cache)
            for (name, first, count), token in zip(step, given, strict=True):
                alone = plain_logits(model, texts[name : name + 1, : first + count])[0, -1]
                assert token == int(alone.argmax()), (number, name)


def routing_of(model: Any, text: Any, loaded: Any) -> np.ndarray:
    """Which experts a plain model chooses for each token of a text (tokens, layers, k)."""
    with record(model) as trace:
        plain_logits(model, text[None])
    return np.asarray(trace.experts, dtype=np.int64)


@pytest.mark.slow
def test_what_is_served_is_what_the_simulation_schedules(saved: Any, tmp_path: Path, prestage: Prestage) -> None:
    _, folder = saved("qwen3_moe")
    config = ServeConfig(folder, scenario(tmp_path, folder), repeats=2)
    report = serve_all(CpuDevice(), config, tmp_path / "out")
    inputs = load_inputs(make_scenario(report["scenario"]))
    assert inputs.scenario.requests is not None and inputs.scenario.requests.scheduler.step_us > 0
    for repeat in report["repeats"]:
        assert repeat["requests"]["requests"] == 6 and repeat["admitted"] == list(range(6))
        parts = [part for step in repeat["steps"] for part in step["parts"]]
        positions = sorted((part[0], at) for part in parts for at in range(part[1], part[1] + part[2]))
        assert positions == [(request, at) for request in range(6) for at in range(7 + 3 - 1)], "all but the last"
        ends = [step["until_ns"] for step in repeat["steps"]]
        assert all(begin["from_ns"] >= end for begin, end in zip(repeat["steps"][1:], ends[:-1], strict=True))
    found = compare_served(read_served(tmp_path / "out"))
    assert found["admitted"] == [True, True] and found["requests"] == 6
    assert [one["steps"] for one in found["repeats"]] == [len(repeat["steps"]) for repeat in report["repeats"]]
    shown = prestage("calibrate", "served", str(tmp_path / "out"))
    assert shown.status == 0 and "admitted in the simulation's order: 2 of 2" in shown.out


@pytest.mark.slow
def test_who_is_preempted_is_computed_again(saved: Any, tmp_path: Path) -> None:
    _, folder = saved("mixtral")
    # Five blocks of four: two prompts of seven fit, what they come to (nine positions each) does not. All are there
    # before the first step ends, however fast this machine is.
    path = scenario(tmp_path, folder, blocks=5, rate=1_000_000)
    report = serve_all(CpuDevice(), ServeConfig(folder, path, repeats=1), tmp_path / "out")
    (repeat,) = report["repeats"]
    assert repeat["requests"]["preemptions"] > 0
    again = [part for step in repeat["steps"] for part in step["parts"] if part[1] == 0]
    assert len(again) > 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("dispatch.mode=graph",), "dispatch.mode = 'graph': must be 'eager'"),
        (("requests.speculation.drafts=2",), "requests.speculation = .*: must not be set"),
        (("requests.replicas=2",), "requests.replicas = 2: must be 1"),
        (("requests.scheduler.name=expert-aware",), "looks at the simulated link"),
    ],
)
def test_what_cannot_be_served_is_one_clear_line(
    saved: Any, tmp_path: Path, settings: tuple[str, ...], message: str
) -> None:
    _, folder = saved("mixtral")
    with pytest.raises(DecodeError, match=message):
        serve_all(CpuDevice(), ServeConfig(folder, scenario(tmp_path, folder), settings), tmp_path / "out")


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "served.json").write_text('{"format": "prestage-decode-1"}')
    with pytest.raises(DecodeError, match="its format must be 'prestage-served-1'"):
        read_served(tmp_path)
