"""Small rollouts, feedback and rewards for tests, and a way into what runs in this process."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.preflight.trial import RESPONSES
from rlhf.tracking import jsonl
from rlhf.tracking.catalogue import find
from rlhf.types import Completion, Feedback, Outcome, Prompt, Rollout, Score


def make_rollout(tokens: Sequence[Sequence[int]], prompt: Sequence[int] = (1, 2, 3), name: str = "p") -> Rollout:
    """A rollout whose completions have these token ids (and log-probs of zero), held by value."""
    from rlhf.cluster import LocalRef

    made = [
        Completion.of_one_version(name, np.array(t, np.int32), np.zeros(len(t), np.float32), 0, "stop") for t in tokens
    ]
    return Rollout(Prompt(name, tuple(prompt), name), tuple(c.info() for c in made), LocalRef(made))


def make_feedback(outcomes: Sequence[float | Outcome], name: str = "p") -> Feedback:
    """Numbers become scores."""
    return Feedback(name, tuple(Score(float(o)) if isinstance(o, int | float) else o for o in outcomes))


def unknown_metrics(run: Path) -> set[str]:
    """The names in a run folder's metrics and evaluations that `rlhf.tracking.catalogue` does not explain."""
    lines = jsonl.read(run / "metrics.jsonl") + jsonl.read(run / "evaluations.jsonl")
    assert lines, run
    return {name for line in lines for name in line if find(name) is None} - {"step", "time", "warnings"}


def broken_reward(prompt: str, response: str, payload: Mapping[str, Any]) -> float:
    """A user's reward function that fails on what a model writes, but not on the trial before the run."""
    if response in RESPONSES:
        return 0.0
    raise RuntimeError("the reward is broken")


def mean_byte(prompt: str, response: str, payload: Mapping[str, Any]) -> float:
    """A reward that hardly ever ties: the mean byte of the response, over 255."""
    text = response.encode()
    return sum(text) / max(len(text), 1) / 255


def coin(prompt: str, response: str, payload: Mapping[str, Any]) -> float:
    """Right or wrong by chance: half of the pairs of responses get equal rewards."""
    return float(zlib.crc32(response.encode()) & 1)


def constant(prompt: str, response: str, payload: Mapping[str, Any]) -> float:
    """A reward that tells nothing apart."""
    return 1.0


def reproducible(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those that say nothing of how busy the machine was: the same in every run of the same."""
    return {name: value for name, value in metrics.items() if not name.startswith("throughput/")}


def rank_inside(group: Any, rank: int = 0) -> Any:
    """The rank's own object behind a `PolicyGroup` or `SupervisedGroup` that runs in this process."""
    return group._ranks.handles[rank].target
