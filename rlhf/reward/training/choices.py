"""What `rlhf reward train` is asked to train: from options and data to an objective, a kind of model, and data prepared for it.

Owns which objectives there are, which options and data each takes, and what is refused. Trains nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from rlhf.config.arguments import count, real, whole
from rlhf.reward.errors import RewardError
from rlhf.reward.folders import NO_LIMIT, Description
from rlhf.reward.training import objectives
from rlhf.reward.training.dataset import PreferenceData
from rlhf.reward.training.objectives import Objective

NAMES = ("squared", "bradley-terry", "ordinal", "gpm", "cross-encoder", "more")
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
"""Options that only these objectives read."""


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that choose an objective."""
    parser.add_argument(
        "--objective",
        choices=("auto", *NAMES),
        default="auto",
        help="loss of --method full; auto: squared error for ratings, more for several, Bradley-Terry for pairs and classifiers",
    )
    parser.add_argument(
        "--centring",
        type=real(0),
        metavar="C",
        help="of bradley-terry: adds C (r_w + r_l)^2, such as 0.01 (default: 0)",
    )
    parser.add_argument(
        "--dimensions", type=whole(2), metavar="2K", help=f"of gpm: of the embedding (default: {DIMENSIONS})"
    )
    parser.add_argument(
        "--gate", action="store_true", default=None, help="of gpm: the prompt weighs the parts of the embedding"
    )
    parser.add_argument(
        "--comparisons",
        type=count,
        metavar="N",
        help="of cross-encoder: pairs drawn, at most (default: two for each row)",
    )
    parser.add_argument(
        "--weights", nargs="+", metavar="NAME=W", help="of several ratings in the reward (default: the mean)"
    )


def weighted(args: argparse.Namespace, data: PreferenceData) -> PreferenceData:
    """The data with `--weights` for its ratings."""
    if args.weights is None or data.ratings is None:
        return data
    given: dict[str, float] = {}
    for item in args.weights:
        name, _, number = item.partition("=")
        try:
            given[name] = real()(number)
        except argparse.ArgumentTypeError as error:
            raise RewardError(f"--weights {item}: {error}. Write NAME=NUMBER, such as helpfulness=0.7.") from None
    if set(given) != set(data.names):
        raise RewardError(
            f"--weights names {', '.join(given)}, but the data rates {', '.join(data.names)}. Name each once."
        )
    return replace(data, weights=tuple(given[name] for name in data.names))


def check(args: argparse.Namespace, data: PreferenceData, ready_made: bool) -> None:
    """Refuse what cannot work or would be ignored.

    Raises:
        RewardError: with the option and the remedy.
    """
    if data.ratings is None and args.method == "ridge":
        raise RewardError(
            f"--method ridge fits ratings, but {args.train} has pairs. Use --method logistic or --method full."
        )
    if data.n_rows < LEAST_ROWS:
        raise RewardError(
            f"{args.train} has {data.n_rows} rows; at least {LEAST_ROWS} are needed to train, validate and test."
        )
    if data.ratings is not None and np.nanmax(data.overall) - np.nanmin(data.overall) <= args.margin:
        raise RewardError(
            f"--margin {args.margin:g}: no two ratings of {args.train} are further apart, so no pair could be measured. Lower it."
        )
    if args.method != "full" and args.objective != "auto":
        raise RewardError(
            f"--objective {args.objective} is for --method full; {args.method} has its own. Leave one of them out."
        )
    name = _name(args, data, ready_made)
    for option, readers in OPTIONS.items():
        if getattr(args, option) is not None and (args.method != "full" or name not in readers):
            raise RewardError(
                f"--{option} is an option of --method full --objective {readers[0]}, and what is trained is "
                f"{name if args.method == 'full' else args.method}. Leave it out."
            )
    if args.method == "full":
        _check_objective(args, data, name)
    elif data.ratings is not None and len(data.names) > 1:
        raise RewardError(
            f"--method {args.method} fits one rating, but {args.train} has {len(data.names)}. Use --method full."
        )


def _check_objective(args: argparse.Namespace, data: PreferenceData, name: str) -> None:
    if data.ratings is None and name in NEEDS_RATINGS:
        raise RewardError(
            f"--objective {name} fits ratings, but {args.train} has pairs. Use --objective bradley-terry."
        )
    several = data.ratings is not None and len(data.names) > 1
    if several and name in ("squared", "ordinal"):
        raise RewardError(
            f"--objective {name} fits one rating, but {args.train} has {len(data.names)}. Use --objective more."
        )
    if name == "more" and not several:
        raise RewardError(
            f"--objective more needs several ratings, but {args.train} has one. Give `ratings`, or use --objective squared."
        )
    if args.dimensions is not None and args.dimensions % 2:
        raise RewardError(f"--dimensions must be even, not {args.dimensions}: a GPM's space is made of planes.")
    if args.gate and (data.input != "conversation" or data.ratings is not None):
        raise RewardError(f"--gate reads the prompt, so it needs pairs with the field `prompt`; {args.train} has none.")
    if name == "ordinal":
        levels = np.unique(data.rated)
        if (levels != np.round(levels)).any() or not 2 <= len(levels) <= MOST_LEVELS:
            raise RewardError(
                f"--objective ordinal needs ratings that are whole numbers, 2 to {MOST_LEVELS} different ones; {args.train} has "
                f"{len(levels)}, such as {levels[0]:g} and {levels[-1]:g}. Use --objective squared."
            )


def choose(args: argparse.Namespace, fit: PreferenceData, ready_made: bool) -> Choice:
    """What `check` has let through.

    Args:
        fit: the rows to be learned from.
        ready_made: the base is a classifier already.
    """
    name = _name(args, fit, ready_made)
    plain = Description("classifier", fit.input, args.max_tokens or NO_LIMIT)

    def grouped(data: PreferenceData, rng: np.random.Generator) -> PreferenceData:
        return data.grouped(GROUP, args.margin, args.seed)

    def as_it_is(data: PreferenceData, rng: np.random.Generator) -> PreferenceData:
        return data

    if name == "squared":
        return Choice(name, objectives.Squared(), plain, 1, as_it_is, start=(float(fit.overall.mean()),))
    if name == "bradley-terry":
        return Choice(name, objectives.BradleyTerry(args.centring or 0.0), plain, 1, grouped)
    if name == "ordinal":
        levels, counts = np.unique(fit.rated, return_counts=True)
        above = 1 - np.cumsum(counts)[:-1] / counts.sum()
        thresholds = tuple((-np.log(above / (1 - above))).tolist())
        description = replace(plain, levels=tuple(levels.tolist()))
        objective = objectives.Ordinal(description.levels)
        return Choice(name, objective, description, 1, as_it_is, thresholds=thresholds)
    if name == "gpm":
        return _gpm(args, plain, grouped)
    if name == "cross-encoder":

        def compared(data: PreferenceData, rng: np.random.Generator) -> PreferenceData:
            return data.as_comparisons(data.drawn_pairs(args.margin, args.comparisons or 2 * data.n_rows, rng))

        return Choice(name, objectives.CrossEncoder(), replace(plain, task="cross_encoder"), 1, compared)
    return _more(fit, plain, as_it_is)


def _gpm(args: argparse.Namespace, plain: Description, grouped: Callable) -> Choice:
    dimensions = args.dimensions or DIMENSIONS
    objective = objectives.GeneralPreference(dimensions, bool(args.gate))

    def prepare(data: PreferenceData, rng: np.random.Generator) -> PreferenceData:
        return data.with_prompts() if args.gate else grouped(data, rng)

    description = replace(plain, task="gpm", dimensions=dimensions, temperature=objectives.TEMPERATURE)
    return Choice("gpm", objective, description, objective.outputs, prepare)


def _more(fit: PreferenceData, plain: Description, prepare: Callable) -> Choice:
    start = tuple(np.nanmean(fit.rated, axis=0).tolist())
    objective = objectives.MultiObjective(len(fit.names))
    description = replace(plain, task="objectives", objectives=fit.names, weights=fit.weights)
    return Choice("more", objective, description, len(fit.names), prepare, start=start)


def _name(args: argparse.Namespace, data: PreferenceData, ready_made: bool) -> str:
    if args.objective != "auto":
        return args.objective
    # The head of a ready classifier has its own scale, far from that of the ratings; pairs do not ask for theirs.
    if data.ratings is None or ready_made:
        return "bradley-terry"
    return "squared" if len(data.names) == 1 else "more"
