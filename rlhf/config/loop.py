"""`loop`: how many steps, and how large."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.config.base import Section


class LoopSettings(Section):
    steps: int = Field(100, ge=1, le=10**9, description="Steps of the online loop: sample, judge, learn, publish.")
    prompts_per_step: int = Field(64, ge=1, le=10**6, description="Prompts drawn in each step.")
    refill: int = Field(
        0,
        ge=0,
        le=1000,
        description="Dynamic sampling: prompts that teach nothing (ties, identical responses, a group of equal rewards) are replaced in "
        "the same step until `prompts_per_step` teach something, by at most so many times `prompts_per_step` further prompts. 0: none is.",
    )
    staleness: int = Field(
        0,
        ge=0,
        le=1000,
        description="Weight versions that the oldest token of a response may be behind the weights that learn from it: so many steps' "
        "prompts are sampled in advance while the policy learns. 0: the synchronous loop, where sampling and learning take turns.",
    )
    stream: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Learn from a step's prompts in pieces, each as soon as it fills a micro-batch on every rank, while others are still "
        "sampled. The same sums in another order. auto: where `staleness` is above 0 and no `normalise` must see the whole step.",
    )
    max_empty_steps: int = Field(
        5, ge=1, le=10**9, description="So many steps in a row in which no prompt taught anything end the run."
    )
    updates_per_step: int = Field(
        1, ge=1, le=10**6, description="Optimizer steps that one step's prompts are divided over."
    )
    epochs_per_step: int = Field(
        1,
        ge=1,
        le=1000,
        description="Times that each step's data is learned from. Every epoch goes through the same updates in the same order: which "
        "prompts share one does not change.",
    )
    eval_every: int = Field(
        0,
        ge=0,
        le=10**9,
        description="Evaluate on the held-out prompts every so many steps, besides before and after the run. 0: only "
        "before and after.",
    )
    eval_limit: int = Field(64, ge=1, le=10**9, description="Held-out prompts used for an evaluation, at most.")
