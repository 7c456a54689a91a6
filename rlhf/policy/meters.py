"""Metrics as sums with counts, so that any split over micro-batches and ranks gives the same mean."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from rlhf.algorithms.contrast import Contrast
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
    objective: Contrast, experience: Experience, scores: torch.Tensor, logprobs: torch.Tensor, reference: torch.Tensor
) -> Meters:
    """Metrics of one micro-batch: of its items, and of its response tokens.

    Names: policy/accuracy (contrast is positive), policy/margin (scaled contrast), policy/chosen_reward and
    policy/rejected_reward (implicit rewards: scaled log-ratios), policy/kl (mean of log pi - log ref per token, nats) and
    policy/kl_k3 (the same quantity by an estimator that is never negative).
    """
    if not len(experience.target):
        return {}
    contrast = experience.coefficients @ scores
    items = float(len(contrast))
    chosen, rejected = experience.coefficients.clamp(min=0), -experience.coefficients.clamp(max=0)
    ratio = logprobs - reference
    tokens = float(len(ratio))
    return {
        "policy/accuracy": ((contrast > 0).float().sum().item(), items),
        "policy/margin": (objective.scale * contrast.sum().item(), items),
        "policy/chosen_reward": (objective.scale * (chosen @ scores).sum().item(), chosen.sum().item()),
        "policy/rejected_reward": (objective.scale * (rejected @ scores).sum().item(), rejected.sum().item()),
        "policy/kl": (ratio.sum().item(), tokens),
        "policy/kl_k3": ((torch.exp(-ratio) - 1 + ratio).sum().item(), tokens),
    }
