"""XPO, exploratory preference optimisation (Xie et al. 2024): DPO on policy against reference, with a bonus for exploring away from it.

    y ~ pi,  y~ ~ ref,    L = -log s(beta h) + alpha LP(y~),    h = U(y_w) - U(y_l),    U(y) = LP(y) - RP(y)

LP and RP sum the log-probs of a response's tokens under policy and reference; (y_w, y_l) are y and y~ as the feedback orders them.
L is minimised, so the bonus LOWERS the log-prob of the reference's response, without beta and without RP (SELM has both). The
reference is the fixed starting policy and the engines' second model.

Deviations: the paper lets alpha decay; here it is constant. Soft and smoothed labels and the robust loss are offered as for DPO. A
prompt whose pair is a tie or identical is dropped with its bonus (see builders.py), so alpha = 0 is DPO on the same pairs.
"""

from __future__ import annotations

from functools import partial

from rlhf.algorithms.algorithm import Algorithm, Source
from rlhf.algorithms.anchors import update_rule
from rlhf.algorithms.builders import source_pair, with_bonus
from rlhf.algorithms.contrast import Contrast, Preference
from rlhf.algorithms.online_dpo import dpo_term, labels
from rlhf.config import Settings
from rlhf.config.methods.contrast import Xpo


def xpo(settings: Settings) -> Algorithm:
    """The declaration: a response of the policy against one of the reference, logistic link, linear bonus, fixed reference."""
    algorithm: Xpo = settings.algorithm
    pairs, pair = partial(source_pair, labels=labels(algorithm), sources=("policy", "reference")), dpo_term(algorithm)
    bonus = Contrast(link="linear", scale=algorithm.alpha, reduce=algorithm.logp_reduce, anchored=False)
    return Algorithm(
        name="xpo",
        sources=(Source("policy", 1), Source("reference", 1, mixture=1.0)),
        build=partial(with_bonus, pairs=pairs, source="reference") if algorithm.alpha else pairs,
        objective=Preference((pair, bonus) if algorithm.alpha else (pair,)),
        reference=update_rule(algorithm),
    )
