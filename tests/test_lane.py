"""Lanes, worked by hand: when work starts and ends, on its own and beside a neighbor."""

from __future__ import annotations

import pytest
from lone_lanes import Lanes, ends

from prestage.engine.timing.lanes import couple
from prestage.resources.lags import Lags
from prestage.resources.timeline import EXPERT, PREFETCH


def test_a_lane_runs_work_in_order_once_it_is_issued_and_what_it_waits_for_has_ended() -> None:
    lanes = Lanes()
    lane, other = lanes.lane("compute"), lanes.lane()
    until_40 = lanes.submit(other, 40)
    lanes.submit(lane, 10)
    lanes.submit(lane, 5)  # queued behind the first
    lanes.submit(lane, 5, after=(until_40,))
    lanes.submit(lane, 5)  # waits behind what waits
    lanes.submit(lane, 5, issued_ns=60)
    assert lanes.intervals() == [(0, 10), (10, 15), (0, 40), (40, 45), (45, 50), (60, 65)]


def test_work_on_an_idle_lane_takes_its_alone_time_and_queued_work_keeps_the_gap() -> None:
    lanes = Lanes()
    lane = lanes.lane(lags=Lags(3))
    # The first finds an idle lane (12 ns); the second is queued: 3 ns later, 10 ns. The third comes at 26, after the
    # lane was free but before it could have taken it (25 + 3 = 28), so it is still queued. So is the fourth, which
    # comes just as the lane can take it (38 + 3); the fifth at 60 finds the lane idle again.
    for issued_ns in (0, 0, 26, 41, 60):
        lanes.submit(lane, 10, alone_ns=12, issued_ns=issued_ns)
    assert lanes.intervals() == [(0, 12), (15, 25), (28, 38), (41, 51), (60, 72)]


@pytest.mark.parametrize(
    ("factor", "second_ns", "end_ns"),
    [
        # a: 100 ns of work from 0; b: 30 ns of work from 20. Alone until 20 (a has 80 left); then both at half speed:
        # b ends at 20 + 60 = 80 with a at 80 - 30 = 50 left; a runs alone again and ends at 80 + 50 = 130.
        (1.0, 30, [130, 80]),
        # b: 20 ns of work from 20, which takes 2 x 1.25 times as long: until 70. a has done 20 by then and 20 beside b,
        # and ends 60 later, alone.
        (1.25, 20, [130, 70]),
    ],
)
def test_two_streams_share_one_link_fairly(factor: float, second_ns: int, end_ns: list[int]) -> None:
    lanes = Lanes()
    a, b = lanes.lane(), lanes.lane()
    a.sharing, b.sharing = [b], [a]
    a.sharing_factor = b.sharing_factor = factor
    couple([a, b])
    first, second = lanes.submit(a, 100), lanes.submit(b, second_ns, issued_ns=20, kind=PREFETCH)
    assert ends(lanes, first, second) == end_ns


def behind_a_copy(submitted_ns: int, issued_ns: int, other: tuple[int, int] | None, lags: Lags) -> int:
    """When a kernel starts that waits for a copy from 0 to 20, another copy running from `other` on for so long."""
    lanes = Lanes()
    compute, h2d = lanes.lane("compute", lags), lanes.lane()
    compute.disturbers = [h2d]
    couple([compute, h2d])
    copied = lanes.submit(h2d, 20)
    if other is not None:
        lanes.submit(h2d, other[1], issued_ns=other[0], kind=PREFETCH)
    lanes.later(submitted_ns, lambda: lanes.submit(compute, 10, issued_ns=issued_ns, after=(copied,), kind=EXPERT))
    lanes.env.run()
    spans = lanes.timeline.spans()
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
    lanes = Lanes()
    compute, h2d = lanes.lane("compute", Lags(2, 3)), lanes.lane()
    compute.disturbers = [h2d]
    couple([compute, h2d])
    lanes.submit(h2d, copy[1], issued_ns=copy[0])
    works = [lanes.submit(compute, 10, kind=EXPERT) for _ in range(2)]
    assert ends(lanes, *works) == [10, start_ns + 10]


def test_a_lag_that_was_not_said_to_be_longer_beside_a_disturber_is_as_long() -> None:
    assert behind_a_copy(0, 0, (20, 100), Lags(after_other_ns=6)) == 26


def test_a_kernel_is_slowed_only_while_a_copy_runs() -> None:
    lanes = Lanes()
    compute, h2d = lanes.lane("compute"), lanes.lane()
    compute.disturbers = [h2d]
    couple([compute, h2d])
    # The kernel needs 100 ns; beside a copy it runs at half speed. The copy runs from 40 to 60: the kernel does 40,
    # then 10 in the 20 ns beside the copy, then the 50 that are left, and ends at 110. The copy is not disturbed.
    kernel, copy = lanes.submit(compute, 100, kind=EXPERT, slowdown=2.0), lanes.submit(h2d, 20, issued_ns=40)
    assert ends(lanes, kernel, copy) == [110, 60]


def test_demand_overtakes_queued_prefetches_and_nearer_goes_before_farther() -> None:
    lanes = Lanes()
    lane = lanes.queue()
    started = lanes.enqueue(lane, False, 9)
    lanes.env.run(until=1)  # it runs, for nothing else is there
    far, near = lanes.enqueue(lane, False, 8), lanes.enqueue(lane, False, 5)
    demand = lanes.enqueue(lane, True, 3, issued_ns=4)
    assert ends(lanes, started, demand, near, far) == [10, 20, 30, 40]


def test_a_promoted_prefetch_goes_like_a_demand() -> None:
    lanes = Lanes()
    lane = lanes.queue()
    lanes.enqueue(lane, False, 1)
    near, far = lanes.enqueue(lane, False, 2), lanes.enqueue(lane, False, 3)
    lanes.later(5, lambda: lane.promote(far, 3))
    assert ends(lanes, far, near) == [20, 30]


def test_chunks_let_a_demand_in_between_but_a_started_chunk_is_not_interrupted() -> None:
    lanes = Lanes()
    lane = lanes.queue()
    # Three pieces of 10 ns; the demand comes at 5 and goes after the first piece.
    prefetch, demand = lanes.enqueue(lane, False, 7, pieces=3), lanes.enqueue(lane, True, 2, issued_ns=5)
    assert ends(lanes, demand, prefetch) == [20, 40]
    assert lanes.intervals() == [(0, 10), (10, 20), (20, 30), (30, 40)]


def test_work_given_up_before_it_started_is_skipped_and_its_room_is_free_when_it_was() -> None:
    lanes = Lanes()
    lane, other = lanes.queue(), lanes.lane("compute")
    read = lanes.submit(other, 7)
    first, second = lanes.enqueue(lane, False, 1), lanes.enqueue(lane, False, 2, after=(read,))
    third = lanes.enqueue(lane, False, 3)
    lanes.env.run(until=5)
    assert lane.give_up(second) == (read,)
    assert lane.give_up(first) == (first,)  # in its only piece
    assert ends(lanes, first, second, third) == [10, None, 20]


def test_work_given_up_in_the_middle_ends_with_the_piece_that_it_is_in() -> None:
    lanes = Lanes()
    lane = lanes.queue()
    work, demand = lanes.enqueue(lane, False, 7, pieces=3), lanes.enqueue(lane, True, 2, issued_ns=5)
    # At 15 the demand runs: one piece is made, the others will not be. What waits for the room need not wait longer.
    lanes.env.run(until=15)
    assert lane.give_up(work) == ()
    assert ends(lanes, demand, work) == [20, None]
    other = lanes.enqueue(lane, False, 7, issued_ns=20, pieces=3)
    lanes.env.run(until=25)
    assert lane.give_up(other) == (other,)  # in its first piece
    assert lanes.intervals() == [(0, 10), (10, 20), (20, 30)]
    assert other.end_ns == 30


def test_what_stands_for_a_copy_leaving_host_memory_ends_with_the_copy_or_when_it_is_given_up() -> None:
    lanes = Lanes()
    lane = lanes.queue()
    made, given_up = lanes.enqueue(lane, True, 1), lanes.enqueue(lane, False, 2)
    made.leaves, given_up.leaves = (lanes.submit(lanes.lane(), 0, issued_ns=10**6) for _ in range(2))
    lanes.later(4, lambda: lane.give_up(given_up))
    lanes.env.run(until=100)
    assert (made.leaves.end_ns, given_up.leaves.end_ns) == (10, 4)


def test_a_copy_held_back_does_not_hold_up_the_queue_before_it_could_start() -> None:
    lanes = Lanes()
    lane, drive = lanes.queue(), lanes.lane("nvme")
    read = lanes.submit(drive, 50)
    demand = lanes.enqueue(lane, True, 1, after=(read,), held_back=True)
    prefetch = lanes.enqueue(lane, False, 2)
    assert ends(lanes, prefetch, demand) == [10, 60]


def test_of_equal_ranks_what_came_first_makes_all_its_pieces_first() -> None:
    # Else the second could hold the lane while it waits for a kernel that waits for the first.
    lanes = Lanes()
    lane = lanes.queue()
    first, second = lanes.enqueue(lane, True, 1, pieces=2), lanes.enqueue(lane, True, 1, pieces=2)
    assert ends(lanes, first, second) == [20, 40]


def test_promoted_work_that_is_not_issued_yet_comes_when_it_is() -> None:
    lanes = Lanes()
    lane = lanes.queue()
    late, early = lanes.enqueue(lane, False, 1, issued_ns=8), lanes.enqueue(lane, False, 2, issued_ns=3)
    lane.promote(late, 0)
    assert ends(lanes, early, late) == [13, 23]


def test_an_engine_stays_with_the_stream_that_it_serves_as_long_as_that_has_ready_work() -> None:
    # The first stream's two copies run back to back although the second stream asked before the second of them; then
    # the second stream has its turn, and the first, whose third copy is asked for at 25 only, waits.
    lanes = Lanes()
    first, second = lanes.lane(), lanes.lane()
    first.turns, second.turns = [second], [first]
    couple([first, second])
    works = [lanes.submit(lane, 10, issued_ns=at) for lane, at in ((first, 0), (second, 0), (first, 0), (first, 25))]
    assert ends(lanes, *works) == [10, 30, 20, 40]


def test_the_backlog_counts_what_is_left_of_work_in_pieces_and_what_holds_the_lane() -> None:
    lanes = Lanes()
    lane, other = lanes.queue(), lanes.lane("compute")
    promise = lanes.submit(other, 1000)
    lanes.enqueue(lane, False, 1, pieces=3)
    lanes.enqueue(lane, False, 2, after=(promise,))
    lanes.env.run(until=5)
    assert lane.backlog_ns() == 5 + 2 * 10 + 10  # the rest of a piece, two more, and the other
    lanes.env.run(until=31)
    assert lane.backlog_ns() == 10  # the first is done; the second holds the lane and waits


def test_the_backlog_counts_work_from_its_submission_on() -> None:
    lanes = Lanes()
    lane = lanes.lane()
    lanes.submit(lane, 10)
    lanes.submit(lane, 20, issued_ns=50)
    assert lane.backlog_ns() == 30  # queued work alone, not what it waits for
