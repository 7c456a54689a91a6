"""What a judge is: it turns texts into raw values and failures; `scoring` and `pairwise` make outcomes of them.

The protocol alone. The judges are in the files beside this one, and `make` is the one table of which kind is which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rlhf.types import Prompt

Texts = tuple[str, ...]
"""One response to score, or two to compare: the first against the second."""


class Judge(Protocol):
    """One raw value or failure for each of `items`, within `deadline_s` seconds."""

    async def judge(self, prompt: Prompt, items: Sequence[Texts], deadline_s: float) -> list[Any]: ...

    def fingerprint(self) -> str | None:
        """Hash of what judges; None where nothing tells whether it has changed."""
        ...

    def close(self) -> None:
        """Release processes and connections."""
        ...
