"""Metrics as sums with counts, so that any split over micro-batches and ranks gives the same mean."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from rlhf.algorithms.contrast import Preference, response_scores, response_sums
from rlhf.training.packing import Experience

Meters = dict[str, tuple[float, float]]
"""Metric name -> (sum, count)."""


def merge(parts: Iterable[Meters]) -> Meters:
    """Add sums and counts."""
    total: Meters = {}
    for part in parts:
        for name, (value, count) in part.items():
            old_value, old_count = total.get(name, (0.0, 0.0))
            total[name] = (old_value + value, old_count + count)
    return total


def means(meters: Meters) -> dict[str, float]:
    """Mean of each metric; metrics without any count are left out."""
    return {name: value / count for name, (value, count) in meters.items() if count}


@torch.no_grad()
def item_meters(
    objective: Preference, experience: Experience, logprobs: torch.Tensor, reference: torch.Tensor
) -> Meters:
    """Metrics of one micro-batch's pairs (the items of the objective's first term), and of its other items.

    Names, each a mean over pairs unless it says otherwise; what is about the chosen response alone also counts items that have no other:
        policy/accuracy: the contrast is positive.
        policy/reference_accuracy: the reference alone gives the chosen response the higher log-prob.
        policy/margin: the contrast times the term's scale.
        policy/chosen_reward, policy/rejected_reward: scores times the term's scale (the implicit rewards of DPO).
        policy/chosen_rose: the chosen response is likelier than under the reference; where this falls, both responses lose.
        policy/chosen_logprob, policy/rejected_logprob: log pi per token, in nats.
        policy/bonus: score in nats of the further terms' responses, before their factor: the log-ratio of SELM's y_gen, the log-prob
            of XPO's reference sample, or of SLiC's chosen response.
    """
    term, n = objective.terms[0], experience.n_responses
    scores = response_scores(term, experience, logprobs, reference)
    logprob, reference_logprob, length = (
        response_sums(values, experience.response, n, "sum")
        for values in (logprobs, reference, torch.ones_like(logprobs))
    )
    coefficients = experience.coefficients[experience.term == 0]
    chosen, rejected = coefficients.clamp(min=0), -coefficients.clamp(max=0)
    items, contrast = float(len(coefficients)), coefficients @ scores
    # An item with a chosen response alone (RAFT) is no pair, and says nothing about the order of two.
    paired = (coefficients < 0).any(1)
    pairs = paired.sum()
    meters = {
        "policy/accuracy": ((contrast > 0)[paired].sum(), pairs),
        "policy/reference_accuracy": ((coefficients @ reference_logprob > 0)[paired].sum(), pairs),
        "policy/margin": (term.scale * contrast[paired].sum(), pairs),
        "policy/chosen_reward": (term.scale * (chosen @ scores).sum(), items),
        "policy/rejected_reward": (term.scale * (rejected @ scores).sum(), pairs),
        "policy/chosen_rose": ((chosen @ (logprob - reference_logprob) > 0).sum(), items),
        "policy/chosen_logprob": ((chosen @ logprob).sum(), (chosen @ length).sum()),
        "policy/rejected_logprob": ((rejected @ logprob).sum(), (rejected @ length).sum()),
    }
    bonus = [
        experience.coefficients[experience.term == number] @ response_scores(further, experience, logprobs, reference)
        for number, further in enumerate(objective.terms)
        if number > 0
    ]
    if bonus:
        meters["policy/bonus"] = (torch.cat(bonus).sum(), float(sum(len(values) for values in bonus)))
    return {name: (float(value), float(count)) for name, (value, count) in meters.items()}
