"""Measuring and fitting: all but the CUDA calls, on a device that runs on the CPU and on samples made by hand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_device import CpuDevice, CpuEvent

from prestage.calibration.device.cuda import CudaError
from prestage.calibration.fit.beside import written
from prestage.calibration.fit.evidence import Row, load_schedule, save_rows, uncertainty
from prestage.calibration.fit.fit import Fit, fit, fit_transfer, write_profile
from prestage.calibration.fit.host import calls_of, further_launch_ns, launch_tables, solve_host
from prestage.calibration.fit.links import links_of, write_links
from prestage.calibration.fit.transfer import from_profile, from_samples
from prestage.calibration.measure.bench import Extent
from prestage.calibration.measure.exchanges import measure_collectives
from prestage.calibration.measure.launches import CALLS
from prestage.calibration.measure.measure import LINKS, measure
from prestage.calibration.measure.samples import (
    TERMS,
    Key,
    Samples,
    SamplesError,
    Series,
    SurfaceSeries,
    load_samples,
)
from prestage.output.plots import plot_transfer
from prestage.resources.profile import load_profile
from prestage.resources.profile_costs import ProfileError
from prestage.resources.surface import LaunchTable

TINY_MODEL = """
name = "tiny"
source = "made for tests"
hidden = 64
vocabulary = 128

[dtypes]
expert = "bfloat16"
dense = "bfloat16"

[[stacks]]
blocks = 2

[attention]
kind = "gqa"
heads = 4
kv_heads = 2
head_dim = 16

[moe]
experts = 4
top_k = 2
expert_ff = 32

[kernels]
dense = 6
expert = 5
"""


class _GateEvent(CpuEvent):  # type: ignore[misc]  # mypy sees tests without the modules beside them
    """An event that has not come while the device spins."""

    def __init__(self, device: GatedDevice) -> None:
        super().__init__()
        self._device = device

    def query(self) -> bool:
        return super().query() and not self._device.spinning


class GatedDevice(CpuDevice):  # type: ignore[misc]
    """The CPU stand-in with what measuring needs besides: a gate that opens when everything is waited for."""

    def __init__(self, index: int = 0, gpus: int = 1) -> None:
        super().__init__(index)
        self._gpus = gpus
        self.spinning = False

    def event(self) -> CpuEvent:
        return _GateEvent(self)

    def spin(self, ns: int) -> None:
        self.spinning = True

    def synchronize(self) -> None:
        self.spinning = False

    def count(self) -> int:
        return self._gpus

    def sibling(self, index: int) -> GatedDevice:
        return GatedDevice(index, self._gpus)

    def release(self) -> None:
        pass


@pytest.fixture(scope="module")
def extent(tmp_path_factory: pytest.TempPathFactory) -> Extent:
    model = tmp_path_factory.mktemp("model") / "tiny.toml"
    model.write_text(TINY_MODEL)
    torch.set_num_threads(1)
    return Extent(
        models={str(model): 2},
        copy_bytes=(64, 4096, 65536),
        batches=(1, 2),
        tokens=(1, 8),
        contexts=(16,),
        cpu_tokens=(1,),
        allocation_bytes=(1024,),
        rounds=2,
        rotated_bytes=1,
        flood_bytes=1024,
        shared_bytes=(1024, 4096),
    )


@pytest.fixture(scope="module")
def samples(extent: Extent) -> Samples:
    return measure(GatedDevice(), extent)


@pytest.fixture(scope="module")
def samples_of_two(extent: Extent) -> Samples:
    return measure(GatedDevice(gpus=2), extent)


def test_what_several_gpus_add_is_measured_by_itself_too(extent: Extent) -> None:
    links = measure(GatedDevice(gpus=2), extent, what=LINKS)
    seen = {(series.term, series.key.get("direction"), series.key.get("beside")) for series in links.series}
    assert {("copy", "peer", "none"), ("copy", "h2d", "all_gpus"), ("peer_wait", None, None)} <= seen
    assert {series.key["call"] for series in links.series if series.term == "host"} == {"peer_enqueue", "turn"}
    assert not any(series.term in ("predictor", "allocation") for series in links.series)
    exchanges = {(s.key["bytes"], s.key["mode"], s.key["gpus"]) for s in links.series if s.term == "exchange"}
    sizes = (4096, 8192, 16384, 32768, 65536)
    assert exchanges == {(size, mode, 2) for size in sizes for mode in ("in a row", "host")}
    with pytest.raises(ProfileError, match=r"^samples: only what several GPUs add \(--links\): give those of one GPU"):
        fit(links, "mine")


def test_all_to_alls_are_measured_by_a_process_for_each_gpu() -> None:
    series = measure_collectives(2, (4096, 65536), rounds=2, backend="gloo", make_gpu=GatedDevice)
    assert [one.key["mode"] for one in series] == ["in a row", "host", "in a row", "host"]
    assert {(one.key["how"], one.key["bytes"], one.key["gpus"]) for one in series} == {
        ("gloo", 4096, 2), ("gloo", 65536, 2),
    }  # fmt: skip
    assert all(len(one.rounds_ns) == 2 and min(map(min, one.rounds_ns)) > 0 for one in series)


class _MissingDevice(GatedDevice):
    """A device that is not there."""

    def __init__(self, index: int = 0) -> None:
        raise CudaError(f"GPU {index} is gone")


def test_a_process_that_fails_ends_the_measurement_and_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"gloo: process \d: CudaError: GPU \d is gone"):
        measure_collectives(2, (4096,), backend="gloo", make_gpu=_MissingDevice)


def test_everything_that_there_is_to_measure_is_measured_in_every_round(
    samples: Samples, samples_of_two: Samples
) -> None:
    beside = {"read"}  # drives are measured alone
    assert {series.term for series in samples_of_two.series} == set(TERMS) - beside
    assert {series.term for series in samples.series} == set(TERMS) - {"peer_wait", "exchange"} - beside
    assert {len(series.rounds_ns) for series in samples_of_two.series} == {2}


def test_what_two_gpus_add_is_fitted_and_so_are_the_links_of_their_graph(samples_of_two: Samples) -> None:
    graph = load_profile("h200-x2").topology
    assert graph is not None
    profile = fit(samples_of_two, "tiny-x2", topology=graph).profile
    assert profile.peer is not None and profile.compute.peer_wait_gap is not None
    assert profile.host.peer_enqueue is not None
    turns = [ns for s in samples_of_two.series if s.key.get("call") == "turn" for taken in s.rounds_ns for ns in taken]
    assert profile.host.turn.ns == pytest.approx(np.median(turns) / 2, abs=1)  # there and back was measured
    assert profile.topology is not None
    speeds: dict[str, int] = {link.kind: link.bytes_per_second for link in profile.topology.links}
    sizes = (64, 4096, 65536)
    for kind, costs in (("nvlink", [profile.peer]), ("pcie", [*profile.h2d.values(), profile.d2h])):
        seen = [size * 1e9 / one.ns(size) for cost in costs for one in (cost.alone, cost.queued) for size in sizes]
        assert max(seen) <= speeds[kind]
    assert profile.topology.node("gpu1").capacity_bytes == samples_of_two.gpu_memory_bytes


def test_what_several_gpus_add_extends_the_profile_of_one(samples_of_two: Samples, tmp_path: Path) -> None:
    graph = load_profile("h200-x2").topology
    fitted = fit(samples_of_two, "mine", topology=graph).profile
    path = tmp_path / "mine.json"
    write_links(links_of(fitted, samples_of_two, "h200"), path)
    made, one = load_profile(str(path)), load_profile("h200")
    assert (made.device, made.date) == ("2 x CPU", samples_of_two.date)
    assert made.peer == fitted.peer and made.topology == fitted.topology
    assert made.host.turn == fitted.host.turn and made.host.launch.ns == one.host.launch.ns
    assert made.compute.peer_wait_gap == fitted.compute.peer_wait_gap
    assert [point.ns for point in made.compute.experts] == [point.ns for point in one.compute.experts]
    # What is fitted to schedules of both comes on top, and the file still extends that profile.
    text, again = written({"host": {"exchange_call": {"ns": 5, "source": "measured"}}}, "mine", str(path))
    assert json.loads(text)["extends"] == "h200" and again.host.turn == fitted.host.turn
    assert again.host.exchange_call is not None and again.host.exchange_call.ns == 5


def test_a_disturbed_measurement_is_fitted_all_the_same(samples_of_two: Samples) -> None:
    """Whatever a busy machine makes of single samples: a hundredth, or a thousand times as long."""
    graph, rng, notes = load_profile("h200-x2").topology, np.random.default_rng(0), ""
    for _ in range(20):
        series = [
            one.model_copy(
                update={
                    "rounds_ns": tuple(
                        tuple(max(1, round(ns * rng.choice([0.01, 1, 1, 1, 1, 100, 1000]))) for ns in taken)
                        for taken in one.rounds_ns
                    )
                }
            )
            for one in samples_of_two.series
        ]
        disturbed = fit(samples_of_two.model_copy(update={"series": tuple(series)}), "tiny-x2", topology=graph).profile
        assert disturbed.contention is not None
        factors = [cost for _, cost in disturbed.contention if hasattr(cost, "factor")]
        assert all(0.5 <= cost.factor <= 20 for cost in factors)
        notes += " ".join(cost.note or "" for cost in factors)
    assert "was measured: disturbed, measure again" in notes


def test_a_profile_is_fitted_from_what_was_measured(samples: Samples) -> None:
    profile = fit(samples, "tiny").profile
    assert {(point.expert_ff, point.tokens, point.dispatch) for point in profile.compute.experts} == {
        (32, tokens, dispatch) for tokens in (1, 8) for dispatch in ("eager", "graph")
    }
    assert {point.context for point in profile.compute.dense} == {0, 16}


# Fits, on numbers made by hand.


def test_a_line_is_found_where_there_is_one() -> None:
    points = [(size, 10_000 + size / 50) for size in (4096, 2**20, 2**30)]  # 10 us and 50 GB/s
    assert fit_transfer(points) == {"latency_ns": 10_000, "bytes_per_second": 50_000_000_000}


def test_where_no_line_fits_a_table_is_kept_and_a_disturbed_copy_does_not_lift_the_larger_ones() -> None:
    # Ten bytes took 900 ns once, disturbed: 100 bytes took 200.
    assert fit_transfer([(1, 100), (10, 900), (100, 200), (1000, 5000)]) == {
        "points": [(1, 100), (10, 200), (100, 200), (1000, 5000)]
    }


def row(cost: str, ns: float, *, n: int = 10, runs: tuple[float, ...] = (), **key: Any) -> Row:
    return Row(cost, key, n, ns, ns, 0.0, runs or (ns, ns), runs or (ns, ns))


def test_the_calls_of_whole_entries_are_solved_for() -> None:
    # record 1, wait 2, small launch 5, product 10 (bf16), graph 7, copy 9, read-back 6, and 3 more behind a wait.
    eager: dict[str, Any] = {"dispatch": "eager", "dtype": "bfloat16", "first": False}
    graph: dict[str, Any] = {"dispatch": "graph", "dtype": "bfloat16", "first": False, "kernels": 5, "products": 3}
    rows = [
        row("host:dense", 2 + 40 * 5 + 4 * 10, kernels=44, products=4, **eager),
        row("host:expert_again", 2 + 2 * 5 + 3 * 10, kernels=5, products=3, **eager),
        row("host:expert_again", 2 + 7, **graph),
        row("host:expert_first_use", 2 + 7 + 2, **graph),
        row("host:copy_fresh", 2 + 9, dispatch="graph", first=False),
        row("host:copy_reuse", 2 + 9 + 2, dispatch="graph", first=False),
        row("host:copy_reuse", 2 + 9 + 2 + 3, dispatch="graph", first=True),
        row("host:readback", 1 + 6, dispatch="graph", first=False),
    ]
    assert solve_host(rows, record_ns=1) == {
        "launch": 5,
        "product_launches:bfloat16": 10,
        "graph_launch": 7,
        "copy_enqueue": 9,
        "event_wait": 2,
        "readback_enqueue": 6,
        "copy_resume": 3,
    }


def test_what_a_product_launches_beyond_one_kernel_is_known_beforehand() -> None:
    # As above, eager: of an expert of 64 x 32, products of 64 rows and 32 columns launch a second kernel, for 3 ns.
    counted = LaunchTable(dtype="bfloat16", rows=(32, 64), columns=(32, 64), tokens=(1,), kernels=(1, 1, 2, 1))
    key: dict[str, Any] = {"dispatch": "eager", "dtype": "bfloat16", "first": False, "hidden": 64, "size": 32}
    expert, head = {**key, "kernels": 5, "products": 3}, {**key, "kernels": 1, "products": 1}
    rows = [
        row("host:expert_again", 2 + 2 * 5 + 3 * 10 + 3, **expert),
        row("host:expert_first_use", 2 + 2 * 5 + 3 * 10 + 3 + 4, **expert),
        row("host:head", 2 + 10, **{**head, "size": 64 * 64 * 2}),
    ]
    assert [calls_of(one, [counted]).get("further_launch") for one in rows] == [1, 1, None]
    solved = solve_host(rows, 1, [counted], further_ns=3)
    assert solved == {"launch": 5, "product_launches:bfloat16": 10, "event_wait": 4}
    # Not told of it, all of it passes for small kernels.
    assert solve_host(rows, 1)["launch"] > 5


def test_a_second_kernel_costs_what_calls_of_two_take_more_than_those_of_one() -> None:
    def counted(shape: tuple[int, ...], kernels: int, *ns: int, dtype: str = "bfloat16") -> SurfaceSeries:
        return SurfaceSeries("launch", dtype, "eager", "none", shape, kernels * CALLS, tuple(CALLS * one for one in ns))

    series = [counted((16, 16, 1), 1, 9, 10, 90), counted((16, 32, 1), 2, 14, 15, 16), counted((32, 16, 1), 1, 10)]
    assert further_launch_ns(series) == 5
    assert further_launch_ns(series[::2]) is None
    (table,) = launch_tables(series)
    assert (table.rows, table.columns, table.tokens, table.kernels) == ((16, 32), (16, 32), (1,), (1, 2, 1, 0))
    # What was not counted launches what fewer columns do; beyond the grid counts its end, between the nearest.
    launched = {(32, 32): 1, (16, 999): 2, (9, 21): 1, (22, 23): 2}
    assert {shape: table.launched(*shape, 7) for shape in launched} == launched


@pytest.mark.parametrize(("given", "why"), [
    ({"kernels": (1, 2)}, "kernels: 2 numbers: rows x columns x tokens makes 4"),
    ({"columns": (32, 16)}, "columns: sizes must grow"),
])  # fmt: skip
def test_counted_launches_that_do_not_fill_their_grid_are_refused(given: dict[str, Any], why: str) -> None:
    whole = {"dtype": "bfloat16", "rows": (16, 32), "columns": (16, 32), "tokens": (1,), "kernels": (1, 2, 1, 0)}
    with pytest.raises(ValueError, match=why):
        LaunchTable.model_validate(whole | given)


def test_counted_launches_are_of_the_same_gpu_and_beside_a_surface(samples: Samples) -> None:
    counted = SurfaceSeries("launch", "bfloat16", "eager", "none", (16, 16, 1), CALLS, (9,))
    launches = samples.model_copy(update={"series": (), "surface": (counted,)})
    with pytest.raises(ProfileError, match="launches were counted without a surface"):
        fit(samples, "tiny", more=[launches])
    with pytest.raises(ProfileError, match="the surface is of an other"):
        fit(samples, "tiny", more=[launches.model_copy(update={"device": "other"})])


def test_what_is_held_back_is_the_last_run_and_rows_count_by_how_long_they_take() -> None:
    # The first row's last run is 10 % over the others; the second is exact and takes nine times as long.
    rows = [row("a", 100, runs=(100, 100, 110)), row("a", 900, runs=(900, 900, 900))]
    unsure = uncertainty(rows)
    assert unsure["held_back_error"] == pytest.approx((0.1 * 0.1**2 + 0.9 * 0) ** 0.5, abs=1e-5)
    assert unsure["scatter"] == 0


def test_inside_schedules_wins_and_scales_the_tokens_that_no_schedule_had(samples: Samples) -> None:
    quick = fit(samples, "tiny").profile.compute
    micro = {point.tokens: point.ns for point in quick.experts if point.dispatch == "graph"}
    key: dict[str, Any] = {
        "hidden": 64,
        "expert_ff": 32,
        "dtype": "bfloat16",
        "kernels": 5,
        "dispatch": "graph",
        "tokens": 1,
    }
    seen = row("expert", 3 * micro[1], beside_copy=False, **key)
    tail = row("idle_tail", 3 * micro[1] - 700, beside_copy=False, what="expert", **key)
    compute = fit(samples, "tiny", [seen, tail]).profile.compute
    points = {point.tokens: point for point in compute.experts if point.dispatch == "graph"}
    assert (points[1].ns, points[1].launch_latency_ns) == (3 * micro[1], -700)
    assert points[8].ns == pytest.approx(3 * micro[8], rel=1e-3)  # both are rounded


def test_rows_come_back_from_their_file(tmp_path: Path) -> None:
    rows = [row("expert", 12.5, runs=(12.0, 13.0), tokens=1, beside_copy=True)]
    save_rows(rows, tmp_path / "seen.rows.json")
    assert load_schedule([tmp_path / "seen.rows.json"]) == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"term": "kopy"}, "series.0: term = 'kopy': choose one of copy, "),
        ({"key": {"direction": "h2d"}}, "series.0: copy_gap: key must have direction, memory (given direction)"),
        ({"rounds_ns": [[1], []]}, "every round must have samples"),
        ({"rounds_ns": [["x"]]}, "series.0.rounds_ns.0.0 = 'x': must be a valid integer"),
    ],
)
def test_bad_samples_are_refused_by_file_and_key(
    samples: Samples, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    data = samples.model_dump()
    series = {"term": "copy_gap", "key": {"direction": "h2d", "memory": "pinned"}, "rounds_ns": [[1]]}
    data["series"] = [{**series, **change}]
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(SamplesError, match=re.escape(message)) as error:
        load_samples(tmp_path / "bad.json")
    assert str(error.value).startswith(str(tmp_path / "bad.json"))


def test_further_samples_give_what_the_first_lack_and_change_nothing_else(samples: Samples) -> None:
    key: Key = {"direction": "peer", "memory": "device", "beside": "none", "mode": "alone"}
    peer = [Series(term="copy", key={**key, "bytes": size}, rounds_ns=((size,),)) for size in (10, 1000)]
    peer += [Series(term="copy", key={**one.key, "mode": "queued"}, rounds_ns=one.rounds_ns) for one in peer]
    peer.append(Series(term="copy_gap", key={"direction": "peer", "memory": "device"}, rounds_ns=((7,),)))
    other = [series.model_copy(update={"rounds_ns": ((10**9,),)}) for series in samples.series]
    more = samples.model_copy(update={"series": (*peer, *other)})
    alone, both = fit(samples, "tiny").profile, fit(samples, "tiny", (), [more]).profile
    assert alone.peer is None and both.peer is not None
    assert both.peer.alone.ns(500) == 500
    assert both.model_copy(update={"peer": None}) == alone


def test_samples_come_back_from_their_file(samples: Samples, tmp_path: Path) -> None:
    samples.save(tmp_path / "samples.json")
    assert load_samples(tmp_path / "samples.json") == samples


# The transfer benchmark.


def test_the_transfer_benchmark_of_the_published_profile_is_the_guides_table() -> None:
    report = from_profile(load_profile("rtx3090"))
    (ours,) = [line for line in report["rows"] if line["way"].startswith("CPU") and line["bytes"] == 27 * 2**20]
    assert ours["models"] == ["switch-base-128"]
    assert ours["single_ms"] == pytest.approx(3.41, abs=0.001)
    assert ours["ten_ms"] == pytest.approx(40.73, abs=0.001)


def test_the_transfer_benchmark_of_samples_takes_single_and_ten_as_measured(samples: Samples) -> None:
    key: Key = {"direction": "h2d", "memory": "pinned", "bytes": 1000}
    series = [
        Series(term="copy_batch", key={**key, "copies": copies}, rounds_ns=((ns,),))
        for copies, ns in ((1, 2_000_000), (10, 10_000_000))
    ]
    report = from_samples(samples.model_copy(update={"series": tuple(series)}))
    (line,) = report["rows"]
    assert (line["single_ms"], line["ten_ms"], line["gb_per_s"]) == (2.0, 10.0, 0.001)


# Without a GPU.


@pytest.mark.process
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
@pytest.mark.parametrize("command", [["calibrate", "measure"], ["benchmark", "transfer"]])
def test_without_cuda_a_command_says_so_in_one_line_and_names_the_profiles(command: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prestage", *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("prestage: no CUDA GPU") and done.stderr.count("\n") == 1
    assert "rtx3090" in done.stderr


# The committed samples.

SAMPLES = Path(__file__).parent.parent / "calibration" / "samples"


def committed_fit() -> Fit:
    names = (
        *(".json", "-two-gpus.json", ".surface.json.gz", ".attention.json.gz", ".low-bit.json.gz"),
        "-launches.json.gz",
    )
    one, *more = (load_samples(SAMPLES / f"h200{name}") for name in names)
    return fit(one, "h200", load_schedule([SAMPLES / "h200.rows.json"]), more)


@pytest.mark.slow
def test_the_shipped_profile_is_what_the_committed_samples_give(tmp_path: Path) -> None:
    fitted = committed_fit()
    assert fitted.profile == load_profile("h200")
    write_profile(fitted.profile, tmp_path / "again.json")
    assert load_profile(str(tmp_path / "again.json")) == fitted.profile


@pytest.mark.slow
def test_the_committed_fit_predicts_held_back_runs() -> None:
    fitted = committed_fit()
    errors = {term.name: term.uncertainty["held_back_error"] for term in fitted.terms}
    assert errors["h2d.pinned.queued"] < 0.005
    graphs = {name: error for name, error in errors.items() if name.endswith(", graph")}
    together = {name: error for name, error in graphs.items() if name.startswith("surface")}  # of single kernels
    assert len(graphs) > 10 and max(error for name, error in graphs.items() if name not in together) < 0.03
    assert len(together) == 3 and max(together.values()) < 0.06


@pytest.mark.slow
def test_the_committed_samples_hold_the_guides_table() -> None:
    report = from_samples(load_samples(SAMPLES / "h200.json"))
    ways = {line["way"]: line for line in report["rows"] if line["bytes"] == 27 * 2**20}
    assert set(ways) == {"CPU -> GPU, pinned", "CPU -> GPU, pageable", "GPU -> GPU"}
    lines = plot_transfer(report).axes[0].get_lines()
    assert {line.get_label() for line in lines} >= set(ways)
    pinned = ways["CPU -> GPU, pinned"]
    assert 9.5 < pinned["ten_ms"] / pinned["single_ms"] < 10.5
