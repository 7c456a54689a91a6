"""Online DPO (direct alignment from online feedback; Guo et al. 2024, on the loss of Rafailov et al. 2023).

    L = -[ p log s(beta h) + (1-p) log s(-beta h) ],    h = U(y_w) - U(y_l),    U(y) = sum_t log pi_t - log ref_t

The responses y come from the current policy, a reward model or judge orders them, the reference is the fixed starting policy.
p = 1 (hard or sampled labels), 1 - eps (label smoothing: conservative DPO), or P(y_w beats y_l) (soft labels), which is
s((r_w - r_l) / T) where the feedback is a score. The robust loss (Chowdhury et al. 2024) is unbiased if labels are flipped at rate eps; the
hinge is max(0, 1 - beta h) instead (Liu et al. 2023, RSO: SLiC with a reference).

Deviations: the paper samples 2 responses and lets a language model annotate them; here K responses are sampled and the pair is
the best against the worst (or two at random, or every two) under any reward. Pairs with identical tokens are dropped, and so are ties under
hard labels; under the others a tie is a pair with p = 1/2.
"""

from __future__ import annotations

from typing import Any

from rlhf.algorithms.algorithm import Algorithm, Source
from rlhf.algorithms.anchors import update_rule
from rlhf.algorithms.builders import pairs_of
from rlhf.algorithms.contrast import Contrast, Preference
from rlhf.algorithms.labels import Labels
from rlhf.config import Settings
from rlhf.config.methods.contrast import OnlineDpo


def online_dpo(settings: Settings) -> Algorithm:
    """The declaration: current policy, K responses, one pair, logistic link, fixed reference."""
    algorithm: OnlineDpo = settings.algorithm
    return Algorithm(
        name="online_dpo",
        sources=(Source("policy", algorithm.samples_per_prompt),),
        build=pairs_of(algorithm.pairing, labels(algorithm)),
        objective=Preference((dpo_term(algorithm),)),
        reference=update_rule(algorithm),
    )


def dpo_term(algorithm: Any) -> Contrast:
    """The contrast that the fields `loss`, `beta`, `label_smoothing` and `logp_reduce` describe."""
    robust = algorithm.loss == "robust"
    return Contrast(
        link=algorithm.loss,
        scale=algorithm.beta,
        reduce=algorithm.logp_reduce,
        flip_rate=algorithm.label_smoothing if robust else 0.0,
    )


def labels(algorithm: Any) -> Labels:
    """The labels that the fields `labels`, `label_temperature` and `label_smoothing` describe; the robust loss corrects for flips
    itself, so it is given certain ones."""
    return Labels(
        algorithm.labels, algorithm.label_temperature, 0.0 if algorithm.loss == "robust" else algorithm.label_smoothing
    )
