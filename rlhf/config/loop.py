"""`loop`: how many steps, and how large."""

from __future__ import annotations

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
