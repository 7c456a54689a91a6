"""`rlhf plan`: memory, fit, time of a step and a layout, for a configuration or for a model's name; with `--simulate` what other layouts of
a recorded run would do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rlhf.config import Settings
from rlhf.preflight.estimate import Cluster
from rlhf.preflight.report import as_json, make_plan, text
from rlhf.preflight.simulation import what_if


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


def simulate(folder: str, overrides: Sequence[str], *, json_path: str | None) -> None:
    """Print what other layouts of a recorded run would do.

    Args:
        folder: the run's.
        overrides: `section.key=value` of what is to be otherwise.
        json_path: file for the numbers.

    Raises:
        UserError: the folder says too little, or an override is wrong.
    """
    answer = what_if.what_if(folder, overrides)
    print(what_if.text(answer))
    if json_path is not None:
        Path(json_path).write_text(json.dumps(what_if.as_numbers(answer), indent=2) + "\n", encoding="utf-8")
