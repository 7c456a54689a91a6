"""The contrast kernel: the loss that all direct preference methods share.

    u_i  = reduce_t( log pi_t - log ref_t )          score of response i, a sum or mean over its tokens
    z    = scale * ( sum_i c_i u_i - offset )        linear contrast of the scores of one item
    loss = weight * link(z; target)

A pair (chosen, rejected) has c = (+1, -1); DPO is the logistic link with scale beta. A batch's loss is the sum over items divided
by the number of prompts that have any, over all ranks and micro-batches (the caller divides: only it knows that number).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

Link = Literal["logistic", "robust", "square", "hinge", "linear"]


@dataclass(frozen=True)
class Contrast:
    """Which score and which link.

    Attributes:
        link: see `link_loss`.
        scale: factor on the contrast (beta for DPO).
        offset: subtracted from the contrast before scaling.
        reduce: a response's log-ratio is summed or averaged over its tokens.
        flip_rate: assumed rate of flipped labels, for the robust link.
    """

    link: Link = "logistic"
    scale: float = 1.0
    offset: float = 0.0
    reduce: Literal["sum", "mean"] = "sum"
    flip_rate: float = 0.0


def response_scores(
    logprobs: torch.Tensor, anchor: torch.Tensor, response: torch.Tensor, n_responses: int, reduce: str
) -> torch.Tensor:
    """Log-ratio of each response to the anchor, [n_responses], fp32.

    Args:
        logprobs, anchor: per-token log-probs under the policy and the anchor, [n_tokens].
        response: index of the response each token belongs to, [n_tokens].
        reduce: "sum" or "mean" over the response's tokens.
    """
    ratio = logprobs.float() - anchor.float()
    scores = ratio.new_zeros(n_responses).index_add(0, response, ratio)
    if reduce == "mean":
        counts = ratio.new_zeros(n_responses).index_add(0, response, torch.ones_like(ratio))
        scores = scores / counts.clamp(min=1)
    return scores


def link_loss(objective: Contrast, contrast: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Loss of each item, before its weight, [n_items].

    Args:
        contrast: sum_i c_i u_i of each item, [n_items].
        target: logistic: probability that the contrast is positive (1 is DPO, 1 - eps conservative DPO, P(w beats l) soft labels);
            robust: unused beyond 1; square: value aimed at, on the scale of the contrast; hinge: margin; linear: unused.
    """
    z = objective.scale * (contrast - objective.offset)
    if objective.link == "logistic":
        return -(target * F.logsigmoid(z) + (1 - target) * F.logsigmoid(-z))
    if objective.link == "robust":
        eps = objective.flip_rate
        return (-(1 - eps) * F.logsigmoid(z) + eps * F.logsigmoid(-z)) / (1 - 2 * eps)
    if objective.link == "square":
        return (contrast - objective.offset - target).square()
    if objective.link == "hinge":
        return F.relu(target - z)
    if objective.link == "linear":
        return z
    raise ValueError(f"unknown link {objective.link!r}; known: logistic, robust, square, hinge, linear")


def contrast_loss(
    objective: Contrast,
    scores: torch.Tensor,
    coefficients: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Weighted loss of each item, [n_items]; the caller sums and divides by the number of prompts with items.

    Args:
        scores: [n_responses], from `response_scores`.
        coefficients: [n_items, n_responses]; zero for responses that are not members.
        target, weight: [n_items].
    """
    return weight * link_loss(objective, coefficients @ scores, target)
