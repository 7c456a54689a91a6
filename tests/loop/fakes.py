"""The roles without a model: responses, rewards and learning are numbers, so that the loop itself can be tried a thousand times.

Each is a class with the methods of its protocol (`rlhf.loop.roles`). All of them act on one `Stage`, which notes every call and can let
one fail or never answer.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf.algorithms import Algorithm, make
from rlhf.cluster import LocalRef
from rlhf.config import Settings
from rlhf.data.ledger import Ledger
from rlhf.engines.sampling import Sampling
from rlhf.loop.judged import JudgedRollout
from rlhf.loop.online import OnlineLoop
from rlhf.loop.roles import Roles
from rlhf.loop.state import RunState
from rlhf.policy import StepContext
from rlhf.policy.kl import KlController
from rlhf.reward.shaping import Shaping
from rlhf.tracking.spans import Timing
from rlhf.types import Assignment, Completion, Feedback, ModelSlot, Outcome, Prompt, Rollout, Shipment

Judge = Callable[[Rollout], Sequence[Outcome]]


class Stage:
    """Where the roles act.

    Attributes:
        calls: every call in order, as `policy.learn`.
        cancelled: those that were cancelled before they answered.
        failing: call -> what it raises.
        silent: number of the call, from 1, that never answers.
        reached: set when that call was made.
        on_devices: who has memory on the devices, where they are shared: the policy, or engines and rewards.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.cancelled: list[str] = []
        self.failing: dict[str, Exception] = {}
        self.silent = 0
        self.reached = asyncio.Event()
        self.on_devices = {"engines", "rewards"}

    def note(self, call: str) -> None:
        """A call that answers at once."""
        self.calls.append(call)
        if call in self.failing:
            raise self.failing[call]

    async def enter(self, call: str) -> None:
        """A call that lets others go on before it answers."""
        self.calls.append(call)
        try:
            if len(self.calls) == self.silent:
                self.reached.set()
                await asyncio.Event().wait()
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled.append(call)
            raise
        if call in self.failing:
            raise self.failing[call]


class Rollouts:
    """Every response is its own number, unless `alike`: then all responses of a prompt are the same token."""

    engines = 1
    writing: Mapping[str, int] = {}
    missing: tuple[ModelSlot, ...] = ()

    def __init__(self, stage: Stage, alike: bool = False, loses: tuple[ModelSlot, ...] = ()):
        """
        Args:
            loses: what must be sent again whenever it was offloaded.
        """
        self.stage, self.alike, self.sampled, self.loses = stage, alike, [], loses
        self.version = 0
        self.lengths: dict[str, int] = {}  # tokens of each response to a prompt; 1 without an entry

    async def sample(self, prompt: Prompt, samplings: Sequence[Sampling], with_pair: bool = False) -> Rollout:
        assert "engines" in self.stage.on_devices
        self.sampled.append(prompt.id)
        await self.stage.enter("rollouts.sample")
        sources = [sampling.source for sampling in samplings for _ in range(sampling.n)]
        made = [self._written(prompt, i, source) for i, source in enumerate(sources)]
        return Rollout(prompt, tuple(one.info() for one in made), LocalRef(made))

    def _written(self, prompt: Prompt, number: int, source: str) -> Completion:
        tokens = np.full(self.lengths.get(prompt.id, 1), 7 if self.alike else number, np.int32)
        logprobs = np.zeros(len(tokens), np.float32)
        return Completion.of_one_version(prompt.id, tokens, logprobs, self.version, "stop", source=source)

    async def probe(self, prompt: Prompt, samplings: Sequence[Sampling]) -> dict[int, Rollout]:
        await self.stage.enter("rollouts.probe")
        return {}

    async def receive(self, shipment: Shipment) -> None:
        assert "engines" in self.stage.on_devices
        await self.stage.enter("rollouts.receive")

    def accept(self, shipment: Shipment, fingerprint: str) -> None:
        self.stage.note("rollouts.accept")
        self.version = shipment.version
        self.missing = tuple(slot for slot in self.missing if slot != shipment.slot)

    async def offload(self) -> None:
        await self.stage.enter("rollouts.offload")
        self.stage.on_devices.discard("engines")
        self.missing = self.loses

    async def reload(self) -> None:
        await self.stage.enter("rollouts.reload")
        assert "policy" not in self.stage.on_devices
        self.stage.on_devices.add("engines")


class Jumbled(Rollouts):
    """Engines that answer in an order of chance."""

    def __init__(self, *args: Any, rng: random.Random):
        super().__init__(*args)
        self._rng = rng

    async def sample(self, prompt: Prompt, samplings: Sequence[Sampling], with_pair: bool = False) -> Rollout:
        for _ in range(self._rng.randrange(30)):
            await asyncio.sleep(0)
        return await super().sample(prompt, samplings, with_pair)


class Rewards:
    """Judges by a function."""

    infos: tuple = ()

    def __init__(self, stage: Stage, judge: Judge):
        self.stage, self._judge = stage, judge

    async def judge(self, rollout: Rollout) -> Feedback:
        assert "rewards" in self.stage.on_devices
        await self.stage.enter("rewards.judge")
        return Feedback(rollout.prompt.id, tuple(self._judge(rollout)))

    async def check(self, step: int) -> dict[str, float]:
        await self.stage.enter("rewards.check")
        return {}

    async def offload(self) -> None:
        await self.stage.enter("rewards.offload")
        self.stage.on_devices.discard("rewards")

    async def reload(self) -> None:
        await self.stage.enter("rewards.reload")
        assert "policy" not in self.stage.on_devices
        self.stage.on_devices.add("rewards")


class Policy:
    """Keeps what it was to learn, and when."""

    specs: tuple = ()

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.learned: list[list[Assignment]] = []
        self.contexts: list[StepContext] = []
        self.pieces: list[tuple[int, list[str]]] = []
        self.partner_follows = False

    async def learn(self, assignments: Sequence[Assignment], step: StepContext) -> dict[str, float]:
        await self.stage.enter("policy.learn")
        self.learned.append(list(assignments))
        self.contexts.append(step)
        return {"policy/kl_response": 2.0}

    async def begin(self, step: StepContext) -> None:
        await self.stage.enter("policy.begin")
        self.learned.append([])
        self.contexts.append(step)

    async def accumulate(self, assignments: Sequence[Assignment], update: int = 0) -> None:
        await self.stage.enter("policy.accumulate")
        self.learned[-1] += assignments
        self.pieces.append((update, [assignment.rollout.prompt.id for assignment in assignments]))

    async def finish(self) -> dict[str, float]:
        await self.stage.enter("policy.finish")
        return {"policy/kl_response": 2.0}

    async def follow(self, step: int) -> Mapping[str, bool]:
        await self.stage.enter("policy.follow")
        return {"reference": False, "partner": self.partner_follows}

    async def measure(self, assignments: Sequence[Assignment]) -> dict[str, float]:
        await self.stage.enter("policy.measure")
        return {}

    async def check_engines(self, probes: Mapping[int, Rollout]) -> dict[str, float]:
        await self.stage.enter("policy.check_engines")
        return {}

    async def check_anchors(self) -> None:
        await self.stage.enter("policy.check_anchors")

    async def send_weights(self, shipment: Shipment) -> str:
        await self.stage.enter("policy.send_weights")
        return "fingerprint"

    async def reload(self) -> None:
        assert not self.stage.on_devices
        await self.stage.enter("policy.reload")
        self.stage.on_devices.add("policy")

    async def offload(self) -> None:
        await self.stage.enter("policy.offload")
        self.stage.on_devices.discard("policy")

    async def save(self, folder: str, tag: str) -> dict[str, str]:
        await self.stage.enter("policy.save")
        return {}

    async def load(self, folder: str, tag: str) -> None:
        await self.stage.enter("policy.load")

    async def export(self, folder: str) -> None:
        await self.stage.enter("policy.export")


class Lines:
    """A record that remembers its lines."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.lines: list[dict[str, Any]] = []
        self.timings: list[Timing] = []

    def step(self, step: int, metrics: Mapping[str, float], warnings: Sequence[str] = ()) -> None:
        self.stage.note("record.step")
        self.lines.append({"step": step, "warnings": list(warnings), **metrics})

    def timing(self, timing: Timing) -> None:
        self.timings.append(timing)


def jumbled(loop: OnlineLoop, seed: int) -> OnlineLoop:
    """The loop with responses that arrive in an order that the seed gives."""
    roles = loop.roles
    loop.roles = Roles(roles.policy, Jumbled(roles.policy.stage, rng=random.Random(seed)), roles.rewards, roles.turns)
    return loop


async def steps(loop: OnlineLoop, count: int = 1) -> list[list[JudgedRollout]]:
    """So many steps of the loop, as `rlhf train` takes them."""
    async with loop.producing():
        return [await loop.step() for _ in range(count)]


def make_loop(
    judge: Judge,
    prompts: int = 20,
    *,
    own: Algorithm | None = None,
    alike: bool = False,
    turns: bool = False,
    stage: Stage | None = None,
    **sections: dict[str, Any],
) -> OnlineLoop:
    """A loop over prompts p0, p1, ... in file order, with stand-ins for roles and record (`loop.roles`, `loop.record`)."""
    tree: dict[str, dict[str, Any]] = {
        "data": {"prompts": "unused.jsonl", "shuffle": False},
        "policy": {"model": "unused"},
        "reward": {"kind": "function", "path": "my_rewards:score"},
        "algorithm": {"name": "online_dpo", "samples_per_prompt": 2},
        "loop": {"prompts_per_step": 4},
    }
    for section, values in sections.items():
        tree[section] = values if section == "algorithm" else tree.get(section, {}) | values
    settings = Settings.model_validate(tree)
    algorithm, stage = own or make(settings), stage or Stage()
    data = [Prompt(f"p{i}", (i,), f"prompt {i}", {"answer": i}) for i in range(prompts)]
    state = RunState(
        Ledger(data, settings.run.seed, settings.data.shuffle),
        KlController(algorithm.objective),
        Shaping.start(settings, data, []),
        run={},
    )
    slots: tuple[ModelSlot, ...] = ("policy", "partner") if algorithm.mixes else ("policy",)
    loses = slots if settings.rollout.sleep_level == 2 else ()
    roles = Roles(Policy(stage), Rollouts(stage, alike, loses), Rewards(stage, judge), turns)
    return OnlineLoop(settings, algorithm, roles, state, Lines(stage))
