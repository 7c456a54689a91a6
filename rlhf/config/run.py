"""`run`: where a run lives and what makes it repeatable."""

from __future__ import annotations

from pydantic import Field

from rlhf.config.base import PathText, Section


class RunSettings(Section):
    dir: PathText = Field(
        "runs/latest",
        description="Folder of the run: configuration, manifest, metrics, samples, checkpoints and the export.",
    )
    seed: int = Field(
        0, ge=0, le=2**32 - 1, description="Seed of the prompt order, of every sampled response and of random pairing."
    )
    invariants: bool = Field(
        True,
        description="Check at run time what must always hold (policy equals reference at step 0, reference unchanged, "
        "engine and trainer log-probs agree) and stop the run with an explanation when it does not.",
    )
    max_logprob_gap: float = Field(
        0.1,
        ge=1e-9,
        le=1000,
        description="Largest allowed mean absolute gap, in nats per token, between the engine's and the trainer's "
        "log-probs of the same tokens (those it learns from, or a probe where these cannot be compared). bf16 needs about "
        "0.05, fp32 less than 0.001.",
    )
