"""SimPO (Meng et al. 2024), online: DPO's logistic loss on mean log-probs, with a margin and without a reference.

    L = -[ p log s(z) + (1-p) log s(-z) ],    z = beta (LP(y_w) / |y_w| - LP(y_l) / |y_l|) - gamma,    LP(y) = sum_t log pi_t

The mean log-prob per token is the quantity that generation maximises, and it does not favour either length. Only the margin limits how
far the policy moves; its KL is still measured against the starting policy.

Deviations: the paper's pairs are sampled once from the starting model, or a data set's; here they are the current policy's.
"""

from __future__ import annotations

from rlhf.algorithms.algorithm import Algorithm, Source
from rlhf.algorithms.builders import pairs_of
from rlhf.algorithms.contrast import Contrast, Preference
from rlhf.algorithms.labels import Labels
from rlhf.config import Settings
from rlhf.config.methods.contrast import Simpo


def simpo(settings: Settings) -> Algorithm:
    """The declaration: current policy, K responses, one pair, logistic link on mean log-probs less a margin, no anchor."""
    algorithm: Simpo = settings.algorithm
    labels = Labels(algorithm.labels, algorithm.label_temperature, algorithm.label_smoothing)
    offset = algorithm.gamma / algorithm.beta
    return Algorithm(
        name="simpo",
        sources=(Source("policy", algorithm.samples_per_prompt),),
        build=pairs_of(algorithm.pairing, labels),
        objective=Preference((Contrast("logistic", algorithm.beta, offset, reduce="mean", anchored=False),)),
    )
