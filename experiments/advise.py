"""Advice: the settings of a runtime that do best on a machine, what they gain, how sure that is, and what would help.

The story: search the runtime's space, undo what changes nothing, set the best beside the scenario as it stands under
the same draws of all costs, and say no where the gain is within the scatter of runs or hangs on a cost that nobody
measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..engine.costs.costs import part_costs
from ..engine.load import load_inputs
from ..engine.measure.recording import Recording
from ..engine.measure.request_metrics import level_of
from ..engine.prediction import Range
from ..engine.run import prepared, run_all
from ..engine.scenario.amounts import ScenarioError
from ..engine.scenario.inputs import Inputs
from ..engine.scenario.scenario import Scenario
from ..engine.simulate import serving_of, simulate_inputs
from ..engine.timing.ready import make_ready
from ..errors import InputError
from ..resources.profile import Profile
from .advice_goals import GOALS, Goal, Limits, Reading, check_goals, parse_limits, read_run, used_bytes
from .advice_result import Advised, best_trial
from .advice_search import Progress, Search, Trial
from .advice_space import Request, Space, make_space, parse_over
from .advice_sure import NOISE, Pair, deciding_costs, drawn_gains
from .advice_upgrades import UPGRADES
from .grid import Point

#: So many evaluations, unless it is said otherwise.
TRIALS = 60
#: Less than this share of the best figure is given up to leave a key as it was.
_INDIFFERENT = 0.002


@dataclass(frozen=True)
class Evaluator:
    """Runs settings of a space and reads goals' figures off; on another machine with a `profile`."""

    space: Space
    names: Sequence[str]
    price_per_hour: float | None = None
    profile: Profile | None = None

    def __call__(self, point: Point) -> dict[str, float]:
        """Returns the figures of goals that settings come to; InputError if they cannot run."""
        return self.figures(self.space.scenario(point))

    def figures(self, scenario: Scenario) -> dict[str, float]:
        """Returns the figures of goals that a scenario comes to; InputError if it cannot run."""
        inputs = load_inputs(scenario, profile=self.profile)
        if inputs.pulls is not None:
            return self._under_load(inputs)
        recordings = run_all(inputs, prepared(inputs, part_costs(inputs)))
        return self.of_run(inputs, recordings)

    def of_run(self, inputs: Inputs, recordings: list[Recording]) -> dict[str, float]:
        """Returns the figures of goals that recordings came to."""
        speed = read_run(recordings, serving_of(inputs))
        reading = Reading(speed, self.space.request, self.price_per_hour, memory_bytes=used_bytes(inputs))
        return {name: GOALS[name].figure(reading) for name in self.names}

    def _under_load(self, inputs: Inputs) -> dict[str, float]:
        data = simulate_inputs(inputs, baselines=False).data
        served = data["requests"]
        speed = {
            "tokens_per_second": data["tokens_per_second"],
            "sustained_tokens_per_second": served["output_tokens_per_second"],
            "time_to_first_token_ms": served["ttft_ms"]["p50"],
        }
        promised = served["goodput"]
        met = None if promised is None else float(promised["requests_per_second"])
        reading = Reading(speed, None, self.price_per_hour, met, used_bytes(inputs))
        return {name: GOALS[name].figure(reading) for name in self.names}


def advise(
    scenario: str | Path | None = None,
    *,
    settings: Iterable[str] = (),
    goal: str | Sequence[str] = "tokens_per_second",
    within: Iterable[str] = (),
    over: Iterable[str] | Mapping[str, list[Any]] | None = None,
    prompt: int | None = None,
    output: int | None = None,
    trials: int = TRIALS,
    seed: int = 0,
    price: float | None = None,
    journal: str | Path | None = None,
    progress: Progress | None = None,
) -> Advised:
    """Search the settings of a scenario's runtime for the best ones, and say what they gain and how sure that is.

    `goal` is one of GOALS, or several; `within` are limits, "memory=20GiB", "ttft=500"; `over` values by key, or
    "key=first..last" and "key=value,value", in place of what the runtime's file lists. `prompt` and `output` are the
    lengths of a request in tokens, where the scenario has no trace and no [requests]. `price` an hour is for the goal
    "cost". A search in a `journal` goes on where it was. Raises InputError.
    """
    goals = check_goals([goal] if isinstance(goal, str) else goal)
    limits = parse_limits(within)
    values = over if over is None or isinstance(over, Mapping) else parse_over(over) or None
    lengths = {name: value for name, value in (("prompt", prompt), ("output", output)) if value is not None}
    request = Request(**lengths) if lengths else None
    space = make_space(scenario, settings, over=values, request=request, total_bytes=limits.memory)
    _check_needs([*goals, *limits.names], space, price)
    evaluator = Evaluator(space, list(dict.fromkeys([*goals, *limits.names, "memory"])), price)
    search = Search(space, goals, evaluator, limits, seed, None if journal is None else Path(journal))
    asked = _Asked(evaluator, limits, goals, max(1, trials // 3), progress)
    make_ready(progress)  # a trial is short, but trials, upgrades and draws are many
    return asked.advised(search.run(trials, progress))


def _check_needs(names: Iterable[str], space: Space, price: float | None) -> None:
    """Refuse goals that lack what they are made of."""
    if "cost" in names and price is None:
        raise ScenarioError("goal cost: what does the machine cost an hour? Give price (--price)")
    if price is not None and not 0 < price < math.inf:
        raise ScenarioError(f"price = {price:g}: must be what an hour costs, above 0")
    requests = space.base().requests
    if "goodput" in names and (requests is None or not level_of(requests.slo).limits()):
        raise ScenarioError("goal goodput: is of requests under load: give a scenario with [requests] and its slo")


@dataclass(frozen=True)
class _Asked:
    """What advice is asked for; `more` trials go into what each upgrade would give."""

    evaluator: Evaluator
    limits: Limits
    goals: Sequence[str]
    more: int
    progress: Progress | None

    @property
    def goal(self) -> Goal:
        """The first goal, which decides."""
        return GOALS[self.goals[0]]

    def advised(self, trials: list[Trial]) -> Advised:
        """Returns the advice that trials come to."""
        space = self.evaluator.space
        base, refused = self._as_it_stands()
        best = best_trial(trials, self.goals[0])
        if best is None:
            why = f"no setting of {len(trials)} runs within the limits: {trials[0].refused}"
            return Advised(space, self.goals, trials, "none", why, base=base, base_refused=refused)
        settings, figures = self._without_idle_changes(best, base)
        known = Advised(
            space, self.goals, trials, "recommend", "", settings, figures, base, refused,
            binds=_binds(load_inputs(space.scenario(settings))), upgrades=self._upgrades(settings, figures),
        )  # fmt: skip
        return self._weighed(known)

    def _as_it_stands(self) -> tuple[dict[str, float] | None, str | None]:
        """Returns the figures of the scenario that is to be bettered, or why it cannot run or breaks a limit."""
        try:
            base = self.evaluator.figures(self.evaluator.space.base())
        except InputError as error:
            return None, " ".join(str(error).split())
        broken = self.limits.broken(base)
        return (base, None) if broken is None else (None, broken)

    def _without_idle_changes(self, best: Trial, base: Mapping[str, float] | None) -> tuple[Point, Mapping[str, float]]:
        """Returns the best settings with every key as it was that gains next to nothing, and their figures."""
        settings, figures, name = dict(best.point), best.figures, self.goals[0]
        for key in best.point if base is not None else ():
            fewer = {other: value for other, value in settings.items() if other != key}
            try:
                again = self.evaluator(fewer)
            except InputError:
                continue
            if not self.limits.broken(again) and self.goal.gain(again[name], best.figures[name]) >= 1 - _INDIFFERENT:
                settings, figures = fewer, again
        return settings, figures

    def _weighed(self, known: Advised) -> Advised:
        """Returns advice with its gain and verdict."""
        if known.base is None:
            return replace(known, why=f"the scenario as it stands will not do: {known.base_refused}")
        name, goal, space = self.goals[0], self.goal, known.space
        gain = goal.gain(known.figures[name], known.base[name])
        found = replace(known, gain=Range(gain, gain, gain) if gain < math.inf else None)
        noise = NOISE[space.base().dispatch.mode]
        if gain <= 1 + noise:
            why = f"the best of {len(known.trials)} trials gains {gain - 1:+.1%}, and runs scatter by {noise:.0%}"
            return replace(found, verdict="keep", why=why, settings={}, figures=known.base)
        ours, theirs = (load_inputs(each) for each in (space.scenario(known.settings), space.base()))
        if ours.pulls is not None:
            now = f"{known.figures[name]:.4g} {goal.unit}, and none as it stands"
            by = f"{gain - 1:+.0%}" if gain < math.inf else now
            return replace(found, why=f"{by} under load, costs as they stand")
        return self._sure(found, Pair(self.evaluator.of_run, ours, theirs, goal, name))

    def _sure(self, known: Advised, pair: Pair) -> Advised:
        """Returns advice with the range of its gain, and no recommendation where that hangs on what nobody knows."""
        gain = drawn_gains(pair)
        known = replace(known, gain=gain)
        if gain.p5 > 1:
            return replace(known, why=f"better by {gain.p50 - 1:.0%}, whatever costs may be (p5 {gain.p5 - 1:+.0%})")
        deciding = deciding_costs(pair)
        if not deciding:
            why = f"p5 to p95 of its gain are {gain.p5:.2f} to {gain.p95:.2f}, by several costs together"
            return replace(known, verdict="keep", why=why)
        first = deciding[0]
        ends = f"{first.least:.2f} to {first.most:.2f} times as good"
        verdict = "keep" if first.source in ("measured", "fitted") else "measure"
        why = f"{first.cost} ({first.source}) decides, {ends}: {first.measure}"
        return replace(known, verdict=verdict, why=why, deciding=deciding)

    def _upgrades(self, settings: Point, figures: Mapping[str, float]) -> dict[str, float]:
        """Returns how many times as good each upgrade would be, its settings searched anew."""
        name, space = self.goals[0], self.evaluator.space
        profile, found = load_inputs(space.scenario(settings)).profile, {}
        for number, (what, upgraded) in enumerate(UPGRADES.items(), start=1):
            bought = upgraded(profile)
            if bought is None:
                continue
            with_it = replace(self.evaluator, profile=bought)
            values = [with_it(settings)[name]]
            trial = best_trial(Search(space, [name], with_it, self.limits, number).run(self.more), name)
            values += [trial.figures[name]] if trial is not None else []
            found[what] = max(self.goal.gain(value, figures[name]) for value in values)
            if self.progress is not None:
                self.progress("upgrades", number, len(UPGRADES))
        return found


def _binds(inputs: Inputs) -> dict[str, float]:
    """Returns the shares of the makespan by what it is spent on: GPU, link, CPU, host, predictor, other GPUs."""
    result = simulate_inputs(inputs, baselines=False)
    data = result.data
    time, whole = data["time"], data["makespan_ms"]
    cpu = data.get("miss", {}).get("cpu", {}).get("stall_ms", 0.0)
    parts = {
        "GPU": time["compute_ms"],
        "CPU": cpu,
        "link": max(0.0, time["stall_ms"] - cpu),
        "host": time["host_ms"],
        "predictor": time["predictor_ms"],
        "other GPUs": time["bubble_ms"] + time["drain_ms"],
    }
    return {name: ms / whole for name, ms in sorted(parts.items(), key=lambda part: -part[1]) if ms > 0}
