"""Miss-ratio curves: every point is what the replay counts there."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cases import traces as random_traces
from tiny import tiny_trace
from typer.testing import CliRunner

from prestage.cli import app
from prestage.engine.decide.dispatch import LOOKUPS
from prestage.engine.policies.eviction import EVICTION
from prestage.engine.replay.compiled import COMPILED, KINDS
from prestage.engine.replay.miss_ratio import DEFAULT_POLICIES, miss_ratio_curves
from prestage.engine.replay.replay import replay_trace
from prestage.output.plots import plot_miss_ratios
from prestage.output.run_folder import write_miss_ratios
from prestage.output.tables.traces import print_miss_ratios
from prestage.workloads.importers import open_trace
from prestage.workloads.trace import RoutingTrace

LAYERS, EXPERTS = 3, 5


def guessed_trace() -> RoutingTrace:
    """A random trace with guesses of two layers ahead, right or wrong."""
    random = np.random.default_rng(3)
    chosen = np.argsort(random.random((60, LAYERS, EXPERTS)), axis=2)[..., :2].astype(np.uint8)
    guessed = np.argsort(random.random((60, LAYERS, 2, EXPERTS)), axis=3)[..., :2].astype(np.int16)
    return RoutingTrace(chosen, EXPERTS, predictions=guessed)


def sized(trace: RoutingTrace, sizes: list[int]) -> RoutingTrace:
    """The same trace, with bytes."""
    extra = {"expert_bytes": np.array(sizes)}
    return RoutingTrace(
        trace.experts, EXPERTS, sequence=trace.sequence, phase=trace.phase, present=trace.present, extra=extra,
        weights=trace.weights,
    )  # fmt: skip


@pytest.mark.slow
@settings(max_examples=100)
@given(
    trace=random_traces(LAYERS, EXPERTS, 2),
    sizes=st.integers(1, 4).map(lambda size: [size] * LAYERS)
    | st.lists(st.integers(1, 6), min_size=LAYERS, max_size=LAYERS),
    batch=st.integers(1, 4),
    scope=st.sampled_from(["global", "per-layer", "shared"]),
    lookup=st.sampled_from(LOOKUPS),
    points=st.integers(1, 20),
)
def test_every_point_is_what_the_replay_counts(
    trace: RoutingTrace, sizes: list[int], batch: int, scope: str, lookup: str, points: int
) -> None:
    if scope == "shared":
        sizes = sizes[:1] * LAYERS
    trace = sized(trace, sizes)
    chosen: dict[str, Any] = {"batch": batch, "scope": scope, "lookup": lookup}
    data = miss_ratio_curves(trace, points=points, policies=list(EVICTION), **chosen)
    if scope == "per-layer" and min(sizes) != max(sizes):
        return  # what pools of several sizes keep of a budget is less, and no budget of its own: see the next test
    for at, capacity in enumerate(data["capacities"]):
        for policy, curve in data["policies"].items():
            replayed = replay_trace(trace, f"{capacity['bytes']}B", eviction=policy, **chosen)
            assert (curve["hits"][at], data["accesses"]) == (replayed["hits"], replayed["accesses"])
            rate = replayed["hit_rate"]
            assert curve["miss_ratio"][at] == (None if rate is None else pytest.approx(1 - rate))


def test_gate_weights_of_a_batch_are_in_python_alone_and_have_a_curve_too() -> None:
    random = np.random.default_rng(2)
    chosen = np.argsort(random.random((60, LAYERS, EXPERTS)), axis=2)[..., :2].astype(np.uint8)
    sequence = np.repeat([0, 1], 30).astype(np.int32)
    trace, budgets = sized(RoutingTrace(chosen, EXPERTS, sequence=sequence), [2] * LAYERS), ["8B", "16B"]
    policies = ["gate-weight", "lru"]
    curve = miss_ratio_curves(trace, capacities=budgets, policies=policies, batch=2)["policies"]["gate-weight"]
    replayed = [replay_trace(trace, budget, eviction="gate-weight", batch=2)["hits"] for budget in budgets]
    assert curve["hits"] == replayed


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"lookahead": 1},
        {"predictor": "oracle"},
        {"predictor": "oracle", "recall": 0.3, "lookahead": 2},
        {"predictor": "previous-token"},
        {"predictor": "recorded"},
        {"predictor": "recorded", "lookahead": 1},
    ],
)
def test_a_policy_goes_by_the_guesses_that_are_asked_for(asked: dict[str, Any]) -> None:
    trace = guessed_trace()
    data = miss_ratio_curves(trace, capacities=["40%", "60%"], policies=["lru", "predictive"], **asked)
    assert data["predictor"] == asked.get("predictor", "transition")
    for policy, curve in data["policies"].items():
        replayed = [replay_trace(trace, budget, eviction=policy, **asked)["hits"] for budget in ("40%", "60%")]
        assert curve["hits"] == replayed


def test_each_option_of_a_predictor_changes_what_is_found() -> None:
    trace = guessed_trace()

    def hits(**asked: Any) -> int:
        data = miss_ratio_curves(trace, capacities=["50%"], policies=["predictive", "belady"], **asked)
        found, best = (data["policies"][policy]["hits"][0] for policy in ("predictive", "belady"))
        assert found <= best
        return int(found)

    sure, half, one_ahead = (
        hits(predictor="oracle", **own) for own in ({}, {"recall": 0.5}, {"recall": 1, "lookahead": 1})
    )
    assert sure > half > hits(predictor="oracle", recall=0) and sure > one_ahead
    # As far as the recorded guesses reach, which is all that there is.
    assert hits(predictor="recorded") == hits(predictor="recorded", lookahead=2) != hits(predictor="transition")


def test_trained_weights_guess_as_far_as_they_were_trained_to() -> None:
    guide = open_trace("guide")
    trace = guide.slice(sequences=guide.sequences_in(":2"))
    asked: dict[str, Any] = {
        "capacities": ["25%"],
        "policies": ["predictive"],
        "predictor": "learned",
        "weights": "guide-predictor",
    }
    known = miss_ratio_curves(trace, **asked)
    assert known == miss_ratio_curves(trace, **asked, lookahead=3) != miss_ratio_curves(trace, **asked, lookahead=1)


def test_where_no_policy_goes_by_guesses_none_are_named() -> None:
    assert miss_ratio_curves(guessed_trace(), points=2, policies=["lru"], predictor="recorded")["predictor"] is None


def test_every_policy_has_a_compiled_replay() -> None:
    assert COMPILED.keys() == EVICTION.keys()


def test_given_capacities_are_those_of_the_replay_in_layers_of_several_sizes() -> None:
    random = np.random.default_rng(0)
    chosen = np.argsort(random.random((80, LAYERS, EXPERTS)), axis=2)[..., :2].astype(np.uint8)
    trace, budgets = sized(RoutingTrace(chosen, EXPERTS), [3, 2, 5]), ["40%", "60%", "90%"]
    data = miss_ratio_curves(trace, capacities=budgets, policies=["lru", "belady"], scope="per-layer")
    for policy, curve in data["policies"].items():
        expected = [replay_trace(trace, b, eviction=policy, scope="per-layer")["hits"] for b in budgets]
        assert curve["hits"] == expected


@pytest.mark.parametrize(("scope", "capacities"), [("global", ["5experts", "14%", "50%"]), ("per-layer", ["50%"])])
def test_curves_of_a_real_trace_are_those_of_the_replay(traces: Path, scope: str, capacities: list[str]) -> None:
    # Five places are less than the eight experts of a token: served in waves.
    trace = open_trace(traces / "olmoe-1b-7b.npz")
    data = miss_ratio_curves(trace, capacities=capacities, scope=scope)
    assert list(data["policies"]) == list(DEFAULT_POLICIES)
    for policy, curve in data["policies"].items():
        replayed = [replay_trace(trace, capacity, eviction=policy, scope=scope) for capacity in capacities]
        assert curve["hits"] == [each["hits"] for each in replayed]


def test_belady_misses_least_and_with_room_for_all_only_first_uses_miss() -> None:
    random = np.random.default_rng(1)
    trace = RoutingTrace(random.integers(0, 6, (200, 2, 1)).astype(np.uint8), 6)
    data = miss_ratio_curves(trace, points=12, policies=list(KINDS))
    curves = {policy: curve["miss_ratio"] for policy, curve in data["policies"].items()}
    for curve in curves.values():
        assert all(best <= miss + 1e-12 for best, miss in zip(curves["belady"], curve, strict=True))
        assert curve[-1] == pytest.approx(12 / 400)
    assert curves["lru"] == sorted(curves["lru"], reverse=True)  # more room never hurts a stack algorithm


def test_capacities_come_ascending_and_once() -> None:
    trace = tiny_trace([[[0]], [[1]], [[2]], [[3]]])
    data = miss_ratio_curves(trace, capacities=["75%", "1experts", "30%"], policies=["lru", "lru"])
    assert [capacity["experts"] for capacity in data["capacities"]] == [1, 3]
    assert [capacity["share"] for capacity in data["capacities"]] == [0.25, 0.75]
    assert data["policies"] == {"lru": {"hits": [0, 0], "miss_ratio": [1.0, 1.0]}}


PREDICTORS: list[tuple[dict[str, Any], str]] = [
    ({"predictor": "oracles"}, "predictor = 'oracles': choose one of oracle, "),
    ({"lookahead": 0}, "lookahead = 0: must be at least 1"),
    ({"recall": 0.5}, "recall = 0.5: goes with predictor = 'oracle' (given 'transition')"),
    (
        {"predictor": "learned"},
        "predictor = 'learned', weights = None: weights (a folder of `prestage predictor train`)",
    ),
    ({"weights": "guide-predictor"}, "predictor = 'transition', weights = 'guide-predictor': weights (a folder"),
    (
        {"policies": ["predictive"], "predictor": "oracle", "recall": 2},
        "predictor recall = 2: must lie between 0 and 1",
    ),
    ({"policies": ["predictive"], "predictor": "recorded"}, "the trace has no array predictions"),
    ({"policies": ["predictive"], "lookahead": 2000}, "predictor horizons = 2,000: must be at most 1,024 layers ahead"),
]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policies": ["lrv"]}, "policy = 'lrv': choose one of fifo, lru"),
        ({"lookup": "token"}, "lookup = 'token': choose one of batch, single"),
        ({"scope": "world"}, "scope = 'world': choose one of global, per-layer"),
        ({"points": 0}, "points = 0: must be at least 1"),
        ({"capacities": ["4GiB"]}, "budget '4GiB': the trace does not say how large an expert is"),
        ({"capacities": ["10%"]}, "the expert budget is 0 bytes: it must hold one expert, 1 byte"),
        *PREDICTORS,
    ],
)
def test_bad_input_is_refused_in_one_clear_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        miss_ratio_curves(tiny_trace([[[0]], [[3]]]), **options)
    assert message in str(error.value)


def test_the_command_writes_a_table_and_a_picture_and_prints_json(tmp_path: Path) -> None:
    trace = tiny_trace([[[0], [1]], [[1], [0]], [[0], [1]]])
    file, table, picture = tmp_path / "t.npz", tmp_path / "m.csv", tmp_path / "m.png"
    trace.save(file)
    arguments = ["mrc", str(file), "--points", "4", "--policies", "lru, belady", "-o", str(table), "-o", str(picture)]
    run = CliRunner().invoke(app, [*arguments, "--json"])
    assert run.exit_code == 0
    data = json.loads(run.stdout)
    assert data == miss_ratio_curves(open_trace(file), points=4, policies=["lru", "belady"])
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["hits"]) for row in rows] == data["policies"]["lru"]["hits"] + data["policies"]["belady"]["hits"]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "belady" in CliRunner().invoke(app, arguments).stdout


def test_the_command_takes_a_predictor_and_says_whose_guesses_they_are(tmp_path: Path) -> None:
    file, arguments = tmp_path / "t.npz", ["--policies", "predictive", "--capacities", "50%", "--predictor", "oracle"]
    guessed_trace().save(file)
    arguments += ["--recall", "0.5", "--lookahead", "2", "-o", str(tmp_path / "m.png")]
    run, found = (CliRunner().invoke(app, ["mrc", str(file), *arguments, *last]) for last in ([], ["--json"]))
    asked: dict[str, Any] = {"predictor": "oracle", "recall": 0.5, "lookahead": 2}
    data = miss_ratio_curves(guessed_trace(), capacities=["50%"], policies=["predictive"], **asked)
    assert json.loads(found.stdout) == data and "Guesses are those of predictor oracle." in run.stdout
    one = CliRunner().invoke(
        app, ["replay", str(file), "--budget", "50%", "--eviction", "predictive", *arguments[4:10], "--json"]
    )
    assert json.loads(one.stdout)["hits"] == data["policies"]["predictive"]["hits"][0]


def test_where_sizes_differ_the_table_says_that_belady_is_no_bound(capsys: pytest.CaptureFixture[str]) -> None:
    # Layer 0 has experts of one byte, layer 1 of three; see test_eviction for what another policy finds.
    for sizes, said in (([1, 3], True), ([3, 3], False)):
        trace = tiny_trace([[[0], [1]], [[1], [0]]], extra={"expert_bytes": np.array(sizes)})
        for scope in ("global", "per-layer"):
            print_miss_ratios(miss_ratio_curves(trace, points=2, policies=["lru", "belady"], scope=scope))
            assert ("belady is no bound" in capsys.readouterr().out) == (said and scope == "global")


def test_curves_are_drawn_at_their_points() -> None:
    data = miss_ratio_curves(tiny_trace([[[0]], [[1]], [[0]], [[1]]]), policies=["lru", "fifo"], points=2)
    (axes,) = plot_miss_ratios(data).axes
    assert [line.get_label() for line in axes.lines] == ["lru", "fifo"]
    assert np.asarray(axes.lines[0].get_xydata()).tolist() == [[0.5, 0.5], [1.0, 0.5]]


def test_several_traces_have_a_panel_a_table_and_rows_each(tmp_path: Path) -> None:
    files = [str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]
    traces = [tiny_trace([[[0]], [[1]], [[0]], [[1]]]), tiny_trace([[[0]], [[0]], [[1]], [[1]]])]
    for file, trace in zip(files, traces, strict=True):
        trace.save(Path(file))
    arguments = ["mrc", *files, "--points", "2", "--policies", "fifo,lru", "-o", str(tmp_path / "m.csv")]
    curves = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["traces"]
    expected = [miss_ratio_curves(trace, points=2, policies=["fifo", "lru"]) for trace in traces]
    assert curves == [{"trace": file, **data} for file, data in zip(files, expected, strict=True)]
    with (tmp_path / "m.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["trace"] for row in rows] == [file for file in files for _ in range(4)]
    assert [float(row["miss_ratio"]) for row in rows[:2]] == expected[0]["policies"]["fifo"]["miss_ratio"]
    panels = plot_miss_ratios(*curves).axes
    assert [axes.get_title(loc="left") or axes.get_title() for axes in panels] == files
    said = "".join(CliRunner().invoke(app, arguments).stdout.split())  # a long path is broken wherever the line ends
    assert all(f"{file}:Missratios" in said for file in files)


@pytest.mark.parametrize("name", ["m.txt", "missing/m.csv"])
def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"m\.(txt|csv): "):
        write_miss_ratios([{}], tmp_path / name)
