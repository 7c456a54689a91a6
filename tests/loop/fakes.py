"""The three roles without a model: responses, rewards and learning are numbers, so that the loop itself can be tried a thousand times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf.algorithms import Algorithm, make
from rlhf.cluster import LocalRef
from rlhf.config import Settings
from rlhf.data.ledger import Ledger
from rlhf.engines.sampling import Sampling
from rlhf.loop.online import OnlineLoop
from rlhf.loop.roles import Roles
from rlhf.policy import StepContext
from rlhf.reward.shaping import Shaping
from rlhf.types import Assignment, Completion, Feedback, Outcome, Prompt, Rollout, Shipment

Judge = Callable[[Rollout], Sequence[Outcome]]


class Rollouts:
    """Every response is its own number, unless `alike`: then all responses of a prompt are the same token."""

    engines = 1
    missing: tuple = ()

    def __init__(self, alike: bool = False):
        self.alike, self.sampled = alike, []

    async def sample(self, prompt: Prompt, samplings: Sequence[Sampling], with_pair: bool = False) -> Rollout:
        self.sampled.append(prompt.id)
        n = sum(sampling.n for sampling in samplings)
        tokens = [np.array([7 if self.alike else i], np.int32) for i in range(n)]
        made = [Completion.of_one_version(prompt.id, one, np.zeros(1, np.float32), 0, "stop") for one in tokens]
        return Rollout(prompt, tuple(one.info() for one in made), LocalRef(made))

    async def probe(self, *_: Any) -> dict[int, Rollout]:
        return {}

    async def receive(self, *_: Any) -> None:
        pass

    def accept(self, *_: Any) -> None:
        pass


class Rewards:
    """Judges by a function."""

    def __init__(self, judge: Judge):
        self._judge = judge

    async def judge(self, rollout: Rollout) -> Feedback:
        return Feedback(rollout.prompt.id, tuple(self._judge(rollout)))

    async def check(self, step: int) -> dict[str, float]:
        return {}


class Policy:
    """Keeps what it was to learn."""

    specs: tuple = ()

    def __init__(self) -> None:
        self.learned: list[list[Assignment]] = []

    async def learn(self, assignments: Sequence[Assignment], step: StepContext) -> dict[str, float]:
        self.learned.append(list(assignments))
        return {}

    async def follow(self, step: int) -> Mapping[str, bool]:
        return {"reference": False, "partner": False}

    async def check_engines(self, probes: Any) -> dict[str, float]:
        return {}

    async def send_weights(self, shipment: Shipment) -> str:
        return "fingerprint"


class Notes:
    """A record that remembers its lines."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def step(self, step: int, metrics: Mapping[str, float], warnings: Sequence[str] = ()) -> None:
        self.lines.append({"step": step, "warnings": list(warnings), **metrics})


def make_loop(
    judge: Judge,
    prompts: int = 20,
    *,
    own: Algorithm | None = None,
    alike: bool = False,
    **sections: dict[str, Any],
) -> OnlineLoop:
    """A loop over prompts p0, p1, ... in file order, with fakes for roles and record (`loop.roles`, `loop.record`)."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"prompts": "unused.jsonl", "shuffle": False},
        "policy": {"model": "unused"},
        "reward": {"kind": "function", "path": "my_rewards:score"},
        "algorithm": {"name": "online_dpo", "samples_per_prompt": 2},
        "loop": {"prompts_per_step": 4},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    settings = Settings.model_validate(tree)
    data = [Prompt(f"p{i}", (i,), f"prompt {i}", {"answer": i}) for i in range(prompts)]
    ledger = Ledger(data, settings.run.seed, settings.data.shuffle)
    roles: Any = Roles(Policy(), Rollouts(alike), Rewards(judge))
    record: Any = Notes()
    shaping = Shaping.start(settings, data, [])
    return OnlineLoop(settings, own or make(settings), roles, ledger, record, shaping)
