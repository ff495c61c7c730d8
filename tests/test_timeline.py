"""The timeline: what is recorded comes back as it was, once, and cheaply."""

from __future__ import annotations

import pytest

from prestage.resources.timeline import DEMAND, DENSE, KINDS, ROLES, SPAN, LaneName, Timeline, pack_span


def test_spans_come_back_in_the_order_of_recording() -> None:
    timeline = Timeline()
    compute, h2d = timeline.add_lane("gpu0", "compute", "compute"), timeline.add_lane("gpu0", "h2d", "copies")
    timeline.record(30, 40, 10, 7, 2, 5, compute, DENSE)
    timeline.extend(pack_span(2**40, 2**40 + 1, 0, -1, -1, -1, h2d, DEMAND))
    assert len(timeline) == 2
    spans = timeline.spans()
    assert spans.dtype == SPAN
    assert spans.tolist() == [(30, 40, 10, 7, 2, 5, 0, DENSE), (2**40, 2**40 + 1, 0, -1, -1, -1, 1, DEMAND)]
    assert timeline.lanes == [LaneName("gpu0", "compute", "compute"), LaneName("gpu0", "h2d", "copies")]
    assert (timeline.lanes_with("h2d"), timeline.lanes_with("d2h")) == ([1], [])


def test_an_empty_timeline_has_no_spans() -> None:
    assert Timeline().spans().tolist() == []


def test_spans_are_a_view_of_40_bytes_each_that_nobody_can_change() -> None:
    timeline = Timeline()
    timeline.record(0, 1, 0, -1, 0, -1, 0, DENSE)
    spans = timeline.spans()
    assert spans.nbytes == 40 and not spans.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        spans["end_ns"] = 2
    with pytest.raises(BufferError):  # the view would be left behind
        timeline.record(1, 2, 1, -1, 0, -1, 0, DENSE)
    del spans
    timeline.record(1, 2, 1, -1, 0, -1, 0, DENSE)
    assert timeline.spans()["end_ns"].tolist() == [1, 2]


def test_a_lane_has_a_known_role() -> None:
    timeline = Timeline()
    with pytest.raises(ValueError, match=f"role = 'copier': choose one of {', '.join(ROLES)}"):
        timeline.add_lane("gpu0", "copier", "copies")
    assert len(KINDS) == len(set(KINDS))


def test_spans_are_by_their_ends_then_by_lane_then_as_they_came_and_are_ordered_only_when_somebody_looks() -> None:
    timeline = Timeline()
    for role in ("compute", "h2d", "compute"):
        timeline.add_lane("gpu0", role, role)
    for number, (end_ns, lane) in enumerate([(9, 2), (5, 1), (9, 0), (7, 1), (5, 0), (5, 1), (9, 0)]):
        timeline.record(0, end_ns, 0, number, -1, -1, lane, DENSE)
    timeline.settle()
    assert timeline.last_end_ns("compute") == 9
    assert timeline.last_end_ns("h2d") == 7
    assert timeline.last_end_ns("d2h") == 0
    assert timeline.spans()["expert"].tolist() == [4, 1, 5, 3, 2, 6, 0]
    assert timeline.spans()["expert"][timeline.on_lanes(timeline.spans(), "h2d")].tolist() == [1, 5, 3]
    timeline.record(0, 6, 0, 7, -1, -1, 0, DENSE)
    timeline.settle()
    assert timeline.spans()["expert"].tolist() == [4, 1, 5, 7, 3, 2, 6, 0]
