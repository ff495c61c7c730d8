"""Misses shared between the link and the CPU, and those that are computed and uploaded behind: by hand, to the ns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny import tiny_inputs, tiny_model, tiny_profile, tiny_scenario, tiny_trace

from prestage.engine.measure.metrics import metrics
from prestage.engine.policies.miss import CPU, MISS, Absent, CpuThenUpload, Resolved, Split, Terms, fetched_of
from prestage.engine.timing.ready import is_ready
from prestage.resources.timeline import CPU_EXPERT, EXPERT, KINDS
from prestage.testing import record

ENGINES = ["simpy", pytest.param("compiled", marks=pytest.mark.skipif(not is_ready(), reason="not compiled yet"))]


def terms(**known: Any) -> Terms:
    """An expert takes 30 ns on the CPU and 32 there and back, 20 to be copied and 7 on the GPU, unless it is said."""
    ns = {"cpu_ns": 30, "there_and_back_ns": 32, "copy_ns": 20, "kernel_ns": 7}
    costs = {name: known.pop(name, default) for name, default in ns.items()}
    rules: dict[str, Any] = {name: lambda layer, tokens, ns=value: ns for name, value in costs.items()}
    return Terms(**rules, **known)


def absent(count: int) -> list[Absent]:
    return [Absent(expert, [1.0]) for expert in range(count)]


@pytest.mark.parametrize(("count", "fetched"), [(3, 1), (4, 1), (5, 1), (6, 2)])
def test_the_link_gets_the_whole_number_that_ends_sooner(count: int, fetched: int) -> None:
    # f = .307. Of 6: with 1 fetched max(.693, 5 x .307) = 1.535, with 2 max(2 x .693, 4 x .307) = 1.386, which is less.
    assert fetched_of(count, 0.307) == fetched


def test_split_fetches_the_first_and_sends_the_rest_to_the_cpu() -> None:
    # A copy takes 693, an expert on the CPU 307: f = 307 / 1000. Of four, one is fetched.
    sent = Split(terms(cpu_ns=307, copy_ns=693)).resolve(0, absent(4))
    assert [access.expert for access in sent] == [1, 2, 3] and {access.way for access in sent} == {CPU}
    # Of two whom the CPU may have none is fetched: max(2 x .307) is less than .693.
    busy = [Absent(0, [1.0]), Absent(1, [1.0, 1.0]), Absent(2, [1.0])]
    sent = Split(terms(cpu_ns=307, copy_ns=693, cpu_max_tokens=1)).resolve(0, busy)
    assert [access.expert for access in sent] == [0, 2]


@pytest.mark.parametrize(("copy_ns", "sent"), [(61, [1, 2]), (60, [1, 2]), (59, [])])
def test_split_if_twice_shares_from_twice_the_link_on(copy_ns: int, sent: list[int]) -> None:
    policy = MISS["split-if-twice"](terms(copy_ns=copy_ns))
    assert [access.expert for access in policy.resolve(0, absent(3))] == sent


def uploaded(policy: CpuThenUpload, *steps: list[int]) -> list[list[int]]:
    """Returns what is uploaded behind each step's visit of layer 0, of the experts that it missed."""
    return [
        list(policy.behind(step, 0, [Resolved(expert, CPU, 1, 1.0) for expert in missed]))
        for step, missed in enumerate(steps)
    ]


def test_an_expert_is_uploaded_when_it_was_missed_often_enough_so_many_a_step() -> None:
    policy = CpuThenUpload(terms(upload_after=2, upload_most=1, upload_horizon=9))
    # 0 and 1 are missed again in the second step: one may go, the first. Then 1; 2 has begun anew.
    assert uploaded(policy, [0, 1], [0, 1], [1, 2], [0]) == [[], [0], [1], []]


def test_an_upload_must_repay_its_copy() -> None:
    # Each use saves 30 + 32 - 7 = 55 ns. Missed once in four steps and expected in 4 more: once, 55 ns.
    for copy_ns, when in ((54, [[], [], [], [0]]), (55, [[], [], [], []])):
        policy = CpuThenUpload(terms(copy_ns=copy_ns, upload_most=9, upload_horizon=4))
        assert uploaded(policy, [], [], [], [0]) == when


def test_uploads_keep_to_their_share_of_the_link() -> None:
    # The CPU is busy for 62 ns with each, and a copy takes 20.
    policy = CpuThenUpload(terms(upload_most=9, upload_horizon=99, upload_share=0.4))
    assert uploaded(policy, [0], [1], [2]) == [[0], [1], [2]]  # 24.8, 49.6, 74.4 against 20, 40, 60
    policy = CpuThenUpload(terms(upload_most=9, upload_horizon=99, upload_share=0.3))
    assert uploaded(policy, [0], [1], [2]) == [[], [1], [2]]  # 18.6, 37.2, 55.8 against 20, 20, 40
    policy = CpuThenUpload(terms(upload_most=9, upload_horizon=99, upload_share=0.2))
    assert uploaded(policy, [0], [1], [2]) == [[], [1], []]  # 12.4, 24.8, 37.2 against 20, 20, 40


def test_copies_take_no_more_than_the_time_that_the_cpu_is_busy_if_nothing_else_is_said() -> None:
    # 62 ns on the CPU and a copy of 63: it must wait for the second miss, when the CPU has been busy for 124.
    policy = CpuThenUpload(terms(copy_ns=63, upload_most=9, upload_horizon=99))
    assert uploaded(policy, [0], [1]) == [[], [1]]


def test_what_nobody_states_takes_no_time() -> None:
    # An expert on the CPU for nothing saves nothing, and a copy for nothing never pays.
    unstated = Terms()
    assert [
        rule(0, 1) for rule in (unstated.cpu_ns, unstated.there_and_back_ns, unstated.copy_ns, unstated.kernel_ns)
    ] == [0] * 4
    assert uploaded(CpuThenUpload(unstated), [0], [0]) == [[], []]


@pytest.mark.parametrize("engine", ENGINES)
def test_what_the_cpu_computed_is_on_the_gpu_when_it_is_wanted_again(engine: str) -> None:
    # dense 3, activations 16, the CPU's 30, the result 16: at 65 the second token begins. The upload is ordered behind
    # the first visit, at 3, and there at 23. The second token's expert runs there from 68 to 75, the third's behind 3.
    trace = tiny_trace([[[0]], [[0]], [[0]]])
    miss = {"policy": "cpu-then-upload", "upload_after": 1}
    inputs = tiny_inputs(tiny_model(1), tiny_profile(), trace, tiny_scenario(miss=miss))
    recording = record(inputs, engine=engine)
    spans = recording.spans
    starts = {kind: spans[spans["kind"] == kind]["start_ns"].tolist() for kind in (CPU_EXPERT, EXPERT)}
    assert starts == {CPU_EXPERT: [19], EXPERT: [68, 78]}
    prefetch = spans[spans["kind"] == KINDS.index("prefetch")]
    assert (prefetch["start_ns"].tolist(), prefetch["end_ns"].tolist()) == ([3], [23])
    counts = metrics(recording)["counts"]
    assert {name: counts[name] for name in ("miss", "prefetch", "prefetch_hit", "cache_hit")} == {
        "miss": 1, "prefetch": 1, "prefetch_hit": 1, "cache_hit": 1,
    }  # fmt: skip
    assert np.count_nonzero(recording.resolved["way"] == CPU) == 1
