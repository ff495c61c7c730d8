"""Schedulers step by step: cases worked by hand against the published descriptions, and what all have in common.

A part is written (request, first position, positions, positions with logits).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from prestage.engine.policies.scheduler import (
    SCHEDULERS,
    Chunked,
    ExpertAware,
    Limits,
    Orca,
    PrefillFirst,
    Sarathi,
    Scheduler,
    Static,
)
from prestage.engine.scenario.sections_requests import SchedulerSection
from prestage.errors import InputError
from prestage.testing import serve, tiny_requests, tiny_server
from prestage.testing.serving import Served
from prestage.workloads.batches import DECODE, PREFILL
from prestage.workloads.requests.kv_blocks import KvBlocks, PrefixBlocks
from prestage.workloads.requests.queue import Live, Queue
from prestage.workloads.requests.request import RequestStep, Wait

Parts = list[tuple[int, int, int, int]]


def parts(ran: list[Served]) -> list[Parts]:
    return [[part[:4] for part in step.parts] for _, step in ran]


def test_a_static_batch_is_joined_by_nobody_until_its_last_has_ended() -> None:
    # Two places. A (2 + 2 tokens) ends in step 2; B (3 + 4) goes on alone in steps 3 and 4; C waits for both.
    server = tiny_server(tiny_requests((0, 2, 2), (0, 3, 4), (0, 1, 1)), Static, max_num_seqs=2)
    assert parts(serve(server, 10)) == [
        [(0, 0, 2, 1), (1, 0, 3, 1)],
        [(0, 2, 1, 1), (1, 3, 1, 1)],
        [(1, 4, 1, 1)],
        [(1, 5, 1, 1)],
        [(2, 0, 1, 1)],
    ]


def test_orca_admits_at_any_step_who_has_room_for_all_its_tokens() -> None:
    # Ten slots. A (2 + 3: 4 positions) and B (3 + 4: 6) fill them; C (2 + 1: 2) fits when A has ended in step 3.
    kv = KvBlocks(10, 1)
    server = tiny_server(tiny_requests((0, 2, 3), (0, 3, 4), (0, 2, 1)), Orca, kv, max_num_seqs=3)
    ran = serve(server, 10)
    assert parts(ran) == [
        [(0, 0, 2, 1), (1, 0, 3, 1)],
        [(0, 2, 1, 1), (1, 3, 1, 1)],
        [(0, 3, 1, 1), (1, 4, 1, 1)],
        [(1, 5, 1, 1), (2, 0, 2, 1)],
    ]
    assert [step.kv_blocks for _, step in ran] == [10, 10, 10, 8]
    # In step 4 one decodes while another's prompt runs.
    assert [step.phase for _, step in ran] == [PREFILL, DECODE, DECODE, PREFILL]


def test_prompts_come_first_and_stop_those_that_decode() -> None:
    # A budget of 8: the prompts of A and B (5 each) do not go together. C comes at 25, while the third step runs,
    # and its prompt runs before A decodes again.
    requests = tiny_requests((0, 5, 4), (0, 5, 2), (25, 3, 1))
    server = tiny_server(requests, PrefillFirst, max_num_batched_tokens=8)
    ran = serve(server, 10)
    assert parts(ran) == [
        [(0, 0, 5, 1)],
        [(1, 0, 5, 1)],
        [(0, 5, 1, 1), (1, 5, 1, 1)],
        [(2, 0, 3, 1)],
        [(0, 6, 1, 1)],
        [(0, 7, 1, 1)],
    ]
    assert [start_ns for start_ns, _ in ran] == [0, 10, 20, 30, 40, 50]


def test_a_prompt_beyond_the_budget_runs_by_itself() -> None:
    server = tiny_server(tiny_requests((0, 9, 1), (0, 1, 1)), PrefillFirst, max_num_batched_tokens=8)
    assert parts(serve(server, 10)) == [[(0, 0, 9, 1)], [(1, 0, 1, 1)]]


def test_prefill_first_keeps_a_hundredth_of_the_blocks_free_and_who_came_last_leaves() -> None:
    # 100 blocks of 1, of which 1 is kept free: A has 50, B would leave 0 free with 50 and leaves 1 with 49.
    kv = KvBlocks(100, 1)
    server = tiny_server(tiny_requests((0, 50, 3), (0, 50, 1)), PrefillFirst, kv)
    assert parts(serve(server, 1))[0] == [(0, 0, 50, 1)]
    # A and B decode: A takes the last block, B finds none and leaves; it comes back, 50 positions, when A has ended.
    server = tiny_server(tiny_requests((0, 50, 3), (0, 49, 3)), PrefillFirst, KvBlocks(100, 1))
    assert parts(serve(server, 1)) == [
        [(0, 0, 50, 1), (1, 0, 49, 1)],
        [(0, 50, 1, 1)],
        [(0, 51, 1, 1)],
        [(1, 0, 50, 1)],
        [(1, 50, 1, 1)],
    ]


def test_chunks_share_one_budget_with_those_that_decode_who_run_first_in_order() -> None:
    # vLLM, version 1, with a budget of 8 and blocks of 4. A's prompt (6) leaves 2 of the first step to B's (7). In the
    # second, A decodes (1), B's rest (5) is next, and C (3), which waits, has what is left: 2.
    server = tiny_server(
        tiny_requests((0, 6, 3), (0, 7, 4), (0, 3, 2)), Chunked, KvBlocks(6, 4), max_num_batched_tokens=8
    )
    ran = serve(server, 10)
    assert parts(ran) == [
        [(0, 0, 6, 1), (1, 0, 2, 0)],
        [(0, 6, 1, 1), (1, 2, 5, 1), (2, 0, 2, 0)],
        [(0, 7, 1, 1), (1, 7, 1, 1), (2, 2, 1, 1)],
        [(1, 8, 1, 1), (2, 3, 1, 1)],
        [(1, 9, 1, 1)],
    ]
    assert [step.kv_blocks for _, step in ran] == [3, 5, 5, 4, 3]


def test_without_blocks_the_last_running_leaves_is_computed_again_and_nobody_is_admitted_in_that_step() -> None:
    # Four blocks of 4. A and B (7 each) hold two each. In step 3 A needs a third: B, the last, leaves, and though one
    # block is free then and C (2) would fit, the step admits nobody; later B is before C, and needs three. When A has
    # ended, B runs its 7 + 2 known positions again, and C is beside it.
    requests = tiny_requests((0, 7, 6), (0, 7, 4), (0, 2, 1))
    server = tiny_server(requests, Chunked, KvBlocks(4, 4), max_num_batched_tokens=16)
    ran = serve(server, 10)
    assert parts(ran) == [
        [(0, 0, 7, 1), (1, 0, 7, 1)],
        [(0, 7, 1, 1), (1, 7, 1, 1)],
        [(0, 8, 1, 1)],
        [(0, 9, 1, 1)],
        [(0, 10, 1, 1)],
        [(0, 11, 1, 1)],
        [(1, 0, 9, 1), (2, 0, 2, 1)],
        [(1, 9, 1, 1)],
    ]
    assert server.log.requests["preempted"].tolist() == [0, 1, 0]
    assert server.log.steps["preempted"].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]


def test_who_finds_no_block_and_is_the_last_leaves_itself() -> None:
    # Two blocks of 4: A (3 + 3) and B (4 + 2). In step 2 A fills its block; B wants a second and is the last.
    server = tiny_server(tiny_requests((0, 3, 3), (0, 4, 2)), Chunked, KvBlocks(2, 4))
    assert parts(serve(server, 1)) == [
        [(0, 0, 3, 1), (1, 0, 4, 1)],
        [(0, 3, 1, 1)],
        [(0, 4, 1, 1)],
        [(1, 0, 5, 1)],
    ]


def test_a_threshold_cuts_long_prompts_and_max_num_seqs_holds() -> None:
    server = tiny_server(
        tiny_requests((0, 7, 1), (0, 2, 1), (0, 1, 1)),
        Chunked,
        max_num_seqs=2,
        max_num_batched_tokens=8,
        long_prefill_token_threshold=3,
    )
    assert parts(serve(server, 1)) == [
        [(0, 0, 3, 0), (1, 0, 2, 1)],
        [(0, 3, 3, 0), (2, 0, 1, 1)],
        [(0, 6, 1, 1)],
    ]


def test_a_budget_below_those_that_run_leaves_the_later_ones_out() -> None:
    server = tiny_server(tiny_requests((0, 1, 2), (0, 1, 2), (0, 1, 2)), Chunked, max_num_batched_tokens=2)
    assert parts(serve(server, 1)) == [
        [(0, 0, 1, 1), (1, 0, 1, 1)],
        [(0, 1, 1, 1), (1, 1, 1, 1)],
        [(2, 0, 1, 1)],
        [(2, 1, 1, 1)],
    ]


def test_sarathi_begins_a_prompt_only_with_room_for_all_of_it() -> None:
    # Four blocks of 2, a budget of 4. A (3 + 2) has two blocks; B's prompt (6) needs three, and waits for A to end.
    # By chunks, its first token's block would do to begin.
    requests = tiny_requests((0, 3, 2), (0, 6, 1))
    assert parts(serve(tiny_server(requests, Sarathi, KvBlocks(4, 2), max_num_batched_tokens=4), 1)) == [
        [(0, 0, 3, 1)],
        [(0, 3, 1, 1)],
        [(1, 0, 4, 0)],
        [(1, 4, 2, 1)],
    ]
    assert parts(serve(tiny_server(requests, Chunked, KvBlocks(4, 2), max_num_batched_tokens=4), 1)) == [
        [(0, 0, 3, 1), (1, 0, 1, 0)],
        [(0, 3, 1, 1), (1, 1, 3, 0)],
        [(1, 4, 2, 1)],
    ]


def test_sarathi_lets_who_decodes_go_on_before_a_prompt_that_came_earlier() -> None:
    # B left and came back behind C; its rest of a prompt would take the whole budget of 3 if it were asked in order.
    queue = Queue(KvBlocks(100, 1))
    for request in tiny_requests((0, 9, 2), (0, 1, 3)):
        queue.waiting.append(Live(request))
    scheduler = Sarathi(Limits(max_num_batched_tokens=3))
    queue.begin()
    queue.admit(queue.waiting[0], 2, 9)
    queue.admit(queue.waiting[0], 1, 1)
    for one in list(queue.running):
        queue.advance(one, 0)
    queue.begin()
    scheduler.plan(queue)
    assert [part[:3] for part in queue.parts.values()] == [(1, 1, 1), (0, 2, 2)]
    chunked = Chunked(Limits(max_num_batched_tokens=3))
    queue.begin()
    chunked.plan(queue)
    assert [part[:3] for part in queue.parts.values()] == [(0, 2, 3)]


def experts_of(request: int) -> npt.NDArray[np.bool_]:
    """Even requests go to the experts 0 and 1 of four, odd ones to 2 and 3."""
    return np.isin(np.arange(4), [0, 1] if request % 2 == 0 else [2, 3])


def test_who_is_aware_of_experts_admits_whoever_adds_the_fewest_and_passes_over_nobody_for_ever() -> None:
    # Two places: 0 runs. Of 1, 2, 3 and 4 those with 0's experts are 2 and 4; 1 may be passed over once.
    requests = tiny_requests((0, 1, 9), (1, 1, 2), (1, 1, 2), (1, 1, 2), (1, 1, 2))
    for patience, order in ((16, [0, 2, 4, 1, 3]), (1, [0, 2, 1, 4, 3])):
        server = tiny_server(requests, ExpertAware, experts_of=experts_of, max_num_seqs=2, patience=patience)
        admitted = list(dict.fromkeys(part[0] for step in parts(serve(server, 1)) for part in step))
        assert admitted == order


def test_who_is_aware_of_experts_sees_no_further_than_its_window() -> None:
    requests = tiny_requests((0, 1, 9), (1, 1, 2), (1, 1, 2))
    server = tiny_server(requests, ExpertAware, experts_of=experts_of, max_num_seqs=2, window=1)
    assert list(dict.fromkeys(part[0] for step in parts(serve(server, 1)) for part in step)) == [0, 1, 2]


def test_who_is_aware_of_experts_admits_nobody_while_the_link_is_busy_as_long_as_somebody_runs() -> None:
    server = tiny_server(tiny_requests((0, 1, 3), (1, 1, 1)), ExpertAware, experts_of=experts_of, most_link_busy=0.8)
    seen, now_ns = [], 0
    for busy_ns in (9, 9, 0, 0):
        step = server.next_step(now_ns)
        assert isinstance(step, RequestStep)
        seen.append([part.request for part in step.parts])
        now_ns += 10
        server.ended(now_ns, busy_ns)
    # After two steps whose copies took 9 of 10 ns, and a third with none, in which 0 ended, 1 is admitted.
    assert seen == [[0], [0], [0], [1]]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_next_step_is_known_where_nobody_waits_or_all_places_are_taken(name: str) -> None:
    queue = Queue(KvBlocks(100, 1))
    scheduler = SCHEDULERS[name](Limits(max_num_seqs=1))
    assert scheduler.goes_on(queue)
    queue.waiting.append(Live(tiny_requests((0, 2, 2))[0]))
    assert not scheduler.goes_on(queue)
    queue.running.append(Live(tiny_requests((0, 2, 2))[0]))
    # Whoever is aware of experts looks at the link after every step.
    assert scheduler.goes_on(queue) == (name != "expert-aware")


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", [KvBlocks, PrefixBlocks])
def test_every_scheduler_serves_all_within_its_limits_and_keeps_the_blocks(name: str, kind: type[KvBlocks]) -> None:
    random = np.random.default_rng(3)
    shapes = random.integers((0, 1, 1), (20, 40, 30), (150, 3))
    shapes[:, 0] = np.cumsum(shapes[:, 0])
    requests = tiny_requests(*(tuple(shape) for shape in shapes.tolist()))
    kv = kind(20, 4)
    server = tiny_server(requests, SCHEDULERS[name], kv, max_num_seqs=6, max_num_batched_tokens=40)
    steps = []
    now_ns = 0
    while (step := server.next_step(now_ns)) is not None:
        kv.check()
        if isinstance(step, Wait):
            now_ns = step.until_ns
            continue
        steps.append(step)
        now_ns += 7
        server.ended(now_ns)
        kv.check()
    assert kv.free_blocks == 20
    done = server.log.requests
    assert done["number"].tolist() == list(range(150))
    assert np.array_equal(np.bincount(server.log.token_times()[0]), shapes[:, 2])
    computed: dict[int, int] = {}
    for step in steps:
        assert len(step.parts) <= 6
        alone = len(step.parts) == 1 and name == "prefill-first"
        assert name in ("static", "orca") or alone or step.rows.size <= 40
        assert len({part.request for part in step.parts}) == len(step.parts)
        for part in step.parts:
            # Positions come one after the other; a request that left may begin anew or behind a prefix that was found.
            assert part.first <= computed.get(part.request, 0)
            computed[part.request] = part.first + part.tokens


class Idle(Scheduler):
    """Gives nobody anything."""

    def plan(self, queue: Queue) -> None:
        pass


def test_a_scheduler_that_gives_nobody_a_part_is_said_so_and_not_run_for_ever() -> None:
    with pytest.raises(InputError, match=r"gave nobody a part of a step.*request 0 \(3 \+ 2 tokens\)"):
        serve(tiny_server(tiny_requests((0, 3, 2)), Idle), 1)


def test_a_scheduler_that_does_not_say_when_its_next_step_is_known_is_asked_for_every_step() -> None:
    assert not Idle(Limits()).goes_on(Queue(KvBlocks(1, 1)))


def test_a_request_that_never_fits_is_said_so() -> None:
    with pytest.raises(InputError, match=r"request 0 \(9 \+ 1 tokens\) with 2 of 2 KV blocks free"):
        serve(tiny_server(tiny_requests((0, 9, 1)), Orca, KvBlocks(2, 4)), 1)


def test_limits_that_nobody_sets_are_those_of_a_scenario() -> None:
    assert Limits(**SchedulerSection().model_dump(exclude={"name", "step_us"})) == Limits()
