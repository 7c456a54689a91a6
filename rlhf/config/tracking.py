"""`tracking`: where a run is shown and sent. The files in the run folder are always written."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.config.base import Section


class TrackingSettings(Section):
    wandb: Literal["off", "offline", "online"] = Field(
        "off",
        description="Send metrics to Weights & Biases, keep them in its offline format in the run folder, or not.",
    )
    project: str = Field("rlhf", description="The Weights & Biases project.")
    console: Literal["rich", "plain", "off"] = Field(
        "rich",
        description="Progress on the terminal: a live table, one line per step, or nothing. rich becomes plain when "
        "the output is not a terminal.",
    )
    samples_per_step: int = Field(
        4,
        ge=0,
        le=10**6,
        description="Prompts per step whose responses and rewards are written to samples.jsonl.",
    )
    responses: bool = Field(
        False,
        description="Keep everything that each step learned from in responses/, so that the run can be replayed "
        "(`rlhf train --replay`): 8 bytes for each token that is sampled, and about 100 for each response.",
    )
