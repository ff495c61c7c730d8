"""[requests] of a scenario: what it means, what it is refused for, and that it makes what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_request_traces import AZURE, MOONCAKE, VLLM

from prestage.engine.load import load_inputs
from prestage.engine.loading.capacity import memories
from prestage.engine.loading.requests import RequestLoad, load_requests, position_bytes
from prestage.engine.policies.scheduler import SCHEDULERS
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import Scenario, load_scenario, make_scenario
from prestage.engine.scenario.sections_requests import edge_requests
from prestage.testing import serve
from prestage.workloads.model import load_model
from prestage.workloads.requests.kv_blocks import PrefixBlocks
from prestage.workloads.synthetic import synthesize

MODEL = load_model("mixtral-8x7b")
TRACE = synthesize(60, 2, 8, 2, sequences=3, prefill_tokens=5)
GIB = 1 << 30


def scenario(**requests: Any) -> Scenario:
    return make_scenario({"workload": {"trace": "t.npz"}, "requests": requests})


def load(room_bytes: int | None = 40 * GIB, total: bool = False, seed: int = 0, **requests: Any) -> RequestLoad:
    section = scenario(**requests).requests
    assert section is not None
    return load_requests(section, MODEL, TRACE, seed, room_bytes, total=total)


def test_a_scenario_without_requests_says_nothing_of_them() -> None:
    plain = make_scenario({"workload": {"trace": "t.npz"}}).plain()
    assert "requests" not in plain


def test_what_a_scenario_says_of_requests_is_the_same_again_from_its_plain_data() -> None:
    first = scenario(
        arrivals="gamma", cv=2.0, prompt_tokens={"mean": 100, "distribution": "lognormal"}, output_tokens=7,
        speculation={"drafts": 2, "acceptance": [0.9, 0.5]}, slo={"ttft_ms": 500}, scheduler={"name": "orca"},
    )  # fmt: skip
    assert make_scenario(json.loads(json.dumps(first.plain()))) == first


def test_keys_are_set_from_outside_also_in_tables_within() -> None:
    settings = ["requests.rate=3", "requests.scheduler.name=sarathi", "requests.prompt_tokens.mean=64",
                "requests.prompt_tokens.distribution=exponential", "requests.slo.itl_ms=40",
                "requests.count=20"]  # fmt: skip
    section = load_scenario("synthetic", settings).requests
    assert section is not None
    assert section.scheduler.name == "sarathi"
    assert section.slo is not None
    made = load_requests(section, MODEL, TRACE, 0, 40 * GIB, total=False)
    assert len(made.requests) == 20
    assert made.requests[0].output_tokens == 128
    assert len({one.prompt_tokens for one in made.requests}) > 5


@pytest.mark.parametrize(
    ("requests", "says"),
    [
        ({"arivals": "poisson"}, r"requests.arivals: no such key; did you mean 'arrivals'\?"),
        ({"arrivals": "poison"}, r"requests.arrivals = 'poison'.*choose one of poisson, gamma, constant, bur"),
        ({"rate": 0}, r"requests.rate = 0"),
        ({"arrivals": "trace"}, r"arrivals = 'trace': give trace, a file of requests"),
        ({"trace": "a.csv", "prompt_tokens": 5}, r"prompt_tokens: no meaning with trace, which says it: leave out"),
        ({"prompt_tokens": 0}, r"requests.prompt_tokens = 0"),
        ({"prompt_tokens": {"mean": 5, "distribution": "normal"}}, "choose one of fixed, uniform, exponential"),
        ({"prompt_tokens": {"mean": 5, "distribution": "uniform"}}, r"it is 0.577 at most"),
        ({"warmup": "10"}, r"'10': write it as '10%' or '50requests'"),
        ({"cooldown": "100%"}, r"'100%': must be less than 100%"),
        ({"scheduler": {"name": "vllm"}}, f"choose one of {', '.join(SCHEDULERS)}"),
        ({"speculation": {"drafts": 2, "acceptance": [0.5]}}, r"give one number, or 2, one for each draft"),
        ({"speculation": {"acceptance": 1.5}}, r"acceptance = 1.5: must be 0 to 1"),
        ({"kv": {"boundary": "moving"}}, r"requests.kv.boundary = 'moving': give memory.total_bytes"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_by_key_value_and_what_would_do(requests: dict[str, Any], says: str) -> None:
    with pytest.raises(ScenarioError, match=says):
        scenario(**requests)


@pytest.mark.parametrize("setting", ["workload.batch=4", "workload.tokens=9", "parallel.gpus=2", "workload.context=8"])
def test_what_makes_steps_by_itself_does_not_go_with_requests(setting: str) -> None:
    with pytest.raises(ScenarioError, match=rf"{setting.split('=')[0]} = \d: with \[requests\]"):
        load_scenario("synthetic", ["requests.rate=1", setting])


def test_edges_of_the_window_are_shares_or_numbers() -> None:
    assert [edge_requests(text, 250) for text in ("10%", "0.5%", "7requests", " 0 % ")] == [25, 1, 7, 0]


def test_blocks_are_what_the_budget_has_room_for() -> None:
    # Mixtral: 32 layers of 2 x 8 heads x 128 x 2 bytes, 128 KiB a position, 2 MiB a block of 16.
    assert position_bytes(MODEL) == 128 << 10
    assert load(kv={"budget": "1GiB"}).room.blocks == 512
    assert load(kv={"budget": "25%"}).room.blocks == 10 * 512
    assert load(kv={"budget": "99blocks"}).room.kv_bytes == 99 * (2 << 20)
    assert load(kv={"budget": "1GiB", "swap_budget": "9MiB"}).room.host_blocks == 4
    assert load(kv={"budget": "1GiB", "block_tokens": 32}).room.blocks == 256
    assert isinstance(load(kv={"prefix_caching": True}).server().queue.kv, PrefixBlocks)


def test_experts_have_what_kv_blocks_leave_of_a_total_at_a_boundary_that_stands_or_moves() -> None:
    fixed = load(total=True, kv={"budget": "10GiB"})
    assert fixed.expert_bytes(100 * GIB) == 30 * GIB
    assert fixed.expert_bytes(5 * GIB) == 5 * GIB
    assert fixed.budget_of(100 * GIB) is None
    assert load(kv={"budget": "10GiB"}).expert_bytes(100 * GIB) == 100 * GIB  # no total that both are parts of
    section = make_scenario({
        "workload": {"trace": "t.npz"}, "memory": {"total_bytes": "50GiB"},
        "requests": {"kv": {"budget": "10GiB", "boundary": "moving"}, "count": 3, "arrivals": "constant", "rate": 1000},
    }).requests  # fmt: skip
    assert section is not None
    moving = load_requests(section, MODEL, TRACE, 0, 40 * GIB, total=True)
    assert moving.expert_bytes(100 * GIB) == 40 * GIB
    budget_of = moving.budget_of(100 * GIB)
    assert budget_of is not None
    # The first step has the prompt of one request: 512 positions, 32 blocks of 2 MiB.
    (_, step), *_ = serve(moving.server(), 10_000_000)
    assert budget_of(step) == 40 * GIB - 64 * (1 << 20)


@pytest.mark.parametrize(
    ("requests", "room_bytes", "says"),
    [
        ({"kv": {"budget": "30blocks"}}, GIB, r"100 of 100 requests can never be served: request 0 has 512"),
        ({"kv": {"budget": "1MiB"}}, GIB, r"requests.kv.budget = '1MiB': less than a block of 16 positions"),
        ({"kv": {"budget": "20%"}}, None, r"how much memory the GPU has is not known: give bytes or blocks"),
        ({"kv": {"budget": "8"}}, GIB, r"requests.kv.budget = '8': write it as '20%', '8GiB' or '2000blocks'"),
        ({"kv": {"budget": "3experts"}}, GIB, r"write it as '20%', '8GiB' or '2000blocks'"),
        ({"kv": {"swap_budget": "5%"}}, GIB, r"requests.kv.swap_budget: '5%': write bytes as '24GiB'"),
        ({"speculation": {"acceptance": "no.json"}}, GIB, r"speculation.acceptance = 'no.json': cannot be read"),
        ({"warmup": "60%", "count": 5, "cooldown": "40%"}, GIB, r"'60%' and cooldown = '40%': 3 and 2 leave none of 5"),
        ({"trace": "no.csv"}, GIB, r"requests.no.csv: cannot be read"),
    ],
)  # fmt: skip
def test_what_can_never_be_served_is_refused_before_the_clock(
    requests: dict[str, Any], room_bytes: int | None, says: str
) -> None:
    with pytest.raises(ScenarioError, match=says):
        load(room_bytes, **requests)


def test_a_trace_gives_lengths_and_times_or_a_rate_in_their_place(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE, encoding="utf-8")
    own = load(trace=str(path), arrivals="trace").requests
    assert [one.arrival_ns for one in own] == [0, 52_000_000, 98_146_000]
    by_rate = load(trace=str(path), arrivals="constant", rate=2.0, count=2).requests
    assert [(one.arrival_ns, one.prompt_tokens) for one in by_rate] == [(0, 4808), (500_000_000, 3180)]
    with pytest.raises(ScenarioError, match=r"requests.count = 4: .*azure.csv has 3 requests"):
        load(trace=str(path), count=4)
    path.write_text(json.dumps({key: value for key, value in VLLM.items() if key != "start_times"}), encoding="utf-8")
    with pytest.raises(ScenarioError, match="does not say when its requests came: choose another"):
        load(trace=str(path), arrivals="trace")


def test_hashes_of_a_trace_are_found_in_blocks(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    path.write_text(MOONCAKE, encoding="utf-8")
    made = load(trace=str(path), arrivals="trace", kv={"prefix_caching": True})
    server = made.server()
    serve(server, 10_000_000)
    # The second prompt's 512 tokens are the first hash of the first: all blocks but the one with its last token.
    assert server.log.requests["cached"].tolist() == [0, 496]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_step_is_larger_than_said_and_every_server_is_a_fresh_one(name: str) -> None:
    made = load(
        count=60, rate=400.0, scheduler={"name": name, "max_num_seqs": 5, "max_num_batched_tokens": 300},
        prompt_tokens={"mean": 90, "distribution": "lognormal"}, output_tokens=9, kv={"budget": "40blocks"},
        speculation={"drafts": 2, "acceptance": 0.5},
    )  # fmt: skip
    runs = [[(now, step.rows.tolist()) for now, step in serve(made.server(), 4_000_000)] for _ in range(2)]
    assert runs[0] == runs[1]
    assert max(len(rows) for _, rows in runs[0]) <= made.most_tokens


def test_recorded_acceptance_is_read(tmp_path: Path) -> None:
    path = tmp_path / "accepted.json"
    path.write_text("[0, 2, 2]", encoding="utf-8")
    made = load(speculation={"drafts": 2, "acceptance": str(path)})
    assert made.speculation is not None
    assert made.speculation.mean_tokens() == pytest.approx(7 / 3)
    path.write_text("[3]", encoding="utf-8")
    with pytest.raises(ScenarioError, match=r"requests\.recorded acceptance: must be 0 to 2"):
        load(speculation={"drafts": 2, "acceptance": str(path)})
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ScenarioError, match="must be a list of integers"):
        load(speculation={"drafts": 2, "acceptance": str(path)})


def test_experts_that_a_request_goes_to_are_those_of_its_sequence() -> None:
    made = load(count=1)
    scheduler = made.server()._scheduler
    known = scheduler.experts_of(0)  # type: ignore[attr-defined]
    own = made.rows.sequence_of(0)
    there = {(layer, expert) for row in own for layer in range(2) for expert in TRACE.experts[row, layer].tolist()}
    assert set(zip(*np.nonzero(known.reshape(2, 8)), strict=True)) == there


def test_what_makes_drafts_leaves_less_room_for_experts() -> None:
    """Of gpt-oss-20b cut to 4 layers: a draft head is a fifth one, as large as each of them."""
    data: dict[str, Any] = {
        "model": {"preset": "gpt-oss-20b", "layers": 4},
        "machine": {"profile": "h200-pcie5"},
        "workload": {"synthetic": {"tokens": 16, "sequences": 1, "prefill_tokens": 8}},
        "memory": {"total_bytes": "3.5GiB", "gpu_budget": "100%"},
    }

    def room(drafter: str) -> Inputs:
        speculation = {"drafts": 1, "drafter_bytes": drafter}
        return load_inputs(
            make_scenario(data | {"requests": {"kv": {"budget": "100blocks"}, "speculation": speculation}})
        )

    without, half, layer = (room(drafter) for drafter in ("0B", "0.5GiB", "layer"))
    assert without.budget_bytes < without.model.total_expert_bytes  # what is taken is taken from experts
    assert without.budget_bytes - half.budget_bytes == GIB // 2 == memories(half)[0].parts["drafter"]
    model = layer.model
    layer_bytes = model.dense_bytes[0] + model.experts * model.expert_bytes[0]
    assert without.budget_bytes - layer.budget_bytes == layer_bytes == memories(layer)[0].parts["drafter"]
    with pytest.raises(ScenarioError, match=r"drafter_bytes: '5%': write bytes as '24GiB', or 'layer'"):
        room("5%")
