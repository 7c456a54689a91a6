"""What `rlhf reward train` is asked to train: from settings and data to an objective, a kind of model, and data prepared for it.

Owns which fields and data each objective takes, and what is refused. Trains nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from rlhf.config.method_checks import changed
from rlhf.config.reward_training import BaseModelSettings, FitSettings, ObjectiveSettings, RewardTrainingSettings
from rlhf.config.reward_training_flags import both
from rlhf.reward.errors import RewardError
from rlhf.reward.folders import NO_LIMIT, Description
from rlhf.reward.training import objectives
from rlhf.reward.training.dataset import PreferenceData
from rlhf.reward.training.objectives import Objective

NEEDS_RATINGS = ("squared", "ordinal", "more")
GROUP = 8
"""Rated texts that are compared with one another in training; of 8 texts there are up to 28 pairs."""
DIMENSIONS = 6
MOST_LEVELS = 50
LEAST_ROWS = 20
OPTIONS = {
    "centring": ("bradley-terry",),
    "dimensions": ("gpm",),
    "gate": ("gpm",),
    "comparisons": ("cross-encoder",),
    "weights": ("more",),
}
"""Fields of `objective` that only these objectives read."""


@dataclass(frozen=True)
class Choice:
    """What will be trained.

    Attributes:
        name: of the objective.
        head_outputs: width of the model's head.
        prepare: the training data in the form that the objective needs.
        start: what a new head's bias starts at, one number for each output; None: 0.
        thresholds: what ordinal thresholds start at.
    """

    name: str
    objective: Objective
    description: Description
    head_outputs: int
    prepare: Callable[[PreferenceData, np.random.Generator], PreferenceData]
    start: tuple[float, ...] | None = None
    thresholds: tuple[float, ...] | None = None

    @property
    def in_rating_units(self) -> bool:
        return self.name in ("squared", "more")


def weighted(objective: ObjectiveSettings, data: PreferenceData) -> PreferenceData:
    """The data with `objective.weights` for its ratings."""
    given = objective.weights
    if given is None or data.ratings is None:
        return data
    if set(given) != set(data.names):
        raise RewardError(
            f"{both('objective.weights')} names {', '.join(given)}, but the data rates {', '.join(data.names)}. Name each once."
        )
    return replace(data, weights=tuple(given[name] for name in data.names))


def check(settings: RewardTrainingSettings, data: PreferenceData, ready_made: bool) -> None:
    """Refuse what cannot work with these data, or would be ignored.

    Raises:
        RewardError: with field, option and remedy.
    """
    fit: FitSettings = settings.training
    objective, method, train = settings.objective, fit.method, settings.data.train
    if data.ratings is None and method == "ridge":
        raise RewardError(
            f"{both('training.method')}: ridge fits ratings, but {train} has pairs. Use --method logistic or --method full."
        )
    if data.n_rows < LEAST_ROWS:
        raise RewardError(
            f"{train} has {data.n_rows} rows; at least {LEAST_ROWS} are needed to train, validate and test."
        )
    margin = settings.data.margin
    if data.ratings is not None and np.nanmax(data.overall) - np.nanmin(data.overall) <= margin:
        raise RewardError(
            f"{both('data.margin')}: no two ratings of {train} are further apart than {margin:g}, so no pair could be measured. Lower it."
        )
    name = _name(objective, data, ready_made)
    for field, readers in OPTIONS.items():
        if changed(objective, field) and (method != "full" or name not in readers):
            raise RewardError(
                f"{both(f'objective.{field}')} is an option of --method full --objective {readers[0]}, and what is trained is "
                f"{name if method == 'full' else method}. Leave it out."
            )
    if method == "full":
        _check_objective(objective, data, name, train)
    elif data.ratings is not None and len(data.names) > 1:
        raise RewardError(
            f"{both('training.method')}: {method} fits one rating, but {train} has {len(data.names)}. Use --method full."
        )


def _check_objective(objective: ObjectiveSettings, data: PreferenceData, name: str, train: str) -> None:
    """
    Args:
        train: the file, for messages.
    """
    field = both("objective.name")
    if data.ratings is None and name in NEEDS_RATINGS:
        raise RewardError(f"{field}: {name} fits ratings, but {train} has pairs. Use --objective bradley-terry.")
    several = data.ratings is not None and len(data.names) > 1
    if several and name in ("squared", "ordinal"):
        raise RewardError(f"{field}: {name} fits one rating, but {train} has {len(data.names)}. Use --objective more.")
    if name == "more" and not several:
        raise RewardError(
            f"{field}: more needs several ratings, but {train} has one. Give `ratings`, or use --objective squared."
        )
    if objective.gate and (data.input != "conversation" or data.ratings is not None):
        raise RewardError(
            f"{both('objective.gate')} reads the prompt, so it needs pairs with the field `prompt`; {train} has none."
        )
    if name == "ordinal":
        levels = np.unique(data.rated)
        if (levels != np.round(levels)).any() or not 2 <= len(levels) <= MOST_LEVELS:
            raise RewardError(
                f"{field}: ordinal needs ratings that are whole numbers, 2 to {MOST_LEVELS} different ones; {train} has "
                f"{len(levels)}, such as {levels[0]:g} and {levels[-1]:g}. Use --objective squared."
            )


def choose(settings: RewardTrainingSettings, fit: PreferenceData, ready_made: bool) -> Choice:
    """What `check` has let through.

    Args:
        fit: the rows to be learned from.
        ready_made: the base is a classifier already.
    """
    objective, margin = settings.objective, settings.data.margin
    base: BaseModelSettings = settings.model
    name = _name(objective, fit, ready_made)
    plain = Description("classifier", fit.input, base.max_tokens or NO_LIMIT)

    def grouped(data: PreferenceData, rng: np.random.Generator) -> PreferenceData:
        return data.grouped(GROUP, margin, settings.run.seed)

    def as_it_is(data: PreferenceData, rng: np.random.Generator) -> PreferenceData:
        return data

    if name == "squared":
        return Choice(name, objectives.Squared(), plain, 1, as_it_is, start=(float(fit.overall.mean()),))
    if name == "bradley-terry":
        return Choice(name, objectives.BradleyTerry(objective.centring or 0.0), plain, 1, grouped)
    if name == "ordinal":
        return _ordinal(fit, plain, as_it_is)
    if name == "gpm":
        return _gpm(objective, plain, grouped)
    if name == "cross-encoder":

        def compared(data: PreferenceData, rng: np.random.Generator) -> PreferenceData:
            return data.as_comparisons(data.drawn_pairs(margin, objective.comparisons or 2 * data.n_rows, rng))

        return Choice(name, objectives.CrossEncoder(), replace(plain, task="cross_encoder"), 1, compared)
    return _more(fit, plain, as_it_is)


def _ordinal(fit: PreferenceData, plain: Description, prepare: Callable) -> Choice:
    levels, counts = np.unique(fit.rated, return_counts=True)
    above = 1 - np.cumsum(counts)[:-1] / counts.sum()
    thresholds = tuple((-np.log(above / (1 - above))).tolist())
    description = replace(plain, levels=tuple(levels.tolist()))
    objective = objectives.Ordinal(description.levels)
    return Choice("ordinal", objective, description, 1, prepare, thresholds=thresholds)


def _gpm(settings: ObjectiveSettings, plain: Description, grouped: Callable) -> Choice:
    dimensions, gate = settings.dimensions or DIMENSIONS, settings.gate
    objective = objectives.GeneralPreference(dimensions, gate)

    def prepare(data: PreferenceData, rng: np.random.Generator) -> PreferenceData:
        return data.with_prompts() if gate else grouped(data, rng)

    description = replace(plain, task="gpm", dimensions=dimensions, temperature=objectives.TEMPERATURE)
    return Choice("gpm", objective, description, objective.outputs, prepare)


def _more(fit: PreferenceData, plain: Description, prepare: Callable) -> Choice:
    start = tuple(np.nanmean(fit.rated, axis=0).tolist())
    objective = objectives.MultiObjective(len(fit.names))
    description = replace(plain, task="objectives", objectives=fit.names, weights=fit.weights)
    return Choice("more", objective, description, len(fit.names), prepare, start=start)


def _name(objective: ObjectiveSettings, data: PreferenceData, ready_made: bool) -> str:
    if objective.name != "auto":
        return objective.name
    # The head of a ready classifier has its own scale, far from that of the ratings; pairs do not ask for theirs.
    if data.ratings is None or ready_made:
        return "bradley-terry"
    return "squared" if len(data.names) == 1 else "more"
