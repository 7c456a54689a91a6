"""`rlhf plan`: memory, fit, time of a step and a layout, for a configuration or for a model's name."""

from __future__ import annotations

from pathlib import Path

from rlhf.config import Settings
from rlhf.preflight.estimate import Cluster
from rlhf.preflight.report import as_json, make_plan, text


def plan(settings: Settings, cluster: Cluster | None, *, configured: bool, json_path: str | None) -> None:
    """Print the plan.

    Args:
        cluster: the GPUs to plan for; None: memory only.
        configured: the settings are a user's configuration, not typical ones of a model (`preflight.report.typical`).
        json_path: file for the numbers.

    Raises:
        UserError: a model that cannot be used.
    """
    planned = make_plan(settings, cluster, configured=configured)
    print(text(planned))
    if json_path is not None:
        Path(json_path).write_text(as_json(planned) + "\n", encoding="utf-8")
