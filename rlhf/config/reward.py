"""`reward`: the servers that judge responses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.config.base import Section


class SourceSettings(Section):
    """Who judges, and what."""

    kind: Literal["model", "function", "pairwise_model", "pairwise_function"] = Field(
        "model",
        description="Who judges. `model`: a reward model; `function`: a Python function. Each scores one response. "
        "`pairwise_model`, `pairwise_function`: the same, but they compare two responses, in both orders.",
    )
    path: str = Field(
        description="For a function its import path, `module:name`; for a model its folder (a transformers sequence "
        "classifier, or what `rlhf reward train` writes).",
    )
    input: Literal["response", "conversation"] = Field(
        "response",
        description="What a reward model reads: the response alone, or prompt and response.",
    )

    @property
    def compares(self) -> bool:
        """Two responses are compared; otherwise each is scored."""
        return self.kind.startswith("pairwise")


class RewardSettings(SourceSettings):
    servers: int = Field(1, ge=1, description="Number of reward servers.")
    gpus: float = Field(
        0.0,
        ge=0,
        description="GPUs that each server reserves; a fraction shares one GPU between servers. 0: servers judge on CPUs.",
    )
    batch_size: int = Field(32, ge=1, description="Most responses a server judges in one batch.")
    max_wait_ms: float = Field(10.0, ge=0, description="How long a server waits for a batch to fill, in milliseconds.")
    deadline_s: float = Field(
        60.0,
        gt=0,
        description="Longest wait for a verdict, in seconds; after it the outcome is `TimedOut`.",
    )
    missing_eos_penalty: float = Field(
        0.0,
        ge=0,
        description="Subtracted from the reward of a response that was cut at `rollout.max_tokens`.",
    )
    max_failed_fraction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="A step in which more than this fraction of the outcomes failed or timed out stops the run.",
    )
