"""SELM, self-exploring language models (Zhang et al. 2024): iterative DPO with a bonus for exploring away from the reference.

    L = -log s(beta h) + alpha beta ( LP(y_gen) - RP(y_gen) ),    h = U(y_w) - U(y_l),    U(y) = LP(y) - RP(y)

LP and RP sum the log-probs of a response's tokens under policy and reference. The reference, which is the previous iterate, writes
y_gen; of y_gen and the data set's chosen and rejected response (or fresh samples of the policy) the best becomes y_w and the worst
y_l. L is minimised, so the bonus LOWERS the log-prob of y_gen, whichever of the three it turned out to be: optimism moves
mass to where the reference puts none. RP(y_gen) has no gradient; it is there so that the bonus starts at 0.

Who writes y_gen: where the reference equals the policy at the start of every step (`previous`, a step per round: the default), the
policy does, and the engines hold one model. With any other rule the reference does, as the engines' second model.

Choices between paper and code: the factor is alpha beta (equation 4.2, the released code) or alpha (algorithm 1): `bonus_scale`;
y_gen is greedy (the released code) or sampled (the paper): `generation`. Deviations: soft and smoothed labels and the robust loss are
offered as for DPO. A prompt whose pair is a tie or identical is dropped with its bonus (see builders.py), so alpha = 0 is
iterative DPO on the same pairs. A y_gen without a verdict is in no pair and keeps its bonus.
"""

from __future__ import annotations

from functools import partial

from rlhf.algorithms.algorithm import Algorithm, Source
from rlhf.algorithms.anchors import Extrapolated, Previous, UpdateRule, update_rule
from rlhf.algorithms.builders import best_vs_worst, with_bonus
from rlhf.algorithms.contrast import Contrast, Preference
from rlhf.algorithms.online_dpo import dpo_term, labels
from rlhf.config import Settings
from rlhf.config.methods.contrast import Selm


def selm(settings: Settings) -> Algorithm:
    """The declaration: y_gen of the previous iterate ranked with the data set's pair or fresh samples, logistic link, linear bonus."""
    algorithm: Selm = settings.algorithm
    reference = update_rule(algorithm)
    y_gen = Source("y_gen", 1, mixture=_share_of_partner(reference), greedy=algorithm.generation == "greedy")
    from_dataset = algorithm.ranked_with == "dataset"
    pairs, pair = partial(best_vs_worst, labels=labels(algorithm)), dpo_term(algorithm)
    scale = algorithm.alpha * algorithm.beta if algorithm.bonus_scale == "alpha_beta" else algorithm.alpha
    bonus = Contrast(link="linear", scale=scale, reduce=algorithm.logp_reduce)
    return Algorithm(
        name="selm",
        sources=(y_gen,) if from_dataset else (y_gen, Source("policy", algorithm.fresh_samples)),
        build=partial(with_bonus, pairs=pairs, source="y_gen") if scale else pairs,
        objective=Preference((pair, bonus) if scale else (pair,)),
        reference=reference,
        dataset_pairs=from_dataset,
    )


def _share_of_partner(reference: UpdateRule) -> float:
    """0 if the policy that samples is the reference of the step, else 1: the reference itself samples."""
    same = isinstance(reference, Previous | Extrapolated) and reference.every == 1
    return 0.0 if same else 1.0
