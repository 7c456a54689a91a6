"""The simulated schedule is the loop's: `OnlineLoop` itself, with stand-ins that take a known time by a clock that jumps from event to
event, needs the same time in every step as its simulation, and engines and ranks are idle for as long."""

from __future__ import annotations

import asyncio
import json
import math
import random
import selectors
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.config import yamls
from rlhf.engines.sampling import Sampling
from rlhf.loop.online import OnlineLoop
from rlhf.loop.roles import Roles
from rlhf.preflight.simulation.engine import Decoding, Engine
from rlhf.preflight.simulation.events import Simulation
from rlhf.preflight.simulation.fit import Fitted, Line
from rlhf.preflight.simulation.recorded import Answer
from rlhf.preflight.simulation.scenario import scenario
from rlhf.preflight.simulation.what_if import what_if
from rlhf.types import Assignment, Completion, Prompt, Rollout, Score, Shipment
from tests.loop import fakes

SPEED, JUDGE_S, PUBLISH_S = Decoding(0.02, 0.003), 0.4, 1.5
WHOLE, PIECE, END = Line(0.7, 4e-3), Line(0.2, 3e-3), Line(0.5, 1e-3)
STEPS, PROMPTS = 9, 400
RNG = random.Random(5)
LENGTHS = [(RNG.randint(3, 40), RNG.randint(5, 100) + 200 * (RNG.random() < 0.15)) for _ in range(PROMPTS)]
"""Of the two responses to each prompt; some are long."""


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
    def __init__(self, stage: fakes.Stage, piece: Line, end: Line):
        super().__init__(stage)
        self._piece, self._end = piece, end

    async def learn(self, assignments: Sequence[Assignment], step: Any) -> dict[str, float]:
        await asyncio.sleep(WHOLE.seconds(sum(one.n_tokens() for one in assignments)))
        return await super().learn(assignments, step)

    async def accumulate(self, assignments: Sequence[Assignment], update: int = 0) -> None:
        await super().accumulate(assignments, update)
        await asyncio.sleep(self._piece.seconds(sum(one.n_tokens() for one in assignments)))

    async def finish(self) -> dict[str, float]:
        await asyncio.sleep(self._end.seconds(sum(one.n_tokens() for one in self.learned[-1])))
        return await super().finish()


class Lines(fakes.Lines):
    """A record that knows when a step ended."""

    def step(self, step: int, metrics: Mapping[str, float], warnings: Sequence[str] = ()) -> None:
        super().step(step, {"time": asyncio.get_running_loop().time(), **metrics}, warnings)


def run(
    monkeypatch: pytest.MonkeyPatch, steps: int, piece: Line = PIECE, end: Line = END, **sections: dict[str, Any]
) -> OnlineLoop:
    """The loop after so many steps."""
    clock = JumpingClock()
    loop = fakes.make_loop(
        lambda rollout: [Score(float(i)) for i in range(len(rollout.infos))], prompts=PROMPTS, **sections
    )
    stage, rollout = loop.roles.policy.stage, loop.settings.rollout
    rewards = Rewards(stage, loop.roles.rewards._judge)
    rollouts = Rollouts(stage, rollout.engines, rollout.max_num_seqs)
    loop = OnlineLoop(
        loop.settings, loop.algorithm, Roles(Policy(stage, piece, end), rollouts, rewards), loop.state, Lines(stage)
    )
    ticking = types.SimpleNamespace(time=clock.time, perf_counter=clock.time)
    for module in ("clock", "online", "producing"):
        monkeypatch.setattr(f"rlhf.loop.{module}.time", ticking)
    with asyncio.Runner(loop_factory=lambda: clock) as runner:
        runner.run(fakes.steps(loop, steps))
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
    loop = run(
        monkeypatch,
        STEPS,
        loop={"prompts_per_step": 6, "staleness": bound, "stream": stream, "steps": 18},
        rollout={"engines": engines, "max_num_seqs": most},
        policy={"model": "unused", "micro_batch_tokens": 300},
    )
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
    draw = types.SimpleNamespace(shuffle=lambda deck: deck.reverse(), choice=lambda found: found[0], random=lambda: 0.0)
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


def write(folder: Path, loop: OnlineLoop) -> str:
    """The run folder of a loop's record."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yamls.dump(loop.settings.model_dump()))
    for name, lines in (("metrics", loop.record.lines), ("spans", [one.line() for one in loop.record.timings])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


@pytest.mark.parametrize(
    ("was", "asked"),
    [
        ((0, 2), (0, 4)),
        ((0, 2), (1, 2)),
        ((0, 2), (2, 4)),
        ((2, 2), (0, 2)),
        ((2, 2), (2, 2)),
        ((2, 4), (1, 1)),
    ],
)
def test_what_a_run_says_of_another_is_what_that_one_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, was: tuple[int, int], asked: tuple[int, int]
) -> None:
    """From the record of a run with (bound, engines) to the time of a step with others, speeds and lengths known from the record alone.
    Ranks that learn in pieces take as long as at once, for of the way that a run did not take nothing better is known."""

    def loop(bound: int, engines: int) -> OnlineLoop:
        return run(
            monkeypatch,
            60,
            Line(0.0, WHOLE.per_token),
            Line(WHOLE.fixed, 0.0),
            loop={"prompts_per_step": 6, "staleness": bound, "steps": 60},
            rollout={"engines": engines, "max_num_seqs": 8, "max_tokens": 310},
            policy={"model": "asset:tiny-llama", "micro_batch_tokens": 640},
            data={"max_prompt_tokens": 8},
        )

    recorded = write(tmp_path / "recorded", loop(*was))
    other = what_if(write(tmp_path / "other", loop(*asked)), []).measured.result
    answer = what_if(recorded, [f"loop.staleness={asked[0]}", f"rollout.engines={asked[1]}"])
    assert answer.asked is not None
    assert answer.asked.result.step_s == pytest.approx(other.step_s, rel=0.06)
    assert answer.asked.result.idle_engines == pytest.approx(other.idle_engines, abs=0.05)
    assert answer.itself.result.step_s == pytest.approx(answer.measured.result.step_s, rel=0.06)
