"""What advice is for, and within what: figures of a run, as goals to reach and limits to keep.

A goal is a figure of a request from its arrival to its last token, so the prompt counts as far as it is long. To add
one: write a function of a `Reading`, name it in GOALS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engine.loading.capacity import NOT_GIVEN, gpu_parts
from ..engine.measure.merge import step_metrics
from ..engine.measure.recording import Recording
from ..engine.measure.speed import Serving
from ..engine.prediction import middles
from ..engine.scenario.amounts import AMOUNT, ScenarioError, parse_bytes
from ..engine.scenario.inputs import Inputs
from ..words import unknown_name
from .advice_space import Request


@dataclass(frozen=True)
class Reading:
    """What a run came to: its figures by name (of percentiles, the middle one), and what the request is.

    `goodput` is of requests under load, in requests a second; None without them. `memory_bytes` is what lies in GPU
    memory at most.
    """

    figures: Mapping[str, Any]
    request: Request | None
    price_per_hour: float | None = None
    goodput: float | None = None
    memory_bytes: int = 0

    @property
    def ttft_ms(self) -> float:
        """Time to the first token; ScenarioError where no request has one."""
        return self._known(
            "time_to_first_token_ms", "no request's first token: give prompts, or another goal than ttft"
        )

    @property
    def token_ms(self) -> float:
        """Time of one token of an answer."""
        return 1e3 / self.tokens_per_second

    @property
    def tokens_per_second(self) -> float:
        """Tokens of answers a second, once prompts are done; ScenarioError where no answer has any."""
        return self._known("tokens_per_second", "no token of an answer: let more tokens run (workload.tokens)")

    def _known(self, name: str, lacks: str) -> float:
        value = self.figures[name]
        if value is None:
            raise ScenarioError(f"the run has {lacks}")
        return float(value)


def tokens_per_second(reading: Reading) -> float:
    """Returns tokens of answers a second over the whole of a request, its prompt included."""
    request = reading.request
    if request is None:
        return float(reading.figures.get("sustained_tokens_per_second") or reading.tokens_per_second)
    # The first token of an answer comes with the prompt.
    return request.output / (reading.ttft_ms + (request.output - 1) * reading.token_ms) * 1e3


def ttft_ms(reading: Reading) -> float:
    """Returns the time to the first token, in ms."""
    return reading.ttft_ms


def decode(reading: Reading) -> float:
    """Returns tokens a second once the prompt is done."""
    return 1e3 / reading.token_ms


def goodput(reading: Reading) -> float:
    """Returns requests a second that had all that was promised to them."""
    return reading.goodput or 0.0


def cost(reading: Reading) -> float:
    """Returns what a million tokens of answers cost at the machine's price an hour."""
    return (reading.price_per_hour or 0.0) / 3600 / tokens_per_second(reading) * 1e6


def memory(reading: Reading) -> float:
    """Returns how much of the GPUs' memory is used, in GiB."""
    return reading.memory_bytes / 2**30


@dataclass(frozen=True)
class Goal:
    """One goal: its figure, whether more of it is better, and its unit."""

    figure: Callable[[Reading], float]
    more: bool
    unit: str

    def better(self, value: float, other: float) -> bool:
        """Whether a value is better than another."""
        return value > other if self.more else value < other

    def gain(self, value: float, other: float) -> float:
        """Returns how many times as good a value is as another; infinitely, where the worse one is nothing at all."""
        above, below = (value, other) if self.more else (other, value)
        if below == 0:  # as goodput is where no request has what was promised
            return 1.0 if above == 0 else math.inf
        return above / below


#: By the names that --goal takes.
GOALS: dict[str, Goal] = {
    "tokens_per_second": Goal(tokens_per_second, True, "tokens/s"),
    "decode": Goal(decode, True, "tokens/s"),
    "ttft": Goal(ttft_ms, False, "ms"),
    "goodput": Goal(goodput, True, "requests/s"),
    "cost": Goal(cost, False, "per million tokens"),
    "memory": Goal(memory, False, "GiB"),
}


@dataclass(frozen=True)
class Limits:
    """What must be kept: bytes of the GPU's memory, and goals' figures at most (`at_most`) or at least (`at_least`)."""

    memory: str | None = None
    at_most: Mapping[str, float] = field(default_factory=dict)
    at_least: Mapping[str, float] = field(default_factory=dict)

    def broken(self, figures: Mapping[str, float]) -> str | None:
        """Returns which limit some figures break, in words; None where they keep all."""
        for name, most in self.at_most.items():
            if figures[name] > most:
                return f"{name} = {figures[name]:.4g} {GOALS[name].unit}, over {most:g}"
        for name, least in self.at_least.items():
            if figures[name] < least:
                return f"{name} = {figures[name]:.4g} {GOALS[name].unit}, under {least:g}"
        return None

    @property
    def names(self) -> list[str]:
        """The goals whose figures are limited."""
        return [*self.at_most, *self.at_least]


def check_goals(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the names of goals, each once; ScenarioError for one that there is not."""
    chosen = tuple(dict.fromkeys(names)) or ("tokens_per_second",)
    for name in chosen:
        if name not in GOALS:
            raise ScenarioError(unknown_name("goal", name, GOALS))
    return chosen


def parse_limits(options: Iterable[str]) -> Limits:
    """Returns the limits of `memory=20GiB`, `ttft=500` and the like: goals to be small at most, others at least.

    Raises ScenarioError.
    """
    memory: str | None = None
    at_most: dict[str, float] = {}
    at_least: dict[str, float] = {}
    for option in options:
        name, _, text = (part.strip() for part in option.partition("="))
        if name == "memory":
            if not text.endswith("%") and AMOUNT.fullmatch(text) is None:
                raise ScenarioError(f"--within memory={text}: write bytes as '24GiB', or a share of the GPU's as '90%'")
            memory = text if text.endswith("%") else f"{parse_bytes(text)}B"
            continue
        if name not in GOALS:
            raise ScenarioError(unknown_name("--within", name, [*GOALS]))
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise ScenarioError(f"--within {option!r}: write a number of {GOALS[name].unit} above 0: {name}=500")
        (at_least if GOALS[name].more else at_most)[name] = value
    return Limits(memory, at_most, at_least)


def read_run(recordings: Sequence[Recording], serving: Serving) -> dict[str, Any]:
    """Returns the figures of speed of a run's recordings, by name."""
    return middles(step_metrics(recordings, serving))


def used_bytes(inputs: Inputs) -> int:
    """Returns what lies in all GPUs' memories when they are fullest, without what of a total is left over."""
    return sum(size for part in inputs.parts for name, size in gpu_parts(part).items() if name != NOT_GIVEN)
