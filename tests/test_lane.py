"""Lanes, worked by hand: when work starts and ends, on its own and beside a neighbor."""

from collections.abc import Generator
from functools import partial
from typing import Any

import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from prestage.resources.lane import (
    Completion,
    CoupledLane,
    FifoLane,
    Lags,
    Pending,
    PriorityLane,
    Work,
    after_all,
    couple,
    wait_for,
)
from prestage.resources.timeline import DEMAND, EXPERT, PREFETCH, Timeline


def intervals(timeline: Timeline) -> list[tuple[int, int]]:
    return [(int(span["start_ns"]), int(span["end_ns"])) for span in timeline.spans()]


def ends(*completions: Completion) -> list[int | None]:
    return [completion if isinstance(completion, int) else completion.end_ns for completion in completions]


def fifo(gap_ns: int = 0) -> tuple[FifoLane, Timeline]:
    timeline = Timeline()
    return FifoLane(timeline, timeline.add_lane("gpu0", "compute", "compute"), Lags(gap_ns)), timeline


def coupled(env: simpy.Environment, timeline: Timeline, role: str) -> CoupledLane:
    return CoupledLane(env, timeline, timeline.add_lane("gpu0", role, role))


def test_a_fifo_lane_knows_the_end_at_once_and_runs_work_in_order() -> None:
    lane, timeline = fifo()
    assert lane.submit(10, 10, 0, 0, EXPERT) == 10
    assert lane.submit(5, 5, 0, 0, EXPERT) == 15  # queued behind the first
    assert lane.submit(5, 5, 0, 40, EXPERT) == 45  # waits for what ends at 40
    assert lane.submit(5, 5, 60, 0, EXPERT) == 65  # waits for its issue at 60
    assert intervals(timeline) == [(0, 10), (10, 15), (40, 45), (60, 65)]


def test_work_on_an_idle_lane_takes_its_alone_time_and_queued_work_keeps_the_gap() -> None:
    lane, timeline = fifo(gap_ns=3)
    # The first finds an idle lane (12 ns); the second is queued: 3 ns later, 10 ns. The third comes at 26, after the
    # lane could have taken it (25 + 3 = 28), so it is still queued; the fourth at 50 finds the lane idle again.
    work = [lane.submit(10, 12, issued_ns, 0, DEMAND) for issued_ns in (0, 0, 26, 50)]
    assert work == [12, 25, 38, 62]
    assert intervals(timeline) == [(0, 12), (15, 25), (28, 38), (50, 62)]


def test_a_fifo_lane_waits_for_a_promise_and_holds_up_what_is_queued_behind() -> None:
    lane, timeline = fifo()
    promise = Pending()
    first = lane.submit(10, 10, 0, promise, EXPERT)
    second = lane.submit(10, 10, 0, 0, EXPERT)
    assert ends(first, second) == [None, None]
    promise.resolve(100)
    assert ends(first, second) == [110, 120]
    assert lane.submit(10, 10, 0, 0, EXPERT) == 130
    assert intervals(timeline) == [(100, 110), (110, 120), (120, 130)]


def test_after_all_is_the_last_of_known_and_promised_ends() -> None:
    assert after_all([]) == 0
    assert after_all([3, 9, 4]) == 9
    early, late = Pending(), Pending()
    together = after_all([5, early, late])
    late.resolve(50)
    assert ends(together) == [None]
    early.resolve(20)
    assert ends(together) == [50]
    assert after_all([early, 60]) == 60


def test_a_process_waits_for_a_promise() -> None:
    env = simpy.Environment()
    promise = Pending()
    seen = []

    def waiter() -> Generator[simpy.Event, Any, None]:
        seen.append(((yield from wait_for(env, promise)), env.now))

    def keeper() -> Generator[simpy.Event, Any, None]:
        yield env.timeout(7)
        promise.resolve(7)

    env.process(waiter())
    env.process(keeper())
    env.run()
    assert seen == [(7, 7)]


def test_two_streams_share_one_link_fairly() -> None:
    env, timeline = simpy.Environment(), Timeline()
    a, b = coupled(env, timeline, "h2d"), coupled(env, timeline, "h2d")
    a.sharing, b.sharing = [b], [a]
    couple([a, b])
    # a: 100 ns of work from 0; b: 30 ns of work from 20. Alone until 20 (a has 80 left); then both at half speed:
    # b ends at 20 + 60 = 80 with a at 80 - 30 = 50 left; a runs alone again and ends at 80 + 50 = 130.
    first, second = a.submit(100, 100, 0, 0, DEMAND), b.submit(30, 30, 20, 0, PREFETCH)
    env.run()
    assert ends(first, second) == [130, 80]


def test_streams_that_get_less_together_than_one_takes_all_of_take_so_much_longer() -> None:
    env, timeline = simpy.Environment(), Timeline()
    a, b = coupled(env, timeline, "h2d"), coupled(env, timeline, "h2d")
    a.sharing, b.sharing = [b], [a]
    a.sharing_factor = b.sharing_factor = 1.25
    couple([a, b])
    # b: 20 ns of work from 20, which takes 2 x 1.25 times as long: until 70. a has done 20 by then and 20 beside b, and
    # ends 60 later, alone.
    first, second = a.submit(100, 100, 0, 0, DEMAND), b.submit(20, 20, 20, 0, PREFETCH)
    env.run()
    assert ends(first, second) == [130, 70]


def behind_a_copy(submitted_ns: int, issued_ns: int, other: tuple[int, int] | None, lags: Lags) -> int:
    """When a kernel starts that waits for a copy from 0 to 20, another copy running from `other` on for so long."""
    env, timeline = simpy.Environment(), Timeline()
    compute = CoupledLane(env, timeline, timeline.add_lane("gpu0", "compute", "compute"), lags)
    h2d = coupled(env, timeline, "h2d")
    compute.disturbers = [h2d]
    couple([compute, h2d])
    copied = h2d.submit(20, 20, 0, 0, DEMAND)
    if other is not None:
        h2d.submit(other[1], other[1], other[0], 0, PREFETCH)

    def host() -> Generator[simpy.Event, Any, None]:
        yield env.timeout(submitted_ns)
        compute.submit(10, 10, issued_ns, copied, EXPERT)

    env.process(host())
    env.run()
    spans = timeline.spans()
    (start_ns,) = spans["start_ns"][spans["kind"] == EXPERT].tolist()
    return int(start_ns)


@pytest.mark.parametrize("submitted_ns", [0, 10, 19, 20, 21, 23, 25])
@pytest.mark.parametrize(
    ("other", "start_ns"),
    [
        (None, 26),  # 6 behind the copy that it waits for
        ((21, 100), 36),  # 16, for another copy runs meanwhile
        ((21, 2), 36),  # also one that is over by then
        ((20, 4), 36),  # or follows at once
        ((27, 5), 26),  # but none that comes only later
    ],
)
def test_how_long_a_kernel_starts_behind_a_copy_does_not_depend_on_when_it_was_submitted(
    submitted_ns: int, other: tuple[int, int] | None, start_ns: int
) -> None:
    lags = Lags(after_other_ns=6, after_other_longer_ns=10)
    assert behind_a_copy(submitted_ns, 0, other, lags) == start_ns


@pytest.mark.parametrize(
    ("issued_ns", "start_ns"),
    [(20, 36), (22, 36), (23, 26), (24, 26), (30, 30)],  # the other copy runs from 21 to 23
)
def test_what_is_issued_once_the_disturber_is_idle_again_starts_undisturbed(issued_ns: int, start_ns: int) -> None:
    lags = Lags(after_other_ns=6, after_other_longer_ns=10)
    assert behind_a_copy(issued_ns, issued_ns, (21, 2), lags) == start_ns


@pytest.mark.parametrize(("copy", "start_ns"), [((3, 7), 12), ((3, 8), 15), ((11, 20), 15), ((13, 20), 12)])
def test_a_gap_is_longer_if_a_disturber_was_busy_in_it(copy: tuple[int, int], start_ns: int) -> None:
    # Two kernels queued, the first from 0 to 10; the gap is 2, or 5 beside a copy, which runs from then on for so long.
    env, timeline = simpy.Environment(), Timeline()
    compute = CoupledLane(env, timeline, timeline.add_lane("gpu0", "compute", "compute"), Lags(2, 3))
    h2d = coupled(env, timeline, "h2d")
    compute.disturbers = [h2d]
    couple([compute, h2d])
    h2d.submit(copy[1], copy[1], copy[0], 0, DEMAND)
    works = [compute.submit(10, 10, 0, 0, EXPERT) for _ in range(2)]
    env.run()
    assert ends(*works) == [10, start_ns + 10]


def test_a_lag_that_was_not_said_to_be_longer_beside_a_disturber_is_as_long() -> None:
    assert behind_a_copy(0, 0, (20, 100), Lags(after_other_ns=6)) == 26


def test_a_kernel_is_slowed_only_while_a_copy_runs() -> None:
    env, timeline = simpy.Environment(), Timeline()
    compute, h2d = coupled(env, timeline, "compute"), coupled(env, timeline, "h2d")
    compute.disturbers = [h2d]
    couple([compute, h2d])
    # The kernel needs 100 ns; beside a copy it runs at half speed. The copy runs from 40 to 60: the kernel does 40,
    # then 10 in the 20 ns beside the copy, then the 50 that are left, and ends at 110. The copy is not disturbed.
    kernel = compute.submit(100, 100, 0, 0, EXPERT, slowdown=2.0)
    copy = h2d.submit(20, 20, 40, 0, DEMAND)
    env.run()
    assert ends(kernel, copy) == [110, 60]


def test_coupled_lanes_without_neighbors_equal_fifo_lanes() -> None:
    env, timeline = simpy.Environment(), Timeline()
    lane = CoupledLane(env, timeline, timeline.add_lane("gpu0", "h2d", "h2d"), Lags(3))
    couple([lane])
    work = [lane.submit(10, 12, issued_ns, 0, DEMAND) for issued_ns in (0, 0, 26, 50)]
    env.run()
    assert ends(*work) == [12, 25, 38, 62]


def queued(lane: PriorityLane, rank: tuple[int, int], issued_ns: int = 0, pieces: int = 1) -> Work:
    work = Work(10, 10, issued_ns, 0, DEMAND, -1, -1, -1, rank=rank, pieces=pieces)
    lane.submit_work(work)
    return work


def priority() -> tuple[simpy.Environment, PriorityLane, Timeline]:
    env, timeline = simpy.Environment(), Timeline()
    lane = PriorityLane(env, timeline, timeline.add_lane("gpu0", "h2d", "h2d"))
    couple([lane])
    return env, lane, timeline


class Anew(CoupledLane):
    """Schedules the end of its work anew whenever a neighbor moves it, and ignores ends that were overtaken."""

    def _schedule_end(self) -> None:
        self._look_number = -1
        super()._schedule_end()


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 20), st.integers(0, 30), st.none() | st.integers(0, 20)),
        min_size=10,
        max_size=30,
    )
)
def test_work_that_is_put_off_ends_when_and_in_the_order_that_scheduling_it_anew_makes(
    works: list[tuple[int, int, int, int | None]],
) -> None:
    def played(kind: type[CoupledLane]) -> tuple[list[tuple[int, int | float]], list[Any]]:
        env, timeline = simpy.Environment(), Timeline()
        lanes = [kind(env, timeline, timeline.add_lane("gpu0", role, role)) for role in ("h2d", "peer", "compute")]
        one, two, compute = lanes
        one.sharing, two.sharing, compute.disturbers, two.slowed_by = [two], [one], [one, two], [(compute, 1.25)]
        couple(lanes)
        ended: list[tuple[int, int | float]] = []
        promises: list[Completion] = []
        for number, (lane, ns, issued_ns, after) in enumerate(works):
            cause = promises[after] if after is not None and after < number else 0
            end = lanes[lane].submit(ns, ns, issued_ns, cause, EXPERT, number, slowdown=1.5)
            assert isinstance(end, Pending)
            end.then(partial(lambda number: ended.append((number, env.now)), number))
            promises.append(end)
        env.run()
        assert len(ended) == len(works)
        return ended, timeline.spans().tolist()

    assert played(CoupledLane) == played(Anew)


def test_demand_overtakes_queued_prefetches_and_nearer_goes_before_farther() -> None:
    env, lane, _ = priority()
    started = queued(lane, (1, 9))  # runs at once: nothing else is there
    far, near = queued(lane, (1, 8)), queued(lane, (1, 5))
    demand = queued(lane, (0, 3), issued_ns=4)
    env.run()
    assert [w.done.end_ns for w in (started, demand, near, far)] == [10, 20, 30, 40]


def test_a_promoted_prefetch_goes_like_a_demand() -> None:
    env, lane, _ = priority()
    queued(lane, (1, 1))
    near, far = queued(lane, (1, 2)), queued(lane, (1, 3))
    lane.promote(far, (0, 3))
    env.run()
    assert (far.done.end_ns, near.done.end_ns) == (20, 30)


def test_chunks_let_a_demand_in_between_but_a_started_chunk_is_not_interrupted() -> None:
    env, lane, timeline = priority()
    # Three pieces of 10 ns; the demand comes at 5 and goes after the first piece.
    prefetch, demand = queued(lane, (1, 7), pieces=3), queued(lane, (0, 2), issued_ns=5)
    env.run()
    assert (demand.done.end_ns, prefetch.done.end_ns) == (20, 40)
    assert intervals(timeline) == [(0, 10), (10, 20), (20, 30), (30, 40)]


def test_work_given_up_before_it_started_is_skipped_and_its_room_is_free_when_it_was() -> None:
    env, lane, timeline = priority()
    first, second, third = queued(lane, (1, 1)), queued(lane, (1, 2)), queued(lane, (1, 3))
    second.after = 7
    assert lane.give_up(second) == 7
    assert lane.give_up(first) is first.done  # in its only piece
    env.run()
    assert second.done.end_ns is None and third.done.end_ns == 20
    assert len(timeline) == 2


def test_work_given_up_in_the_middle_ends_with_the_piece_that_it_is_in() -> None:
    env, lane, timeline = priority()
    work, demand = queued(lane, (1, 7), pieces=3), queued(lane, (0, 2), issued_ns=5)
    # At 15 the demand runs: one piece is made, the others will not be. What waits for the room need not wait longer.
    env.run(until=15)
    assert lane.give_up(work) == 15
    env.run()
    assert (demand.done.end_ns, work.done.end_ns) == (20, None)
    other = queued(lane, (1, 7), issued_ns=20, pieces=3)
    env.run(until=25)
    assert lane.give_up(other) is other.done  # in its first piece
    env.run()
    assert other.done.end_ns == 30
    assert intervals(timeline) == [(0, 10), (10, 20), (20, 30)]


def test_of_equal_ranks_what_came_first_makes_all_its_pieces_first() -> None:
    # Else the second could hold the lane while it waits for a kernel that waits for the first.
    env, lane, _ = priority()
    first, second = queued(lane, (0, 1), pieces=2), queued(lane, (0, 1), pieces=2)
    env.run()
    assert (first.done.end_ns, second.done.end_ns) == (20, 40)


def test_promoted_work_that_is_not_issued_yet_comes_when_it_is() -> None:
    env, lane, _ = priority()
    late, early = queued(lane, (1, 1), issued_ns=8), queued(lane, (1, 2), issued_ns=3)
    lane.promote(late, (0, 0))
    env.run()
    assert (early.done.end_ns, late.done.end_ns) == (13, 23)


def test_an_engine_stays_with_the_stream_that_it_serves_as_long_as_that_has_ready_work() -> None:
    # The first stream's two copies run back to back although the second stream asked before the second of them; then
    # the second stream has its turn, and the first, whose third copy is asked for at 25 only, waits.
    env, timeline = simpy.Environment(), Timeline()
    first, second = (coupled(env, timeline, "h2d") for _ in range(2))
    first.turns, second.turns = [second], [first]
    couple([first, second])
    work = [
        first.submit(10, 10, 0, 0, DEMAND),
        second.submit(10, 10, 0, 0, PREFETCH),
        first.submit(10, 10, 0, 0, DEMAND),
        first.submit(10, 10, 25, 0, DEMAND),
    ]
    env.run()
    assert ends(*work) == [10, 30, 20, 40]


def test_the_backlog_counts_what_is_left_of_work_in_pieces_and_what_holds_the_lane() -> None:
    env, lane, _ = priority()
    queued(lane, (1, 1), pieces=3)
    promise = Pending()
    held = queued(lane, (1, 2))
    held.after = promise
    env.run(until=5)
    assert lane.backlog_ns(5) == 5 + 2 * 10 + 10  # the rest of a piece, two more, and the other
    env.run(until=31)
    assert lane.backlog_ns(31) == 10  # the first is done; the second holds the lane and waits
