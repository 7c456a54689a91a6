"""The simulated schedule is the loop's: `OnlineLoop` itself, with stand-ins that take a known time by a clock that jumps from event to
event, needs the same time in every step as its simulation, and engines and ranks are idle for as long."""

from __future__ import annotations

import asyncio
import itertools
import math
import selectors
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rlhf.engines.sampling import Sampling
from rlhf.loop.online import OnlineLoop
from rlhf.preflight.simulation.engine import Decoding, Engine
from rlhf.preflight.simulation.events import Simulation
from rlhf.preflight.simulation.fit import Fitted, Line
from rlhf.preflight.simulation.recorded import Answer
from rlhf.preflight.simulation.scenario import scenario
from rlhf.types import Assignment, Completion, Prompt, Rollout, Score, Shipment
from tests.loop import fakes

SPEED, JUDGE_S, PUBLISH_S = Decoding(0.02, 0.003), 0.4, 1.5
WHOLE, PIECE, END = Line(0.7, 4e-3), Line(0.2, 3e-3), Line(0.5, 1e-3)
STEPS, PROMPTS = 9, 120
LENGTHS = [(3 + 7 * i % 40, 5 + 23 * i % 97 + 200 * (i % 7 == 0)) for i in range(PROMPTS)]
"""Of the two responses to each prompt; every seventh is long."""


class JumpingClock(asyncio.SelectorEventLoop):
    """An event loop in which nobody waits: its time is that of the next timer."""

    def __init__(self) -> None:
        clock = self

        class Jumping(selectors.SelectSelector):
            def select(self, timeout: float | None = None) -> list:
                assert timeout is not None, "everybody waits for something that will not happen"
                clock.now += timeout
                return super().select(0)

        self.now = 0.0
        super().__init__(Jumping())

    def time(self) -> float:
        return self.now


class Rollouts(fakes.Rollouts):
    """Engines that write at a known speed."""

    def __init__(self, stage: fakes.Stage, engines: int, most: int):
        super().__init__(stage)
        self.engines = engines
        self._models = [Engine(SPEED, most) for _ in range(engines)]
        self.writing: dict[str, int] = {}
        self._ended: dict[int, asyncio.Event] = {}

    async def sample(self, prompt: Prompt, samplings: Sequence[Sampling], with_pair: bool = False) -> Rollout:
        number, version = prompt.token_ids[0], self.version
        place = min(range(self.engines), key=lambda one: (list(self.writing.values()).count(one), one))
        self.writing[prompt.id], self._ended[number] = place, asyncio.Event()
        self._models[place].add(self._now(), number, LENGTHS[number])
        self._foresee(place)
        await self._ended[number].wait()
        del self.writing[prompt.id]
        made = [
            Completion.of_one_version(
                prompt.id, np.full(length, i, np.int32), np.zeros(length, np.float32), version, "stop"
            )
            for i, length in enumerate(LENGTHS[number])
        ]
        return Rollout(prompt, tuple(one.info() for one in made), None, place)

    async def receive(self, shipment: Shipment) -> None:
        for engine in self._models:
            engine.pause(self._now(), paused=True)
        await asyncio.sleep(PUBLISH_S)
        for place, engine in enumerate(self._models):
            engine.pause(self._now(), paused=False)
            self._foresee(place)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _foresee(self, place: int) -> None:
        engine = self._models[place]
        if (when := engine.next_end()) < math.inf:
            asyncio.get_running_loop().call_at(when, self._ends, place, engine.stamp, when)

    def _ends(self, place: int, stamp: int, when: float) -> None:
        if self._models[place].stamp == stamp:
            for number in self._models[place].end(when):
                self._ended[number].set()
            self._foresee(place)


class Rewards(fakes.Rewards):
    async def judge(self, rollout: Rollout) -> Any:
        await asyncio.sleep(JUDGE_S)
        return await super().judge(rollout)


class Policy(fakes.Policy):
    async def learn(self, assignments: Sequence[Assignment], step: Any) -> dict[str, float]:
        await asyncio.sleep(WHOLE.seconds(sum(one.n_tokens() for one in assignments)))
        return await super().learn(assignments, step)

    async def accumulate(self, assignments: Sequence[Assignment], update: int = 0) -> None:
        await super().accumulate(assignments, update)
        await asyncio.sleep(PIECE.seconds(sum(one.n_tokens() for one in assignments)))

    async def finish(self) -> dict[str, float]:
        await asyncio.sleep(END.seconds(sum(one.n_tokens() for one in self.learned[-1])))
        return await super().finish()


def timed_loop(monkeypatch: pytest.MonkeyPatch, clock: JumpingClock, **sections: dict[str, Any]) -> OnlineLoop:
    loop = fakes.make_loop(
        lambda rollout: [Score(float(i)) for i in range(len(rollout.infos))], prompts=PROMPTS, **sections
    )
    stage, rollout = loop.roles.policy.stage, loop.settings.rollout
    rewards = Rewards(stage, loop.roles.rewards._judge)
    loop.roles = type(loop.roles)(Policy(stage), Rollouts(stage, rollout.engines, rollout.max_num_seqs), rewards)
    ticking = types.SimpleNamespace(time=clock.time, perf_counter=clock.time)
    for module in ("clock", "online", "producing"):
        monkeypatch.setattr(f"rlhf.loop.{module}.time", ticking)
    return loop


@pytest.mark.parametrize(
    ("bound", "stream", "engines", "most"),
    [
        (0, "auto", 2, 6),
        (0, "always", 2, 64),
        (1, "auto", 2, 64),
        (2, "auto", 3, 4),
        (2, "never", 1, 64),
        (4, "auto", 2, 8),
    ],
)
def test_every_step_takes_as_long_as_in_its_simulation(
    monkeypatch: pytest.MonkeyPatch, bound: int, stream: str, engines: int, most: int
) -> None:
    clock = JumpingClock()
    loop = timed_loop(
        monkeypatch,
        clock,
        loop={"prompts_per_step": 6, "staleness": bound, "stream": stream, "steps": 18},
        rollout={"engines": engines, "max_num_seqs": most},
        policy={"model": "unused", "micro_batch_tokens": 300},
    )
    with asyncio.Runner(loop_factory=lambda: clock) as runner:
        runner.run(fakes.steps(loop, STEPS))

    fitted = Fitted(
        decoding=SPEED,
        batches_differ=True,
        whole=WHOLE,
        piece=PIECE,
        end=END,
        publish=[PUBLISH_S],
        answers=[Answer("engine-0", 0.0, 1.0, 1, lengths, JUDGE_S) for lengths in LENGTHS],
        learned_share=1.0,
        taught_share=1.0,
        other_s=0.0,
    )
    simulation = Simulation(scenario(loop.settings, loop.settings), fitted, seed=0)
    in_order = itertools.count()
    draw = types.SimpleNamespace(
        choice=lambda options: options[next(in_order)] if len(options) == PROMPTS else options[0], random=lambda: 0.0
    )
    monkeypatch.setattr(simulation, "_random", draw)
    simulated = simulation.run(STEPS)

    recorded = loop.record.lines
    assert [line["time/step"] for line in recorded] == pytest.approx([step.seconds for step in simulated])
    idle = [1 - step.engines_s / step.seconds / engines for step in simulated]
    assert [line["idle/engines"] for line in recorded] == pytest.approx(idle, abs=1e-6)
    idle = [1 - step.policy_s / step.seconds for step in simulated]
    assert [line["idle/policy"] for line in recorded] == pytest.approx(idle, abs=1e-6)
    oldest = [line.get("staleness/max", 0.0) for line in recorded]
    assert oldest == [step.staleness for step in simulated]
