"""Policy-gradient methods."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rlhf.config.base import PathText
from rlhf.config.methods.shared import Ahead, Labels, Method, Reference, Sampled

CORRECTION_BOUNDS = {"none": (0.0, 5.0), "tis": (0.0, 5.0), "icepop": (0.5, 5.0), "sequence_mask": (0.95, 1.05)}
"""Lowest and highest importance weight of each `correction`, where none is given. A response's geometric mean lies far closer to 1 than
a token's weight: 5% off for a whole response is an engine that computes something else."""

Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]


class _Kl(Method):
    kl_placement: Literal["reward", "loss", "none"] = Field(
        "reward",
        description="Where the KL to the reference counts: subtracted from each token's reward, added to the loss, or nowhere.",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k1",
        description="Per token, with lr = log pi - log ref: k1 = lr, k2 = lr^2/2, k3 = exp(-lr) - 1 + lr. The reward takes k1 alone: "
        "the others hold nothing there and are refused. In a loss k1 has no gradient in expectation and is refused; k2 has that of the "
        "reverse KL, k3 that of the forward KL.",
    )
    kl_coef: float = Field(0.01, ge=0, le=1e6, description="Factor on the KL; where it starts if `kl_target` is set.")
    kl_target: float | None = Field(
        None,
        ge=1e-6,
        le=1e6,
        description="KL per response (nats) that an adaptive controller steers to by changing the factor; null: constant.",
    )
    kl_horizon: int = Field(
        10_000,
        ge=1,
        le=10**9,
        description="Responses over which the adaptive controller changes the factor by 20% at most; a step never changes it by more.",
    )


_WEIGHED = (
    "The policy term of each token is weighed by pi_old / pi_behaviour, clamped: for a response of one token the expected gradient is that "
    "of the present policy; for a longer one it is PPO's surrogate, in which the other tokens are the older policy's."
)
_BY_SPREAD = Ahead(
    "corrected",
    f"{_WEIGHED} The spread that rewards are divided by is that of the older policy's group, whose members a response is compared with.",
)


class Gradient(Reference, _Kl, Sampled):
    """What all policy-gradient methods with a scalar reward share."""

    ahead: ClassVar[Ahead] = Ahead("corrected", _WEIGHED)
    samples_per_prompt: int = Field(8, ge=1, le=4096, description="Responses sampled per prompt (K).")
    clip_low: float = Field(0.2, gt=0, lt=1, description="The ratio to the old policy is clipped at 1 - clip_low.")
    clip_high: float = Field(0.2, ge=1e-6, le=1e6, description="... and at 1 + clip_high; a higher one is clip-higher.")
    ratio: Literal["token", "sequence"] = Field(
        "token", description="Ratio of each token, or of the whole response (geometric mean: GSPO)."
    )
    entropy_coef: float = Field(0.0, ge=0, le=1e6, description="Weight of the entropy bonus.")
    aggregation: Aggregation = Field(
        "token_mean",
        description="How token losses become one: mean over all tokens of the update; mean over responses of the mean, or of the "
        "sum, over tokens; or the latter divided by `rollout.max_tokens`. Counts are those of all ranks together.",
    )
    correction: Literal["none", "tis", "icepop", "sequence_mask"] = Field(
        "tis",
        description="Importance weights for the gap between engine and trainer, and with `loop.staleness` for how far the policy has moved "
        "since a token was written: clamped (truncated importance sampling), set to 0 outside the bounds (icepop), or "
        "whole responses left out whose mean ratio is outside (sequence_mask).",
    )
    correction_low: float | None = Field(
        None,
        ge=0,
        le=1e6,
        description="Lower bound of the importance weight, or of a response's mean ratio. null: tis 0 (a higher one raises small weights "
        "to it), icepop 0.5, sequence_mask 0.95.",
    )
    correction_high: float | None = Field(
        None, ge=1e-6, le=1e6, description="Upper bound. null: tis and icepop 5, sequence_mask 1.05."
    )
    reward_clip: float | None = Field(
        10.0, ge=1e-6, le=1e9, description="Rewards are clipped to +- this, before any baseline; null: not."
    )
    gamma: float = Field(1.0, gt=0, le=1, description="Discount per token.")
    whiten: bool = Field(
        False, description="Bring the advantages of all response tokens of a step to mean 0 and variance 1."
    )


def correction_bounds(algorithm: Gradient) -> tuple[float, float]:
    """Lowest and highest importance weight: the fields', or the defaults of the correction."""
    low, high = CORRECTION_BOUNDS[algorithm.correction]
    if algorithm.correction_low is not None:
        low = algorithm.correction_low
    return low, high if algorithm.correction_high is None else algorithm.correction_high


class _Clipped(Gradient):
    dual_clip: float | None = Field(
        None,
        gt=1,
        le=1e6,
        description="Bound on the loss of a negative advantage, as a multiple of its size (3 is usual); null: none.",
    )


class _Group(_Clipped):
    samples_per_prompt: int = Field(8, ge=2, le=4096, description="Responses sampled per prompt (K): the group.")


class Ppo(_Clipped):
    """PPO: clipped policy gradient with a learned value baseline and generalised advantage estimation."""

    ahead: ClassVar[Ahead] = Ahead(
        "corrected", f"{_WEIGHED} The returns that the critic learns are the older policy's as well, and not weighed."
    )
    name: Literal["ppo"] = Field(description="Ziegler et al. 2019, Ouyang et al. 2022.")
    samples_per_prompt: int = Field(1, ge=1, le=4096, description="Responses sampled per prompt (K).")
    lam: float = Field(0.95, ge=0, le=1, description="GAE's lambda; 1 is the return less the value.")
    whiten: bool = Field(True, description=Gradient.model_fields["whiten"].description)
    critic_model: PathText | None = Field(
        None,
        description="Where the critic starts: a reward model of the policy's architecture (body and head), or null: the policy's "
        "own body with a fresh head.",
    )
    critic_learning_rate: float = Field(9e-6, ge=0, le=100, description="Peak learning rate of the critic.")
    critic_warmup_steps: int = Field(0, ge=0, le=10**9, description="First steps in which only the critic learns.")
    value_clip: float | None = Field(
        0.2,
        ge=1e-6,
        le=1e6,
        description="How far a value may move from its old one before the loss stops following; null: no clipping.",
    )


class ReinforcePlusPlus(_Clipped):
    """REINFORCE++: returns to go with the token KL inside, whitened over the batch; no critic."""

    name: Literal["reinforce_pp"] = Field(description="Hu 2025.")
    samples_per_prompt: int = Field(1, ge=1, le=4096, description="Responses sampled per prompt (K).")
    whiten: bool = Field(True, description=Gradient.model_fields["whiten"].description)


class ReinforcePlusPlusBaseline(_Group):
    """REINFORCE++-baseline: reward less the group's mean, whitened over the batch; KL as a loss."""

    name: Literal["reinforce_pp_baseline"] = Field(description="Hu 2025.")
    whiten: bool = Field(True, description=Gradient.model_fields["whiten"].description)
    kl_placement: Literal["reward", "loss", "none"] = Field(
        "loss", description=_Kl.model_fields["kl_placement"].description
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k2", description=_Kl.model_fields["kl_estimator"].description)


class Rloo(_Group):
    """RLOO: reward less the mean of the group's other responses."""

    name: Literal["rloo"] = Field(description="Ahmadian et al. 2024.")
    samples_per_prompt: int = Field(4, ge=2, le=4096, description="Responses sampled per prompt (K): the group.")
    kl_before_baseline: bool = Field(
        True,
        description="Subtract a response's KL from its reward before the baseline (the paper); false: token by token, after it.",
    )


class Grpo(_Group):
    """GRPO: reward less the group's mean, divided by its standard deviation; KL as a loss."""

    ahead: ClassVar[Ahead] = _BY_SPREAD
    name: Literal["grpo"] = Field(description="Shao et al. 2024.")
    kl_placement: Literal["reward", "loss", "none"] = Field(
        "loss", description=_Kl.model_fields["kl_placement"].description
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description=_Kl.model_fields["kl_estimator"].description)
    kl_coef: float = Field(0.04, ge=0, le=1e6, description=_Kl.model_fields["kl_coef"].description)
    aggregation: Aggregation = Field(
        "seq_mean_token_mean", description=Gradient.model_fields["aggregation"].description
    )


class DrGrpo(_Group):
    """Dr. GRPO: GRPO without the standard deviation and without division by a response's length; no KL."""

    name: Literal["dr_grpo"] = Field(description="Liu et al. 2025.")
    kl_placement: Literal["reward", "loss", "none"] = Field(
        "none", description=_Kl.model_fields["kl_placement"].description
    )
    aggregation: Aggregation = Field(
        "seq_mean_token_sum_norm", description=Gradient.model_fields["aggregation"].description
    )


class Cispo(Gradient):
    """CISPO: GRPO's advantages with a clipped importance weight on the log-prob, so that no token's gradient is cut off; no KL."""

    ahead: ClassVar[Ahead] = _BY_SPREAD
    name: Literal["cispo"] = Field(description="MiniMax 2025 (M1).")
    samples_per_prompt: int = Field(8, ge=2, le=4096, description="Responses sampled per prompt (K): the group.")
    clip_low: float | None = Field(  # type: ignore[assignment]  # wider than its parent's
        None, gt=0, lt=1, description="The ratio to the old policy, as a weight, is clipped at 1 - clip_low; null: not."
    )
    clip_high: float = Field(4.0, ge=1e-6, le=1e6, description="... and at 1 + clip_high.")
    kl_placement: Literal["reward", "loss", "none"] = Field(
        "none", description=_Kl.model_fields["kl_placement"].description
    )


class _NashGradient(Labels):
    ahead: ClassVar[Ahead] = Ahead(
        "refused",
        "The gradient is a score function without importance weights: on the responses of an older policy the mean payoff, which otherwise "
        "moves nothing, pushes the policy towards that one or away from it, and nothing bounds the push.",
    )
    tau: float = Field(
        0.008, ge=1e-6, le=1e6, description="Strength of the regularisation towards the reference (the papers' tau)."
    )
    labels: Literal["hard", "soft", "sampled"] = Field("soft", description=Labels.model_fields["labels"].description)


class NashMd(_NashGradient):
    """Nash-MD-PG: a response of the policy against one of the mixture of policy and reference."""

    name: Literal["nash_md"] = Field(description="Munos et al. 2023.")
    mixture: float = Field(
        0.125,
        ge=0,
        le=1,
        description="Share of the reference in the mixture that writes the opponent's response; 0 is the policy alone.",
    )


class NashEma(_NashGradient):
    """Nash-EMA-PG: a response of the policy against one of its own moving average."""

    name: Literal["nash_ema"] = Field(description="Munos et al. 2023.")
    opponent_decay: float = Field(
        0.999, gt=0, lt=1, description="Share of the old average that the opponent keeps in each step."
    )
