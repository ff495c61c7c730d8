"""Miss policies: what becomes of an access whose expert is absent, where it is not simply fetched.

A policy sees the absent experts of one layer visit and says which of their tokens need no copy, and why; it knows costs
and token counts but no clock, so the replay and the engine decide the same. What it does not name is fetched. To add
one: write a class with `resolve`, name it in MISS, describe it in tests/test_miss.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

#: What can become of an access whose expert is absent, by number.
WAYS = ("fetched", "cpu", "low_precision", "skipped", "deferred")
FETCHED, CPU, LOW_PRECISION, SKIPPED, DEFERRED = range(len(WAYS))
#: What the CPU computes, for this layer or the next.
BY_CPU = (CPU, DEFERRED)

#: What something takes over so many tokens at a layer, in ns: called with (layer, tokens).
Takes = Callable[[int, int], int]


@dataclass(slots=True)
class Absent:
    """An access whose expert is absent: the gate weights of the tokens that chose it, in their order."""

    expert: int
    gates: Sequence[float]


@dataclass(slots=True)
class Resolved:
    """`tokens` tokens of an access that need no copy of the expert, by one of WAYS; `gate` is their gate weight.

    Where they are all of the access's tokens (`whole`), nobody of this visit waits for the expert.
    """

    expert: int
    way: int
    tokens: int
    gate: float
    whole: bool = True


def _nothing(layer: int, tokens: int) -> int:
    return 0


@dataclass(frozen=True)
class Terms:
    """What policies go by, each by what it needs.

    `cpu_ns`: what an expert takes on the CPU, and `there_and_back_ns` its activations to the host and its result back;
    `copy_ns`: its copy to the GPU; `kernel_ns`: its kernels there. From `fetch_from` tokens of a step on nobody is
    asked, and all is fetched. `low`: the experts with a copy in low precision;
    with `fetch_behind`, what is used so is prefetched for the layer's next visit. Of each token's experts the
    `deferred` of least gate weight, if the CPU computes them, may be a layer late. An expert is uploaded behind once so
    many visits missed it (`upload_after`), at most `upload_most` of them a step, if what they save in `upload_horizon`
    steps repays the copy, and copies take no more than `upload_share` of the time that the CPU is busy.
    """

    cpu_ns: Takes = _nothing
    there_and_back_ns: Takes = _nothing
    copy_ns: Takes = _nothing
    kernel_ns: Takes = _nothing
    cpu_max_tokens: int | None = None
    fetch_from: int | None = None
    low: Collection[int] = ()
    fetch_behind: bool = False
    threshold: float = 0.0
    deferred: int = 0
    upload_after: int = 1
    upload_most: int = 1
    upload_share: float = 1.0
    upload_horizon: int = 1


class Miss:
    """What the dispatcher asks of a miss policy."""

    #: Whether it cannot do without the gate weights of a trace; whether it uses the CPU.
    needs_gates = False
    uses_cpu = False

    def __init__(self, terms: Terms) -> None:
        self.terms = terms

    def resolve(self, layer: int, absent: Sequence[Absent]) -> list[Resolved]:
        """Returns what needs no copy, in the order of the absent."""
        raise NotImplementedError

    def behind(self, step: int, layer: int, resolved: Sequence[Resolved]) -> Sequence[int]:
        """Returns the experts to copy behind a visit, for the next one of its layer, the most wanted first.

        It is asked after every visit, with what was resolved there.
        """
        return ()

    @property
    def looks_behind(self) -> bool:
        """Whether it ever has anything copied behind a visit."""
        return type(self).behind is not Miss.behind


class Fetch(Miss):
    """Copy it."""

    def resolve(self, layer: int, absent: Sequence[Absent]) -> list[Resolved]:
        """Leave all to be copied."""
        return []


class Cpu(Miss):
    """Compute it on the CPU, as llama.cpp and KTransformers do, unless more tokens chose it than `cpu_max_tokens`."""

    uses_cpu = True

    def resolve(self, layer: int, absent: Sequence[Absent]) -> list[Resolved]:
        """Send whom the CPU may have."""
        return [to_cpu(access) for access in absent if self._may_have(access)]

    def _may_have(self, access: Absent) -> bool:
        most = self.terms.cpu_max_tokens
        return most is None or len(access.gates) <= most


class Cost(Cpu):
    """Fetch it or compute it on the CPU, whichever takes less by itself, given its tokens.

    Fiddler (Kamahori et al. 2024, arXiv:2402.07033, algorithm 1): a copy costs the same whatever the tokens, the CPU
    more with each of them.
    """

    def resolve(self, layer: int, absent: Sequence[Absent]) -> list[Resolved]:
        """Send what the CPU does sooner; ties to the copy."""
        return [to_cpu(access) for access in absent if self._may_have(access) and self._sooner(layer, access)]

    def _sooner(self, layer: int, access: Absent) -> bool:
        terms, tokens = self.terms, len(access.gates)
        on_cpu_ns = terms.cpu_ns(layer, tokens) + terms.there_and_back_ns(layer, tokens)
        return on_cpu_ns < terms.copy_ns(layer, tokens) + terms.kernel_ns(layer, tokens)


class Balanced(Cpu):
    """Give each to the CPU or the link, whichever would be done with it first after what it has of this visit.

    The greedy rule of HybriMoE's hybrid scheduling (Zhong et al. 2025, arXiv:2504.05897), without its queues of other
    layers: in the order of access, both lanes begin the visit empty.
    """

    def resolve(self, layer: int, absent: Sequence[Absent]) -> list[Resolved]:
        """Deal them out; ties to the copy."""
        terms = self.terms
        link_ns = cpu_ns = 0
        sent = []
        for access in absent:
            tokens = len(access.gates)
            copied_ns = link_ns + terms.copy_ns(layer, tokens)
            computed_ns = cpu_ns + terms.cpu_ns(layer, tokens)
            back_ns = computed_ns + terms.there_and_back_ns(layer, tokens)
            if self._may_have(access) and back_ns < copied_ns + terms.kernel_ns(layer, tokens):
                cpu_ns = computed_ns
                sent.append(to_cpu(access))
            else:
                link_ns = copied_ns
        return sent


class Split(Cpu):
    """Fetch the share f = link / (link + CPU) of what is absent, and compute the rest, so that both end together.

    The q* policy of FreeToken (FlashML-org/FreeToken 0.1.2), f of the rates that both reach beside each other: of m
    experts the link has the whole number F beside f m with the smaller max(F (1 - f), (m - F) f), the first in the
    order of access. What slows both down alike leaves f as it is.
    """

    #: The CPU shares only from so many times the link's rate on.
    least_ratio = 0.0

    def resolve(self, layer: int, absent: Sequence[Absent]) -> list[Resolved]:
        """Leave the first F to the link."""
        may = [access for access in absent if self._may_have(access)]
        copy_ns, cpu_ns = self.terms.copy_ns(layer, 1), self.terms.cpu_ns(layer, 1)
        if not may or copy_ns < self.least_ratio * cpu_ns:
            return []
        return [to_cpu(access) for access in may[fetched_of(len(may), cpu_ns / max(1, cpu_ns + copy_ns)) :]]


def fetched_of(absent: int, link_share: float) -> int:
    """Returns how many of so many absent experts the link gets, of whose rates it has this share: see `Split`."""
    below = int(absent * link_share)
    pairs = [
        (max(fetched * (1 - link_share), (absent - fetched) * link_share), fetched) for fetched in (below, below + 1)
    ]
    return min(pairs)[1]


class SplitIfTwice(Split):
    """Split, but only where the CPU is at least twice as fast as the link, which is when FreeToken chooses to share.

    Measured, that is not enough: an RTX 4090 whose CPU is 2.3 times its link is faster when it fetches
    (FlashML-org/FreeToken PR 232).
    """

    least_ratio = 2.0


class CpuThenUpload(Cpu):
    """Compute it on the CPU at once, and upload it behind if it is used again: at most so many a step, if it pays.

    As engines do that keep a cache of hot experts beside the CPU's (thecodacus/llama.cpp PR 5; llama.cpp's MoE cache).
    What an upload saves is the CPU's time less the GPU's, for as many uses as the visits so far let expect; time is
    what the profile says, so that the replay decides the same.
    """

    def __init__(self, terms: Terms) -> None:
        super().__init__(terms)
        #: By expert, how many visits missed it since it was last uploaded; by layer, its visits.
        self._missed: dict[int, int] = {}
        self._visits: dict[int, int] = {}
        self._step, self._left = -1, 0
        self._cpu_ns = self._link_ns = 0

    def behind(self, step: int, layer: int, resolved: Sequence[Resolved]) -> Sequence[int]:
        """Upload what pays, in the order of access."""
        terms = self.terms
        if step != self._step:
            self._step, self._left = step, terms.upload_most
        self._visits[layer] = self._visits.get(layer, 0) + 1
        chosen = []
        for access in resolved:
            self._missed[access.expert] = self._missed.get(access.expert, 0) + 1
            self._cpu_ns += self._on_cpu_ns(layer, access.tokens)
            if self._left > 0 and self._admits(layer, access):
                chosen.append(access.expert)
                self._left -= 1
                self._link_ns += terms.copy_ns(layer, access.tokens)
                del self._missed[access.expert]
        return chosen

    def _on_cpu_ns(self, layer: int, tokens: int) -> int:
        return self.terms.cpu_ns(layer, tokens) + self.terms.there_and_back_ns(layer, tokens)

    def _admits(self, layer: int, access: Resolved) -> bool:
        """Whether an expert that was just missed is worth its copy, and the link has time for it."""
        terms, missed = self.terms, self._missed[access.expert]
        copy_ns = terms.copy_ns(layer, access.tokens)
        saved_ns = self._on_cpu_ns(layer, access.tokens) - terms.kernel_ns(layer, access.tokens)
        expected = missed / self._visits[layer] * terms.upload_horizon
        in_time = self._link_ns + copy_ns <= terms.upload_share * self._cpu_ns
        return missed >= terms.upload_after and expected * saved_ns > copy_ns and in_time


class LowPrecision(Miss):
    """Use the expert's copy in low precision, if it has one in GPU memory.

    After HOBBIT (Tang et al. 2024, arXiv:2411.01433), which loads the low-precision version when an unimportant expert
    misses; here it is there already, so nothing waits.
    """

    def resolve(self, layer: int, absent: Sequence[Absent]) -> list[Resolved]:
        """Use all low-precision copies there are."""
        low = self.terms.low
        return [
            Resolved(access.expert, LOW_PRECISION, len(access.gates), sum(access.gates))
            for access in absent
            if access.expert in low
        ]

    def behind(self, step: int, layer: int, resolved: Sequence[Resolved]) -> Sequence[int]:
        """Copy what was used so, if that is wanted."""
        return [access.expert for access in resolved] if self.terms.fetch_behind else ()


class Skip(Miss):
    """Leave it out for the tokens whose gate weight is under the threshold; the others need it fetched.

    As the score-based skipping of AdapMoE (Zhong et al. 2024, arXiv:2408.10284) and "Not all experts are equal" (Lu et
    al. 2024, arXiv:2402.14800), but of absent experts only.
    """

    needs_gates = True

    def resolve(self, layer: int, absent: Sequence[Absent]) -> list[Resolved]:
        """Skip token by token."""
        skipped = []
        for access in absent:
            small = [gate for gate in access.gates if gate < self.terms.threshold]
            if small:
                whole = len(small) == len(access.gates)
                skipped.append(Resolved(access.expert, SKIPPED, len(small), sum(small), whole))
        return skipped


def to_cpu(access: Absent) -> Resolved:
    """Returns that the CPU computes all of an access."""
    return Resolved(access.expert, CPU, len(access.gates), sum(access.gates))


def defer(resolved: Sequence[Resolved], at_once: Collection[int]) -> None:
    """Put off to the next layer what the CPU computes, but for the experts that are wanted at once.

    The expert deferral of KTransformers (Chen et al. 2025, SOSP, doi:10.1145/3731569.3764843; kt-kernel's
    `select_deferred_experts`): an expert is wanted at once if any token has it among its best, experts on the GPU
    counted too; the others' results are added to the next layer's. The last layer puts off nothing.
    """
    for access in resolved:
        if access.way == CPU and access.expert not in at_once:
            access.way = DEFERRED


#: By the names that a scenario uses.
MISS: dict[str, Callable[[Terms], Miss]] = {
    "fetch": Fetch,
    "cpu": Cpu,
    "cost": Cost,
    "balanced": Balanced,
    "split": Split,
    "split-if-twice": SplitIfTwice,
    "cpu-then-upload": CpuThenUpload,
    "low_precision": LowPrecision,
    "skip": Skip,
}
