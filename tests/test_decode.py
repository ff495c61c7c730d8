"""The real runtime: its logits are the plain model's, and its decisions the simulator's, on tiny models and the CPU."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpu_device import CpuDevice
from test_cli import Prestage
from test_cli import prestage as prestage
from test_llama_cpp import FAMILIES, SHAPES

from prestage.calibration.decode import models, parts
from prestage.calibration.decode.deciding import Deciding, Filling
from prestage.calibration.decode.models import DecodeError, load
from prestage.calibration.decode.runs import DecodeConfig, Known, Point, decode_all, parse_point
from prestage.calibration.decode.runtime import Runtime
from prestage.calibration.executor.plan import decision_counts
from prestage.engine.load import load_inputs
from prestage.engine.scenario.scenario import Scenario
from prestage.workloads.model import load_model
from prestage.workloads.torch_threads import one_thread
from prestage.workloads.trace import RoutingTrace

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason="transformers (the extra `record`) is not installed")

from test_recorder import DECODERS, tiny  # noqa: E402 - needs transformers


@pytest.fixture(autouse=True, scope="module")
def small_models_on_one_core() -> Iterator[None]:
    """Several take twice the time of models as small as these."""
    with one_thread():
        yield


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """Saves the tiny model of a family; returns it and its folder."""

    def save(family: str) -> tuple[Any, str]:
        model = tiny(family).float()
        model.save_pretrained(tmp_path / family)
        return model, str(tmp_path / family)

    return save


def prompt_and_rest(batch: int = 2) -> tuple[Any, Any]:
    tokens = torch.randint(3, 60, (batch, 12), generator=torch.Generator().manual_seed(3))
    return tokens[:, :7], tokens[:, 7:]


def plain_logits(model: Any, *parts: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.cat(parts, dim=1)).logits


@pytest.mark.slow
@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("batch", [1, 2])
def test_logits_are_the_plain_models_whatever_is_evicted(saved: Any, family: str, batch: int) -> None:
    model, folder = saved(family)
    prompt, rest = prompt_and_rest(batch)
    loaded = load(CpuDevice(), folder)
    slots = loaded.top_k + 1  # a layer's experts replace those of the layer before; a batch of two is served in waves
    runtime = Runtime(CpuDevice(), loaded, slots)
    filling = Filling(loaded.layers, loaded.num_experts, loaded.layout.expert_bytes, slots)
    steps = runtime.decode(runtime.fill(prompt), filling, 5, forced=rest, keep_logits=True)
    expected = plain_logits(model, prompt, rest)[:, 7:]
    assert torch.allclose(torch.stack(steps.logits, dim=1), expected, rtol=1e-4, atol=1e-6)


def test_a_wrong_experts_bytes_change_the_logits(saved: Any) -> None:
    """The test above can fail: the bytes that are copied are those that are used."""
    model, folder = saved("qwen3_moe")
    prompt, rest = prompt_and_rest()
    loaded = load(CpuDevice(), folder)
    loaded = replace(loaded, host=loaded.host[::-1])
    runtime = Runtime(CpuDevice(), loaded, 10)
    filling = Filling(loaded.layers, loaded.num_experts, loaded.layout.expert_bytes, 10)
    steps = runtime.decode(runtime.fill(prompt), filling, 5, forced=rest, keep_logits=True)
    assert not torch.allclose(
        torch.stack(steps.logits, dim=1), plain_logits(model, prompt, rest)[:, 7:], rtol=1e-4, atol=1e-6
    )


POINTS = [Point("25%", 1, 10), Point("25%", 1, 10, 2), Point("60%", 3, 10), Point("60%", 3, 10, 4)]


def simulated_counts(run: dict[str, Any], out: Path, change: Any = lambda trace: trace) -> dict[str, int]:
    """What the simulator decides in the scenario and with the routing that a run left."""
    trace = change(RoutingTrace.load(out / f"{run['name']}.safetensors"))
    inputs = load_inputs(Scenario.model_validate(run["scenario"]), trace)
    known = Known(inputs)
    visits = [known.visit(0, []) for _ in range(len(inputs.steps) * inputs.model.layers)]
    return decision_counts(visits, known.manager)


@pytest.mark.slow
def test_decisions_are_those_of_a_simulation_of_the_routing_that_was_met(saved: Any, tmp_path: Path) -> None:
    _, folder = saved("qwen3_moe")
    out = tmp_path / "out"
    config = DecodeConfig(folder, POINTS, tokens=8, warmup=2, repeats=3)
    report = decode_all(CpuDevice(), config, out)
    assert len(report["runs"]) == 4 and json.loads((out / "decode.json").read_text()) == report
    for run in report["runs"]:
        assert run["same_routing"] and len(run["repeats"]) == 3 and all(len(r["step_ns"]) == 8 for r in run["repeats"])
        assert run["counts"] == [simulated_counts(run, out)] * 3
    found = {run["name"].split("-", 1)[1]: run["counts"][0]["found"] for run in report["runs"]}
    assert found["25pct-b1-c10-p0-own"] < found["25pct-b1-c10-p2-own"], "prefetch by the gates finds nothing more"
    prefetching = report["runs"][1]
    without = simulated_counts(prefetching, out, lambda trace: replace(trace, predictions=trace.predictions * 0 - 1))
    assert without != prefetching["counts"][0], "the guesses that were recorded decide nothing"


def recorded_trace(path: Path, layers: int = 3, experts: int = 20, k: int = 3) -> Path:
    random = np.random.default_rng(0)
    chosen = np.stack([[random.permutation(experts)[:k] for _ in range(layers)] for _ in range(40)])
    RoutingTrace(chosen.astype(np.uint8), experts).save(path)
    return path


@pytest.mark.slow
def test_a_recorded_routing_takes_the_place_of_the_routers(saved: Any, tmp_path: Path) -> None:
    _, folder = saved("qwen3_moe")
    path, out = recorded_trace(tmp_path / "trace.safetensors"), tmp_path / "out"
    points = [Point("30%", 1, 5, 0, True), Point("30%", 2, 5, 3, True)]
    config = DecodeConfig(folder, points, tokens=10, warmup=2, repeats=1, routing=path, predictor="oracle")
    report = decode_all(CpuDevice(), config, out)
    trace = RoutingTrace.load(path)
    for run, batch in zip(report["runs"], (1, 2), strict=True):
        met = RoutingTrace.load(out / f"{run['name']}.safetensors")
        assert (met.experts == trace.experts[: 10 * batch]).all()
        assert (met.sequence == np.repeat(range(batch), 10)).all()
        assert run["counts"] == [simulated_counts(run, out)]


@pytest.mark.slow
def test_a_recorded_choice_gets_the_weights_of_the_routers_ranks(saved: Any) -> None:
    """With the model's own choices recorded, the logits are its own."""
    model, folder = saved("mixtral")
    prompt, rest = prompt_and_rest()
    loaded = load(CpuDevice(), folder)
    runtime = Runtime(CpuDevice(), loaded, 24)
    filled = runtime.fill(prompt)

    def decoded(**more: Any) -> Any:
        filling = Filling(loaded.layers, loaded.num_experts, loaded.layout.expert_bytes, 24)
        return runtime.decode(filled, filling, 5, forced=rest, keep_logits=True, **more)

    own = decoded()
    again = decoded(routing=np.stack(own.routing))
    other = decoded(routing=(np.stack(own.routing) + 1) % 8)
    expected = plain_logits(model, prompt, rest)[:, 7:]
    assert torch.allclose(torch.stack(again.logits, dim=1), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(torch.stack(other.logits, dim=1), expected, rtol=1e-4, atol=1e-6)


def test_random_weights_have_the_shapes_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = tmp_path / "small.toml"
    shapes.write_text(SHAPES.format(**FAMILIES["qwen3moe"]))
    monkeypatch.setattr(models, "POOL_BYTES", 10 * 3 * 512 * 256 * 2)
    loaded = load(CpuDevice(), str(shapes), layers=2)
    assert (loaded.layers, loaded.num_experts, loaded.top_k, loaded.random) == (2, 8, 2, True)
    assert loaded.layout.expert_bytes == 3 * 512 * 256 * 2 == load_model(shapes).expert_bytes[0]
    views = loaded.layout.views(loaded.host[0])
    assert {name: tuple(view.shape) for name, view in views.items()} == {
        "gate_up_proj": (512, 512),
        "down_proj": (512, 256),
    }
    assert len(loaded.host) == 16 and torch.equal(loaded.host[0], loaded.host[10]), "a pool of ten stands for all"
    assert not torch.equal(loaded.host[0], loaded.host[1])
    out = tmp_path / "out"
    report = decode_all(
        CpuDevice(), DecodeConfig(str(shapes), [Point("50%", 2, 6, 2)], tokens=4, warmup=1, repeats=1), out
    )
    (run,) = report["runs"]
    assert run["counts"] == [simulated_counts(run, out)]


@pytest.mark.slow
def test_parts_time_both_layouts_and_profile_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SHAPES", ((64, 32),)), ("CACHES", ((1, 2, 10, 8),)), ("_COLD_BYTES", 1 << 14)):
        monkeypatch.setattr(parts, name, value)
    rows = [*parts.products(CpuDevice()), *parts.caches(CpuDevice())]
    assert [row["layout"] for row in rows[:-1]] == ["out_in", "in_out"] * 4 and all(row["us"] > 0 for row in rows)
    shapes = tmp_path / "small.toml"
    shapes.write_text(SHAPES.format(**FAMILIES["qwen3moe"]))
    parts.profile(CpuDevice(), str(shapes), 2, 6, tmp_path / "steps.json.gz")
    assert b"aten::linear" in gzip.decompress((tmp_path / "steps.json.gz").read_bytes())


def test_a_setting_is_one_text() -> None:
    assert parse_point("25%,4,8000,2,recorded") == Point("25%", 4, 8000, 2, True)
    with pytest.raises(DecodeError, match="25%,1,8000,0,own"):
        parse_point("25%,4,8000")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmup": 8}, "--warmup 8: must be less than --tokens 8"),
        ({"points": []}, "at least one setting"),
        ({"points": [Point(recorded=True)]}, "give --routing"),
        ({"points": [Point(prefetch=2)], "predictor": "oracle"}, "--predictor oracle: guesses before the run"),
        ({"layers": 9}, "--layers 9: the model has 1 to 3"),
        ({"routing": "other.safetensors", "points": [Point(recorded=True)]}, "4 layers of 8 experts, top-2"),
        ({"routing": "short.safetensors", "points": [Point(batch=9, recorded=True)]}, "holds 5 times 8 decode tokens"),
    ],
)
def test_what_cannot_be_run_is_one_clear_line(
    saved: Any, tmp_path: Path, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = saved("qwen3_moe")
    recorded_trace(tmp_path / "other.safetensors", 4, 8, 2)
    recorded_trace(tmp_path / "short.safetensors")
    if "routing" in change:
        change = change | {"routing": tmp_path / change["routing"]}
    with pytest.raises(DecodeError, match=message):
        decode_all(
            CpuDevice(), DecodeConfig(folder, **{"points": POINTS, "tokens": 8, "warmup": 2, **change}), tmp_path / "o"
        )
    assert not (tmp_path / "o").exists()


def test_the_command_says_what_is_missing(prestage: Prestage) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ran = prestage("calibrate", "decode", "olmoe-1b-7b", "-o", "out")
    assert ran.status == 2 and "no CUDA GPU" in ran.err


def test_guesses_are_asked_of_the_layers_that_there_are(saved: Any) -> None:
    """The last layer has no router ahead: nothing is prefetched there, and nothing is guessed in what is recorded."""
    _, folder = saved("qwen3_moe")
    loaded = load(CpuDevice(), folder)
    shape = (4, loaded.layers, loaded.top_k)
    trace = RoutingTrace(np.broadcast_to(np.arange(3, dtype=np.uint8), shape), loaded.num_experts,
                         predictions=np.full((4, loaded.layers, 2, 3), -1, dtype=np.int16))  # fmt: skip
    scenario = Scenario.model_validate(
        {
            "model": {"preset": folder, "expert_bytes": loaded.layout.expert_bytes},
            "workload": {"trace": "none", "prefill": "skip"},
            "memory": {"gpu_budget": "50%"},
            "predictor": {"name": "recorded"},
            "prefetch": {"policy": "top-k", "k": 3, "lookahead": 2},
        }
    )
    deciding = Deciding(load_inputs(scenario, trace))
    runtime = Runtime(CpuDevice(), loaded, 30)
    steps = runtime.decode(runtime.fill(prompt_and_rest(1)[0]), deciding, 4)
    guessed = np.stack(steps.guessed)  # (steps, batch, layers, horizons, n)
    assert (guessed[:, :, 0] >= 0).all() and (guessed[:, :, 1, 0] >= 0).all()
    assert (guessed[:, :, 1, 1] == -1).all() and (guessed[:, :, 2] == -1).all()
