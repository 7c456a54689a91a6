"""SLiC-HF (Zhao et al. 2023), online: a hinge on the log-probs themselves, and a likelihood term as regulariser.

    L = max(0, delta - LP(y_w) + LP(y_l)) - lambda LP(y_w),    LP(y) = sum_t log pi_t

There is no reference in the loss; the likelihood term regularises in its place.

Deviations: the paper's pairs come from the supervised model (or are human), and the likelihood is that of the supervised targets; here
pairs are the current policy's, best against worst of K, and the likelihood is that of the chosen response. KL is still measured
against the starting policy, so a run's curves compare with those of the other methods.
"""

from __future__ import annotations

from functools import partial

from rlhf.algorithms.algorithm import Algorithm, Source
from rlhf.algorithms.builders import pairs_of, with_likelihood
from rlhf.algorithms.contrast import Contrast, Preference
from rlhf.algorithms.labels import Labels
from rlhf.config import Settings
from rlhf.config.methods.contrast import Slic


def slic(settings: Settings) -> Algorithm:
    """The declaration: current policy, K responses, one pair, hinge link, linear likelihood, no anchor."""
    algorithm: Slic = settings.algorithm
    pairs = pairs_of(algorithm.pairing, Labels(algorithm.labels, algorithm.label_temperature))
    hinge = Contrast(link="hinge", margin=algorithm.delta, reduce=algorithm.logp_reduce, anchored=False)
    weight = algorithm.likelihood_weight
    likelihood = Contrast(link="linear", scale=-weight, reduce=algorithm.logp_reduce, anchored=False)
    return Algorithm(
        name="slic",
        sources=(Source("policy", algorithm.samples_per_prompt),),
        build=partial(with_likelihood, pairs=pairs) if weight else pairs,
        objective=Preference((hinge, likelihood) if weight else (hinge,)),
    )
