"""Methods whose loss contrasts responses, and RAFT, which imitates the best one."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rlhf.config.methods.shared import Ahead, Labels, Pairs, Reduced, Reference, Sampled


class _DpoLoss(Reduced):
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


class OnlineDpo(_DpoLoss, Pairs):
    """Online DPO: pairs of the current policy's responses, logistic loss, fixed reference."""

    ahead: ClassVar[Ahead] = Ahead(
        "approximate",
        "A pair's loss is least where beta h = log(p / (1 - p)), whoever wrote the pair, so soft labels keep the optimum ref "
        "exp(r / beta); but which pairs are compared, and how much each counts where no policy fits all of them, is up to the "
        "older policy.",
    )
    name: Literal["online_dpo"] = Field("online_dpo", description="Guo et al. 2024.")


class Rdpo(_DpoLoss, Pairs):
    """R-DPO: online DPO with a price on length, so that a longer winner teaches less and a shorter one more."""

    ahead: ClassVar[Ahead] = Ahead(
        "approximate",
        "As online DPO: soft labels keep the optimum ref exp((r - alpha |y|) / beta), whoever wrote the pairs; but which pairs "
        "are compared, and how much each counts where no policy fits all of them, is up to the older policy.",
    )
    name: Literal["rdpo"] = Field(description="Park et al. 2024, online.")
    length_coef: float = Field(
        0.01,
        ge=0,
        le=1e6,
        description="Price of a token, in reward units (alpha): alpha times the tokens that the winner has more than the loser is added "
        "to beta h. 0 is online DPO.",
    )


class IterativeDpo(_DpoLoss, Pairs):
    """Iterative DPO: rounds of K samples, best against worst, the reference is the previous iterate."""

    ahead: ClassVar[Ahead] = Ahead(
        "approximate",
        "A round's optimum stays ref exp(r / beta) under soft labels, with the policy at the round's own start as ref; but its "
        "pairs are those of an earlier round.",
    )
    name: Literal["iterative_dpo"] = Field(description="Dong et al. 2024.")
    samples_per_prompt: int = Field(
        8, ge=2, le=4096, description="Responses sampled per prompt (K). Unused with `pairs: dataset`."
    )
    reference: Literal["fixed", "previous", "ema", "extrapolated"] = Field(
        "previous", description=Reference.model_fields["reference"].description
    )
    pairs: Literal["sampled", "dataset"] = Field(
        "sampled",
        description="Learn from fresh responses, or from the fields `chosen` and `rejected` of `data.prompts`; then nothing is "
        "sampled or judged for training.",
    )


class _Nash(Reduced, Pairs):
    tau: float = Field(
        1.0, ge=1e-6, le=1e6, description="Strength of the regularisation towards the reference (the papers' tau)."
    )
    labels: Literal["hard", "soft", "sampled"] = Field("soft", description=Labels.model_fields["labels"].description)
    pairing: Literal["best_vs_worst", "random", "all"] = Field(
        "random", description=Pairs.model_fields["pairing"].description
    )


class OnlineIpo(_Nash):
    """Online IPO: pairs of the current policy's responses, square loss, fixed reference."""

    ahead: ClassVar[Ahead] = Ahead(
        "approximate",
        "On pairs of a policy mu the loss is least at ref exp(P(y beats mu) / tau): each step heads for the best response to an "
        "older policy. A policy that has come to rest is at the equilibrium all the same, but it needs a smaller learning rate "
        "to come to rest.",
    )
    name: Literal["online_ipo"] = Field(description="Calandriello et al. 2024.")


class IpoMd(_Nash):
    """IPO-MD: pairs from the geometric mixture of policy and reference, square loss, fixed reference."""

    ahead: ClassVar[Ahead] = Ahead(
        "approximate",
        "As online IPO, with the mixture of an older policy for mu: a policy that has come to rest is at the equilibrium, but "
        "it needs a smaller learning rate to come to rest.",
    )
    name: Literal["ipo_md"] = Field(description="Calandriello et al. 2024.")
    mixture: float = Field(
        0.125,
        ge=0,
        le=1,
        description="Share of the reference in the mixture that is sampled from (the paper's beta); 0 is the policy alone.",
    )


class Selm(_DpoLoss, Reference, Labels):
    """SELM: DPO on the best against the worst of several responses, and a bonus that lowers the log-prob of y_gen."""

    ahead: ClassVar[Ahead] = Ahead(
        "approximate",
        "The DPO term is as in iterative DPO; y_gen is written by a reference of so many steps before, so the bonus moves the "
        "policy away from that one, not from the present reference.",
    )
    name: Literal["selm"] = Field(description="Zhang et al. 2024.")
    beta: float = Field(0.01, ge=1e-6, le=1e6, description=_DpoLoss.model_fields["beta"].description)
    reference: Literal["fixed", "previous", "ema", "extrapolated"] = Field(
        "previous", description=Reference.model_fields["reference"].description
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


class Xpo(_DpoLoss, Reference, Labels):
    """XPO: DPO on a response of the policy against one of the reference, and a bonus against the latter."""

    ahead: ClassVar[Ahead] = Ahead(
        "approximate",
        "A fixed reference writes y~ at any staleness, so the bonus stays what it is, and the pair's loss is least at the same "
        "point whoever wrote it; but the balance of the two follows the pairs of an older policy.",
    )
    name: Literal["xpo"] = Field(description="Xie et al. 2024.")
    alpha: float = Field(
        1e-5, ge=0, le=1e6, description="Weight of the bonus against what is likely already; 0 leaves it out."
    )


class Slic(Labels, Sampled):
    """SLiC-HF on fresh pairs: a hinge on the log-probs themselves, without a reference, and a likelihood term."""

    ahead: ClassVar[Ahead] = Ahead(
        "approximate",
        "A pair still comes to rest at its margin; but the likelihood term imitates the winners of an older policy, and pulls "
        "the policy back to them.",
    )
    name: Literal["slic"] = Field(description="Zhao et al. 2023, online.")
    pairing: Literal["best_vs_worst", "random", "all"] = Field(
        "best_vs_worst", description=Pairs.model_fields["pairing"].description
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


class Simpo(Labels, Sampled):
    """SimPO on fresh pairs: mean log-probs per token, a margin, and no reference."""

    ahead: ClassVar[Ahead] = Ahead(
        "approximate",
        "A pair still comes to rest where beta times the difference of its mean log-probs is gamma + log(p / (1 - p)); but "
        "which pairs are compared, and how much each counts where no policy fits all of them, is up to the older policy.",
    )
    name: Literal["simpo"] = Field(description="Meng et al. 2024, online.")
    samples_per_prompt: int = Field(
        4, ge=2, le=4096, description=Sampled.model_fields["samples_per_prompt"].description
    )
    pairing: Literal["best_vs_worst", "random", "all"] = Field(
        "best_vs_worst", description=Pairs.model_fields["pairing"].description
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description=_DpoLoss.model_fields["label_smoothing"].description)
    beta: float = Field(2.0, ge=1e-6, le=1e6, description="Factor on the difference of the mean log-probs.")
    gamma: float = Field(
        1.0,
        ge=0,
        le=1e6,
        description="Margin by which `beta` times the difference of the mean log-probs is to exceed 0.",
    )


class Raft(Sampled):
    """RAFT: the likelihood of the best of K fresh responses, and perhaps a pull to the reference."""

    ahead: ClassVar[Ahead] = Ahead(
        "approximate",
        "The policy imitates the best of K responses of an older policy, which is less of a step ahead of it. The pull of "
        "`kl_weight` is still least at the reference, but has the gradient of the KL only once the policy has come to rest.",
    )
    name: Literal["raft"] = Field(description="Dong et al. 2023.")
    samples_per_prompt: int = Field(
        8, ge=2, le=4096, description=Sampled.model_fields["samples_per_prompt"].description
    )
    kl_weight: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="Factor on the KL to the reference, measured on all K responses (lambda); 0 leaves it out.",
    )
    logp_reduce: Literal["sum", "mean"] = Field("sum", description=Slic.model_fields["logp_reduce"].description)
