"""Iterative DPO (Dong et al. 2024, RLHFlow): DPO in rounds, each against the policy at the end of the previous round.

    L = -[ p log s(beta h) + (1-p) log s(-beta h) ],    h = U(y_w) - U(y_l),    U(y) = sum_t log pi_t - log pi_old_t

pi_old is the policy at the start of the present round: it writes K responses to every prompt of the round, the best and the worst
become the pair, and several epochs are trained on them. A round is `reference_every` steps of the loop; with one (the default)
a round is a step, so make the step large: `loop.prompts_per_step`, `loop.updates_per_step` and `loop.epochs_per_step`. With soft
labels p = s(r_w - r_l) a round trained to convergence multiplies the policy by exp(r / beta), so T rounds give pi_0 exp(T r / beta).

`pairs: dataset` learns from the data set's chosen and rejected responses instead; nothing is sampled or judged then.

Deviations: the report describes a reference fixed at pi_0, the released scripts move it to the previous iterate; the latter is the
default here, the former is `reference: fixed`. Prompts whose rewards are all equal are dropped under hard labels, as in the release; its
length penalty would be part of the reward here.
"""

from __future__ import annotations

from functools import partial

from rlhf.algorithms.algorithm import Algorithm, Source
from rlhf.algorithms.anchors import update_rule
from rlhf.algorithms.builders import dataset_pair, pairs_of
from rlhf.algorithms.contrast import Preference
from rlhf.algorithms.online_dpo import dpo_term, labels
from rlhf.config import Settings
from rlhf.config.methods.contrast import IterativeDpo


def iterative_dpo(settings: Settings) -> Algorithm:
    """The declaration: K responses of the iterate, or the data set's pair; logistic link; the reference is the previous iterate."""
    algorithm: IterativeDpo = settings.algorithm
    from_dataset = algorithm.pairs == "dataset"
    built = labels(algorithm)
    return Algorithm(
        name="iterative_dpo",
        sources=() if from_dataset else (Source("policy", algorithm.samples_per_prompt),),
        build=partial(dataset_pair, smoothing=built.smoothing) if from_dataset else pairs_of(algorithm.pairing, built),
        objective=Preference((dpo_term(algorithm),)),
        reference=update_rule(algorithm),
        dataset_pairs=from_dataset,
        judged=not from_dataset,
    )
