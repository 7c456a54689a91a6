"""Does the reward tell a good response from a bad one? The run's own reward server judges the two, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf.config import Settings
from rlhf.config.loader import UserError
from rlhf.preflight.finding import Finding
from rlhf.reward.reference_scores import unreferenced
from rlhf.reward.serving.server import RewardServer
from rlhf.types import Completion, Feedback, Invalid, Outcome, Prompt, Score

QUESTION = "How do I keep bread fresh for longer?"
GOOD = (
    "Keep it in a bread box or a paper bag at room temperature, not in the fridge, where it dries out. What you will not eat within "
    "two or three days is best sliced and frozen; a slice is ready again after a minute in the toaster."
)
BAD = "bread bread i dont know stupid question go away go away go away"


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, of which the first should win.

    Attributes:
        payload: what the reward function sees of the prompt's line.
    """

    prompt: str = QUESTION
    good: str = GOOD
    bad: str = BAD
    payload: Mapping[str, Any] = field(default_factory=dict)


def judged(settings: Settings, tokenizer: Any, pair: Pair) -> Feedback:
    """What the run's reward says about the pair: good first.

    Raises:
        RewardError: the function or the model cannot be used.
    """
    if settings.cluster.device == "cuda":  # the driver's host may have no GPU; for two texts a CPU will do
        settings = settings.model_copy(update={"cluster": settings.cluster.model_copy(update={"device": "auto"})})
    # The reference's scores say nothing about this prompt.
    settings = settings.model_copy(update={"reward": unreferenced(settings.reward)})
    prompt = Prompt("doctor", tuple(tokenizer(pair.prompt).input_ids), pair.prompt, pair.payload)
    completions = []
    for text in (pair.good, pair.bad):
        ids = np.asarray(tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int32)
        completions.append(Completion.of_one_version(prompt.id, ids, np.zeros(len(ids), np.float32), 0, "stop"))

    async def ask() -> Feedback:
        server = RewardServer(settings, 0, local=True)
        await server.ready()
        try:
            return await server.judge(prompt, completions)
        finally:
            server.close()

    return asyncio.run(ask())


def check_reward(settings: Settings, tokenizer: Any, pair: Pair) -> Finding:
    """The verdict on the pair, judged."""
    try:
        good, bad = judged(settings, tokenizer, pair).outcomes
    except UserError as error:
        return Finding("reward", "failed", str(error), "correct `reward.path`, `reward.kind` or `reward.input`")
    return compare(good, bad)


def compare(good: Outcome, bad: Outcome) -> Finding:
    """A finding for the two outcomes."""
    for name, outcome in (("good", good), ("bad", bad)):
        if isinstance(outcome, Invalid) and outcome.reason.endswith("None"):
            return Finding(
                "reward",
                "warning",
                f"the {name} response has no reward: {outcome.reason}",
                "if the reward needs fields of the prompt's line, give a pair of your own with --prompt, --good and --bad",
            )
        if not isinstance(outcome, Score):
            return Finding(
                "reward",
                "failed",
                f"the {name} response: {outcome}",
                "fix the reward: it must return a finite number in time (`reward.deadline_s`); the log of this command has its own words",
            )
    assert isinstance(good, Score) and isinstance(bad, Score)
    seen = f"good {good.value:.4g}, bad {bad.value:.4g}"
    if good.value > bad.value:
        return Finding("reward", "ok", seen)
    what = "does not tell the two apart" if good.value == bad.value else "prefers the bad one"
    return Finding(
        "reward",
        "warning",
        f"{seen}: the reward {what}",
        "if this is not what the reward is about, give a pair of your own with --good and --bad; else see that a model has the right "
        "sign, label and `reward.input`",
    )
