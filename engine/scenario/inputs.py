"""What a scenario names, loaded and checked: what every run, baseline and warning starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ...resources.links import Links
from ...resources.profile import Profile
from ...resources.runtime import DEFAULT, Runtime, load_runtime
from ...workloads.batches import Step, columns_of
from ...workloads.guesses import Guesses
from ...workloads.model import Model
from ...workloads.requests.replicas import Turns
from ...workloads.requests.request import StepSource
from ...workloads.trace import RoutingTrace
from ..decide.expert_parallel import ExpertParallel
from ..decide.pulled import Pulled
from .predicting import FREE, PredictorCost
from .scenario import Scenario


@dataclass(frozen=True)
class Pulls:
    """A scheduler that makes the steps of a run as it goes: `source` makes a fresh one for each run.

    No step has more than `most_tokens` tokens, and the host takes `schedule_ns` to make one. KV caches take `kv_bytes`
    of GPU memory at most. `budget_of` says the expert budget before each step, `least_bytes` or more, where that moves.
    """

    source: Callable[[], StepSource]
    most_tokens: int
    schedule_ns: int = 0
    kv_bytes: int = 0
    budget_of: Callable[[Step], int] | None = None
    least_bytes: int | None = None
    #: How many requests of a trace are left out, as they were given no token.
    failed: int = 0
    #: Of several replicas: makes a fresh source for each of them, and what lets them run in turns.
    replicas: Callable[[], tuple[Turns, Sequence[StepSource]]] | None = None


@dataclass(frozen=True)
class Rerouted:
    """What routing that knows the cache made of a trace: of so many choices, how many are of another expert.

    `gate_before` is the gate weight of what the router chose, `gate_after` of what was used.
    """

    choices: int
    changed: int
    gate_before: float
    gate_after: float


@dataclass(frozen=True)
class Inputs:
    """What a scenario names, loaded and checked: it can be run as it is, any number of times."""

    scenario: Scenario
    model: Model
    profile: Profile
    trace: RoutingTrace
    steps: list[Step]
    budget_bytes: int
    guesses: Guesses | None
    #: The expert budget before each step, where the KV cache takes its part of a total; None where it is constant.
    budgets: list[int] | None = None
    predictor: PredictorCost = FREE
    #: Which GPU runs it, and the model's first layer there: `model` and `trace` have its layers only, from 0.
    device: str = "gpu0"
    first_layer: int = 0
    #: The inputs of each stage of a pipeline, in order, and the links between their GPUs, None for one stage.
    stages: tuple[Inputs, ...] = ()
    links: Links | None = None
    #: The inputs of each of the GPUs that share the experts of all layers, in order, and how the experts lie on them.
    gpus: tuple[Inputs, ...] = ()
    expert_parallel: ExpertParallel | None = None
    #: Where a scheduler makes the steps: how, and, of a run that has begun, those that it has pulled: its `steps`.
    pulls: Pulls | None = None
    pulled: Pulled | None = None
    #: Of a run of several replicas that has begun: the inputs of each, and what lets them run in turns.
    replicas: tuple[Inputs, ...] = ()
    turns: Turns | None = None
    #: Of a run that was executed: what its miss policy went by then, in place of this profile and scenario.
    decides_by: Inputs | None = None
    #: What routing that knows the cache made of the trace, which is then of what was used; None where it knows nothing.
    rerouted: Rerouted | None = None
    #: The software that is predicted.
    runtime: Runtime = field(default_factory=lambda: load_runtime(DEFAULT))

    @property
    def parts(self) -> tuple[Inputs, ...]:
        """The inputs of each GPU by itself: of stages, of those that share the experts, of replicas, or these."""
        return self.stages or self.gpus or self.replicas or (self,)

    @property
    def gpu_number(self) -> int:
        """Which GPU runs it, as a number."""
        return int(self.device.removeprefix("gpu"))

    def begun(self) -> Inputs:
        """Returns the inputs of one run: where a scheduler makes the steps, with a fresh one and no step yet."""
        pulls = self.pulls
        if pulls is None:
            return self
        if pulls.replicas is None:
            return self._pulling(pulls.source())
        turns, sources = pulls.replicas()
        replicas = [
            replace(self._pulling(source), device=f"gpu{number}", turns=turns) for number, source in enumerate(sources)
        ]
        return replace(self, replicas=tuple(replicas))

    def _pulling(self, source: StepSource) -> Inputs:
        """Returns these inputs with steps that a source makes, none yet."""
        pulls = self.pulls
        assert pulls is not None
        pulled = Pulled(source, pulls.most_tokens, pulls.schedule_ns, pulls.budget_of)
        return replace(self, steps=pulled.steps, budgets=pulled.budgets, pulled=pulled)

    @property
    def most_tokens(self) -> int:
        """The most tokens that a step has."""
        if self.pulls is not None:
            return self.pulls.most_tokens
        return columns_of(self.steps).most_rows

    @property
    def guessers(self) -> tuple[Inputs, ...]:
        """The inputs that have the run's guesses, each of them once."""
        return self.stages or (self,)

    @property
    def layer_visits(self) -> int:
        """How many layer visits a run has."""
        return len(self.steps) * self.trace.layers
