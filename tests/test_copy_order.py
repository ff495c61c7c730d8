"""Copy orders: every row of the table runs and is executed or refused; a user's own is one class."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from test_execute import small_inputs
from tiny import tiny_inputs, tiny_model, tiny_profile, tiny_scenario, tiny_trace

from prestage.calibration.executor.entries import ExecutionError
from prestage.calibration.executor.executable import check_executable
from prestage.engine.costs.costs import part_costs
from prestage.engine.load import load_inputs
from prestage.engine.policies.copy_order import COPY_ORDERS, ByRank, CopyOrder, Fifo, Priority, QueuedCopy, Rank
from prestage.engine.run import engine_for, prepared, run_all
from prestage.engine.scenario.amounts import ScenarioError
from prestage.engine.scenario.inputs import Inputs
from prestage.engine.scenario.scenario import load_scenario
from prestage.engine.simulate import simulate
from prestage.errors import InputError
from prestage.resources.timeline import DEMAND, PREFETCH
from prestage.workloads.guesses import Guesses


class Deadline(ByRank):
    """What is for the nearer visit first, whether it is demanded or not."""

    def rank(self, copy: QueuedCopy) -> Rank:
        return copy.visit, int(not copy.demanded)


class FarFirst(ByRank):
    """Prefetches before demand, what is for the farthest visit first: the worst that one could do."""

    def rank(self, copy: QueuedCopy) -> Rank:
        return int(copy.demanded), -copy.visit


@pytest.fixture(autouse=True)
def own_orders() -> Any:
    with patch.dict(COPY_ORDERS, deadline=Deadline, far_first=FarFirst):
        yield


def queueing(discipline: str) -> Inputs:
    """Four layers of one expert, copied in 20 ns each and computed in 3 + 7; the first visit prefetches the others."""
    trace = tiny_trace([[[0], [1], [2], [3]]])
    scenario = tiny_scenario(prefetch={"lookahead": 3, "k": 1}, copy={"discipline": discipline})
    inputs: Inputs = tiny_inputs(tiny_model(4), tiny_profile(), trace, scenario)
    return inputs


def copies(inputs: Inputs) -> list[tuple[int, int, int, int]]:
    """(layer, kind, start, end) of the copies of a run by SimPy, in order of their starts."""
    (recording,) = run_all(inputs, prepared(inputs, part_costs(inputs)), engine="simpy")
    rows = [span for span in recording.spans if span["kind"] in (DEMAND, PREFETCH)]
    told = [(int(row["expert"]) // 4, int(row["kind"]), int(row["start_ns"]), int(row["end_ns"])) for row in rows]
    return sorted(told, key=lambda copy: copy[2])


# The choice of layer 0 is known at 3, and its copy takes the engine until 23; three prefetches wait behind it.


@pytest.mark.parametrize("discipline", ["fifo", "priority", "deadline"])
def test_the_nearer_visit_goes_first(discipline: str) -> None:
    assert copies(queueing(discipline)) == [
        (0, DEMAND, 3, 23), (1, PREFETCH, 23, 43), (2, PREFETCH, 43, 63), (3, PREFETCH, 63, 83),
    ]  # fmt: skip


def test_an_order_of_ones_own_says_what_goes_next() -> None:
    # All are queued at 3: the farthest goes first, then, by rank, what is nearer; demand is last, so layer 0 waits.
    assert [layer for layer, *_ in copies(queueing("far_first"))] == [3, 2, 1, 0]


@pytest.mark.parametrize("drop_stale", [False, True])
def test_a_queued_prefetch_is_dropped_once_its_visit_has_gone_without_it_if_the_scenario_says_so(
    drop_stale: bool,
) -> None:
    # Two wrong guesses for layer 1 wait behind layer 0's copy. The first runs until 43; at 33 layer 1 demands another
    # expert, whose copy goes before the second, and the host goes on to layer 2: at 63 the second is for nothing.
    # Expert 63-70, dense 70-73: layer 2's copy starts at once, or at 83.
    trace = tiny_trace([[[0], [1], [0]]])
    scenario = tiny_scenario(
        prefetch={"lookahead": 1, "k": 2}, copy={"discipline": "priority", "drop_stale": drop_stale}
    )
    plain = tiny_inputs(tiny_model(3), tiny_profile(), trace, scenario)
    wrong = Guesses(np.zeros(1, dtype=np.int64), np.array([[[[2, 3]], [[-1, -1]], [[-1, -1]]]], dtype=np.int16))
    last = [(2, DEMAND, 73, 93)] if drop_stale else [(1, PREFETCH, 63, 83), (2, DEMAND, 83, 103)]
    made = [(0, DEMAND, 3, 23), (1, PREFETCH, 23, 43), (1, DEMAND, 43, 63), *last]
    assert copies(replace(plain, guesses=wrong)) == made


def test_a_demanded_prefetch_takes_the_rank_of_a_demand() -> None:
    order, copy = Priority(), QueuedCopy(False, 5, 17)
    assert order.rank(copy) == (1, 5) > order.rank(copy._replace(demanded=True)) == (0, 5)


@pytest.mark.parametrize("name", ["two_streams", "priority", "deadline", "far_first"])
def test_an_order_says_when_bytes_come_and_nothing_else(name: str) -> None:
    def decided(discipline: str) -> list[int]:
        settings = ["workload.tokens=6", "prefetch.policy=top-k", "prefetch.lookahead=2", "memory.gpu_budget=40experts"]
        scenario = load_scenario("guide", [*settings, f"copy.discipline={discipline}"])
        counts = simulate(scenario, baselines=False, engine="simpy").data["counts"]
        found = counts["prefetch_hit"] + counts["cache_hit"] + counts["late"]
        return [found, counts["miss"], counts["prefetch"], counts["evict"]]

    assert decided(name) == decided("fifo")
    assert min(decided(name)) > 0


def test_an_order_of_ones_own_that_ranks_as_priority_does_ends_at_the_same_nanoseconds() -> None:
    settings = ["workload.tokens=6", "prefetch.lookahead=2", "copy.chunk_bytes=4194304", "copy.drop_stale=true"]

    def spans(discipline: str) -> bytes:
        inputs = load_inputs(load_scenario("guide", [*settings, f"copy.discipline={discipline}"]))
        (recording,) = run_all(inputs, prepared(inputs, part_costs(inputs)), engine="simpy")
        return recording.spans.tobytes()

    class Same(Priority):
        """Priority's ranks, by another name."""

    with patch.dict(COPY_ORDERS, same=Same):
        assert spans("same") == spans("priority") != spans("far_first")


def test_the_scenario_takes_its_choices_from_the_table() -> None:
    assert tiny_scenario(copy={"discipline": "deadline"}).copy_.order is Deadline
    with pytest.raises(
        InputError, match=r"choose one of deadline, far_first, fifo, priority, two_streams|choose one of"
    ):
        tiny_scenario(copy={"discipline": "lifo"})
    with pytest.raises(
        InputError, match="drop_stale = true needs discipline = 'priority' or 'deadline' or 'far_first'"
    ):
        tiny_scenario(copy={"discipline": "fifo", "drop_stale": True})


def test_an_order_that_an_engine_does_not_know_runs_by_simpy_and_is_refused_where_compiled_is_asked_for() -> None:
    inputs = queueing("deadline")
    why = "copy.discipline = 'deadline': engine 'compiled' knows fifo, two_streams, priority alone"
    assert [engine_for(inputs, name) for name in (None, "simpy")] == [("simpy", why), ("simpy", "asked for")]
    assert engine_for(queueing("priority"), "compiled") == ("compiled", "")
    with pytest.raises(ScenarioError, match=r"'deadline': engine 'compiled' knows fifo, two_streams, priority alone"):
        engine_for(inputs, "compiled")
    scenario = load_scenario("guide", ["copy.discipline=deadline", "workload.tokens=2"])
    assert simulate(scenario).engine == ("simpy", why)  # and so do its baselines


@pytest.mark.parametrize("name", ["fifo", "two_streams", "priority"])
def test_shipped_orders_are_executed(name: str) -> None:
    check_executable(small_inputs(copy={"discipline": name}))


def test_others_are_refused_by_the_executor_by_name() -> None:
    says = r"copy\.discipline = 'deadline': choose fifo, two_streams or priority \(execution on a GPU\)"
    with pytest.raises(ExecutionError, match=says):
        check_executable(small_inputs(copy={"discipline": "deadline"}))


def test_an_order_under_a_shipped_name_is_still_ones_own() -> None:
    class Mine(Fifo):
        """The same, by another class."""

    with patch.dict(COPY_ORDERS, fifo=Mine):
        inputs = queueing("fifo")
        assert engine_for(inputs).engine == "simpy"
        with pytest.raises(ExecutionError, match="'fifo': choose two_streams or priority"):
            check_executable(small_inputs(copy={"discipline": "fifo"}))


def test_a_queue_has_one_stream() -> None:
    assert not [name for name, order in COPY_ORDERS.items() if issubclass(order, ByRank) and order.prefetch_stream]
    assert not CopyOrder.prefetch_stream
