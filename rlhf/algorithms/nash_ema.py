"""Nash-EMA-PG (Munos et al. 2023): as Nash-MD-PG, against an exponential moving average of the policy's weights.

    y ~ pi,    y' ~ opponent,    opponent's weights <- d (opponent's weights) + (1 - d) (policy's weights)  after every step
    ascend  E[ sum_t grad log pi_t ( P(y beats y') - 1/2 - tau sum_{s >= t} (log pi_s - log ref_s) ) ]

d is the field `opponent_decay`. The opponent is the engines' second model and its weights are published to them after every step; the
reference of the KL stays the starting policy. Where policy and opponent agree, the policy is the Nash equilibrium
of the regularised game, pi*(y) proportional to ref(y) exp( P(y beats pi*) / tau ).

Deviations: as Nash-MD-PG. One text writes the opponent as (1 - beta) theta_t + beta theta_0; this is the running average.
"""

from __future__ import annotations

from rlhf.algorithms.algorithm import Algorithm, Source
from rlhf.algorithms.anchors import Ema
from rlhf.algorithms.nash_md import game, nash_gradient
from rlhf.config import Settings
from rlhf.config.methods.gradient import NashEma


def nash_ema(settings: Settings) -> Algorithm:
    """The declaration: a response of the policy, judged against one of its moving average; policy gradient; fixed reference."""
    algorithm: NashEma = settings.algorithm
    return Algorithm(
        name="nash_ema",
        sources=(Source("policy", 1), Source("opponent", 1, mixture=1.0)),
        build=game(algorithm),
        objective=nash_gradient(algorithm),
        partner=Ema(algorithm.opponent_decay),
    )
