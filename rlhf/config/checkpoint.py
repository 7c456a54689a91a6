"""`checkpoint`: what is saved, and when."""

from __future__ import annotations

from pydantic import Field

from rlhf.config.base import Section


class CheckpointSettings(Section):
    every: int = Field(
        50,
        ge=0,
        le=10**9,
        description="Write a DeepSpeed checkpoint every so many steps; 0: never. `--resume` continues from the last "
        "complete one.",
    )
    keep: int = Field(
        2, ge=1, le=10**6, description="Checkpoints kept; older ones are deleted after a newer one is complete."
    )
    export: bool = Field(
        True,
        description="Write the final policy in Hugging Face format to `export/` in the run folder.",
    )
