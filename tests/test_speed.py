"""Speed in the words of those who serve models: rates, TTFT, ITL and TPOT, with and without a warmup, by hand.

One layer, all experts resident, host free: a step takes 3 ns and 7 for each expert that its tokens choose.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_inputs, tiny_model, tiny_profile, tiny_scenario, tiny_trace

from prestage.engine.baselines import baseline_scenario
from prestage.engine.load import load_inputs
from prestage.engine.measure.comparison import compare
from prestage.engine.measure.speed import Served, speed, speed_metrics
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.simulate import simulate, simulate_inputs
from prestage.output.tables.runs import speed_rows
from prestage.workloads.batches import DECODE, PREFILL, PREFILL_MODES, Step, plan_steps, warmup_steps

# Three sequences, written row by row: prompts p, decode tokens d. A and B take the two places.
#   prefill A   0-10   A's first token at 10
#   prefill B  10-20   B's first token at 20
#   A and B    20-30   B ends; C takes its place
#   prefill C  30-61   four tokens choose four experts: 3 + 4 x 7
#   A and C    61-71   C ends
#   A          71-81
#   A          81-91
STALLED = "Ap Ad Ad Ad Ad Bp Bd Cp Cp Cp Cp Cd"


def simulated(rows: str, chosen: str | None = None, **workload: Any) -> dict[str, Any]:
    """Returns the result of a trace written row by row; `chosen` has the expert of each row, all 0 without it."""
    names = rows.split()
    experts = [[[int(expert)]] for expert in chosen or "0" * len(names)]
    trace = tiny_trace(
        experts,
        sequence=np.array([ord(name[0]) for name in names], dtype=np.int32),
        phase=np.array([DECODE if name[1] == "d" else PREFILL for name in names], dtype=np.uint8),
    )
    memory = {"preload": "layers"} if workload.pop("resident", True) else {}
    scenario = tiny_scenario(workload=workload, memory=memory)
    return simulate_inputs(tiny_inputs(tiny_model(1), tiny_profile(), trace, scenario), baselines=False).data


def stalled(**workload: Any) -> dict[str, Any]:
    return simulated(STALLED, "000000001230", batch=2, **workload)


def percentiles(values_ns: list[float]) -> list[float]:
    found = [float(np.mean(values_ns)), *np.percentile(values_ns, (50, 95, 99))]
    return [value / 1e6 for value in found]


def test_a_prefill_that_stalls_a_sequence_is_in_the_sustained_rate_and_in_the_gaps_between_its_tokens() -> None:
    data = stalled()
    assert data["makespan_ms"] == 91 / 1e6
    assert (data["decode_tokens"], data["prefill_tokens"]) == (6, 6)
    # The four decode steps take 10 each, and by themselves know nothing of the prompt between them.
    assert data["tokens_per_second"] == 6e9 / 40
    assert [*data["decode_step_ms"].values()] == pytest.approx([10 / 1e6] * 4)
    assert data["sustained_tokens_per_second"] == 6e9 / 91
    # A: 10, 30, 71, 81, 91; B: 20, 30; C: 61, 71.
    assert [*data["inter_token_latency_ms"].values()] == pytest.approx(percentiles([20, 41, 10, 10, 10, 10]))


def test_a_sequence_waits_for_its_first_token_from_when_its_place_was_free() -> None:
    # A and B come at 0; C when B ends, at 30.
    assert [*stalled()["time_to_first_token_ms"].values()] == pytest.approx(percentiles([10, 20, 61 - 30]))


def test_time_per_output_token_is_end_to_end_without_the_first_over_the_tokens_after_it() -> None:
    # A: (91 - 10) / 4; B: (30 - 20) / 1; C: (71 - 61) / 1.
    assert [*stalled()["time_per_output_token_ms"].values()] == pytest.approx(percentiles([81 / 4, 10, 10]))


def test_without_a_prefill_the_first_decode_step_gives_the_first_token() -> None:
    # Prompts are left out. A and B 0-10, B ends; A and C 10-20; A 20-30, 30-40.
    data = stalled(prefill="skip")
    assert [*data["time_to_first_token_ms"].values()] == pytest.approx(percentiles([10, 10, 10]))
    assert [*data["inter_token_latency_ms"].values()] == pytest.approx(percentiles([10, 10, 10]))
    assert [*data["time_per_output_token_ms"].values()] == pytest.approx(percentiles([10]))  # B and C have one token
    assert data["sustained_tokens_per_second"] == data["tokens_per_second"] == 6e9 / 40


def test_a_further_prompt_of_a_sequence_is_a_request_of_its_own() -> None:
    # Prefill 0-10, token 10-20; the second prompt comes at 20 and gives its first token at 30; its next is at 40.
    data = simulated("Ap Ad Ap Ad")
    assert [*data["time_to_first_token_ms"].values()] == pytest.approx(percentiles([10, 10]))
    assert [*data["inter_token_latency_ms"].values()] == pytest.approx(percentiles([10, 10]))


def test_a_prompt_in_chunks_gives_its_first_token_with_the_last() -> None:
    # Chunks 0-10 and 10-20, a token 20-30.
    data = simulated("Ap Ap Ad", prefill="chunked", chunk_tokens=1)
    assert data["time_to_first_token_ms"]["mean"] == 20 / 1e6
    assert data["inter_token_latency_ms"]["mean"] == 10 / 1e6


@pytest.mark.parametrize("warmup", ["3steps", "2tokens", "1tokens"])
def test_a_warmup_is_left_out_of_speed_and_stays_in_all_else(warmup: str) -> None:
    # Until 30, when the first decode step ends: whole steps. Behind it are A's tokens at 71, 81, 91, and C's at 61, 71.
    whole, data = stalled(), stalled(warmup=warmup)
    assert data["warmup"] == {"steps": 3, "decode_tokens": 2, "ms": 30 / 1e6}
    assert data["tokens_per_second"] == 4e9 / 30
    assert data["sustained_tokens_per_second"] == 4e9 / (91 - 30)
    assert [*data["time_to_first_token_ms"].values()] == pytest.approx(percentiles([31]))
    assert [*data["inter_token_latency_ms"].values()] == pytest.approx(percentiles([41, 10, 10, 10]))
    assert [*data["time_per_output_token_ms"].values()] == pytest.approx(percentiles([61 / 3, 10]))
    assert data["cold"] == {name: whole[name] for name in data["cold"]}
    assert (whole["cold"], whole["warmup"]) == (None, {"steps": 0, "decode_tokens": 0, "ms": 0.0})
    for name in ("makespan_ms", "accesses", "counts", "time", "bytes", "decode_tokens", "prefill_tokens"):
        assert data[name] == whole[name], name


def test_a_warmup_is_left_out_of_the_rates_of_accesses() -> None:
    # Two experts come, 20 ns each, and are found from then on: a step takes 30, 30, 10, 10.
    data = simulated("Ad Ad Ad Ad", "0101", resident=False, warmup="2tokens")
    assert (data["hit_rate"], data["cold"]["hit_rate"]) == (1.0, 0.5)
    assert (data["access_latency_ms"], data["cold"]["access_latency_ms"]) == (0.0, 10 / 1e6)
    assert data["tokens_per_second"] == pytest.approx(1e9 / 10)
    assert data["cold"]["tokens_per_second"] == 4e9 / 80
    assert data["gpus"][0]["hit_rate"] == 1.0
    assert (data["counts"]["miss"], data["accesses"]) == (2, 4)


@pytest.mark.slow
def test_rates_behind_a_warmup_are_those_of_its_visits_on_every_gpu_and_without_prefetch() -> None:
    settings = ["workload.tokens=40", "workload.warmup=20tokens"]
    for name in ("guide", "pipeline-2", "placement-8"):
        result = simulate(load_scenario(name, settings), baselines=False)
        first = result.data["warmup"]["steps"]
        found = [
            recording.outcomes[recording.access_visit >= first * len(recording.expert_bytes)] <= 1
            for recording in result.recordings
        ]
        assert result.data["hit_rate"] == np.concatenate(found).mean(), name
        assert [gpu["hit_rate"] for gpu in result.data["gpus"]] == [float(hits.mean()) for hits in found], name
    alone = simulate(load_scenario("guide", [*settings, "prefetch.lookahead=0"]), baselines=False).data
    with_prefetch = simulate(load_scenario("guide", settings), baselines=False).data
    assert with_prefetch["hit_rate_without_prefetch"] == alone["hit_rate"] != alone["cold"]["hit_rate"]


@pytest.mark.slow
def test_speed_behind_a_warmup_hardly_depends_on_how_long_the_run_is() -> None:
    warm, cold = [], []
    for tokens in (200, 400):
        settings = [f"workload.tokens={tokens}", "workload.warmup=100tokens"]
        data = simulate(load_scenario("guide", settings), baselines=False).data
        warm.append(data["tokens_per_second"])
        cold.append(data["cold"]["tokens_per_second"])
    assert max(warm) / min(warm) < 1.05 < max(cold) / min(cold)


def test_what_a_user_sees_says_batch_percentile_and_warmup() -> None:
    rows = {name: (value, note) for name, value, note in speed_rows(stalled())}
    assert rows["tokens per second"][1] == "batch 2, 6 tokens"
    assert rows["sustained"][0] == "65,930,000"  # as many digits as costs are known to
    assert rows["ITL (next token)"][1].startswith("p50; mean ")
    assert {"TTFT (first token)", "TPOT (per token)", "decode step"} < rows.keys()
    assert "from a cold start" not in rows
    rows = {name: (value, note) for name, value, note in speed_rows(stalled(warmup="2tokens"))}
    assert rows["tokens per second"][1] == "batch 2, decode tokens 3 to 6"
    assert rows["from a cold start"] == ("150,000,000", "all 6 tokens, hit rate 100.0%")
    assert compare({"one": stalled(), "two": stalled(warmup="2tokens")})["figures"]["cold.tokens_per_second"] == [
        None,
        6e9 / 40,
    ]


@pytest.mark.parametrize(
    ("warmup", "message"),
    [
        ("20%", r"workload\.warmup = '20%': write it as '100tokens' or '20steps'"),
        ("20", r"workload\.warmup = 20: write it as '100tokens' or '20steps'"),
        ("true", r"workload\.warmup = True: write it as '100tokens' or '20steps'"),
        ("-1steps", r"workload\.warmup = '-1steps': write it as"),
        ("99999999999999999999tokens", r"write it as"),
        ("12tokens", r"workload\.warmup = '12tokens': no token is left .* has 12 decode tokens in 3 steps; give less"),
        ("3steps", r"workload\.warmup = '3steps': no token is left"),
        ("999999999999999steps", r"no token is left"),
    ],
)
def test_a_warmup_that_is_none_or_leaves_nothing_is_refused_before_the_run(warmup: str, message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        load_inputs(load_scenario("guide", ["workload.tokens=12", f"workload.warmup={warmup}"]))


def test_a_warmup_is_as_few_whole_steps_as_have_its_tokens() -> None:
    steps = [Step(phase, np.arange(size)) for phase, size in ((PREFILL, 9), (DECODE, 2), (DECODE, 2), (DECODE, 1))]
    found = {warmup: warmup_steps(steps, warmup) for warmup in ("0tokens", "1tokens", "2tokens", "3tokens", "4tokens")}
    assert list(found.values()) == [0, 2, 2, 3, 3]
    assert [warmup_steps(steps, f"{number}steps") for number in range(4)] == [0, 1, 2, 3]


def test_rows_with_and_without_a_warmup_share_their_baselines() -> None:
    plain, warm = (load_scenario("guide", settings) for settings in ([], ["workload.warmup=20steps"]))
    for name in ("resident", "baseline", "no_prefetch"):
        assert baseline_scenario(name, plain) == baseline_scenario(name, warm)


# In general.


@given(
    kinds=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), min_size=1, max_size=24),
    batch=st.integers(1, 4),
    groups=st.integers(1, 3),
    prefill=st.sampled_from(PREFILL_MODES),
)
def test_as_many_sequences_are_under_way_as_there_are_places(
    kinds: list[tuple[int, int]], batch: int, groups: int, prefill: str
) -> None:
    sequence = np.array([name for name, _ in kinds], dtype=np.int32)
    phase = np.array([kind for _, kind in kinds], dtype=np.uint8)
    groups = min(groups, batch)
    steps = plan_steps(sequence, phase, batch=batch, prefill=prefill, chunk_tokens=2, micro_batches=groups)
    if not steps:
        return
    end_ns = np.arange(1, len(steps) + 1)  # step n is from n to n + 1
    served = Served(steps, sequence, end_ns, np.ones_like(end_ns), len(steps))
    requests = served.requests
    rows = np.concatenate([step.rows for step in steps])
    came: dict[int, int] = {}
    left: dict[int, int] = {}
    for request, row, at_ns in zip(requests.request, rows[requests.token_at], requests.end_ns, strict=True):
        came.setdefault(int(sequence[row]), int(requests.arrival_ns[request]))
        left[int(sequence[row])] = int(at_ns)
    under_way = [sum(came[name] <= at_ns < left[name] for name in came) for at_ns in range(len(steps))]
    assert max(under_way) <= batch
    # While some are still to come, no place is empty; but what ends with its prompt makes room for the next at once.
    if all(phase[np.flatnonzero(sequence == name)[-1]] == DECODE for name in came):
        assert all(number == min(batch, len(came)) for number in under_way[: max(came.values())])
    # Whatever the requests, they wait for every token, and all their waits are their time from end to end.
    assert (requests.since_last_ns > 0).all()
    for request in np.unique(requests.request):
        own = requests.request == request
        assert requests.since_last_ns[own].sum() == requests.end_ns[own][-1] - requests.arrival_ns[request]
    decoding = [len(step.rows) for step in steps if step.phase == DECODE]
    assert speed(served)["tokens_per_second"] == (1e9 * sum(decoding) / len(decoding) if decoding else None)
    assert len(served.gaps_ns) == speed_metrics(served)["decode_tokens"] == sum(decoding)
