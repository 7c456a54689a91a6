"""`algorithm`: which objective, and its choices."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.config.base import Section

BUILT_IN = ("online_dpo",)


class AlgorithmSettings(Section):
    name: str = Field(
        "online_dpo",
        description="A built-in algorithm (`online_dpo`), or the import path `module:function` of your own: a function "
        "from these settings to an `Algorithm`.",
    )
    samples_per_prompt: int = Field(2, ge=2, description="Responses sampled per prompt (K).")
    beta: float = Field(
        0.1,
        gt=0,
        description="Strength of the pull to the reference (inverse temperature of the log-ratio).",
    )
    pairing: Literal["best_vs_worst", "random"] = Field(
        "best_vs_worst",
        description="Which two of the K responses form the pair: highest against lowest reward, or two at random.",
    )
    labels: Literal["hard", "soft"] = Field(
        "hard",
        description="hard: the higher reward wins with certainty; soft: it wins with probability sigmoid(reward "
        "difference / label_temperature).",
    )
    label_temperature: float = Field(
        1.0,
        gt=0,
        description="Reward difference, in reward units, at which a soft label is sigmoid(1) = 0.73.",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Assumed probability that a label is flipped.")
    loss: Literal["logistic", "robust"] = Field(
        "logistic",
        description="logistic: DPO (conservative DPO with label smoothing); robust: unbiased under flips at rate "
        "`label_smoothing`.",
    )
    logp_reduce: Literal["sum", "mean"] = Field(
        "sum",
        description="Log-ratio of a response: sum over its tokens (the paper), or mean per token.",
    )
