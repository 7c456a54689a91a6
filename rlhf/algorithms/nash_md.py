"""Nash-MD-PG (Munos et al. 2023): a policy gradient on the game of the policy against a mixture of itself and the reference.

    y ~ pi,    y' ~ pi_m,    pi_m(v | x, y_<t) proportional to pi(v | x, y_<t)^(1-m) ref(v | x, y_<t)^m
    ascend  E[ sum_t grad log pi_t ( P(y beats y') - 1/2 - tau sum_{s >= t} (log pi_s - log ref_s) ) ]

m is the field `mixture` (the paper's beta). y' is not trained on. The KL is a reward-to-go: the advantage of a token
holds its own and the later log-ratios. The stationary policy is pi*(y) proportional to ref(y) exp( P(y beats pi*_m) / tau ), the same
as IPO-MD's.

In the policy-gradient kernel this is: reward P - 1/2, no baseline (1/2 is P's mean in self-play), k1 with factor tau in each token's
reward, no clipping (so make one optimizer step per batch), a response's tokens summed, responses averaged.

Deviations: P is used itself rather than a drawn winner (`labels: sampled` draws one). TRL's former trainer multiplied each token by its
own log-ratio only; that has another stationary policy and is not offered.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from rlhf.algorithms.algorithm import Algorithm, Source
from rlhf.algorithms.builders import Pairs, against_opponent
from rlhf.algorithms.labels import Labels
from rlhf.algorithms.policy_gradient import PolicyGradient
from rlhf.config import Settings
from rlhf.config.methods.gradient import NashMd


def nash_md(settings: Settings) -> Algorithm:
    """The declaration: a response of the policy, judged against one of the mixture; policy gradient; fixed reference."""
    algorithm: NashMd = settings.algorithm
    return Algorithm(
        name="nash_md",
        sources=(Source("policy", 1), Source("opponent", 1, mixture=algorithm.mixture)),
        build=game(algorithm),
        objective=nash_gradient(algorithm),
    )


def game(algorithm: Any) -> Pairs:
    """The builder that the fields `labels` and `label_temperature` describe."""
    return partial(against_opponent, labels=Labels(algorithm.labels, algorithm.label_temperature), opponent="opponent")


def nash_gradient(algorithm: Any) -> PolicyGradient:
    """The policy gradient with the regularisation of strength `tau` and nothing else."""
    return PolicyGradient(
        baseline="none",
        kl_placement="reward",
        kl_estimator="k1",
        kl_coef=algorithm.tau,
        clip_low=None,
        clip_high=None,
        aggregation="seq_mean_token_sum",
        correction="none",
    )
