"""IPO-MD (Calandriello et al. 2024, section 5): IPO on pairs drawn from a mixture of policy and reference.

    y, y' ~ pi_m,    pi_m(v | x, y_<t) proportional to pi(v | x, y_<t)^(1-m) ref(v | x, y_<t)^m
    L = ( U(y) - U(y') - (p - 1/2) / tau )^2,    U(y) = sum_t log pi_t - log ref_t,    p = P(y beats y')

m is the field `mixture` (the paper's beta): 0 is online IPO, 1 draws from the reference alone. U is relative to the reference, not to
the mixture, and nothing is differentiated through the drawing. The reference is the regulariser and the mixture's partner in one,
fixed at the starting policy. The mixture is normalised token by token, as in the paper; that is not the mixture of whole responses.
The stationary policy is Nash-MD's, pi*(y) proportional to ref(y) exp( P(y beats pi*_m) / tau ), and pi*_m is the Nash
equilibrium of the game at temperature tau / (1 - m) (where a response is one token, so that the two mixtures agree).

Deviations: as online IPO. A moving reference (`reference`) moves the mixture's partner with it; the paper has none.
"""

from __future__ import annotations

from rlhf.algorithms.algorithm import Algorithm, Source
from rlhf.algorithms.anchors import update_rule
from rlhf.algorithms.online_ipo import ipo_objective, ipo_pairs
from rlhf.config import Settings
from rlhf.config.methods.contrast import IpoMd


def ipo_md(settings: Settings) -> Algorithm:
    """The declaration: both responses from the mixture, a pair at random, square link, fixed reference."""
    algorithm: IpoMd = settings.algorithm
    return Algorithm(
        name="ipo_md",
        sources=(Source("mixture", algorithm.samples_per_prompt, mixture=algorithm.mixture),),
        build=ipo_pairs(algorithm),
        objective=ipo_objective(algorithm),
        reference=update_rule(algorithm),
    )
