"""`rlhf doctor`: prints each finding about this machine, this cluster and this configuration as soon as it is known."""

from __future__ import annotations

from pathlib import Path

from rlhf.config import Settings
from rlhf.preflight import doctor as examination
from rlhf.preflight.checks_reward import Pair


def doctor(settings: Settings | None, *, pair: Pair | None, step: bool, json_path: str | None) -> bool:
    """Print the findings and the verdict. Returns whether the run can work here.

    Args:
        settings: None: the environment only.
        pair: two responses of which the reward should prefer the first.
        step: make a trial step, which loads all models.
        json_path: file for the findings.
    """
    findings = []
    for finding in examination.examine(settings, examination.Wanted(pair, _trial_step if step else None)):
        print(examination.line(finding), flush=True)
        findings.append(finding)
    if json_path is not None:
        Path(json_path).write_text(examination.as_json(findings) + "\n", encoding="utf-8")
    fit = examination.fit(findings)
    print("fit" if fit else "NOT FIT")
    return fit


def _trial_step(trial: Settings) -> None:
    from rlhf.loop.run import train

    train(trial, full_length=True)
