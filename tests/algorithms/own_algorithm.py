"""Two algorithms of one's own: SimPO, and DPO of the best response against all worse ones at once."""

import random

from rlhf.algorithms import Algorithm, Contrast, Preference, Source
from rlhf.algorithms.builders import Dropped, pairs_of
from rlhf.algorithms.labels import Labels, scored
from rlhf.config import Settings
from rlhf.types import Feedback, Rollout, TrainingItem


def simpo(settings: Settings) -> Algorithm:
    """SimPO (Meng et al. 2024): -log s(beta (mean log pi(y_w) - mean log pi(y_l)) - gamma), without a reference."""
    options = settings.algorithm.options
    beta, gamma = options.get("beta", 2.0), options.get("gamma", 1.0)
    return Algorithm(
        name="simpo",
        sources=(Source("policy", n=options.get("samples", 4)),),
        build=pairs_of("best_vs_worst", Labels("hard", smoothing=options.get("smoothing", 0.0))),
        objective=Preference((Contrast("logistic", scale=beta, offset=gamma / beta, reduce="mean", anchored=False),)),
    )


def one_against_many(settings: Settings) -> Algorithm:
    """-log s(beta (U(best) - mean U(worse))): the builder is one's own, the loss is DPO's."""
    beta = settings.algorithm.options.get("beta", 0.1)
    return Algorithm(
        name="one_against_many",
        sources=(Source("policy", n=4),),
        build=best_against_mean,
        objective=Preference((Contrast("logistic", scale=beta),)),
    )


def best_against_mean(rollout: Rollout, feedback: Feedback, rng: random.Random) -> tuple[TrainingItem, ...] | Dropped:
    scores = scored(feedback)
    if len(scores) < 2:
        return Dropped("too_few_scores")
    best, most = max(scores, key=lambda score: score[1])
    worse = [i for i, reward in scores if reward < most]
    if not worse:
        return Dropped("tie")
    return (TrainingItem((best, *worse), (1.0, *[-1.0 / len(worse)] * len(worse))),)
