"""The policy-gradient kernel: the clipped loss that PPO and its relatives share. Advantages come from `advantages.py`.

On the learned tokens of all responses in one flat row [N], with A_t fixed and rho = exp(log pi - log pi_old) of a token (or the geometric
mean over the response: GSPO), each token's loss is

    w_t max(-rho A_t, -clip(rho, 1 - clip_low, 1 + clip_high) A_t)          clipped surrogate (Schulman et al. 2017)
      + kl_coef k(log pi - log ref)                                         if the KL counts in the loss
      - entropy_coef H_t

With dual clip, the loss of a negative advantage is at most dual_clip |A_t| (Ye et al. 2020). Without bounds the first line is
the plain policy gradient: at pi = pi_old its gradient is -A_t grad log pi. CISPO (MiniMax 2025) has instead

    -w_t sg[ clip(rho, 1 - clip_low, 1 + clip_high) ] A_t log pi

whose gradient no bound makes zero: a token far from the old policy counts with the bound as its weight.

w_t corrects for pi_old not being what sampled the token: the engines compute slightly other log-probs than the trainer, or older weights
wrote it (`importance_correction`). All of pi, pi_old and ref are at the sampling temperature.

A learner, and a test on a table, go through the same calls:

    estimate = advantages(objective, rewards, response, group, kl_coef=..., logratio=old - reference, values=...)
    (whitened,) = whiten([estimate.advantages])                                                   # if objective.whiten
    weights = importance_correction(objective, old, behaviour, response).weights
    loss = policy_loss(objective, logprobs, old, whitened, response, kl_coef=..., reference=..., weights=weights).loss
    (aggregate(objective, loss, response) / normaliser(objective, n_responses=..., n_tokens=...)).backward()
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rlhf.algorithms.kl import kl_estimate

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut here before the exponential, so that a wild token gives a large number and not infinity."""


@dataclass(frozen=True)
class Critic:
    """The learned value baseline of PPO.

    Attributes:
        model: a reward model to start from, or None: the policy's body with a fresh head.
        learning_rate: peak, of AdamW.
        warmup_steps: first loop steps in which only the critic learns.
        value_clip: range of the clipped value loss, or None.
        lam: GAE's lambda.
    """

    model: str | None
    learning_rate: float
    warmup_steps: int
    value_clip: float | None
    lam: float


@dataclass(frozen=True)
class PolicyGradient:
    """Which estimator, which KL, which clipping, which correction, which mean (see config/methods/gradient.py for the meanings).

    Attributes:
        baseline: what is subtracted from a response's reward: nothing, the group's mean, the mean of the group's others, or the
            mean with a division by the standard deviation.
        critic: PPO's value model; None for the others.
        clip_low, clip_high: None: the ratio has no bound on that side.
        max_tokens: the constant of the aggregation `seq_mean_token_sum_norm`.
        surrogate: which policy term (see the module).
    """

    baseline: Literal["none", "mean", "leave_one_out", "mean_std"] = "none"
    critic: Critic | None = None
    gamma: float = 1.0
    whiten: bool = False
    reward_clip: float | None = None
    kl_placement: Literal["reward", "loss", "none"] = "none"
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_coef: float = 0.0
    kl_target: float | None = None
    kl_horizon: int = 10_000
    kl_before_baseline: bool = False
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    dual_clip: float | None = None
    ratio: Literal["token", "sequence"] = "token"
    entropy_coef: float = 0.0
    aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"] = (
        "token_mean"
    )
    max_tokens: int = 1
    correction: Literal["none", "tis", "icepop", "sequence_mask"] = "none"
    correction_low: float = 0.5
    correction_high: float = 5.0
    surrogate: Literal["clipped", "cispo"] = "clipped"

    def __post_init__(self) -> None:
        """Raises ValueError for a KL estimator whose gradient is not that of a KL where it is placed (see kl.py)."""
        if self.kl_placement == "reward" and self.kl_estimator != "k1":
            raise ValueError(
                f"kl_estimator: {self.kl_estimator} in the reward has not the gradient of the KL; use k1 there"
            )
        if self.kl_placement == "loss" and self.kl_estimator == "k1":
            raise ValueError("kl_estimator: k1 as a loss has no gradient in expectation; use k2 or k3 there")


@dataclass(frozen=True)
class Correction:
    """Importance weights between engine and trainer, without gradient, [N] each.

    Attributes:
        ratio: w_t = pi_old / pi_engine of each token.
        weights: the factor on the policy term that `PolicyGradient.correction` makes of it.
        altered: whether the token's weight was clamped, or the token left out.
    """

    ratio: torch.Tensor
    weights: torch.Tensor
    altered: torch.Tensor


@dataclass(frozen=True)
class TokenLoss:
    """What `policy_loss` gives, [N] each; only `loss` has a gradient.

    Attributes:
        loss: of each token, not yet aggregated.
        ratio: pi / pi_old (of the token, or of its response).
        clipped: whether a bound on the ratio made the token's gradient zero (CISPO: was its weight).
    """

    loss: torch.Tensor
    ratio: torch.Tensor
    clipped: torch.Tensor


@torch.no_grad()
def importance_correction(
    objective: PolicyGradient, old: torch.Tensor, behaviour: torch.Tensor, response: torch.Tensor
) -> Correction:
    """Weights for the ratio of the policy at the step's start to what sampled the tokens: the gap between the trainer's and the engines'
    log-probs (Yao et al. 2025), and for tokens of older weights also how far the policy has moved since.

    none: 1. tis: w clamped to [correction_low, correction_high]. icepop: w inside the bounds, 0 outside. sequence_mask: 1 for
    responses whose geometric mean of w is inside the bounds, 0 for the others.

    Args:
        old: log-probs under the policy as the step starts, by the trainer, [N].
        behaviour: those recorded when the tokens were sampled, [N].
    """
    low, high = objective.correction_low, objective.correction_high
    gap = old - behaviour
    ratio = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    weights = torch.ones_like(ratio)
    altered = torch.zeros_like(ratio, dtype=torch.bool)
    if objective.correction == "sequence_mask":
        mean = _response_means(gap, response).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()[response]
        altered = (mean < low) | (mean > high)
        weights = weights.masked_fill(altered, 0.0)
    elif objective.correction != "none":
        altered = (ratio < low) | (ratio > high)
        weights = ratio.clamp(low, high) if objective.correction == "tis" else ratio.masked_fill(altered, 0.0)
    return Correction(ratio, weights, altered)


def policy_loss(
    objective: PolicyGradient,
    logprobs: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    response: torch.Tensor,
    *,
    kl_coef: float = 0.0,
    reference: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> TokenLoss:
    """Loss of each token (see the module).

    Args:
        logprobs: log pi of each token, with gradient, [N].
        old: log pi_old, without gradient, [N].
        advantages: A_t, [N].
        response: each token's response, ascending, [N].
        kl_coef: present factor on the KL; only counts with `kl_placement` "loss".
        reference: log ref, [N]; needed then.
        entropy: H_t of the policy with gradient, [N]; needed if `entropy_coef` is not 0.
        weights: factor on the policy term, [N] (`Correction.weights`); None: 1.

    Raises:
        ValueError: `reference` or `entropy` is needed and missing.
    """
    log_ratio = logprobs - old
    if objective.ratio == "sequence":
        log_ratio = _response_means(log_ratio, response)[response]
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if objective.surrogate == "cispo":
        bound = _clip(objective, ratio).detach()
        losses, clipped = -bound * advantages * logprobs, bound != ratio
    else:
        losses, clipped = _clipped_surrogate(objective, ratio, advantages)
    if weights is not None:
        losses = losses * weights
    if objective.kl_placement == "loss":
        if reference is None:
            raise ValueError("the KL counts in the loss, which needs `reference`")
        losses = losses + kl_coef * kl_estimate(logprobs - reference, objective.kl_estimator)
    if objective.entropy_coef:
        if entropy is None:
            raise ValueError("the entropy bonus needs `entropy`")
        losses = losses - objective.entropy_coef * entropy
    return TokenLoss(losses, ratio.detach(), clipped)


def value_loss(values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, clip: float | None) -> torch.Tensor:
    """Half the squared error of each value, [N]; with `clip`, the worse of it and that of the value kept within `clip` of the old
    one (Schulman et al.'s PPO code)."""
    losses = (values - returns).square()
    if clip is not None:
        losses = torch.maximum(losses, (old + (values - old).clamp(-clip, clip) - returns).square())
    return losses / 2


def aggregate(objective: PolicyGradient, losses: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """This micro-batch's part of a sum: over all micro-batches and ranks of an update, divided by `normaliser`, it is the update's loss.

    Args:
        losses: of each token, [N]; whole responses.
    """
    if objective.aggregation == "seq_mean_token_mean":
        return _response_means(losses, response).sum()
    return losses.sum()


def normaliser(objective: PolicyGradient, *, n_responses: int, n_tokens: int) -> int:
    """What the update's sum is divided by, once the whole update is known.

    Args:
        n_responses, n_tokens: that have a loss, of the whole update, over all ranks.
    """
    if objective.aggregation == "token_mean":
        return n_tokens
    return n_responses * (objective.max_tokens if objective.aggregation == "seq_mean_token_sum_norm" else 1)


def _clipped_surrogate(
    objective: PolicyGradient, ratio: torch.Tensor, advantages: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first line of the module's loss, and where a bound made its gradient zero."""
    free, bounded = -ratio * advantages, -_clip(objective, ratio) * advantages
    losses, clipped = torch.maximum(free, bounded), bounded > free
    if objective.dual_clip is not None:
        most = -objective.dual_clip * advantages
        beyond = (advantages < 0) & (losses > most)
        losses, clipped = torch.where(beyond, most, losses), clipped | beyond
    return losses, clipped


def _clip(objective: PolicyGradient, ratio: torch.Tensor) -> torch.Tensor:
    if objective.clip_low is not None:
        ratio = ratio.clamp(min=1 - objective.clip_low)
    if objective.clip_high is not None:
        ratio = ratio.clamp(max=1 + objective.clip_high)
    return ratio


def _response_means(values: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """Mean over each response's tokens, [R]."""
    counts = response.bincount()
    return values.new_zeros(len(counts)).index_add(0, response, values) / counts.clamp(min=1)
