"""Requests: when they come, how long they are, where their tokens go, what drafts yield, and KV blocks by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from prestage.engine.policies.scheduler import SCHEDULERS, Chunked, Limits, Orca
from prestage.errors import InputError
from prestage.testing import serve, tiny_requests, tiny_server
from prestage.workloads.batches import DECODE, PREFILL
from prestage.workloads.requests.arrivals import ARRIVALS, Closed, Open, Process, arrival_instants
from prestage.workloads.requests.kv_blocks import KvBlocks, PrefixBlocks, prompt_keys
from prestage.workloads.requests.lengths import LENGTHS, OUTPUTS, PROMPTS, Lengths, draw_lengths
from prestage.workloads.requests.queue import Queue, Swapping
from prestage.workloads.requests.request import Part, Request, RequestStep, Wait
from prestage.workloads.requests.rows import RequestRows
from prestage.workloads.requests.server import Server
from prestage.workloads.requests.speculation import Speculation, draft_rows

MANY = 40_000


@pytest.mark.parametrize("name", ARRIVALS)
def test_arrivals_begin_at_0_come_at_their_rate_and_begin_alike_however_many(name: str) -> None:
    process = Process(rate=20.0, cv=2.0, on_s=0.5, off_s=1.5)
    instants = arrival_instants(name, process, MANY, seed=5)
    assert instants[0] == 0
    assert (np.diff(instants) >= 0).all()
    # The standard error of the mean gap is at most that of cv = 2 and of bursts of 20 at once: within 5 %.
    assert (MANY - 1) / (instants[-1] / 1e9) == pytest.approx(20, rel=0.05)
    assert np.array_equal(arrival_instants(name, process, 100, seed=5), instants[:100])
    if name != "constant":
        assert not np.array_equal(arrival_instants(name, process, 100, seed=6), instants[:100])


@pytest.mark.parametrize(("name", "cv"), [("poisson", 1.0), ("gamma", 0.5), ("gamma", 2.0), ("constant", 0.0)])
def test_gaps_have_their_coefficient_of_variation(name: str, cv: float) -> None:
    gaps = np.diff(arrival_instants(name, Process(rate=3.0, cv=cv or 1.0), MANY, seed=1))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05, abs=1e-6)


def test_gaps_of_a_poisson_process_are_exponential() -> None:
    # The largest distance of the distribution functions is below 1.63 / sqrt(n) at 1 % (Kolmogorov).
    gaps = np.sort(np.diff(arrival_instants("poisson", Process(rate=2.0), MANY, seed=2)) / 1e9)
    there = np.arange(1, len(gaps) + 1) / len(gaps)
    assert np.abs(there - (1 - np.exp(-2.0 * gaps))).max() < 1.63 / len(gaps) ** 0.5


def test_bursts_are_silent_while_they_are_off() -> None:
    instants = arrival_instants("bursts", Process(rate=10.0, on_s=0.25, off_s=0.75), 5000, seed=1)
    assert ((instants / 1e9) % 1.0).max() <= 0.25


def test_a_closed_loop_sends_the_next_request_when_the_last_is_whole_and_thought_over() -> None:
    # Two users who do not think, one request a step of 10 ns each: 0 and 1 at 0; 2 and 3 when they are done, at 10.
    source = Closed(tiny_requests(*[(0, 1, 1)] * 5), users=2, think_ns=0, seed=0)
    ran = serve(tiny_server(source, Orca), 10)
    assert [(now, [part.request for part in step.parts]) for now, step in ran] == [
        (0, [0, 1]), (10, [2, 3]), (20, [4]),
    ]  # fmt: skip


def test_thinking_has_its_mean_and_throughput_of_a_closed_loop_its_bound() -> None:
    # One at a time, 100 ns each, by users who think for 900 ns: N users give at most min(1 / 100, N / 1000) a ns
    # (the asymptotic bounds of operational analysis), and with one user it is 1 / 1000.
    for users in (1, 3, 30):
        source = Closed(tiny_requests(*[(0, 1, 1)] * 4000), users, think_ns=900, seed=users)
        server = tiny_server(source, Orca, max_num_seqs=1)
        serve(server, 100)
        rate = 4000 / server.log.requests["finished_ns"].max()
        bound = min(1 / 100, users / 1000)
        assert rate <= bound * 1.05
        assert users == 3 or rate == pytest.approx(bound, rel=0.05)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"rate": 0.0}, "rate = 0.0: must be more than 0"), ({"rate": 1.0, "cv": -1.0}, "cv = -1.0"),
     ({"rate": 1.0, "off_s": -1.0}, "off_s = -1.0: must be at least 0")],
)  # fmt: skip
def test_a_process_that_cannot_be_is_refused(wrong: dict[str, float], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Process(**wrong)


def test_arrivals_without_end_are_refused() -> None:
    with pytest.raises(InputError, match=r"rate = 1e-06: the last of 10,000 requests would come after 1e\+10 s"):
        arrival_instants("constant", Process(rate=1e-6), 10_000, seed=0)


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_have_their_mean_and_spread_and_begin_alike_however_many(name: str) -> None:
    cv = {"fixed": 0.0, "uniform": 0.4, "exponential": 1.0, "lognormal": 0.7}[name]
    drawn = draw_lengths(Lengths(1000, name, cv=cv), MANY, seed=4, purpose=PROMPTS)
    assert drawn.mean() == pytest.approx(1000, rel=0.02)
    assert drawn.std() / drawn.mean() == pytest.approx(cv, rel=0.04, abs=1e-9)
    assert np.array_equal(draw_lengths(Lengths(1000, name, cv=cv), 9, seed=4, purpose=PROMPTS), drawn[:9])
    if name != "fixed":
        assert not np.array_equal(draw_lengths(Lengths(1000, name, cv=cv), 9, seed=4, purpose=OUTPUTS), drawn[:9])
    cut = draw_lengths(Lengths(1000, name, cv=cv, least=900, most=1100), 500, seed=4, purpose=PROMPTS)
    assert cut.min() >= 900
    assert cut.max() <= 1100


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"mean": 0}, "mean = 0: must be 1 to"), ({"mean": 5, "cv": -1}, "cv = -1"), ({"mean": 5, "least": 0}, "least"),
     ({"mean": 5, "distribution": "uniform", "cv": 0.6}, "0.577 at most")],
)  # fmt: skip
def test_lengths_that_cannot_be_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Lengths(**wrong)


def two_sequences() -> RequestRows:
    """Rows 0 to 4 are a sequence with a prompt of 3, rows 5 and 6 one that only decodes."""
    return RequestRows(np.array([0] * 5 + [1] * 2), np.array([PREFILL] * 3 + [DECODE] * 4), seed=1)


def test_a_request_goes_around_the_prompt_rows_and_the_decode_rows_of_its_sequence() -> None:
    rows = two_sequences()
    seen = set()
    for request in range(40):
        found = rows.of(request, 4, 9).tolist()
        prompt, decode = found[:4], found[4:]
        own = {0, 1, 2} if found[0] < 5 else {5, 6}
        after = {3, 4} if found[0] < 5 else {5, 6}
        assert set(prompt) <= own
        assert set(decode) <= after
        # One after the other, and around.
        wheel = sorted(own)
        assert all(wheel[(wheel.index(a) + 1) % len(wheel)] == b for a, b in itertools.pairwise(prompt))
        seen.add((found[0], found[4]))
    assert len(seen) > 4  # several sequences, and several places in them
    assert np.array_equal(rows.of(7, 4, 9)[:6], rows.of(7, 4, 6))


def test_drafts_yield_the_mean_of_a_geometric_series() -> None:
    # Leviathan et al.: (1 - a^(d + 1)) / (1 - a). The spread of 20,000 steps of 1 to d + 1 tokens is under d / 141.
    for drafts, a in ((1, 0.6), (2, 0.9), (4, 0.7), (8, 0.3)):
        speculation = Speculation(drafts, (a,) * drafts, seed=9)
        tokens = [1 + speculation.accepted(request, 10) for request in range(20_000)]
        theory = (1 - a ** (drafts + 1)) / (1 - a)
        assert speculation.mean_tokens() == pytest.approx(theory)
        assert np.mean(tokens) == pytest.approx(theory, abs=4 * float(np.std(tokens)) / 141)


def test_acceptance_is_conditional_on_the_drafts_before() -> None:
    speculation = Speculation(3, (0.8, 0.5, 0.0), seed=1)
    found = np.bincount([speculation.accepted(request, 5) for request in range(20_000)], minlength=4) / 20_000
    assert found == pytest.approx([0.2, 0.4, 0.4, 0.0], abs=0.02)
    assert Speculation(3, (1.0,) * 3).accepted(0, 0) == 3


def test_recorded_acceptance_is_drawn_from() -> None:
    speculation = Speculation(3, recorded=(0, 0, 3, 1), seed=1)
    found = np.bincount([speculation.accepted(request, 5) for request in range(20_000)], minlength=4) / 20_000
    assert found == pytest.approx([0.5, 0.25, 0.0, 0.25], abs=0.02)
    assert speculation.mean_tokens() == 2


def test_rejected_drafts_go_where_their_keys_say_and_accepted_ones_where_the_true_tokens_go() -> None:
    own, true = list(range(100, 200)), np.array([1, 2, 3, 4])
    apart = draft_rows(Speculation(4, (0.5,) * 4, overlap=0.0, seed=3), own, true, 7, 20, accepted=2)
    assert apart[:2].tolist() == [1, 2]
    assert all(100 <= row < 200 for row in apart[2:])
    assert np.array_equal(apart, draft_rows(Speculation(4, (0.9,) * 4, seed=3), own, true, 7, 20, accepted=2))
    same = draft_rows(Speculation(4, (0.5,) * 4, overlap=1.0, seed=3), own, true, 7, 20, accepted=0)
    assert np.array_equal(same, true)
    half = Speculation(1, (0.5,), overlap=0.3, seed=3)
    kept = [draft_rows(half, own, np.array([1]), request, 20, accepted=0)[0] == 1 for request in range(5000)]
    assert np.mean(kept) == pytest.approx(0.3, abs=0.03)


def speculating(drafts: int, acceptance: float, kv: KvBlocks | None = None, **limits: Any) -> Server:
    requests = tiny_requests((0, 3, 10), (0, 2, 7), (5, 4, 12))
    return Server(
        Open(requests), Queue(kv or KvBlocks(1000, 1), drafts), Chunked(Limits(**limits)), two_sequences(),
        Speculation(drafts, (acceptance,) * drafts, seed=2),
    )  # fmt: skip


def test_a_step_verifies_one_token_and_its_drafts_and_gives_back_what_was_wrong() -> None:
    # Every draft right: after the prompt's, 10 tokens come as 1, 3, 3, 3; none right: one by one.
    right, wrong = speculating(2, 1.0), speculating(2, 0.0)
    of_first = [part for _, step in serve(right, 10) for part in step.parts if part.request == 0]
    assert of_first == [Part(0, 0, 3, 1), Part(0, 3, 3, 3, 2), Part(0, 6, 3, 3, 2), Part(0, 9, 3, 3, 2)]
    steps = serve(wrong, 10)
    of_first = [part for _, step in steps for part in step.parts if part.request == 0]
    assert of_first == [Part(0, 0, 3, 1), *(Part(0, position, 3, 3, 2) for position in range(3, 12))]
    # In blocks of one position, three stand by in every step, and two of them are free again behind it.
    alone = [step for _, step in steps if [part.request for part in step.parts] == [2]]
    assert len(alone) > 2
    assert [step.kv_blocks for step in alone] == [step.parts[0].first + 3 for step in alone]
    assert wrong.queue.kv.free_blocks == 1000


def test_the_experts_of_a_token_are_the_same_under_any_scheduler_chunk_preemption_prefix_hit_or_draft_depth() -> None:
    found: dict[tuple[int, int], set[int]] = {}
    shapes = [(0, 9, 12), (3, 14, 5), (5, 9, 9), (8, 30, 4), (9, 3, 17)]
    hashes = ((1, 2, 3), (1, 2, 4, 5), (1, 2, 3), (1, 2, 4, 5, 6, 7, 8, 9), (9,))
    runs = 0
    for (name, scheduler), drafts, kv in itertools.product(
        SCHEDULERS.items(), (0, 2), (KvBlocks(1000, 4), KvBlocks(18, 2), PrefixBlocks(18, 2))
    ):
        requests = [Request(i, *shape, hashes=hashes[i], hash_tokens=4) for i, shape in enumerate(shapes)]
        speculation = Speculation(drafts, (0.5,) * drafts, seed=2) if drafts else None
        limits = Limits(max_num_seqs=3, max_num_batched_tokens=7 if name in ("chunked", "sarathi") else 40)
        server = Server(Open(requests), Queue(kv, drafts), scheduler(limits), two_sequences(), speculation)
        for _, step in serve(server, 2):
            at = 0
            for part in step.parts:
                rows = step.rows[at : at + part.tokens - part.drafts].tolist()
                for position, row in enumerate(rows, part.first):
                    found.setdefault((part.request, position), set()).add(row)
                at += part.tokens
        runs += 1
    assert runs == len(SCHEDULERS) * 6
    assert len(found) == sum(prompt + output - 1 for _, prompt, output in shapes)
    assert all(len(rows) == 1 for rows in found.values())


def test_blocks_are_counted() -> None:
    kv = KvBlocks(4, 8)
    assert kv.take(0, 9)
    assert (kv.held(0), kv.free_blocks, kv.used_blocks) == (2, 2, 2)
    assert not kv.take(1, 17)
    assert kv.held(1) == 0
    assert kv.take(0, 16)  # which it has
    assert kv.take(1, 16)
    kv.trim(0, 8)
    kv.release(1)
    kv.release(1)
    assert (kv.held(0), kv.free_blocks) == (1, 3)
    kv.check()


def test_blocks_that_nobody_holds_keep_their_content_until_they_are_taken_the_last_of_a_request_first() -> None:
    kv = PrefixBlocks(4, 2)
    assert kv.take(0, 6)
    kv.name(0, ["a", "b", "c"])
    kv.release(0)  # free, first to be taken first: the fourth, never held; then c, b, a
    assert kv.cached(["a", "b", "c"]) == 3
    assert kv.take(1, 4)  # the fourth and c's
    assert kv.cached(["a", "b", "c"]) == 2
    assert kv.take(2, 6, ["a", "b"]) is False  # it needs one besides a and b, and none is free but these
    assert kv.take(2, 4, ["a", "b"])
    assert kv.free_blocks == 0
    kv.check()
    kv.release(1)
    assert kv.take(3, 6, ["a"])  # shares a, and takes the two that 1 had
    kv.check()
    assert kv.free_blocks == 0
    kv.release(2)
    assert kv.free_blocks == 1  # b; a is held by 3
    kv.release(3)
    kv.check()


def test_hashes_of_512_tokens_name_blocks_of_other_sizes() -> None:
    # 1,200 tokens: two full hashes and one of 176 tokens. By blocks of 256: four full ones in the two.
    request = Request(0, 0, 1200, 1, hashes=(7, 8, 9), hash_tokens=512)
    assert prompt_keys(request, 256) == [(7, 0), (7, 1), (8, 2), (8, 3)]
    # Of 1,024: one, known by the hash at its end, which stands for all before it.
    assert prompt_keys(request, 1024) == [(8, 0)]
    # Of 80: the 13th ends at 1,040, in what the last hash is of; the 15th at 1,200.
    assert prompt_keys(request, 80) == list(zip([7] * 6 + [8] * 6 + [9] * 3, range(15), strict=True))
    # Of 300, which do not divide 512: the second goes from 300 to 600, and is known by the hash up to 1,024.
    assert prompt_keys(request, 300) == [(7, 0), (8, 1), (8, 2), (9, 3)]


def prefix_server(blocks: int = 100) -> Server:
    # Two prompts of 8 that agree in 6 tokens (three blocks of 2), one after the other; then the first one again.
    requests = [Request(0, 0, 8, 2, (1, 2, 3, 4), 2), Request(1, 50, 8, 2, (1, 2, 3, 5), 2),
                Request(2, 90, 8, 2, (1, 2, 3, 4), 2)]  # fmt: skip
    return Server(Open(requests), Queue(PrefixBlocks(blocks, 2)), Chunked(Limits()), two_sequences())


def test_a_prefix_that_is_there_is_not_computed_but_a_last_token_always_is() -> None:
    server = prefix_server()
    firsts = [[part[:3] for part in step.parts] for _, step in serve(server, 10)]
    # The third prompt is there as a whole; of its four blocks three are used, for the last token has to be run.
    assert firsts == [[(0, 0, 8)], [(0, 8, 1)], [(1, 6, 2)], [(1, 8, 1)], [(2, 6, 2)], [(2, 8, 1)]]
    assert server.log.requests["cached"].tolist() == [0, 6, 6]


def test_a_prefix_whose_blocks_were_taken_is_computed_again() -> None:
    # With five blocks the second request takes two of the first one's: the last ones, as it shares three.
    firsts = [[part[:3] for part in step.parts] for _, step in serve(prefix_server(5), 10)]
    assert firsts[2] == [(1, 6, 2)]
    assert firsts[4] == [(2, 6, 2)]


def test_who_leaves_is_swapped_to_host_memory_where_there_is_room_and_comes_back_without_computing() -> None:
    # As in tests/test_scheduler.py: A and B, four blocks of 4; in step 3 B leaves with its two blocks, 100 bytes each.
    def run(host_blocks: int) -> list[RequestStep]:
        requests = tiny_requests((0, 7, 6), (0, 7, 4))
        queue = Queue(KvBlocks(4, 4), swapping=Swapping(host_blocks, 100))
        server = Server(Open(requests), queue, Chunked(Limits(max_num_batched_tokens=16)), two_sequences())
        return [step for _, step in serve(server, 10)]

    swapped = run(2)
    moved = [(step.swap_out_bytes, step.swap_in_bytes) for step in swapped]
    assert [bytes_ for bytes_ in moved if any(bytes_)] == [(200, 0), (0, 200)]
    assert [part[:3] for step in swapped for part in step.parts if part.request == 1] == [
        (1, 0, 7), (1, 7, 1), (1, 8, 1), (1, 9, 1),
    ]  # fmt: skip
    recomputed = run(1)
    assert not any(step.swap_out_bytes + step.swap_in_bytes for step in recomputed)
    assert [part[:3] for step in recomputed for part in step.parts if part.request == 1][2] == (1, 0, 9)


def test_a_server_waits_for_the_next_arrival_and_ends_behind_the_last() -> None:
    server = tiny_server(tiny_requests((5, 1, 1), (30, 1, 1)), Orca)
    assert server.next_step(0) == Wait(5)
    assert isinstance(server.next_step(5), RequestStep)
    server.ended(25)
    assert server.next_step(25) == Wait(30)
    assert isinstance(server.next_step(31), RequestStep)  # a host that looks a little later
    server.ended(41)
    assert server.next_step(41) is None
    assert server.log.requests["started_ns"].tolist() == [5, 31]
