"""Online DPO (direct alignment from online feedback; Guo et al. 2024, on the loss of Rafailov et al. 2023).

    L = -[ p log s(beta h) + (1-p) log s(-beta h) ],    h = U(y_w) - U(y_l),    U(y) = sum_t log pi_t - log ref_t

The responses y come from the current policy, a reward model orders them, the reference is the fixed starting policy.
p = 1 (hard labels), 1 - eps (label smoothing: conservative DPO) or s((r_w - r_l) / T) (soft labels). The robust loss
(Chowdhury et al. 2024) is unbiased if labels are flipped at rate eps.

Deviations: the paper samples 2 responses and lets a language model annotate them; here K responses are sampled and the pair is
the best against the worst (or two at random) under any reward. Pairs with identical tokens, and ties, are dropped.
"""

from __future__ import annotations

from functools import partial

from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.builders import Labels, best_vs_worst, random_pair
from rlhf.algorithms.contrast import Contrast
from rlhf.config.algorithm import AlgorithmSettings


def online_dpo(settings: AlgorithmSettings) -> Algorithm:
    """The declaration: current policy, K responses, one pair, logistic link, fixed reference."""
    robust = settings.loss == "robust"
    labels = Labels(
        soft=settings.labels == "soft",
        temperature=settings.label_temperature,
        smoothing=0.0 if robust else settings.label_smoothing,
    )
    pair = best_vs_worst if settings.pairing == "best_vs_worst" else random_pair
    return Algorithm(
        name="online_dpo",
        samples_per_prompt=settings.samples_per_prompt,
        build=partial(pair, labels=labels),
        objective=Contrast(
            link=settings.loss,
            scale=settings.beta,
            reduce=settings.logp_reduce,
            flip_rate=settings.label_smoothing if robust else 0.0,
        ),
    )
