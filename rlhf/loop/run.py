"""What the command line calls: train, generate, evaluate. Wires the roles, and takes them down whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from rlhf.algorithms import Algorithm, make
from rlhf.cluster import ActorDied, DeadlineExpired, LocalRuntime, RayRuntime, Runtime, uses_gpu
from rlhf.config import Settings
from rlhf.config.loader import UserError
from rlhf.config.settings import single_process
from rlhf.data.assets import resolve
from rlhf.data.ledger import Ledger
from rlhf.data.prompts import load_prompts, load_tokenizer
from rlhf.loop.checkpoints import Checkpoints
from rlhf.loop.clock import Clock
from rlhf.loop.evaluation import (
    evaluation_sampling,
    held_out,
    held_out_metrics,
    measurable,
    response_rows,
    write_held_out,
)
from rlhf.loop.online import OnlineLoop, Roles
from rlhf.policy import PolicyGroup
from rlhf.reward.pool import RewardPool
from rlhf.rollout.pool import RolloutPool
from rlhf.tracking.record import Record
from rlhf.transfer import TransferSession
from rlhf.types import Prompt, content_id


def train(settings: Settings, debug: bool = False, resume: bool = False) -> None:
    """Run the configured loop to its end.

    Args:
        debug: all roles in this process, one of each, so that a breakpoint works anywhere.
        resume: continue the run in `run.dir` from its last complete checkpoint.

    Raises:
        UserError: something the user can put right.
    """
    if debug:
        settings = single_process(settings)
    asyncio.run(Training(settings, debug, resume).run())


class Training:
    """One run, from its files to its files."""

    def __init__(self, settings: Settings, debug: bool, resume: bool):
        self.settings, self.debug, self.resume = settings, debug, resume
        self.algorithm = make(settings)
        self.tokenizer = load_tokenizer(resolve(settings.policy.model))
        pair_tokens = settings.rollout.max_tokens if self.algorithm.dataset_pairs else None
        prompts = load_prompts(resolve(settings.data.prompts), self.tokenizer, settings.data, pair_tokens)
        self.data_id = content_id([prompt.id for prompt in prompts])
        self.ledger = Ledger(prompts, settings.run.seed, settings.data.shuffle)
        self.held_out_prompts: list[Prompt] = []
        if settings.data.eval_prompts is not None:
            held = load_prompts(resolve(settings.data.eval_prompts), self.tokenizer, settings.data)
            self.held_out_prompts = held[: settings.loop.eval_limit]
        self.checkpoints = Checkpoints(settings.run.dir, settings.checkpoint.keep)

    async def run(self) -> None:
        """Start the roles, take the remaining steps, evaluate, export."""
        settings = self.settings
        with Record(settings, self.resume, resolve) as self.record:
            start, tag = self._starting_point()
            async with started_roles(settings, self.algorithm, self.debug) as roles:
                self.loop = OnlineLoop(settings, self.algorithm, roles, self.ledger, self.record)
                if tag is not None:
                    await roles.policy.load(str(self.checkpoints.folder), tag)
                    roles.policy.restore(self.policy_state)
                await self.loop.publish(version=start)
                if self.algorithm.mixes:
                    await self.loop.publish(version=start, half="partner")
                if start == 0:
                    await self._evaluate(0, "before")
                for step in range(start + 1, settings.loop.steps + 1):
                    await self._step(step)
                await roles.policy.check_anchors()
                await self._evaluate(settings.loop.steps, "after")
                if settings.checkpoint.export:
                    await roles.policy.export(str((self.record.folder / "export").absolute()))

    async def _step(self, step: int) -> None:
        settings = self.settings
        judged = await self.loop.step(step)
        shown = judged[: settings.tracking.samples_per_step]
        self.record.samples(step, [row for one in shown for row in response_rows(one, self.tokenizer)])
        every = settings.checkpoint.every
        if every and (step % every == 0 or step == settings.loop.steps):
            await self._save(step)
        if settings.loop.eval_every and step % settings.loop.eval_every == 0 and step < settings.loop.steps:
            await self._evaluate(step, None)

    async def _evaluate(self, step: int, moment: str | None) -> None:
        """Answer the held-out prompts; `before` and `after` the run the answers are kept for the comparison."""
        if not self.held_out_prompts:
            return
        loop = self.loop
        judged = await loop.sample_and_judge(self.held_out_prompts, [evaluation_sampling(self.settings)], Clock())
        answers = held_out(judged, self.tokenizer)
        kl = await loop.measure(measurable(judged))
        self.record.evaluation(step, held_out_metrics(answers) | kl)
        if moment is not None:
            write_held_out(self.record.folder / f"heldout_{moment}.jsonl", answers)

    async def _save(self, step: int) -> None:
        tag = self.checkpoints.tag(step)
        await self.loop.roles.policy.save(str(self.checkpoints.folder), tag)
        state = {"step": step, "ledger": self.ledger.state(), "data": self.data_id, "seed": self.settings.run.seed}
        state["policy"] = self.loop.roles.policy.state()
        self.checkpoints.complete(tag, state)

    def _starting_point(self) -> tuple[int, str | None]:
        """Steps already done, and the checkpoint that holds them."""
        found = self.checkpoints.latest() if self.resume else None
        if found is None:
            if self.resume:
                self.record.rewind(0)
            return 0, None
        tag, state = found
        if (state["data"], state["seed"]) != (self.data_id, self.settings.run.seed):
            raise UserError(
                f"run.dir={self.settings.run.dir}: the checkpoint {tag} was made with other prompts or another run.seed, so the run "
                "cannot go on where it stopped. Restore data.prompts and run.seed, or start a new run in another run.dir."
            )
        self.ledger.restore(state["ledger"])
        self.policy_state = state["policy"]
        self.record.rewind(state["step"])
        return state["step"], tag


@asynccontextmanager
async def started_roles(settings: Settings, algorithm: Algorithm, debug: bool) -> AsyncIterator[Roles]:
    """All roles, ready and connected; taken down on the way out."""
    runtime = make_runtime(settings, debug)
    started: list[PolicyGroup | RolloutPool | RewardPool] = []

    async def start(role: Coroutine[Any, Any, Any]) -> Any:
        started.append(await role)
        return started[-1]

    try:
        updates = settings.loop.steps * settings.loop.updates_per_step * settings.loop.epochs_per_step
        policy, rollouts, rewards = await asyncio.gather(
            start(PolicyGroup.start(runtime, settings, algorithm, updates)),
            start(RolloutPool.start(runtime, settings, algorithm.mixes)),
            start(RewardPool.start(runtime, settings)),
        )
        host, port = await policy.transfer_address()
        session = TransferSession(
            backend=rollouts.backend,
            host=host,
            port=port,
            world_size=1 + rollouts.workers,
            timeout_s=settings.cluster.publish_deadline_s,
        )
        await asyncio.gather(policy.open_transfer(session), rollouts.connect(session))
        yield Roles(policy, rollouts, rewards, turns=debug and uses_gpu(settings.cluster))
    finally:
        for role in reversed(started):
            with suppress(ActorDied, DeadlineExpired):  # it may be what ended the run
                await role.close()
        runtime.stop()


def make_runtime(settings: Settings, debug: bool) -> Runtime:
    """Ray, or this process in debug mode."""
    if debug:
        return LocalRuntime()
    return RayRuntime(settings.cluster, settings.policy.ranks + settings.rollout.engines + settings.reward.servers)
