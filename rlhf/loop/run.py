"""`rlhf train`: an online run from its files to its files. Owns what surrounds the steps: reading the inputs, going on from a checkpoint,
evaluations, saving, the export. Starting the roles is in `starting`, a step in `online`, what is remembered in `state`, what of a recorded
run takes the engines' place in `replay`."""

from __future__ import annotations

import asyncio
import logging
from contextlib import closing

from rlhf.algorithms import make
from rlhf.cluster import Runtime
from rlhf.cluster.precision import settle
from rlhf.config import Settings
from rlhf.config.settings import single_process
from rlhf.data.assets import resolve
from rlhf.data.ledger import Ledger
from rlhf.data.loading_time import with_startup_deadline
from rlhf.data.model_folder import find_model
from rlhf.data.prompts import load_prompts, load_tokenizer
from rlhf.loop.evaluation import (
    evaluation_sampling,
    held_out,
    held_out_metrics,
    measurable,
    response_rows,
    write_held_out,
)
from rlhf.loop.judged import measured
from rlhf.loop.keeping import Keeping
from rlhf.loop.online import OnlineLoop
from rlhf.loop.replay import open_replay
from rlhf.loop.starting import reserved_runtime, started_roles
from rlhf.loop.state import RunState
from rlhf.loop.turns import policy_turn
from rlhf.policy.kl import KlController
from rlhf.reward.shaping import Shaping
from rlhf.tracking.folder import check_run_folder
from rlhf.tracking.record import Record, recorded_dtype, sinks_of
from rlhf.training.checkpoints import Checkpoints
from rlhf.training.resume import remembered, run_contents, starting_point
from rlhf.types import Prompt

log = logging.getLogger(__name__)


def train(
    settings: Settings,
    debug: bool = False,
    resume: bool = False,
    full_length: bool = False,
    replay: str | None = None,
) -> None:
    """Run the configured loop to its end.

    Args:
        debug: all roles in this process, one of each, so that a breakpoint works anywhere.
        resume: continue the run in `run.dir` from its last complete checkpoint.
        full_length: no response ends before `rollout.max_tokens`.
        replay: folder of a recorded run whose responses and verdicts are learned from again, instead of new ones.

    Raises:
        UserError: something the user can put right.
    """
    if debug:
        settings = single_process(settings)
    asyncio.run(Training(settings, debug, resume, full_length, replay).run())


def check_replay(settings: Settings, debug: bool, replay: str) -> str:
    """What a replay would do, in a sentence. Raises UserError if it cannot."""
    training = Training(single_process(settings) if debug else settings, debug, resume=False, replay=replay)
    assert training.replay is not None
    return training.replay.words()


class Training:
    """One run, from its files to its files."""

    def __init__(
        self, settings: Settings, debug: bool, resume: bool, full_length: bool = False, replay: str | None = None
    ):
        settings = with_startup_deadline(settings)
        self.settings, self.debug, self.resume, self.full_length = settings, debug, resume, full_length
        check_run_folder(settings.run.dir, resume)
        self.algorithm = make(settings)
        model = find_model(settings.policy.model, "`policy.model`", weights=False)
        self.tokenizer = load_tokenizer(model)
        pair_tokens = settings.rollout.max_tokens if self.algorithm.dataset_pairs else None
        prompts = load_prompts(settings.data.prompts, self.tokenizer, settings.data, pair_tokens)
        self.contents = run_contents(model, prompts)
        self.replay = None if replay is None else open_replay(replay, settings, self.contents)
        if self.replay is not None:
            self.settings = settings = self.replay.settings
        self.held_out_prompts: list[Prompt] = []
        if settings.data.eval_prompts is not None and self.replay is None:  # which has no engines to answer them
            held = load_prompts(settings.data.eval_prompts, self.tokenizer, settings.data)
            self.held_out_prompts = held[: settings.loop.eval_limit]
        self.state = RunState(
            Ledger(prompts, settings.run.seed, settings.data.shuffle, prompts.shares),
            KlController(self.algorithm.objective),
            Shaping.start(settings, prompts, self.held_out_prompts),
            remembered(settings, self.contents),
        )
        self.checkpoints = Checkpoints(settings.run.dir, settings.checkpoint.keep)
        self.start = starting_point(settings, self.contents, settings.loop.steps) if resume else None
        if self.start is not None:
            self.state.restore(self.start.state)
            log.warning("run.dir=%s: %s", settings.run.dir, "; ".join(self.start.words()))

    async def run(self) -> None:
        """Reserve the devices, start the roles, take the remaining steps, evaluate, export."""
        if self.replay is not None:
            log.warning("run.dir=%s: %s", self.settings.run.dir, self.replay.words())
        with (
            closing(sinks_of(self.settings)) as sinks,
            reserved_runtime(self.settings, self.debug, sinks.phase, policy_alone=self.replay is not None) as (
                runtime,
                placement,
            ),
        ):
            before = recorded_dtype(self.settings.run.dir) if self.resume else None
            self.settings, choice = settle(self.settings, runtime, before)
            self.state.run = remembered(self.settings, self.contents)
            with Record(self.settings, self.resume, resolve, sinks) as self.record:
                self.record.computes(choice.dtype, choice.why)
                if placement is not None:
                    self.record.placed(placement.lines())
                await self._train(runtime)

    async def _train(self, runtime: Runtime) -> None:
        settings, state = self.settings, self.state
        if self.resume:  # what is done again; without a checkpoint also what was measured before the first step
            self.record.rewind(-1 if self.start is None else state.step)
        if settings.tracking.responses:
            self.record.keeps_responses(state.step, state.run)
        self.keeping = Keeping(self.record, remote=not runtime.local)
        recording = None if self.replay is None else self.replay.recording
        async with started_roles(runtime, settings, self.algorithm, self.record.phase, recording) as roles:
            if recording is None:
                state.shaping.require_judge(settings.reward, roles.rewards.infos[0].fingerprint)
            self.loop = OnlineLoop(settings, self.algorithm, roles, state, self.record, full_length=self.full_length)
            if self.start is not None:
                self.record.phase(f"loading the checkpoint {self.start.tag}")
                async with policy_turn(roles):
                    await roles.policy.load(str(self.checkpoints.folder), self.start.tag)
            self.record.phase("publishing the weights to the engines, the first time")
            await self.loop.publish()
            await self._steps()
            async with policy_turn(roles):
                await roles.policy.check_anchors()
                if settings.checkpoint.export:
                    self.record.phase(f"exporting to {self.record.folder / 'export'}")
                    await roles.policy.export(str((self.record.folder / "export").absolute()))

    async def _steps(self) -> None:
        """The steps that remain, with the evaluations before and after them."""
        state, resumed = self.state, self.state.step > 0
        if not resumed:
            await self._evaluate("before")
        self.record.phase(f"step {state.step + 1}")
        async with self.loop.producing():
            while state.step < self.settings.loop.steps:
                await self._step()
            await self.keeping.finish()
        if not resumed and not self.full_length:  # a trial of the machines need not learn
            self.loop.progress.require_any()
        await self._evaluate("after")

    async def _step(self) -> None:
        settings, state = self.settings, self.state
        judged = await self.loop.step()
        if self.replay is not None:
            self.replay.recording.require(state.step, judged)
        if settings.tracking.responses:
            await self.keeping.keep(state.step, judged)
        shown = judged[: settings.tracking.samples_per_step]
        self.record.samples(state.step, [row for one in shown for row in response_rows(one, self.tokenizer)])
        last = state.step == settings.loop.steps
        if settings.checkpoint.every and (last or state.step % settings.checkpoint.every == 0):
            await self._save()
        self.loop.progress.require()
        if settings.loop.eval_every and not last and state.step % settings.loop.eval_every == 0:
            await self._evaluate(None)

    async def _evaluate(self, moment: str | None) -> None:
        """Answer the held-out prompts; `before` and `after` the run the answers are kept for the comparison."""
        if not self.held_out_prompts:
            return
        loop = self.loop
        self.record.phase(f"evaluating on {len(self.held_out_prompts)} held-out prompts")
        judged = await loop.sample_and_judge(self.held_out_prompts, [evaluation_sampling(self.settings)])
        answers = held_out(judged, self.tokenizer)
        kl = await loop.measure(measurable(judged))
        self.record.evaluation(self.state.step, held_out_metrics(answers) | measured(judged) | kl)
        if moment is not None:
            write_held_out(self.record.folder / f"heldout_{moment}.jsonl", answers)

    async def _save(self) -> None:
        tag = self.checkpoints.tag(self.state.step)
        self.record.phase(f"saving the checkpoint {tag}")
        await self.keeping.finish()  # a run that goes on from here does not take these steps again
        async with self.loop.policy_turn():
            written = await self.loop.roles.policy.save(str(self.checkpoints.folder), tag)
        self.checkpoints.complete(tag, self.state.state(), written)
