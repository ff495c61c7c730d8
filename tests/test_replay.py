"""Sequential replay: against published hit rates of a real trace, theory, cases worked by hand, and naive code."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from naive import NaiveManager
from random_cases import traces as random_traces
from tiny import tiny_trace

from prestage.engine.decide.dispatch import LOOKUPS
from prestage.engine.decide.memory_manager import MemoryManager
from prestage.engine.decide.pools import pool_budgets
from prestage.engine.policies.eviction import EVICTION, Lru
from prestage.engine.replay.compiled import COMPILED, is_compiled
from prestage.engine.replay.replay import FOUND, MISSED, NOT_LOOKED_UP, Replayed, replay, replay_trace, setting_of
from prestage.engine.scenario.warnings import cliff_warning
from prestage.workloads.batches import DECODE, PREFILL, plan_steps
from prestage.workloads.importers import open_trace
from prestage.workloads.trace import RoutingTrace

QWEN = Path("bigmoeonedge-qwen")
BUDGETS_MIB = [250, 500, 750, 1000, 1500, 2000, 2500, 3000, 4000, 6000, 8000]
REAL = ["gpt-oss-20b.npz", "olmoe-1b-7b.npz", "qwen3-30b-a3b_k6.npz", "switch-base-8_encoder.npz"]


@pytest.fixture(scope="module")
def qwen(traces: Path) -> RoutingTrace:
    return open_trace(traces / QWEN / "qwen.route.csv")


@pytest.fixture(scope="module")
def published(traces: Path) -> dict[tuple[str, int], dict[str, str]]:
    """The published rows, by policy and budget in MiB, as printed."""
    with (traces / QWEN / "qwen-curve.csv").open(newline="") as file:
        return {(row["policy"], int(row["budget_mib"])): row for row in csv.DictReader(file)}


# Published.


@pytest.mark.parametrize("mib", BUDGETS_MIB)
@pytest.mark.parametrize("eviction", ["lru", "lfu", "belady"])
def test_the_published_curve_is_reproduced_to_the_printed_digits(
    qwen: RoutingTrace, published: dict[tuple[str, int], dict[str, str]], eviction: str, mib: int
) -> None:
    data = replay_trace(qwen, f"{mib}MiB", eviction=eviction)
    row = published[eviction, mib]
    assert f"{100 * data['hit_rate']:.3f}" == row["hit_pct_cum"]
    assert f"{100 * data['hit_rate_decode']:.3f}" == row["hit_pct_decode"]
    assert f"{data['bytes_read'] / 2**20:.1f}" == row["read_mib"]


@pytest.mark.slow
@pytest.mark.parametrize("mib", BUDGETS_MIB)
def test_random_eviction_comes_as_near_the_published_curve_as_luck_allows(
    qwen: RoutingTrace, published: dict[tuple[str, int], dict[str, str]], mib: int
) -> None:
    # 39,526 accesses: if they were drawn one by one, a standard deviation would be 0.25 points at most. Two runs differ
    # by sqrt(2) of that, and 3 of those are 1.1 points.
    data = replay_trace(qwen, f"{mib}MiB", eviction="random")
    assert abs(100 * data["hit_rate"] - float(published["random", mib]["hit_pct_cum"])) < 1.1


def test_every_published_row_of_one_pool_is_compared(published: dict[tuple[str, int], dict[str, str]]) -> None:
    kinds = {policy for policy, _ in published}
    assert kinds == {"lru", "lfu", "belady", "random", "layer", "layerlfu"}  # the last two overshoot their budget
    assert sorted(published) == sorted((policy, mib) for policy in kinds for mib in BUDGETS_MIB)


def test_at_4000_mib_lru_hits_74880_of_100000_and_80287_when_decoding(qwen: RoutingTrace) -> None:
    data = replay_trace(qwen, "4000MiB")
    assert round(data["hit_rate"], 5) == 0.74880
    assert round(data["hit_rate_decode"], 5) == 0.80287


def test_the_logged_residency_agrees_where_the_log_was_made(qwen: RoutingTrace) -> None:
    at_4000, at_3000 = (replay_trace(qwen, budget)["residency_agreement"] for budget in ("4000MiB", "3000MiB"))
    assert at_4000 >= 0.999
    assert at_3000 < at_4000  # another budget than the log's agrees less: the number can tell


def test_a_trace_without_a_log_has_no_agreement(traces: Path) -> None:
    assert replay_trace(open_trace(traces / REAL[1]), "25%")["residency_agreement"] is None


# Theory: the cliff.


@pytest.mark.slow
@pytest.mark.parametrize("name", [*REAL, str(QWEN / "qwen.route.csv")])
def test_a_global_lru_of_a_whole_round_of_other_layers_never_hits(traces: Path, name: str) -> None:
    # Between two visits of a layer at batch 1, (layers - 1) x top-k experts of other layers come and go.
    trace = open_trace(traces / name)
    slots = (trace.layers - 1) * trace.k
    data = replay_trace(trace, f"{slots}experts", expert_bytes=1)
    assert data["hits_decode"] == 0 and data["hit_rate_decode"] == 0.0
    assert data["accesses_decode"] == (trace.phase == DECODE).sum() * trace.layers * trace.k
    (warning,) = data["warnings"]
    assert warning.startswith("cliff: this global LRU evicts every expert before it is used again")
    assert f" {slots} experts of other layers" in warning
    assert "its decode hit rate at batch 1 is exactly 0 without prefetching; use " in warning
    assert ("scope = per-layer, or " in warning) == (slots >= trace.layers)
    assert "a budget of at least" in warning
    # One more expert, and there is nothing to warn of; nor with a pool for each layer, or a batch.
    assert replay_trace(trace, f"{slots + 1}experts", expert_bytes=1)["warnings"] == []
    layered = replay_trace(trace, f"{trace.layers * trace.k}experts", expert_bytes=1, scope="per-layer")
    assert layered["warnings"] == [] and layered["hits_decode"] > 0
    assert replay_trace(trace, f"{slots}experts", expert_bytes=1, batch=2)["warnings"] == []


@settings(max_examples=60)
@given(data=st.data(), layers=st.integers(1, 4), experts=st.integers(2, 6), tokens=st.integers(1, 25))
def test_below_the_cliff_nothing_hits_and_right_above_it_something_can(
    data: st.DataObject, layers: int, experts: int, tokens: int
) -> None:
    k = data.draw(st.integers(1, experts))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=layers, max_size=layers))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    chosen = np.argsort(random.random((tokens, layers, experts)), axis=2)[..., :k].astype(np.uint8)
    trace = RoutingTrace(chosen, experts)
    least = next(size for size in range(1000) if cliff_warning(size, sizes, k, "global", "lru") is None)
    # The last expert of a layer's visit stays if it fits with k experts of every other layer; the largest layer needs
    # the least for that, because it does not count k times.
    assert least == max(sizes) + k * (sum(sizes) - max(sizes))
    steps = plan_steps(trace.sequence, trace.phase)
    if least > max(sizes):
        manager = MemoryManager(sizes, experts, least - 1, Lru)
        assert replay(trace, steps, manager).count(FOUND) == 0
    # The same token twice: the largest layer's last expert is found again.
    twice = RoutingTrace(chosen[[0, 0]], experts)
    manager = MemoryManager(sizes, experts, least, Lru)
    assert replay(twice, steps := plan_steps(twice.sequence, twice.phase), manager).count(FOUND) > 0, steps


def test_other_policies_and_scopes_have_no_cliff() -> None:
    assert cliff_warning(1, [1, 1, 1], 2, "global", "lru") is not None
    assert cliff_warning(1, [1, 1, 1], 2, "per-layer", "lru") is None
    assert cliff_warning(1, [1, 1, 1], 2, "global", "sieve") is None


# Theory: uniform routing.


@pytest.mark.parametrize(("experts", "slots", "k"), [(16, 4, 1), (16, 15, 1), (32, 8, 4), (8, 6, 6), (64, 16, 2)])
def test_under_uniform_routing_a_per_layer_lru_hits_slots_in_experts(experts: int, slots: int, k: int) -> None:
    # Once a layer's pool is full it holds `slots` of `experts`. The next token's k experts are drawn independently of
    # all before, so how many of them are held is hypergeometric, whatever LRU has kept: mean k slots / experts,
    # variance k p (1 - p) (experts - k) / (experts - 1). Visits are independent of each other, so the count over n
    # visits has a standard deviation of sqrt(n variance); 4 of them are missed by chance once in 16,000 seeds.
    tokens, layers, warm = 3000, 4, 500
    random = np.random.default_rng(7)
    chosen = np.argsort(random.random((tokens, layers, experts)), axis=2)[..., :k].astype(np.uint8)
    trace = RoutingTrace(chosen, experts)
    for layer in range(layers):  # every pool is full long before it counts
        assert len(np.unique(chosen[:warm, layer])) >= slots
    steps = plan_steps(trace.sequence, trace.phase)
    manager = MemoryManager([1] * layers, experts, slots * layers, Lru, scope="per-layer")
    outcome = replay(trace, steps, manager).outcome[warm:]
    visits, p = (tokens - warm) * layers, slots / experts
    deviation = math.sqrt(visits * k * p * (1 - p) * (experts - k) / (experts - 1))
    assert abs((outcome == FOUND).sum() - visits * k * p) <= 4 * deviation


@given(random_traces(3, 5, 2), st.integers(1, 4))
def test_with_room_for_all_only_first_uses_miss(trace: RoutingTrace, batch: int) -> None:
    steps = plan_steps(trace.sequence, trace.phase, batch=batch)
    replayed = replay(trace, steps, MemoryManager([1] * 3, 5, 15, Lru))
    used = {(layer, e) for row in range(trace.tokens) for layer in range(3) for e in trace.chosen(row, layer)}
    assert (replayed.count(MISSED), replayed.evict) == (len(used), 0)


@settings(max_examples=50)
@given(trace=random_traces(2, 5, 2), slots=st.integers(1, 9), lookup=st.sampled_from(LOOKUPS))
def test_more_room_never_hurts_lru_at_batch_1(trace: RoutingTrace, slots: int, lookup: str) -> None:
    # LRU is a stack algorithm (Mattson et al. 1970): what the smaller memory holds, the larger holds too. Look-ups
    # one by one; and a whole token's, as long as they fit (waves would change the order).
    steps = plan_steps(trace.sequence, trace.phase, prefill="chunked", chunk_tokens=1)
    less, more = (
        replay(trace, steps, MemoryManager([1] * 2, 5, room, Lru), lookup=lookup).outcome for room in (slots, slots + 1)
    )
    if lookup == "single" or slots >= trace.k:
        assert ((less == FOUND) <= (more == FOUND)).all()


# By hand.


def outcomes(trace: RoutingTrace, slots: int, *, lookup: str = "batch", batch: int = 1) -> str:
    """The outcome of every (token, layer, rank), tokens apart: m missed, f found, . not looked up."""
    steps = plan_steps(trace.sequence, trace.phase, batch=batch)
    manager = MemoryManager([1] * trace.layers, trace.num_experts, slots, Lru)
    outcome = replay(trace, steps, manager, lookup=lookup).outcome
    letters = {MISSED: "m", FOUND: "f", NOT_LOOKED_UP: "."}
    return " ".join("".join(letters[cell] for cell in row) for row in outcome.reshape(trace.tokens, -1).tolist())


def test_a_batch_looks_up_each_expert_once_and_single_looks_up_every_pair() -> None:
    # Two sequences side by side: tokens (0, 1) and (1, 2), then (2, 0) and (3, 0); room for three.
    trace = tiny_trace([[[0, 1]], [[2, 0]], [[1, 2]], [[3, 0]]], sequence=np.array([0, 0, 1, 1]))
    # Batch: 0 1 2 are missed, 1's second look-up is none. Then 2 and 0 are found and 3 missed (1 leaves); 0's second
    # is none. Rows of sequence 0 are 0 and 1.
    assert outcomes(trace, 3, batch=2) == "mm ff .m m."
    # Single: 0 m, 1 m, 1 f, 2 m; then 2 f, 0 f, 3 m (1 leaves), 0 f.
    assert outcomes(trace, 3, batch=2, lookup="single") == "mm ff fm mf"
    # With room for two only: 0 m, 1 m, 1 f, 2 m (0 leaves); 2 f, 0 m (1 leaves), 3 m (2 leaves), 0 f.
    assert outcomes(trace, 2, batch=2, lookup="single") == "mm fm fm mf"


def test_a_prompt_is_one_look_up_of_all_its_tokens() -> None:
    # The prompt (0, 1), (1, 2) in one step; then (2, 0) finds both.
    phase = np.array([PREFILL, PREFILL, DECODE])
    trace = tiny_trace([[[0, 1]], [[1, 2]], [[2, 0]]], phase=phase)
    assert outcomes(trace, 4) == "mm .m ff"


def test_layers_share_no_expert() -> None:
    assert outcomes(tiny_trace([[[1], [1], [1]]]), 9) == "mmm"


def test_a_token_that_is_not_routed_at_a_layer_is_not_looked_up_there() -> None:
    trace = tiny_trace([[[0], [1]], [[0], [0]], [[0], [1]]], present=np.array([[1, 1], [1, 0], [1, 1]], dtype=bool))
    assert outcomes(trace, 4) == "mm f. ff"
    assert outcomes(trace, 4, lookup="single") == "mm f. ff"


def test_counts_rates_and_bytes_are_those_of_the_outcome() -> None:
    phase = np.array([PREFILL, DECODE, DECODE])
    trace = tiny_trace([[[0], [1]], [[0], [2]], [[3], [2]]], phase=phase)
    data = replay_trace(trace, "6KiB", expert_bytes=1024)
    # Missed 0 1; found 0, missed 2; missed 3, found 2. Nothing leaves: 5 experts in 6 KiB.
    assert {key: data[key] for key in ("accesses", "hits", "accesses_decode", "hits_decode", "evict")} == {
        "accesses": 6,
        "hits": 2,
        "accesses_decode": 4,
        "hits_decode": 2,
        "evict": 0,
    }
    assert (data["hit_rate"], data["hit_rate_decode"]) == (2 / 6, 0.5)
    assert (data["bytes_read"], data["budget_bytes"]) == (4 * 1024, 6 * 1024)
    # Of unequal sizes, every layer's misses count as its own: layer 0 misses twice, layer 1 twice.
    sized = RoutingTrace(trace.experts, 4, phase=phase, extra={"expert_bytes": np.array([10, 1])})
    data = replay_trace(sized, "100%")
    assert (data["bytes_read"], data["budget_bytes"]) == (22, 44)


def test_without_sizes_a_share_has_a_meaning_and_bytes_have_none() -> None:
    trace = tiny_trace([[[0]], [[0]], [[1]], [[0]]])
    data = replay_trace(trace, "25%")  # of four experts: one
    assert (data["hits"], data["evict"], data["bytes_read"], data["budget_bytes"]) == (1, 2, None, None)


def test_rates_without_look_ups_are_none() -> None:
    trace = tiny_trace([[[0]]], phase=np.array([PREFILL]))
    assert replay_trace(trace, "1experts", expert_bytes=5)["hit_rate_decode"] is None
    assert Replayed(trace, np.full((1, 1, 1), NOT_LOOKED_UP, dtype=np.uint8), 0).hit_rate() is None


def test_agreement_is_the_share_of_decode_look_ups_found_exactly_if_logged_as_there() -> None:
    # Prefill does not count. Decode: missed and logged 0, found and logged 1, missed and logged 2 (a prefetch there).
    residency = np.array([1, 0, 1, 2]).reshape(4, 1, 1)
    trace = tiny_trace(
        [[[0]], [[1]], [[1]], [[2]]], phase=np.array([0, 1, 1, 1]), extra={"residency": residency.astype(np.uint8)}
    )
    assert replay_trace(trace, "4experts", expert_bytes=1)["residency_agreement"] == pytest.approx(2 / 3)


# Bad input.


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        ("4GiB", {}, "budget '4GiB': the trace does not say how large an expert is; give --model or --expert-bytes"),
        ("much", {"expert_bytes": 1}, "budget 'much': write it as '25%', '4GiB' or '512experts'"),
        ("-4GiB", {"expert_bytes": 1}, "budget '-4GiB': write it as"),
        ("1B", {"expert_bytes": 2}, "the expert budget is 1 byte: it must hold one expert, 2 bytes"),
        ("1experts", {"scope": "per-layer"}, "a layer's share (1/2) of the expert budget is 0 bytes: it must hold one"),
        ("50%", {"eviction": "lrv"}, "eviction = 'lrv': choose one of "),
        ("50%", {"scope": "world"}, "scope = 'world': choose one of global, per-layer, benefit, shared"),
        ("50%", {"lookup": "token"}, "lookup = 'token': choose one of batch, single"),
        ("50%", {"predictor": "oracles"}, "predictor = 'oracles': choose one of oracle, "),
        ("50%", {"eviction": "predictive", "lookahead": 0}, "lookahead = 0: must be at least 1"),
        ("50%", {"batch": 0}, "batch = 0: must be at least 1"),
        ("50%", {"expert_bytes": 0}, "expert_bytes = 0: must be at least 1"),
        ("50%", {"model": "mixtral-8x7b"}, "model 'mixtral-8x7b' has 32 MoE layers, but the trace has 2"),
        ("50%", {"model": "mixtrall"}, "model 'mixtrall': did you mean 'mixtral-8x7b'?"),
    ],
)
def test_bad_input_is_refused_in_one_clear_line(budget: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        replay_trace(tiny_trace([[[0], [1]]]), budget, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# Against naive code, and the compiled replays against this one.


@settings(max_examples=150)
@given(
    trace=random_traces(3, 5, 2),
    sizes=st.integers(1, 4).map(lambda size: [size] * 3) | st.lists(st.integers(1, 6), min_size=3, max_size=3),
    spare=st.integers(0, 40),
    batch=st.integers(1, 4),
    scope=st.sampled_from(["global", "per-layer"]),
    lookup=st.sampled_from(LOOKUPS),
)
def test_replay_finds_what_a_naive_replay_finds(
    trace: RoutingTrace, sizes: list[int], spare: int, batch: int, scope: str, lookup: str
) -> None:
    budget = max(sizes) * (3 if scope == "per-layer" else 1) + spare
    steps = plan_steps(trace.sequence, trace.phase, batch=batch)
    replayed = replay(trace, steps, MemoryManager(sizes, 5, budget, Lru, scope=scope), lookup=lookup)
    naive = NaiveManager(sizes, 5, budget, scope)
    outcome = np.full(trace.experts.shape, NOT_LOOKED_UP, dtype=np.uint8)
    for step in steps:
        for layer in range(3):
            rows = step.rows.tolist()
            cells = [(row, layer, rank) for row in rows for rank in range(len(trace.chosen(row, layer)))]
            for together in [cells] if lookup == "batch" else [[cell] for cell in cells]:
                first: dict[int, tuple[int, int, int]] = {}
                for cell in together:
                    first.setdefault(layer * 5 + int(trace.experts[cell]), cell)
                by_last = dict.fromkeys(layer * 5 + int(trace.experts[cell]) for cell in reversed(together))
                (found, _), *_ = naive.visit(list(first), list(reversed(by_last)))
                for expert, cell in first.items():
                    outcome[cell] = FOUND if expert in found else MISSED
    assert np.array_equal(replayed.outcome, outcome)
    assert replayed.evict == sum(event[0] == "out" for event in naive.log)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
@settings(max_examples=150)
@given(
    trace=random_traces(3, 5, 2),
    sizes=st.integers(1, 4).map(lambda size: [size] * 3) | st.lists(st.integers(1, 6), min_size=3, max_size=3),
    spare=st.integers(0, 40),
    batch=st.integers(1, 4),
    scope=st.sampled_from(["global", "per-layer", "shared"]),
    lookup=st.sampled_from(LOOKUPS),
)
def test_a_compiled_replay_equals_the_reference_to_the_last_access(
    name: str, trace: RoutingTrace, sizes: list[int], spare: int, batch: int, scope: str, lookup: str
) -> None:
    if scope == "shared":
        sizes = sizes[:1] * 3
    budget = max(sizes) * (3 if scope == "per-layer" else 1) + spare
    steps = plan_steps(trace.sequence, trace.phase, batch=batch)
    assume(is_compiled(name, steps, lookup))
    setting = setting_of(trace, steps, name, lookup)
    manager = MemoryManager(sizes, 5, budget, EVICTION[name], setting=setting, scope=scope)
    reference = replay(trace, steps, manager, lookup=lookup)
    pools, shared = pool_budgets(sizes, budget, scope), scope == "shared"
    outcome, evict = COMPILED[name](trace, steps, pools, sizes, lookup, shared=shared, setting=setting)
    assert np.array_equal(outcome, reference.outcome)
    assert evict == reference.evict


def test_a_compiled_replay_forgets_sequences_in_the_order_in_which_they_end() -> None:
    # Sequence 1 ends after step 1, sequence 0 after step 2, which looks nobody up. Expert 1 was forgotten first, so it
    # is the one that sequence 2 evicts for its expert 2 at step 3, and misses at step 4.
    trace = RoutingTrace(
        np.array([0, 0, 0, 1, 1, 0, 2, 1], dtype=np.uint8).reshape(-1, 1, 1), 3,
        sequence=np.array([0, 0, 0, 1, 1, 2, 2, 2], dtype=np.int32), phase=np.full(8, DECODE, dtype=np.uint8),
        present=np.array([True, True, False, True, True, False, True, True])[:, None],
    )  # fmt: skip
    steps = plan_steps(trace.sequence, trace.phase, batch=2)
    setting = setting_of(trace, steps, "activation-aware", "batch")
    manager = MemoryManager([1], 3, 2, EVICTION["activation-aware"], setting=setting)
    reference = replay(trace, steps, manager)
    outcome, evicted = COMPILED["activation-aware"](trace, steps, [2], [1], "batch", setting=setting)
    assert outcome.ravel().tolist() == reference.outcome.ravel().tolist()
    assert evicted == reference.evict
    assert outcome.ravel().tolist() == [MISSED, FOUND, NOT_LOOKED_UP, MISSED, FOUND, NOT_LOOKED_UP, MISSED, MISSED]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(COMPILED.keys() - {"gate-weight"}))  # in Python where a step has many tokens
def test_a_compiled_replay_equals_the_reference_on_a_real_trace_with_a_prompt(qwen: RoutingTrace, name: str) -> None:
    # Experts of two sizes, and a prompt that is one visit of up to 128 experts a layer.
    sizes = [int(size) for size in qwen.extra["expert_bytes"]]
    steps = plan_steps(qwen.sequence, qwen.phase)
    setting = setting_of(qwen, steps, name, "batch")
    manager = MemoryManager(sizes, qwen.num_experts, 2000 << 20, EVICTION[name], setting=setting)
    reference = replay(qwen, steps, manager)
    outcome, evict = COMPILED[name](qwen, steps, [2000 << 20], sizes, "batch", setting=setting)
    assert np.array_equal(outcome, reference.outcome)
    assert evict == reference.evict


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_replay_equals_the_reference_on_a_real_trace_pair_by_pair(traces: Path, name: str) -> None:
    trace = open_trace(traces / "olmoe-1b-7b.npz")
    steps = plan_steps(trace.sequence, trace.phase)
    setting = setting_of(trace, steps, name, "single")
    sizes, slots = [1] * trace.layers, 20 * trace.layers
    manager = MemoryManager(sizes, trace.num_experts, slots, EVICTION[name], setting=setting, scope="per-layer")
    reference = replay(trace, steps, manager, lookup="single")
    outcome, evict = COMPILED[name](
        trace, steps, pool_budgets(sizes, slots, "per-layer"), sizes, "single", setting=setting
    )
    assert np.array_equal(outcome, reference.outcome)
    assert evict == reference.evict
