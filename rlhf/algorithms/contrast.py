"""The contrast kernel: the loss that all direct preference methods share.

    u_i  = reduce_t( log pi_t - log ref_t )          score of response i, a sum or mean over its learned tokens
    h    = sum_i c_i u_i - offset                    linear contrast of the scores of one item
    loss = weight * link(h, p)                       p: the probability that h should be positive

A pair (chosen, rejected) has c = (+1, -1); DPO is the logistic link with scale beta, p = 1. Further terms, such as a likelihood
or an exploration bonus, are items on single responses under the linear link. A batch's loss is the sum over items divided by the
number of prompts that have any, over all ranks and micro-batches (the caller divides: only it knows that number).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F

Link = Literal["logistic", "robust", "square", "hinge", "linear"]


@dataclass(frozen=True)
class Contrast:
    """One term of an objective: which score and which link.

    Attributes:
        link: see `link_loss`.
        scale: beta of the logistic, robust and hinge links, tau of the square link, the term's factor for the linear link.
        offset: subtracted from the contrast, in nats (SimPO's gamma / beta).
        reduce: a response's log-ratio is summed or averaged over its tokens.
        flip_rate: assumed rate of flipped labels, for the robust link.
        margin: of the hinge link, on the scaled contrast.
        anchored: False: the score is log pi alone, without a reference.
        length_coef: added to z for each token that the chosen response is longer than the rejected one (R-DPO's alpha).
    """

    link: Link = "logistic"
    scale: float = 1.0
    offset: float = 0.0
    reduce: Literal["sum", "mean"] = "sum"
    flip_rate: float = 0.0
    margin: float = 1.0
    anchored: bool = True
    length_coef: float = 0.0


@dataclass(frozen=True)
class Preference:
    """A sum of contrast terms; `TrainingItem.term` says which one an item belongs to. The first is the preference itself."""

    terms: tuple[Contrast, ...]


class Batch(Protocol):
    """The part of a packed micro-batch (`rlhf.training.packing.Experience`) that the loss needs."""

    @property
    def response(self) -> torch.Tensor: ...
    @property
    def coefficients(self) -> torch.Tensor: ...
    @property
    def target(self) -> torch.Tensor: ...
    @property
    def weight(self) -> torch.Tensor: ...
    @property
    def term(self) -> torch.Tensor: ...


def response_sums(values: torch.Tensor, response: torch.Tensor, n_responses: int, reduce: str) -> torch.Tensor:
    """Sum or mean of a value per token over each response's tokens, [n_responses].

    Args:
        values: [n_tokens].
        response: index of the response each token belongs to, [n_tokens].
        reduce: "sum" or "mean".
    """
    sums = values.new_zeros(n_responses).index_add(0, response, values)
    if reduce == "sum":
        return sums
    counts = values.new_zeros(n_responses).index_add(0, response, torch.ones_like(values))
    return sums / counts.clamp(min=1)


def response_scores(term: Contrast, batch: Batch, logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """u of each response, [n_responses], from per-token log-probs, [n_tokens] in fp32."""
    tokens = logprobs - reference if term.anchored else logprobs
    return response_sums(tokens, batch.response, batch.coefficients.shape[1], term.reduce)


def link_loss(term: Contrast, contrast: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Loss of each item, before its weight, [n_items]. With z = scale (contrast - offset) and p = target:

        logistic   -p log s(z) - (1-p) log s(-z)                               DPO, conservative DPO, soft labels
        robust     logistic with (p - e) / (1 - 2e) for p, e = flip_rate       Chowdhury et al. 2024
        hinge      p max(0, margin - z) + (1-p) max(0, margin + z)             SLiC, RSO
        square     (contrast - offset - (p - 1/2) / scale)^2                   IPO with tau = scale
        linear     z                                                           likelihood, bonus; p is not read

    For 0 < p < 1 the square is IPO's p (h - 1/(2 tau))^2 + (1-p) (h + 1/(2 tau))^2 less a constant, so it has the same gradient.

    Args:
        contrast: sum_i c_i u_i of each item, in nats, [n_items].
        target: probability that the contrast should be positive, [n_items].
    """
    shifted = contrast - term.offset
    z = term.scale * shifted
    if term.link == "linear":
        return z
    if term.link == "square":
        return (shifted - (target - 0.5) / term.scale).square()
    if term.link in ("logistic", "robust"):
        p = target if term.link == "logistic" else (target - term.flip_rate) / (1 - 2 * term.flip_rate)
        return -(p * F.logsigmoid(z) + (1 - p) * F.logsigmoid(-z))
    if term.link == "hinge":
        return target * F.relu(term.margin - z) + (1 - target) * F.relu(term.margin + z)
    raise ValueError(f"unknown link {term.link!r}; known: logistic, robust, square, hinge, linear")


def preference_loss(
    objective: Preference, batch: Batch, logprobs: torch.Tensor, reference: torch.Tensor
) -> torch.Tensor:
    """Weighted loss of each item, [n_items]; the caller sums and divides by the number of prompts with items.

    A batch without items gives an empty loss that still depends on `logprobs`, so that every rank can take part in the backward pass.

    Args:
        logprobs, reference: per-token log-probs (nats) under the policy, with gradient, and the anchor, [n_tokens].
    """
    losses = logprobs.new_zeros(len(batch.target))
    for number, term in enumerate(objective.terms):
        contrast = batch.coefficients @ response_scores(term, batch, logprobs, reference)
        if term.length_coef:
            lengths = response_sums(torch.ones_like(reference), batch.response, batch.coefficients.shape[1], "sum")
            contrast = contrast + term.length_coef / term.scale * (batch.coefficients @ lengths)
        losses = losses + torch.where(batch.term == number, link_loss(term, contrast, batch.target), 0.0)
    return batch.weight * losses
