"""A trace of one model that drives another, and traces drawn by counts of each layer's experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prestage.engine.load import load_inputs
from prestage.engine.loading.deciders import make_manager
from prestage.engine.loading.stages import stage_trace
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.scenario import load_scenario, make_scenario
from prestage.workloads.importers import open_trace
from prestage.workloads.mapping import map_trace
from prestage.workloads.model import load_model
from prestage.workloads.popularity import draw_by, load_popularity, popular_trace
from prestage.workloads.trace import RoutingTrace
from prestage.workloads.trace_limits import TraceError

#: 2 tokens in each of 2 sequences, 2 layers, top-2 of 4 experts.
EXPERTS = np.array([[[0, 3], [1, 2]], [[0, 1], [2, 3]], [[0, 3], [1, 2]], [[2, 3], [0, 1]]])
SMALL = RoutingTrace(
    experts=EXPERTS,
    num_experts=4,
    sequence=np.array([0, 0, 1, 1]),
    weights=np.full((4, 2, 2), 0.5),
    meta={"model": "a"},
)


def test_layers_stand_for_their_share_and_the_rest_stays() -> None:
    mapped = map_trace(SMALL, 4, 4, 2, "b")
    assert mapped.experts.tolist() == EXPERTS[:, [0, 0, 1, 1]].tolist()
    assert map_trace(SMALL, 1, 4, 2).experts.tolist() == EXPERTS[:, :1].tolist()
    assert mapped.sequence.tolist() == [0, 0, 1, 1]
    assert mapped.weights is not None
    assert mapped.meta["model"] == "b"
    assert mapped.meta["mapped_from"] == "a"
    assert mapped.meta["mapping"].startswith("layers 2 to 4 in proportion; experts 4 to 4")


def test_an_expert_is_one_of_its_share_for_a_whole_sequence() -> None:
    mapped = map_trace(SMALL, 2, 12, 2)
    assert (mapped.experts // 3).tolist() == EXPERTS.tolist()
    # Expert 0 of layer 0 is chosen by both tokens of sequence 0: by the same new one.
    assert mapped.experts[0, 0, 0] == mapped.experts[1, 0, 0]
    many = map_trace(open_trace("guide"), 12, 384, 1)
    assert len(np.unique(many.experts)) > 300
    assert map_trace(SMALL, 2, 12, 2).experts.tolist() == mapped.experts.tolist()
    assert map_trace(SMALL, 2, 12, 2, seed=1).experts.tolist() != mapped.experts.tolist()


def test_fewer_experts_stay_distinct() -> None:
    mapped = map_trace(SMALL, 2, 2, 2)
    # 0 and 1 become 0, 2 and 3 become 1; who comes second to the same takes the other.
    assert mapped.experts.tolist() == [[[0, 1], [0, 1]], [[0, 1], [1, 0]], [[0, 1], [0, 1]], [[1, 0], [0, 1]]]
    assert mapped.weights is None


def test_fewer_choices_keep_the_first_and_more_are_drawn() -> None:
    assert map_trace(SMALL, 2, 4, 1).experts.tolist() == EXPERTS[:, :, :1].tolist()
    more = map_trace(SMALL, 2, 4, 4)
    assert more.experts[:, :, :2].tolist() == EXPERTS.tolist()
    assert np.sort(more.experts, axis=2).tolist() == np.broadcast_to(np.arange(4), (4, 2, 4)).tolist()
    with pytest.raises(TraceError, match=r"top_k = 5: must be 1 to experts = 4"):
        map_trace(SMALL, 2, 4, 5)


def test_a_shipped_trace_maps_to_any_model() -> None:
    model = load_model("qwen3.8-flash-next")
    mapped = map_trace(open_trace("topk").slice(first=20), model.layers, model.experts, model.top_k, model.name)
    mapped.check()
    assert (mapped.layers, mapped.num_experts, mapped.k) == (48, 512, 10)


COUNTS = [[5, 0, 1, 4], [0, 2, 2, 6]]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(COUNTS),
        json.dumps({"model": "x", "counts": COUNTS}),
        json.dumps({f"layer_{n}": {str(e): c for e, c in enumerate(row) if c} for n, row in enumerate(COUNTS)}),
        json.dumps([{"layer": n, "expert": e, "count": c} for n, row in enumerate(COUNTS) for e, c in enumerate(row)]),
        "layer,expert,count\n" + "".join(f"{n},{e},{c}\n" for n, row in enumerate(COUNTS) for e, c in enumerate(row)),
        "# dense first\nlayer_id, expert_id, hits\n" + "".join(
            f"{n + 3},{e},{c}\n" for n, row in enumerate(COUNTS) for e, c in enumerate(row)),
    ],
)  # fmt: skip
def test_counts_are_read_in_every_form(tmp_path: Path, text: str) -> None:
    path = tmp_path / "counts"
    path.write_text(text)
    assert load_popularity(path).tolist() == COUNTS


def test_draws_follow_the_counts() -> None:
    trace = draw_by(np.array(COUNTS, dtype=float), 4000, 1, sequences=4, prefill_tokens=10)
    trace.check()
    for layer, counts in enumerate(COUNTS):
        drawn = np.bincount(trace.experts[:, layer, 0], minlength=4) / 4000
        assert drawn == pytest.approx(np.array(counts) / 10, abs=0.03)
    assert np.bincount(trace.sequence).tolist() == [1000] * 4
    assert np.bincount(trace.sequence[trace.phase == 0]).tolist() == [10] * 4
    pairs = draw_by(np.array(COUNTS, dtype=float), 100, 3)
    pairs.check()
    assert not (pairs.experts[:, 0] == 1).any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"not JSON"),
        ("[]", r"no counts"),
        ("[[1], 4]", r"layer 1: expert: 4: must be a list, or an object by number"),
        ('{"a": [1]}', r"layer 'a': must name one number"),
        ("[[1, -2]]", r"layer 0, expert 1: count '-2': must be a number of at least 0"),
        ("[[1, true]]", r"count 'True'"),
        ("layer,expert\n1,2\n", r"row 2: must have layer, expert and count"),
        ("layer,expert,count\n1,x,2\n", r"row 2: layer '1', expert 'x': must be integers"),
        ("layer,expert,count\n1,-1,2\n", r"expert -1: must be 0"),
        ("layer,expert,count\n1,99999999,2\n", r"expert 99999999: must be 0"),
    ],
)
def test_counts_that_cannot_be_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "counts"
    path.write_text(text)
    with pytest.raises(TraceError, match=message) as caught:
        load_popularity(path)
    assert "\n" not in str(caught.value)


def test_counts_must_be_of_the_model_and_have_enough_experts(tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    path.write_text(json.dumps([[1] * 64] * 15))
    model = load_model("olmoe-1b-7b")
    with pytest.raises(TraceError, match=r"15 layers: olmoe-1b-7b has 16 MoE layers"):
        popular_trace(path, model, 10, 1, 0, 0)
    path.write_text(json.dumps([[1] * 64] * 15 + [[1] * 7]))
    with pytest.raises(TraceError, match=r"layer 15: fewer than 8 experts were ever chosen"):
        popular_trace(path, model, 10, 1, 0, 0)
    with pytest.raises(TraceError, match=r"tokens = 3: must be at least sequences = 4"):
        draw_by(np.ones((1, 4)), 3, 1, sequences=4)


def popular(tmp_path: Path, **synthetic: Any) -> dict[str, Any]:
    """A scenario of two layers of four experts whose trace is drawn by COUNTS, two of eight experts in memory."""
    (tmp_path / "counts.json").write_text(json.dumps(COUNTS))
    return {
        "model": {"preset": "mixtral-8x7b", "layers": len(COUNTS), "experts": 4, "top_k": 1},
        "workload": {"synthetic": {"popularity": str(tmp_path / "counts.json"), "tokens": 40} | synthetic},
        "memory": {"gpu_budget": "2experts", "eviction": "static", "preload": "popular"},
    }


def test_a_scenario_draws_its_trace_by_counts_and_places_experts_by_them(tmp_path: Path) -> None:
    inputs = load_inputs(make_scenario(popular(tmp_path)))
    assert inputs.trace.experts.tolist() == draw_by(np.array(COUNTS, dtype=float), 40, 1).experts.tolist()
    manager = make_manager(inputs)
    most = sorted(range(8), key=lambda expert: -np.ravel(COUNTS)[expert])[:2]
    assert sorted(manager.assigned) == sorted(most)
    # The counts stay with a part of a trace, and with a stage's layers.
    rows = inputs.trace.select(np.arange(2))
    assert rows.extra["popularity"].tolist() == COUNTS
    assert stage_trace(rows, 1, 1).extra["popularity"].tolist() == COUNTS[1:]


def test_counts_of_a_scenario_in_a_file_lie_beside_it_and_change_a_sweeps_rows(tmp_path: Path) -> None:
    popular(tmp_path)
    (tmp_path / "s.toml").write_text(
        '[model]\nlayers = 2\nexperts = 4\ntop_k = 1\n[workload.synthetic]\npopularity = "counts.json"\n'
    )
    assert load_inputs(load_scenario(tmp_path / "s.toml")).trace.tokens == 500
    synthetic = load_scenario("synthetic", ["workload.synthetic.popularity=x.csv"]).workload.synthetic
    assert synthetic is not None
    assert not {"skew", "reuse", "fit"} & synthetic.model_fields_set


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"skew": 0.9}, r"workload\.synthetic: skew: no meaning with popularity"),
        ({"fit": "x.json"}, r"popularity: no meaning with fit"),
    ],
)
def test_counts_take_the_place_of_other_ways_to_draw(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        make_scenario(popular(tmp_path, **more))
