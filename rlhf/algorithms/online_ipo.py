"""Online IPO (Calandriello et al. 2024): the square loss of IPO (Azar et al. 2023) on the policy's own responses.

    L = ( U(y) - U(y') - (p - 1/2) / tau )^2,    U(y) = sum_t log pi_t - log ref_t,    p = P(y beats y')

y and y' are drawn independently from the current policy, without gradient through the drawing; the reference is the fixed starting
policy and tau the strength of the pull to it. The stationary policy is the Nash equilibrium of the regularised preference game,

    pi*(y) proportional to ref(y) exp( P(y beats pi*) / tau )

which also exists where preferences are cyclic and no reward explains them.

Deviations: the paper draws the winner with probability p (`labels: sampled`); the default takes p itself (`soft`), the same in
expectation with less noise. The paper's two-term form of the soft loss differs by a constant. With more than two responses, best
against worst is no independent draw any more, so the default is two at random. The equilibrium needs `logp_reduce: sum`.
"""

from __future__ import annotations

from typing import Any

from rlhf.algorithms.algorithm import Algorithm, Source
from rlhf.algorithms.anchors import update_rule
from rlhf.algorithms.builders import Pairs, pairs_of
from rlhf.algorithms.contrast import Contrast, Preference
from rlhf.algorithms.labels import Labels
from rlhf.config import Settings
from rlhf.config.methods.contrast import OnlineIpo


def online_ipo(settings: Settings) -> Algorithm:
    """The declaration: current policy, a pair at random, square link, fixed reference."""
    algorithm: OnlineIpo = settings.algorithm
    return Algorithm(
        name="online_ipo",
        sources=(Source("policy", algorithm.samples_per_prompt),),
        build=ipo_pairs(algorithm),
        objective=ipo_objective(algorithm),
        reference=update_rule(algorithm),
    )


def ipo_pairs(algorithm: Any) -> Pairs:
    """The builder that the fields `pairing`, `labels` and `label_temperature` describe."""
    return pairs_of(algorithm.pairing, Labels(algorithm.labels, algorithm.label_temperature))


def ipo_objective(algorithm: Any) -> Preference:
    """The square loss that the fields `tau` and `logp_reduce` describe."""
    return Preference((Contrast(link="square", scale=algorithm.tau, reduce=algorithm.logp_reduce),))
