"""The result of advice: the settings, what they gain, and the trials behind it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engine.prediction import Range
from .advice_goals import GOALS
from .advice_search import Trial
from .advice_space import Space
from .advice_sure import Deciding
from .grid import Point


@dataclass(frozen=True)
class Advised:
    """What advice comes to.

    `verdict` is "recommend", "keep" (no setting is surely better than the scenario as it stands), "measure" (that hangs
    on a cost that nobody measured) or "none" (nothing runs); `why` says so in words. `figures` are the best `settings`'
    and `base` those of the scenario as it stands (None: it will not do, as `base_refused` says), `gain` how many times
    as good, `binds` the shares of the time by what it is spent on, `upgrades` how many times as good the machine would
    be with twice of a part. Figures are by goal, each in its unit.
    """

    space: Space
    goals: Sequence[str]
    trials: Sequence[Trial]
    verdict: str
    why: str
    settings: Point = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    base: Mapping[str, float] | None = None
    base_refused: str | None = None
    gain: Range | None = None
    deciding: Sequence[Deciding] = ()
    binds: Mapping[str, float] = field(default_factory=dict)
    upgrades: Mapping[str, float] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The runtime's own command line with the settings; nothing where its file knows none."""
        advice, base = self.space.runtime.advice, self.space.base_values()
        settings = {**base, **self.settings}
        return advice.command_line(settings, self.space.model.experts) if advice.command else ""

    @property
    def front(self) -> list[Trial]:
        """The trials that no other is as good as in every goal, best by the first first; of one goal, and memory."""
        return front(self.trials, self.goals if len(self.goals) > 1 else [*self.goals, "memory"])

    @property
    def data(self) -> dict[str, Any]:
        """All of it as plain data for JSON."""
        request = self.space.request
        return {
            "verdict": self.verdict,
            "why": self.why,
            "settings": dict(self.settings),
            "command": self.command,
            "goals": list(self.goals),
            "figures": dict(self.figures),
            "units": {name: goal.unit for name, goal in GOALS.items()},
            "base": None if self.base is None else dict(self.base),
            "base_refused": self.base_refused,
            "gain": None if self.gain is None else self.gain._asdict(),
            "deciding": [each._asdict() for each in self.deciding],
            "binds": dict(self.binds),
            "upgrades": dict(self.upgrades),
            "front": [_said(trial) for trial in self.front],
            "tried": [_said(trial) for trial in self.trials if trial.feasible],
            "trials": len(self.trials),
            "infeasible": sum(not trial.feasible for trial in self.trials),
            "space": len(self.space),
            "runtime": self.space.runtime.name,
            "request": None if request is None else {"prompt": request.prompt, "output": request.output},
        }


def best_trial(trials: Iterable[Trial], goal: str) -> Trial | None:
    """Returns the best trial by a goal, the first of equal ones; None where none is feasible."""
    best: Trial | None = None
    for trial in trials:
        if trial.feasible and (best is None or GOALS[goal].better(trial.figures[goal], best.figures[goal])):
            best = trial
    return best


def front(trials: Iterable[Trial], goals: Sequence[str]) -> list[Trial]:
    """Returns the trials that no other dominates, best by the first goal first; of equal ones the first."""
    kept: list[Trial] = []
    for trial in trials:
        if trial.feasible and not any(_dominates(other, trial, goals) for other in kept):
            kept = [other for other in kept if not _dominates(trial, other, goals)] + [trial]
    return sorted(kept, key=lambda trial: trial.figures[goals[0]], reverse=GOALS[goals[0]].more)


def _dominates(one: Trial, other: Trial, goals: Sequence[str]) -> bool:
    """Whether a trial is at least as good as another in all goals."""
    return not any(GOALS[name].better(other.figures[name], one.figures[name]) for name in goals)


def _said(trial: Trial) -> dict[str, Any]:
    return {"settings": trial.point, "figures": dict(trial.figures)}
