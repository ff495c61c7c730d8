"""Eviction policies: what all of them owe the memory manager, and the order of each, worked by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cases import Case, cases
from random_cases import traces as random_traces
from tiny import tiny_trace

from prestage.engine.decide.memory_manager import MemoryManager
from prestage.engine.policies.eviction import EVICTION, Lru, Setting
from prestage.engine.policies.eviction_base import Chain, Ranking
from prestage.engine.policies.eviction_queues import Arc, S3Fifo
from prestage.engine.replay.replay import FOUND, replay, replay_trace
from prestage.testing.conformance import check_no_early_eviction, check_same_evictions, check_victims
from prestage.workloads.batches import plan_steps
from prestage.workloads.predictors import make_predictor
from prestage.workloads.trace import RoutingTrace

EVERY = pytest.mark.parametrize("name", EVICTION)


@EVERY
@settings(max_examples=20)
@given(data=st.data(), look=st.booleans())
def test_victims_walks_exactly_the_experts_in_memory_once(name: str, data: st.DataObject, look: bool) -> None:
    check_victims(name, data.draw(cases(memory={"eviction": name})).inputs(), look=look)


@EVERY
@settings(max_examples=15)
@given(data=st.data())
def test_the_same_run_meets_the_same_evictions(name: str, data: st.DataObject) -> None:
    case: Case = data.draw(cases(memory={"eviction": name}))
    check_same_evictions(case.inputs(), case.inputs())


@EVERY
@settings(max_examples=15)
@given(data=st.data())
def test_nobody_is_evicted_while_there_is_room(name: str, data: st.DataObject) -> None:
    check_no_early_eviction(data.draw(cases(memory={"eviction": name, "scope": "global"})).inputs())


@settings(max_examples=60)
@given(
    trace=random_traces(3, 5, 2),
    slots=st.integers(2, 14),
    batch=st.integers(1, 3),
    scope=st.sampled_from(["global", "shared"]),
    lookup=st.sampled_from(["batch", "single"]),
)
def test_of_experts_of_one_size_no_policy_misses_fewer_than_belady(
    trace: RoutingTrace, slots: int, batch: int, scope: str, lookup: str
) -> None:
    # As long as a whole visit fits: in waves, who is found depends on the order.
    steps = plan_steps(trace.sequence, trace.phase, batch=batch, prefill="chunked", chunk_tokens=batch)
    if lookup == "batch" and slots < min(5, 2 * batch):
        return
    guesses = make_predictor("previous-token").guess(trace, steps, 3, 2)
    setting = Setting(trace=trace, steps=steps, single=lookup == "single", guesses=guesses)
    hits = {}
    for name, policy in EVICTION.items():
        manager = MemoryManager([1] * 3, 5, slots, policy, setting=setting, scope=scope)
        hits[name] = replay(trace, steps, manager, lookup=lookup).count(FOUND)
    assert max(hits.values()) == hits["belady"], hits


def test_where_sizes_differ_belady_is_no_bound() -> None:
    # Room for 4: a takes 1, x and y 3 each. Asked for: a x a y x a y. Both find the second a. Then y wants 3 bytes. LFU
    # evicts x, keeps a and finds it again. Belady's rule evicts a, which is farthest, and then x too, and finds none.
    experts = np.array([[1, 0], [1, 1], [0, 0], [1, 1]], dtype=np.uint8)[:, :, None]
    present = np.array([[True, True], [True, True], [False, True], [True, True]])
    trace = RoutingTrace(experts, 2, present=present)
    steps = plan_steps(trace.sequence, trace.phase)
    hits = {}
    for name in ("lfu", "belady"):
        manager = MemoryManager([1, 3], 2, 4, EVICTION[name], setting=Setting(trace=trace, steps=steps))
        hits[name] = replay(trace, steps, manager).count(FOUND)
    assert hits == {"lfu": 2, "belady": 1}


# The two orders that most policies keep.


@given(st.lists(st.tuples(st.integers(0, 9), st.none() | st.integers(0, 3)), max_size=150))
def test_a_ranking_walks_by_priority_then_by_when_it_was_put(changes: list[tuple[int, int | None]]) -> None:
    ranking, plain = Ranking(), {}
    for at, (expert, priority) in enumerate(changes):
        if priority is not None:
            ranking.put(expert, priority)
            plain[expert] = (priority, at)
        elif expert in plain:
            ranking.remove(expert)
            del plain[expert]
        expected = sorted(plain, key=lambda expert: plain[expert])
        assert list(ranking) == expected
        assert list(itertools.islice(ranking, 2)) == expected[:2]  # whoever walks may stop anywhere
        assert all((expert in ranking) == (expert in plain) for expert in range(10))


@given(st.lists(st.integers(0, 6), max_size=60))
def test_a_chain_keeps_the_order_in_which_it_was_appended_to(changes: list[int]) -> None:
    chain = Chain()
    plain: list[int] = []
    for item in changes:
        if item in plain:
            chain.remove(item)
            plain.remove(item)
        else:
            chain.append(item)
            plain.append(item)
        walked, at = [], chain.after(chain.END)
        while at != chain.END:
            walked.append(at)
            at = chain.after(at)
        assert walked == plain
        assert len(chain) == len(plain)


# The members, one by one: a story of one expert a visit, lower case a prefetch, and who leaves, in order.


def evicted(name: str, story: str, slots: int, **known: object) -> str:
    """Returns who leaves when the experts of a story are demanded one by one (capitals) or prefetched."""
    experts = [ord(letter.upper()) - ord("A") for letter in story]
    demanded = [expert for expert, letter in zip(experts, story, strict=True) if letter.isupper()]
    trace = tiny_trace([[[expert]] for expert in demanded], num_experts=26, **known)
    setting = Setting(trace=trace, steps=plan_steps(trace.sequence, trace.phase))
    manager = MemoryManager([1], 26, slots, EVICTION[name], setting=setting, protect="none")
    number = 0
    for expert, letter in zip(experts, story, strict=True):
        if letter.islower():
            manager.prefetch(expert, number)
            continue
        weights = [1.0] if trace.weights is None else trace.weights[number, 0].tolist()
        manager.visit(number, 0, [expert], [expert], weights)
        manager.unpin()
        number += 1
    return "".join(chr(ord("A") + manager.copy_expert[copy]) for copy in manager.evicted_copies)


@pytest.mark.parametrize(
    ("name", "slots", "story", "leave"),
    [
        # In order of arrival, used again or not.
        ("fifo", 3, "ABCADE", "AB"),
        # A is used again, so B and then C are the oldest.
        ("lru", 3, "ABCADE", "BC"),
        # A has 2 uses; of B and C with one each B is the older, then of C and D it is C. B has 2 by then, and D goes.
        ("lfu", 3, "ABCADBE", "BCD"),
        # A has 3 uses, B 2: B goes for C, and C for B, which has 3 now: of the two A is the older.
        ("lfu", 2, "ABBAACBD", "BCA"),
        # The same, but B starts anew when it returns.
        ("lfu-incache", 2, "ABBAACBD", "BCB"),
        # A prefetch is no use: C has none and goes first, though it came last.
        ("lfu", 3, "ABcD", "C"),
        ("lrfu", 3, "ABcD", "C"),
        # Room for two, so a half-life of two uses: A's two are worth 2**-1 + 2**-0.5 = 1.2, and B's last one 1.
        ("lrfu", 2, "AABC", "B"),
        # Four slots, two of them privileged: A and B are, then C, and A falls back with two uses. D was used once and
        # leaves for E, then E for F, for A has more.
        ("lfru", 4, "ABCDABCEF", "DE"),
        # Privileged are C and D, with two uses each; A fell back with three and B with five, and of these A leaves.
        ("lfru", 4, "AAABBBBBCCDDE", "A"),
        # A is marked when the hand comes, loses the mark and goes behind C: B leaves, then C, then A.
        ("clock", 3, "ABCADEF", "BCA"),
        # A is marked and stays in front; the hand is past it: B leaves, then C, and not A before the hand is round.
        ("sieve", 3, "ABCADEF", "BCD"),
        # Ten slots, the small queue holds one: A is there, B to J in the main queue. A leaves for K and is remembered,
        # K (small) leaves for A, which comes to the main queue.
        ("s3fifo", 10, "ABCDEFGHIJKA", "AK"),
        # Four slots, one of them for newcomers. A leaves for E and is remembered, B for A, which goes to the main LRU.
        ("2q", 4, "ABCDEA", "AB"),
        # A, B and C come back, to the main LRU; E alone is a newcomer, no more than their part, and A leaves for F.
        ("2q", 4, "ABCDEABCF", "ABCDA"),
        # A and B were used twice and are in the second LRU; the first one's target is still 0, so C leaves.
        ("arc", 3, "ABABCD", "C"),
        # A is demanded of four in the first tenth (one step of ten): it is the popular one, the others take turns.
        ("static", 2, "ABCDEFGHIJ", "BCDEFGHI"),
        # A prefetch, a, stays; what is demanded takes turns in what is left.
        ("preloaded", 3, "aBCDBE", "BCD"),
        # The same, and nobody stays beyond its visit, not in free room either; with the visit of A nobody leaves.
        ("spent", 3, "aBCABE", "BCBE"),
        # B is used next, then A, then C never: for D, C goes; for E, D, which is never used again.
        ("belady", 3, "ABCDBAE", "CD"),
    ],
)
def test_by_hand(name: str, slots: int, story: str, leave: str) -> None:
    assert evicted(name, story, slots) == leave


def arc(capacity: int, *experts: int) -> Arc:
    """A policy with room for all of these, which were demanded and came."""
    policy = Arc(Setting(capacity=capacity))
    for expert in experts:
        policy.miss(expert, True)
        policy.admit(expert, True)
    return policy


def test_arc_remembers_no_more_than_it_has_room_for_also_where_a_batch_evicts_before_it_admits() -> None:
    # 3 and 4 are of one batch: both evict (1, all of T1, is forgotten; 2 is remembered) before either comes. Then T1
    # is full, and 2 is forgotten, too: it comes back as a stranger, to T1, behind 4.
    policy = arc(2, 1, 2)
    for expert, leaves in ((3, 1), (4, 2)):
        policy.miss(expert, True)
        policy.evict(leaves)
    policy.admit(3, True)
    policy.admit(4, True)
    policy.miss(2, True)
    policy.evict(3)
    policy.admit(2, True)
    assert list(policy.victims()) == [4, 2]


def test_arc_counts_uses_of_a_prefetched_expert_from_the_first_on() -> None:
    policy = arc(2)
    policy.admit(1, False)
    policy.use(1, 1.0)  # the first, as that which a demanded one comes by
    policy.use(1, 1.0)
    policy.admit(2, True)
    assert list(policy.victims()) == [2, 1]


def test_arc_takes_a_prefetched_expert_for_the_latest_at_its_first_use() -> None:
    policy = arc(2)
    policy.admit(1, False)
    policy.admit(2, True)
    policy.use(1, 1.0)
    assert list(policy.victims()) == [2, 1]


def test_arc_remembers_as_many_as_it_has_room_for() -> None:
    # 1 was used twice; 2 left for 3 and is remembered, one in T1 and one in B1. It comes back: the target for T1 rises
    # to the one that is there, and of T2 it is that one leaves.
    policy = arc(2, 1, 2)
    policy.use(1, 1.0)
    policy.miss(3, True)
    policy.evict(2)
    policy.admit(3, True)
    policy.miss(2, True)
    assert list(policy.victims()) == [1, 3]


def comes(policy: S3Fifo, expert: int, demanded: bool = True) -> None:
    policy.miss(expert, demanded)
    policy.admit(expert, demanded)


def newcomers_left(*experts: int) -> S3Fifo:
    """A policy with room for ten, one of them a newcomer: these came one by one, and left before the next."""
    policy = S3Fifo(Setting(capacity=10))
    for expert in experts:
        comes(policy, expert)
        policy.evict(expert)
    return policy


def test_s3fifo_remembers_as_many_newcomers_as_nine_tenths_of_its_room() -> None:
    # Ten have left, and the first of them, 0, is forgotten: it comes to the small queue, and 1 to the main one.
    policy = newcomers_left(*range(10))
    comes(policy, 1)
    comes(policy, 0)
    assert list(policy.victims()) == [0, 1]


def test_s3fifo_remembers_who_left_twice_from_the_second_time_on() -> None:
    # 0 to 8 are remembered. 0 is prefetched, which proves nothing, leaves again and is now the last; with 9, which is
    # one too many, 1 is forgotten: 1 comes to the small queue, and 0 to the main one.
    policy = newcomers_left(*range(9))
    comes(policy, 0, demanded=False)
    policy.evict(0)
    comes(policy, 9)
    policy.evict(9)
    comes(policy, 0)
    comes(policy, 1)
    assert list(policy.victims()) == [1, 0]


def test_every_policy_has_a_case_by_hand() -> None:
    ours = {mark.args[1][i][0] for mark in test_by_hand.pytestmark for i in range(len(mark.args[1]))}  # type: ignore[attr-defined]
    apart = {"random", "least-stale", "activation-aware", "gate-weight", "heat", "payback", "predictive"}
    assert ours | apart == set(EVICTION)


def test_random_evicts_everyone_equally_often() -> None:
    # 2,000 draws of one of five: each 400 times, with a standard deviation of sqrt(2000 * 0.2 * 0.8) = 18.
    counts = np.zeros(5, dtype=int)
    policy = EVICTION["random"](Setting(seed=1))
    for expert in range(5):
        policy.admit(expert, True)
    for _ in range(2000):
        victim = next(policy.victims())
        policy.evict(victim)
        policy.admit(victim, True)
        counts[victim] += 1
    assert np.abs(counts - 400).max() < 4 * 18


def test_gate_weight_evicts_the_least_weight_of_late() -> None:
    # A 0.9, B 0.1, C 0.5 each once, within a half-life of eight passes: B goes for D, then C (0.5) before D (0.6).
    weights = np.array([0.9, 0.1, 0.5, 0.6, 0.7], dtype=np.float16).reshape(5, 1, 1)
    assert evicted("gate-weight", "ABCDE", 3, weights=weights) == "BC"


def test_heat_fades_and_outlives_an_eviction() -> None:
    # Room for two. A was used twice, so B leaves for C, and C for B, which has two uses by then. D is new: of A (passes
    # 0 and 1) and B (2 and 4) A is the colder, though each was used twice.
    assert evicted("heat", "AABCBD", 2) == "BCA"


def test_pay_back_gives_no_hot_experts_room_to_a_prefetch_that_is_colder() -> None:
    # A and B were used, c never: it finds no room under "payback", and takes A's under "heat".
    assert evicted("payback", "ABc", 2) == ""
    assert evicted("heat", "ABc", 2) == "A"
    assert evicted("payback", "ABC", 2) == "A"  # what is demanded gets room


def test_least_stale_goes_back_from_the_layer_just_passed() -> None:
    # Three layers of one expert each, room for two: in a circle LRU always evicts what comes next and never hits.
    trace = tiny_trace([[[0], [0], [0]]] * 6)
    hits = {name: replay_trace(trace, "2experts", eviction=name)["hits"] for name in ("lru", "least-stale")}
    # Expert l of layer l. First pass: 0 and 1 are missed, and 2 takes the room of 1, just passed. From then on 0 hits,
    # 1 takes the room of 2, which is stale, and 2 that of 1, just passed. So one hit in every pass after the first.
    assert hits == {"lru": 0, "least-stale": 5}


def test_activation_aware_goes_by_the_sequence_in_flight() -> None:
    # Sequence 0 uses A often; sequence 1 begins and its map is empty but for its own B, C: now A is the first to go.
    sequence = np.array([0, 0, 0, 1, 1, 1])
    assert evicted("activation-aware", "AAABCD", 3, sequence=sequence) == "A"
    assert evicted("activation-aware", "AAABCD", 3) == "B"


def test_activation_aware_evicts_of_late_layers_rather_than_of_early_ones() -> None:
    # Two layers of two experts. Both of layer 0 had a token of two: (1/2 + 0.001) * 1. One of layer 1 had both, which
    # comes to less: (1 + 0.001) * 1/2.
    trace = tiny_trace([[[0], [0]], [[1], [0]]], num_experts=2)
    steps = plan_steps(trace.sequence, trace.phase)
    policy = EVICTION["activation-aware"](Setting(trace=trace, steps=steps, experts=2, layers=(0, 1), capacity=4))
    for visit, expert in enumerate((0, 2, 1, 2)):
        policy.begin(visit, visit % 2, [expert], [1.0])
        if visit < 3:
            policy.admit(expert, True)
    assert list(policy.victims()) == [2, 0, 1]


def test_predictive_keeps_whom_the_predictor_expects() -> None:
    # One layer, room for three. The oracle knows the next token's expert: at D's visit A is expected, so the least
    # recently used of the others, B, leaves.
    trace = tiny_trace([[[0]], [[1]], [[2]], [[3]], [[0]]])
    steps = plan_steps(trace.sequence, trace.phase)
    found = {}
    for guesses in (None, make_predictor("oracle", recall=1.0).guess(trace, steps, 1, 1)):
        setting = Setting(trace=trace, steps=steps, guesses=guesses)
        manager = MemoryManager([1], 4, 3, EVICTION["predictive"], setting=setting)
        found[guesses is not None] = replay(trace, steps, manager).count(FOUND)
    assert found == {False: 0, True: 1}


def test_popularity_can_be_given_with_the_trace() -> None:
    popularity = np.zeros((1, 26))
    popularity[0, 2] = 1.0  # C
    assert evicted("static", "ABCDE", 2, extra={"popularity": popularity}) == "ABD"
    with pytest.raises(
        ValueError, match=r"trace array popularity \(2,\): must be numbers \(layers, experts\) = \(1, 26\)"
    ):
        evicted("static", "AB", 2, extra={"popularity": np.zeros(2)})


@pytest.mark.parametrize(
    "name", ["belady", "static", "gate-weight", "heat", "payback", "least-stale", "activation-aware", "predictive"]
)
def test_an_informed_policy_without_a_trace_says_what_it_needs(name: str) -> None:
    with pytest.raises(ValueError, match="needs to know the trace and the steps"):
        MemoryManager([1], 4, 3, EVICTION[name])


# LRU, the reference of the others, in more detail.


def test_lru_evicts_the_expert_used_longest_ago() -> None:
    lru = Lru()
    for expert in (1, 2, 3):
        lru.admit(expert, True)
    assert list(lru.victims()) == [1, 2, 3]
    lru.use(1, 0.5)  # 1 becomes the latest
    assert list(lru.victims()) == [2, 3, 1]
    lru.use(2, 0.0)  # a use is a use, whatever its weight
    assert list(lru.victims()) == [3, 1, 2]
    lru.evict(3)
    lru.admit(4, False)  # a prefetch comes as the latest
    assert list(lru.victims()) == [1, 2, 4]


def test_lru_by_hand_through_the_memory_manager() -> None:
    # Three slots, one expert a visit. 1 2 3 fill them; 1 is found and becomes the latest; 4 evicts 2, the oldest use;
    # 2 evicts 3; 1 is still there.
    manager = MemoryManager([1], 8, 3, Lru)
    found = []
    for number, expert in enumerate([1, 2, 3, 1, 4, 2, 1, 3]):
        (wave,) = manager.visit(number, 0, [expert], [expert], [1.0])
        found.append(expert in wave.found)
        manager.unpin()
    assert found == [False, False, False, True, False, False, True, False]
    assert [manager.copy_expert[copy] for copy in manager.evicted_copies] == [2, 3, 4]
    assert sorted(manager.assigned) == [1, 2, 3]
