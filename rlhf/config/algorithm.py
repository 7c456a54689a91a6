"""`algorithm`: which method, and its choices. Each built-in method has fields and defaults of its own.

A method's class lists exactly the fields that change something for it, so a field that belongs to another method is an
unknown key. Defaults are the paper's where it names one; docs/algorithms/ says where they come from.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

from pydantic import Discriminator, Field, Tag

from rlhf.config.base import PathText, Section

OWN = "module:function"
"""The tag of a user's own algorithm among the built-in names."""


# Fields that several methods share


class _Method(Section):
    # Declared here so that it comes first wherever a method's fields are listed.
    name: str = Field(description="Which method.")
    mask_truncated: bool = Field(
        False,
        description="Learn nothing from a response that was cut at `rollout.max_tokens`: it is in no pair (a prompt left without one "
        "counts in dropped/truncated); for a policy gradient its loss is 0 and it leaves the means, but its reward stays in its "
        "group's baseline.",
    )


class _Sampled(_Method):
    samples_per_prompt: int = Field(2, ge=2, le=4096, description="Responses sampled per prompt (K).")


class _Reference(_Method):
    reference: Literal["fixed", "previous", "ema", "extrapolated"] = Field(
        "fixed",
        description="What the reference is: the starting policy, which never changes; the policy as it was at the start of each round; an "
        "exponential moving average of the policy; or the start of each round moved on by `reference_alpha` times the "
        "round before (accelerated preference optimisation), from which the policy then goes on too.",
    )
    reference_every: int = Field(
        1, ge=1, le=10**9, description="Steps in a round, for the references `previous` and `extrapolated`."
    )
    reference_decay: float = Field(
        0.99, gt=0, lt=1, description="Share of the old average that an `ema` reference keeps in each step."
    )
    reference_alpha: float = Field(
        0.3, ge=0, le=10, description="How far an `extrapolated` reference moves on; 0 is `previous`."
    )


class _Labels(_Method):
    labels: Literal["hard", "soft", "sampled"] = Field(
        "hard",
        description="The target for a pair whose first response is preferred with probability p: 1 for the likelier winner "
        "(hard), p itself (soft), or 1 for a winner drawn with probability p (sampled). p comes from pairwise judges, or "
        "is sigmoid(reward difference / label_temperature).",
    )
    label_temperature: float = Field(
        1.0,
        ge=1e-6,
        le=1e6,
        description="Reward difference, in reward units, at which p is sigmoid(1) = 0.73. Unused with pairwise judges. The temperature "
        "that was fitted to a reward model is not looked up: give it here to have that model's own probabilities.",
    )


class _Pairs(_Reference, _Labels, _Sampled):
    pairing: Literal["best_vs_worst", "random", "all"] = Field(
        "best_vs_worst",
        description="Which of the K responses form pairs: highest against lowest, two at random, or every two.",
    )


class _Reduced(_Method):
    logp_reduce: Literal["sum", "mean"] = Field(
        "sum", description="Log-ratio of a response: sum over its tokens, or mean per token."
    )


# Direct methods


class _DpoLoss(_Reduced):
    beta: float = Field(
        0.1,
        ge=1e-6,
        le=1e6,
        description="Strength of the pull to the reference (inverse temperature of the log-ratio).",
    )
    loss: Literal["logistic", "robust", "hinge"] = Field(
        "logistic",
        description="logistic: DPO (conservative DPO with label smoothing); robust: unbiased under flips at rate "
        "`label_smoothing`; hinge: max(0, 1 - beta h), which leaves a pair alone once it is 1 / beta nats apart (RSO, SLiC with a "
        "reference).",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Assumed probability that a label is flipped.")


class OnlineDpo(_DpoLoss, _Pairs):
    """Online DPO: pairs of the current policy's responses, logistic loss, fixed reference."""

    name: Literal["online_dpo"] = Field("online_dpo", description="Guo et al. 2024.")


class Rdpo(_DpoLoss, _Pairs):
    """R-DPO: online DPO with a price on length, so that a longer winner teaches less and a shorter one more."""

    name: Literal["rdpo"] = Field(description="Park et al. 2024, online.")
    length_coef: float = Field(
        0.01,
        ge=0,
        le=1e6,
        description="Price of a token, in reward units (alpha): alpha times the tokens that the winner has more than the loser is added "
        "to beta h. 0 is online DPO.",
    )


class IterativeDpo(_DpoLoss, _Pairs):
    """Iterative DPO: rounds of K samples, best against worst, the reference is the previous iterate."""

    name: Literal["iterative_dpo"] = Field(description="Dong et al. 2024.")
    samples_per_prompt: int = Field(
        8, ge=2, le=4096, description="Responses sampled per prompt (K). Unused with `pairs: dataset`."
    )
    reference: Literal["fixed", "previous", "ema", "extrapolated"] = Field(
        "previous", description=_Reference.model_fields["reference"].description
    )
    pairs: Literal["sampled", "dataset"] = Field(
        "sampled",
        description="Learn from fresh responses, or from the fields `chosen` and `rejected` of `data.prompts`; then nothing is "
        "sampled or judged for training.",
    )


class _Nash(_Reduced, _Pairs):
    tau: float = Field(
        1.0, ge=1e-6, le=1e6, description="Strength of the regularisation towards the reference (the papers' tau)."
    )
    labels: Literal["hard", "soft", "sampled"] = Field("soft", description=_Labels.model_fields["labels"].description)
    pairing: Literal["best_vs_worst", "random", "all"] = Field(
        "random", description=_Pairs.model_fields["pairing"].description
    )


class OnlineIpo(_Nash):
    """Online IPO: pairs of the current policy's responses, square loss, fixed reference."""

    name: Literal["online_ipo"] = Field(description="Calandriello et al. 2024.")


class IpoMd(_Nash):
    """IPO-MD: pairs from the geometric mixture of policy and reference, square loss, fixed reference."""

    name: Literal["ipo_md"] = Field(description="Calandriello et al. 2024.")
    mixture: float = Field(
        0.125,
        ge=0,
        le=1,
        description="Share of the reference in the mixture that is sampled from (the paper's beta); 0 is the policy alone.",
    )


class Selm(_DpoLoss, _Reference, _Labels):
    """SELM: DPO on the best against the worst of several responses, and a bonus that lowers the log-prob of y_gen."""

    name: Literal["selm"] = Field(description="Zhang et al. 2024.")
    beta: float = Field(0.01, ge=1e-6, le=1e6, description=_DpoLoss.model_fields["beta"].description)
    reference: Literal["fixed", "previous", "ema", "extrapolated"] = Field(
        "previous", description=_Reference.model_fields["reference"].description
    )
    alpha: float = Field(
        0.001, ge=0, le=1e6, description="Weight of the bonus against what is likely already; 0 leaves it out."
    )
    bonus_scale: Literal["alpha_beta", "alpha"] = Field(
        "alpha_beta",
        description="Factor on log pi(y_gen): alpha x beta (equation 4.2 and the released code) or alpha (algorithm 1).",
    )
    ranked_with: Literal["dataset", "samples"] = Field(
        "dataset",
        description="What y_gen is ranked with: `chosen` and `rejected` of `data.prompts` (the paper), or fresh samples.",
    )
    fresh_samples: int = Field(
        2, ge=1, le=4096, description="Responses sampled beside y_gen, with `ranked_with: samples`."
    )
    generation: Literal["greedy", "sampled"] = Field(
        "greedy",
        description="How y_gen is written: greedily (the released code), or sampled (the paper's text).",
    )


class Xpo(_DpoLoss, _Reference, _Labels):
    """XPO: DPO on a response of the policy against one of the reference, and a bonus against the latter."""

    name: Literal["xpo"] = Field(description="Xie et al. 2024.")
    alpha: float = Field(
        1e-5, ge=0, le=1e6, description="Weight of the bonus against what is likely already; 0 leaves it out."
    )


class Slic(_Labels, _Sampled):
    """SLiC-HF on fresh pairs: a hinge on the log-probs themselves, without a reference, and a likelihood term."""

    name: Literal["slic"] = Field(description="Zhao et al. 2023, online.")
    pairing: Literal["best_vs_worst", "random", "all"] = Field(
        "best_vs_worst", description=_Pairs.model_fields["pairing"].description
    )
    labels: Literal["hard", "sampled"] = Field(
        "hard", description="The winner: the likelier one, or drawn with its probability."
    )
    delta: float = Field(1.0, ge=1e-6, le=1e6, description="Margin of the hinge, in nats.")
    likelihood_weight: float = Field(
        0.1, ge=0, le=1e6, description="Weight of the negative log-likelihood of the chosen response (lambda)."
    )
    logp_reduce: Literal["sum", "mean"] = Field(
        "sum", description="Log-prob of a response: sum over its tokens, or mean per token."
    )


class Simpo(_Labels, _Sampled):
    """SimPO on fresh pairs: mean log-probs per token, a margin, and no reference."""

    name: Literal["simpo"] = Field(description="Meng et al. 2024, online.")
    samples_per_prompt: int = Field(
        4, ge=2, le=4096, description=_Sampled.model_fields["samples_per_prompt"].description
    )
    pairing: Literal["best_vs_worst", "random", "all"] = Field(
        "best_vs_worst", description=_Pairs.model_fields["pairing"].description
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description=_DpoLoss.model_fields["label_smoothing"].description)
    beta: float = Field(2.0, ge=1e-6, le=1e6, description="Factor on the difference of the mean log-probs.")
    gamma: float = Field(
        1.0,
        ge=0,
        le=1e6,
        description="Margin by which `beta` times the difference of the mean log-probs is to exceed 0.",
    )


class Raft(_Sampled):
    """RAFT: the likelihood of the best of K fresh responses, and perhaps a pull to the reference."""

    name: Literal["raft"] = Field(description="Dong et al. 2023.")
    samples_per_prompt: int = Field(
        8, ge=2, le=4096, description=_Sampled.model_fields["samples_per_prompt"].description
    )
    kl_weight: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="Factor on the KL to the reference, measured on all K responses (lambda); 0 leaves it out.",
    )
    logp_reduce: Literal["sum", "mean"] = Field("sum", description=Slic.model_fields["logp_reduce"].description)


# Policy-gradient methods

CORRECTION_BOUNDS = {"none": (0.0, 5.0), "tis": (0.0, 5.0), "icepop": (0.5, 5.0), "sequence_mask": (0.95, 1.05)}
"""Lowest and highest importance weight of each `correction`, where none is given. A response's geometric mean lies far closer to 1 than
a token's weight: 5% off for a whole response is an engine that computes something else."""

Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]


class _Kl(_Method):
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


class Gradient(_Reference, _Kl, _Sampled):
    """What all policy-gradient methods with a scalar reward share."""

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
        description="Importance weights for the gap between engine and trainer: clamped (truncated importance sampling), set to 0 "
        "outside the bounds (icepop), or whole responses left out whose mean ratio is outside (sequence_mask).",
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

    name: Literal["cispo"] = Field(description="MiniMax 2025 (M1).")
    samples_per_prompt: int = Field(8, ge=2, le=4096, description="Responses sampled per prompt (K): the group.")
    clip_low: float | None = Field(  # type: ignore[assignment] - wider than its parent's
        None, gt=0, lt=1, description="The ratio to the old policy, as a weight, is clipped at 1 - clip_low; null: not."
    )
    clip_high: float = Field(4.0, ge=1e-6, le=1e6, description="... and at 1 + clip_high.")
    kl_placement: Literal["reward", "loss", "none"] = Field(
        "none", description=_Kl.model_fields["kl_placement"].description
    )


class _NashGradient(_Labels):
    tau: float = Field(
        0.008, ge=1e-6, le=1e6, description="Strength of the regularisation towards the reference (the papers' tau)."
    )
    labels: Literal["hard", "soft", "sampled"] = Field("soft", description=_Labels.model_fields["labels"].description)


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


class OwnAlgorithm(Section):
    """Your own: a function from these settings to an `Algorithm` (docs/algorithms/own.md)."""

    name: str = Field(pattern=r"^[\w.]+:[\w.]+$", description="Its import path, `module:function`.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Whatever it wants to know: a mapping of your own."
    )


METHODS: dict[str, type[Section]] = {
    cls.model_fields["name"].annotation.__args__[0]: cls
    for cls in (
        OnlineDpo,
        Rdpo,
        IterativeDpo,
        OnlineIpo,
        IpoMd,
        Selm,
        Xpo,
        Slic,
        Simpo,
        Raft,
        Ppo,
        ReinforcePlusPlus,
        ReinforcePlusPlusBaseline,
        Rloo,
        Grpo,
        DrGrpo,
        Cispo,
        NashMd,
        NashEma,
    )
}
"""Name -> settings of each built-in method."""


def tag(value: Any) -> str | None:
    """Which method's fields a value (a mapping, or settings) is to have; None for a name nobody knows."""
    name = value.get("name", "online_dpo") if isinstance(value, dict) else getattr(value, "name", None)
    if not isinstance(name, str):
        return None
    return OWN if ":" in name else name if name in METHODS else None


AlgorithmSettings = Annotated[
    Union[tuple(Annotated[cls, Tag(name)] for name, cls in (METHODS | {OWN: OwnAlgorithm}).items())],  # noqa: UP007 - computed
    Discriminator(tag),
]
