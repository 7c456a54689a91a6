"""R-DPO, length-regularised DPO (Park et al. 2024), online: DPO for the reward less a penalty per token.

    L = -[ p log s(z) + (1-p) log s(-z) ],    z = beta h + alpha (|y_w| - |y_l|)
    h = U(y_w) - U(y_l),    U(y) = sum_t log pi_t - log ref_t

|y| is a response's number of tokens, alpha the field `length_coef`. The reward that pi and ref imply is then beta U(y) + alpha |y|, so
with soft labels the stationary policy is proportional to ref(y) exp( (r(y) - alpha |y|) / beta ): a longer winner gets a smaller gradient.

Deviations: the paper's pairs are a data set's; here they are the current policy's, as for online DPO.
"""

from __future__ import annotations

from dataclasses import replace

from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.contrast import Preference
from rlhf.algorithms.online_dpo import dpo_term, online_dpo
from rlhf.config import Settings
from rlhf.config.methods.contrast import Rdpo


def rdpo(settings: Settings) -> Algorithm:
    """The declaration: online DPO's, with lengths in the contrast."""
    algorithm: Rdpo = settings.algorithm
    term = replace(dpo_term(algorithm), length_coef=algorithm.length_coef)
    return replace(online_dpo(settings), name="rdpo", objective=Preference((term,)))
