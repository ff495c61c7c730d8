"""What a notebook works with: names for everything, settings by their keys, results that show themselves."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import prestage
from prestage.engine.measure.recording import FATES, OUTCOMES
from prestage.engine.scenario.amounts import ScenarioError
from prestage.errors import InputError
from prestage.notebook.runs import Result
from prestage.notebook.settings import settings_of
from prestage.output.figures import FIGURES
from prestage.output.run_folder import write_result
from prestage.output.shown import FRAMES, csv_text, latex


@pytest.fixture(scope="module")
def result() -> Result:
    return prestage.simulate("default", tokens=20, baselines=False)


def test_every_public_name_is_shown_loads_and_says_what_it_is() -> None:
    assert dir(prestage) == sorted(prestage.__all__)
    for name in prestage.__all__:
        value = getattr(prestage, name)
        assert name == "__version__" or (inspect.getdoc(value) or "").strip(), name
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__ not in (None, ""), name


def test_the_stubs_that_editors_read_name_what_there_is() -> None:
    stub = ast.parse(Path(prestage.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    homes = {
        one.asname: (each.module, one.name)
        for each in stub.body
        if isinstance(each, ast.ImportFrom)
        for one in each.names
    }
    listed = next(ast.literal_eval(each.value) for each in stub.body if isinstance(each, ast.Assign))
    assert listed == prestage.__all__
    assert homes.keys() == set(prestage.__all__) - {"__version__"}
    for name, (module, inside) in homes.items():
        assert name == inside
        assert getattr(import_module(f"prestage.{module}"), name) is getattr(prestage, name)


def test_an_unknown_public_name_is_refused_and_type_checkers_see_it() -> None:
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        prestage.simulat  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    "given",
    ["default", None, {"workload": {"synthetic": {}}}, prestage.load_scenario("default")],
    ids=["name", "default", "data", "scenario"],
)
def test_settings_lie_over_whatever_names_a_scenario(given: Any) -> None:
    scenario = prestage.scenario_of(given, {"tokens": 7, "prefetch.lookahead": 2})
    assert (scenario.workload.tokens, scenario.prefetch.lookahead) == (7, 2)


def test_the_scenario_that_was_given_does_not_change() -> None:
    data: dict[str, Any] = {"workload": {"synthetic": {"skew": 0.5}}}
    prestage.scenario_of(data, {"skew": 0.7})
    assert data == {"workload": {"synthetic": {"skew": 0.5}}}


@pytest.mark.parametrize(
    ("given", "settings", "says"),
    [
        ("default", {"tokns": 7}, "tokns: no such key; did you mean 'tokens'?"),
        ("default", {"policy": "lru"}, "policy: is a key of several sections: .*prefetch.policy.* or .*miss.policy"),
        ("default", {"batch": -1}, "workload.batch = -1: must be"),
        ("defalt", {}, "did you mean 'default'"),
        (7, {}, "scenario = 7: give the name of a shipped one, a TOML file, a dict of sections or a Scenario"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_would_do(given: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ScenarioError, match=says):
        prestage.scenario_of(given, settings)


def test_a_setting_that_is_no_list_is_refused() -> None:
    with pytest.raises(ScenarioError, match=r"give a list of them: \['workload.tokens=20'\]"):
        prestage.load_scenario("default", "workload.tokens=20")
    with pytest.raises(ScenarioError, match=r"give a list, such as .*; `simulate` takes a dict"):
        prestage.load_scenario("default", {"workload.tokens": 20})


def test_every_key_that_stands_alone_is_found() -> None:
    keys = prestage.scenario_keys()
    assert {"workload.tokens", "memory.gpu_budget", "copy.discipline", "workload.synthetic.skew", "seed"} <= set(keys)
    assert len(keys) == len(set(keys))


def test_a_result_prints_its_figures_and_not_its_arrays(result: Result) -> None:
    text = repr(result)
    assert f"{result.data['tokens_per_second']:.3g}" in text
    assert "batch 1" in text
    assert len(text) < 2000
    html = result._repr_html_()
    assert html.count("<tr>") == len(result.summary().splitlines()) - 1


@pytest.mark.parametrize("table", FRAMES)
def test_a_table_of_a_run_holds_what_its_figures_count(table: str, result: Result) -> None:
    pytest.importorskip("pandas")
    frame, data = result.to_pandas(table), result.data
    wanted = {
        "tokens": data["decode_tokens"],
        "accesses": data["accesses"],
        "spans": len(result.timeline.spans()),
        "layers": data["model"]["layers"],
    }
    assert len(frame) == wanted.get(table, len(frame)) > 0


def test_words_stand_where_arrays_have_numbers(result: Result) -> None:
    pytest.importorskip("pandas")
    counted = result.to_pandas("accesses")["outcome"].value_counts()
    assert {name: counted.get(name, 0) for name in OUTCOMES} == {name: result.data["counts"][name] for name in OUTCOMES}
    fates = result.to_pandas("copies")["fate"].value_counts()
    assert {name: fates.get(name, 0) for name in FATES} == result.data["prefetch"]
    spans = result.to_pandas("spans")
    assert set(spans["device"]) <= {"gpu0", "host"}
    dense = spans[spans["kind"] == "dense"]
    assert set(dense["lane"]) == {"compute stream"}


def test_an_unknown_table_is_refused(result: Result) -> None:
    with pytest.raises(InputError, match=r"table = 'acesses': .*did you mean 'accesses'"):
        result.to_pandas("acesses")


@pytest.mark.parametrize("kind", [kind for kind in FIGURES if kind != "waterfall"])
def test_every_figure_of_a_run_is_drawn(kind: str, result: Result) -> None:
    assert result.plot(kind).axes


def test_runs_side_by_side_are_tables(result: Result) -> None:
    other = prestage.simulate("default", tokens=20, lookahead=0, baselines=False)
    compared = prestage.compare({"ahead": result, "not": other})
    assert compared["figures"]["tokens_per_second"][0] == result.data["tokens_per_second"]
    assert "ahead, not" in repr(compared)
    assert compared.to_csv().splitlines()[0] == "figure,ahead,not"
    assert compared.to_latex().count("&") == 2 * (1 + len(compared["figures"]))
    assert result.plot("waterfall", other).axes
    for runs in ([result, other],), (result, other), (result.data, other.data):
        assert prestage.compare(*runs) == {**prestage.compare({"run 1": result, "run 2": other})}


def test_runs_of_one_name_are_all_compared(result: Result, tmp_path: Path) -> None:
    for folder in "one", "two":
        write_result(result, tmp_path / folder / "run")
    loaded = [prestage.load_result(tmp_path / folder / "run") for folder in ("one", "two")]
    assert prestage.compare(*loaded)["runs"] == ["run", "run (2)"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda result: [{"a": result, "b": 7}], "b = int: give a Result"),
        (lambda result: [result, "default"], "run 2 = str: give a Result"),
        (lambda result: [result], "runs = Result: give two or more results: compare(one, other)"),
        (lambda result: ["default"], "runs = str: give two or more results"),
        (lambda result: [result.data], "runs = dict: give two or more results"),
        (lambda result: [], "give at least two different runs to compare"),
        (lambda result: [result, {"a": 1}], "run 2 = dict: give a Result"),
    ],
)
def test_what_is_no_run_is_not_compared(result: Result, make: Callable[[Result], list[Any]], says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        prestage.compare(*make(result))


def test_rows_of_a_sweep_are_tables(tmp_path: Path) -> None:
    rows = prestage.sweep(
        "default", {"prefetch.lookahead": [0, 1]}, out=tmp_path / "s.jsonl", settings=["workload.tokens=8"], workers=1
    )
    assert repr(rows).endswith("s.jsonl: 2, 0 of them failed>")
    # Keys stand alone where that is clear, and values as they are: the same rows, of which none runs again.
    again = prestage.sweep("default", {"lookahead": [0, 1]}, out=tmp_path / "s.jsonl", tokens=8, workers=1)
    assert [row["key"] for row in again] == [row["key"] for row in rows]
    with pytest.raises(ScenarioError, match="token: no such key; did you mean 'tokens'"):
        prestage.sweep("default", {"lookahead": [0]}, out=tmp_path / "s.jsonl", token=8)
    assert settings_of({"tokens": 8, "caching": False, "cpu_layers": None, "prefetch.k": "4"}) == [
        "workload.tokens=8", "memory.caching=false", "memory.cpu_layers=", "prefetch.k=4",
    ]  # fmt: skip
    assert settings_of({"workload.trace": Path("mine.npz")}) == ['workload.trace="mine.npz"']
    assert rows._repr_html_().count("<tr>") == 3
    assert rows.to_latex().splitlines()[2].startswith(r"prefetch.lookahead & tokens/s")
    rows.to_csv(tmp_path / "rows.csv")
    assert len((tmp_path / "rows.csv").read_text("utf-8").splitlines()) == 3
    pandas = pytest.importorskip("pandas")
    frame = rows.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["prefetch.lookahead"]) == [0, 1]


def test_latex_takes_no_name_for_a_command() -> None:
    assert latex(["a_b", "50%"], [["x\\y", "{1}"]]).splitlines()[2:5:2] == [
        r"a\_b & 50\% \\",
        r"x\textbackslash{}y & \{1\} \\",
    ]


def test_csv_leaves_out_what_is_not_known() -> None:
    assert csv_text(["a", "b"], [["x, y", None]]) == 'a,b\n"x, y",\n'


def test_a_trace_prints_how_much_there_is() -> None:
    trace = prestage.RoutingTrace(experts=np.zeros((6, 2, 1), dtype=np.uint8), num_experts=4)
    assert repr(trace) == "<RoutingTrace: 6 tokens (6 decode) of 1 sequences, 2 layers of 4 experts, top-1>"
    shown = dataclasses.replace(trace, meta={"model": "a <b> & c"})._repr_html_()
    assert shown == f"<p><b>a &lt;b&gt; &amp; c</b>: {trace.summary()}</p>"


@pytest.mark.parametrize(
    ("kind", "one"),
    [
        ("models", "mixtral-8x7b"),
        ("machines", "h200"),
        ("evictions", "lru"),
        ("prefetches", "top-k"),
        ("scenarios", "default"),
        ("traces", "guide"),
    ],
)
def test_what_there_is_can_be_listed(kind: str, one: str) -> None:
    assert one in prestage.names(kind)


def test_an_unknown_list_is_refused() -> None:
    with pytest.raises(InputError, match=r"kind = 'model': .*did you mean 'models'"):
        prestage.names("model")
