"""What a check says: of `rlhf doctor`, what was seen, whether that is sound, and what to do if not; before a run, why it cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.config import UserError

State = Literal["ok", "warning", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        seen: what was looked at and found, with numbers.
        remedy: what to do; never empty for a warning or a failure.
    """

    name: str
    state: State
    seen: str
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.state in ("warning", "failed") and not self.remedy:
            raise ValueError(f"the finding `{self.name}` has no remedy")


class PlanError(UserError):
    """The run cannot work as configured; the message names the field and the remedy."""
