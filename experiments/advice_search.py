"""The search of advice: Optuna's journal keeps what each setting came to, and a search goes on from it.

A trial's sampler is made for it alone, from (seed, trial number) and what the trials before came to, so that a search
that was killed proposes what an unbroken one would. A trial whose settings are refused counts as one, and says why.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from ..errors import InputError
from ..files import check_file
from .advice_goals import GOALS, Limits
from .advice_sampler import Axes, propose
from .advice_space import Space
from .grid import Point

if TYPE_CHECKING:
    import optuna

#: What settings came to: goals' figures by name; or, as InputError, why they cannot run.
Evaluate = Callable[[Point], Mapping[str, float]]
Progress = Callable[[str, int, int], None]


class AdviceError(InputError):
    """A search that cannot be made; the message says what would be right."""


@dataclass(frozen=True)
class Trial:
    """One evaluation: settings, where they lie in the space, and the figures of goals that they came to.

    `refused` says why there are none, or which limit they break; None where all is well.
    """

    number: int
    places: tuple[int, ...]
    point: Point
    figures: Mapping[str, float]
    refused: str | None

    @property
    def feasible(self) -> bool:
        """Whether the settings run and keep all limits."""
        return self.refused is None


@dataclass
class Search:
    """A search of a space for goals within limits, by `evaluate`; `seed` is its luck.

    The first trial is the scenario as it stands, as near as the space has it. What a `journal` has is not done again;
    AdviceError if it is another search's.
    """

    space: Space
    goals: Sequence[str]
    evaluate: Evaluate
    limits: Limits = field(default_factory=Limits)
    seed: int = 0
    journal: Path | None = None

    def run(self, trials: int, progress: Progress | None = None) -> list[Trial]:
        """Returns `trials` trials, in their order; those that the journal has are read there."""
        if trials < 1:
            raise AdviceError(f"trials = {trials}: must be at least 1")
        study = self._study()
        done = self._done(study)
        for number in range(len(done), min(trials, len(self.space))):
            trial = self._one(study, number, done)
            done.append(trial)
            if progress is not None:
                progress("trials", number + 1, trials)
        return done[:trials]

    @property
    def name(self) -> str:
        """What the search is called in its journal: a hash of all that it follows from."""
        said = [self.space.grid.base, self.space.grid.values, list(self.goals), str(self.limits), self.seed]
        return hashlib.sha256(orjson.dumps(said, option=orjson.OPT_SORT_KEYS, default=str)).hexdigest()[:16]

    def _study(self) -> optuna.Study:
        optuna = load_optuna()
        storage = None
        if self.journal is not None:
            check_file(self.journal)
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend

            storage = JournalStorage(JournalFileBackend(str(self.journal)))
            others = [each for each in optuna.get_all_study_names(storage) if each != self.name]
            if others:
                raise AdviceError(
                    f"{self.journal}: holds another search (other settings, goals, limits or seed): name another file"
                )
        directions = ["maximize" if GOALS[goal].more else "minimize" for goal in self.goals]
        return optuna.create_study(storage=storage, study_name=self.name, directions=directions, load_if_exists=True)

    def _done(self, study: optuna.Study) -> list[Trial]:
        """Returns the trials that have ended; one that was under way when its process died is done now."""
        optuna = load_optuna()
        done: list[Trial] = []
        for frozen in study.get_trials(deepcopy=False):
            places = tuple(int(frozen.params[key]) for key in self.space.keys)
            if frozen.state.is_finished():
                refused = frozen.user_attrs.get("refused")
                done.append(Trial(frozen.number, places, self._point(places), frozen.user_attrs["figures"], refused))
            else:
                done.append(self._told(study, optuna.Trial(study, frozen._trial_id), places))
        return done

    def _one(self, study: optuna.Study, number: int, done: Sequence[Trial]) -> Trial:
        from optuna.distributions import IntDistribution

        tried = [(trial.places, self._score(trial)) for trial in done]
        places = propose(self._axes(), tried, self.seed, number) if number else self.space.base_places()
        # The journal's study is told of it as of fixed parameters, so that Optuna's own tools can read it.
        study.enqueue_trial(dict(zip(self.space.keys, places, strict=True)))
        sizes = zip(self.space.keys, self._axes().sizes, strict=True)
        asked = study.ask({key: IntDistribution(0, size - 1) for key, size in sizes})
        return self._told(study, asked, places)

    def _axes(self) -> Axes:
        sizes = [len(values) for values in self.space.grid.values.values()]
        return Axes(sizes, [key in self.space.ordered for key in self.space.keys])

    def _told(self, study: optuna.Study, asked: optuna.Trial, places: tuple[int, ...]) -> Trial:
        """Evaluate a trial that Optuna knows of, and tell it what came of it."""
        from optuna.trial import TrialState

        trial = self._tried(asked.number, places)
        asked.set_user_attr("figures", dict(trial.figures))
        if trial.feasible:
            study.tell(asked, [trial.figures[goal] for goal in self.goals])
        else:
            asked.set_user_attr("refused", trial.refused)
            study.tell(asked, state=TrialState.FAIL)
        return trial

    def _point(self, places: tuple[int, ...]) -> Point:
        return self.space.point(dict(zip(self.space.keys, places, strict=True)))

    def _tried(self, number: int, places: tuple[int, ...]) -> Trial:
        point = self._point(places)
        try:
            figures = dict(self.evaluate(point))
        except InputError as error:
            return Trial(number, places, point, {}, " ".join(str(error).split()))
        return Trial(number, places, point, figures, self.limits.broken(figures))

    def _score(self, trial: Trial) -> tuple[float, ...] | None:
        """Returns how good each goal's figure is, as a logarithm, more being better; None where it does not count."""
        if not trial.feasible:
            return None
        return tuple(
            math.log(max(trial.figures[goal], 1e-300)) * (1 if GOALS[goal].more else -1) for goal in self.goals
        )


def load_optuna() -> Any:
    """Returns Optuna, which says only what goes wrong; AdviceError if it is not installed."""
    try:
        import optuna
    except ImportError:
        raise AdviceError("advice needs Optuna: pip install 'prestage[advise]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
