"""`cluster`: the Ray cluster and the patience of those who wait for others."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.config.base import Section


class ClusterSettings(Section):
    address: str | None = Field(
        None,
        description="Address of a running Ray cluster (`auto` finds the one on this host). None: start one on this "
        "machine for this run.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="Where models run. auto: CUDA if a GPU is visible.",
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of each actor that computes. None: the machine's cores, since the roles of a "
        "synchronous loop take turns, divided by the actors of the same role.",
    )
    startup_deadline_s: float = Field(
        600.0,
        gt=0,
        description="Longest wait for an actor to load its model, in seconds.",
    )
    learn_deadline_s: float = Field(3600.0, gt=0, description="Longest wait for one learning step, in seconds.")
    publish_deadline_s: float = Field(600.0, gt=0, description="Longest wait for a weight transfer, in seconds.")
