"""Fields that several methods share. A method's class derives from those whose fields change something for it."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

from pydantic import Field

from rlhf.config.base import Section


class Ahead(NamedTuple):
    """What `loop.staleness` above 0 means for a method.

    Attributes:
        kind: corrected: importance weights make up for what older weights chose. approximate: the loss serves whoever wrote the responses,
            at the price of a property. refused: the gradient would be that of nothing. unaffected: the method samples nothing.
        why: what is kept and what is not, in a sentence or two; shown in messages and in docs/algorithms.
    """

    kind: Literal["corrected", "approximate", "refused", "unaffected"]
    why: str


class Method(Section):
    ahead: ClassVar[Ahead]
    # Declared here so that it comes first wherever a method's fields are listed.
    name: str = Field(description="Which method.")
    mask_truncated: bool = Field(
        False,
        description="Learn nothing from a response that was cut at `rollout.max_tokens`: it is in no pair (a prompt left without one "
        "counts in dropped/truncated); for a policy gradient its loss is 0 and it leaves the means, but its reward stays in its "
        "group's baseline.",
    )


class Sampled(Method):
    samples_per_prompt: int = Field(2, ge=2, le=4096, description="Responses sampled per prompt (K).")


class Reference(Method):
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


class Labels(Method):
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


class Pairs(Reference, Labels, Sampled):
    pairing: Literal["best_vs_worst", "random", "all"] = Field(
        "best_vs_worst",
        description="Which of the K responses form pairs: highest against lowest, two at random, or every two.",
    )


class Reduced(Method):
    logp_reduce: Literal["sum", "mean"] = Field(
        "sum", description="Log-ratio of a response: sum over its tokens, or mean per token."
    )
