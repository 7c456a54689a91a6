"""Starting the roles of an online run, connected and ready, and taking them down whatever happens.

Owns the order in which they start: where they share devices, each must have settled before the next takes stock of the memory. Knows
nothing of steps.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

from rlhf.algorithms import Algorithm
from rlhf.cluster import (
    ActorDied,
    LocalRuntime,
    Placement,
    RayRuntime,
    Runtime,
    resource_request,
    shared_rewards,
    takes_turns,
)
from rlhf.cluster.tasks import task_group
from rlhf.config import Settings
from rlhf.config.checks import optimizer_steps
from rlhf.config.cluster import Role
from rlhf.loop.replay import RecordedRewards, RecordedRollouts, Recording, UnsentPolicy
from rlhf.loop.roles import Roles
from rlhf.policy import PolicyGroup
from rlhf.reward.reference_scores import members_need_references
from rlhf.reward.serving.pool import RewardPool
from rlhf.rollout.pool import RolloutPool

Started = TypeVar("Started", PolicyGroup, RolloutPool, RewardPool)
CLOSE_S = 10.0
"""How long a role gets to end by itself when the run ends for another reason, in seconds. A rank in a long step cannot, and whoever
told the run to end does not wait for it: SLURM and Kubernetes kill after 30 s."""


@contextmanager
def reserved_runtime(
    settings: Settings, debug: bool, say: Callable[[str], None] = lambda _: None, *, policy_alone: bool = False
) -> Iterator[tuple[Runtime, Placement | None]]:
    """A runtime that holds all that the roles want, and who runs where in it (None in debug mode). Ended on the way out.

    Args:
        say: told what goes on.
        policy_alone: for a replay, which has no engines and reward servers.

    Raises:
        UserError: the cluster cannot hold the roles, or one of its nodes cannot read the models.
    """
    say("reserving devices")
    request, folders = resource_request(settings), model_folders(settings)
    if policy_alone:
        request = dataclasses.replace(request, engines=0, servers=0, shared=0, shared_servers=False)
        folders = {"policy": folders["policy"]}
    runtime = make_runtime(settings, debug)
    try:
        placement = runtime.reserve(request)
        runtime.check_files(folders)
        yield runtime, placement
    finally:
        runtime.stop()


@asynccontextmanager
async def started_roles(
    runtime: Runtime,
    settings: Settings,
    algorithm: Algorithm,
    say: Callable[[str], None] = lambda _: None,
    recording: Recording | None = None,
) -> AsyncIterator[Roles]:
    """All roles, ready and connected; taken down on the way out. The run folder must exist.

    Args:
        say: told what goes on.
        recording: engines and reward servers are replaced by what they gave in this one.
    """
    started: list[PolicyGroup | RolloutPool | RewardPool] = []
    say("starting policy, engines and reward" if recording is None else "starting the policy")
    ended_well = False
    try:
        if settings.checkpoint.every:
            runtime.check_files({"policy": {"run.dir": os.path.abspath(settings.run.dir)}})
        if recording is None:
            roles = await _start(runtime, settings, algorithm, say, started)
        else:
            roles = await _start_replay(runtime, settings, algorithm, started, recording)
        yield roles
        ended_well = True
    finally:
        for role in reversed(started):
            with suppress(ActorDied, TimeoutError):  # it may be what ended the run
                await asyncio.wait_for(role.close(), None if ended_well else CLOSE_S)


async def _start(
    runtime: Runtime,
    settings: Settings,
    algorithm: Algorithm,
    say: Callable[[str], None],
    started: list[PolicyGroup | RolloutPool | RewardPool],
) -> Roles:
    """All roles, connected; each is added to `started` as soon as there is something to close."""

    async def start(name: str, role: Coroutine[Any, Any, Started]) -> Started:
        one = await role
        started.append(one)
        say(f"{name} ready")
        return one

    turns = takes_turns(settings, runtime.local)
    updates = optimizer_steps(settings)
    async with task_group() as tasks:
        policy = tasks.create_task(start("policy", PolicyGroup.start(runtime, settings, algorithm, updates)))
        if turns:  # an engine takes stock of its GPU's memory when it starts, so the policy must have settled before
            await (await policy).offload()
        rewards = tasks.create_task(start("reward", RewardPool.start(runtime, settings)))
        if shared_rewards(settings, runtime.local):  # and so must the reward models
            await rewards
        rollouts = tasks.create_task(start("engines", RolloutPool.start(runtime, settings, algorithm.mixes)))
    await _connect(policy.result(), rollouts.result())
    return Roles(policy.result(), rollouts.result(), rewards.result(), turns=turns)


async def _start_replay(
    runtime: Runtime,
    settings: Settings,
    algorithm: Algorithm,
    started: list[PolicyGroup | RolloutPool | RewardPool],
    recording: Recording,
) -> Roles:
    """The policy, with stand-ins for the others."""
    policy = await UnsentPolicy.start(runtime, settings, algorithm, optimizer_steps(settings))
    started.append(policy)
    rollouts = RecordedRollouts(recording)
    return Roles(policy, rollouts, RecordedRewards(rollouts))


async def _connect(policy: PolicyGroup, rollouts: RolloutPool) -> None:
    """Open the session in which the policy's weights go to the engines."""
    host, port = await policy.transfer_address()
    session = rollouts.new_session(host, port)
    async with task_group() as tasks:
        tasks.create_task(policy.open_transfer(session))
        tasks.create_task(rollouts.connect(session))


def make_runtime(settings: Settings, debug: bool) -> Runtime:
    """Ray, or this process in debug mode."""
    if debug:
        return LocalRuntime()
    return RayRuntime(settings.cluster, settings.policy.ranks + settings.rollout.engines + settings.reward.servers)


def model_folders(settings: Settings) -> dict[Role, dict[str, str]]:
    """Role -> field -> folder or file that its actors will read; assets and names of a hub are found by each node itself."""
    policy, reward = settings.policy.model, settings.reward
    critic = getattr(settings.algorithm, "critic_model", None)
    folders: dict[Role, dict[str, str | None]] = {
        "policy": {"policy.model": policy, "algorithm.critic_model": critic},
        "rollout": {"policy.model": policy},
        "reward": {
            "policy.model": policy,
            "reward.common_set": reward.common_set,
            "reward.reference_scores": reward.reference_scores if members_need_references(reward) else None,
            **{f"{place}.path": source.model for place, source in reward.sources()},
        },
    }
    return {
        role: {name: os.path.abspath(path) for name, path in paths.items() if path is not None and os.path.exists(path)}
        for role, paths in folders.items()
    }
