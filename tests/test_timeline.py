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
