"""RAFT, reward-ranked fine-tuning (Dong et al. 2023): the likelihood of the best of K fresh responses.

    L = -LP(y_best) + lambda / (2K) sum_k U(y_k)^2,    y_best = argmax_k r(y_k),    y_1..y_K ~ pi,    U(y) = LP(y) - RP(y)

LP and RP sum the log-probs of a response's tokens under policy and reference. The second sum, off by default, is the KL to the
reference (the estimator k2 on whole responses): since the y_k are the policy's own, its gradient is that of lambda KL(pi || ref).

Deviations: the paper ranks either the K responses of each prompt or all of a batch; here it is each prompt's. It trains on many batches'
best until the loss converges, here a step learns from its own. It puts the KL into the reward; here it is a term of the loss. Of equal
rewards the first response counts as best.
"""

from __future__ import annotations

from functools import partial

from rlhf.algorithms.algorithm import Algorithm, Source
from rlhf.algorithms.builders import best_of
from rlhf.algorithms.contrast import Contrast, Preference
from rlhf.config import Settings
from rlhf.config.methods.contrast import Raft


def raft(settings: Settings) -> Algorithm:
    """The declaration: current policy, K responses, the best one's likelihood, and optionally a KL to the fixed reference."""
    algorithm: Raft = settings.algorithm
    likelihood = Contrast(link="linear", scale=-1.0, reduce=algorithm.logp_reduce, anchored=False)
    pull = Contrast(link="square", reduce=algorithm.logp_reduce)  # with target 1/2 it is U^2
    weight = algorithm.kl_weight
    return Algorithm(
        name="raft",
        sources=(Source("policy", algorithm.samples_per_prompt),),
        build=partial(best_of, kl_weight=weight),
        objective=Preference((likelihood, pull) if weight else (likelihood,)),
    )
