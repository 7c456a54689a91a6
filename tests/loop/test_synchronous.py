"""With `loop.staleness` 0 the loop is the synchronous one: a plain statement of its step, and the loop compared with it.

The statement knows none of admission, producing, buffer, collecting and batch. All prompts are sampled, then all are judged.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.algorithms.anchors import equals_policy
from rlhf.algorithms.builders import Dropped
from rlhf.algorithms.building import build, teaches
from rlhf.loop.judged import JudgedRollout, rollout_metrics
from rlhf.loop.online import OnlineLoop
from rlhf.loop.sampling import step_samplings
from rlhf.policy import StepContext
from rlhf.types import Assignment, Failed, Feedback, Invalid, Outcome, Rollout, Score, Shipment, TimedOut
from tests.loop.fakes import jumbled, make_loop, steps

STEPS = 3
TIMES = ("time/", "throughput/", "idle/", "warnings")


async def plain_step(loop: OnlineLoop) -> list[JudgedRollout]:
    """The synchronous step, with the loop's parts: lease, sample, judge, shape, build, replace, learn, follow, publish, settle, record."""
    asked, algorithm, state, roles = loop.settings, loop.algorithm, loop.state, loop.roles
    step, size, extra = state.step + 1, asked.loop.prompts_per_step, asked.loop.refill * asked.loop.prompts_per_step
    samplings = step_samplings(algorithm.sources, asked.rollout, seed=asked.run.seed, step=step)
    judged: list[JudgedRollout] = []
    shaped: list[Feedback] = []
    assignments: list[Assignment] = []
    outcomes: dict[str, str] = {}
    taught = rounds = 0
    prompts = state.ledger.lease(size)
    while prompts:
        writing = (roles.rollouts.sample(one, samplings, with_pair=algorithm.dataset_pairs) for one in prompts)
        rollouts = await asyncio.gather(*writing)
        feedbacks = [await verdict(loop, rollout) for rollout in rollouts]
        judged += [JudgedRollout(*pair) for pair in zip(rollouts, feedbacks, strict=True)]
        for rollout, feedback in zip(rollouts, state.shaping.shape(rollouts, feedbacks), strict=True):
            shaped.append(feedback)
            items = build(algorithm, rollout, feedback, random.Random(f"{asked.run.seed}/{step}/{rollout.prompt.id}"))
            if isinstance(items, Dropped):
                outcomes[rollout.prompt.id] = items.reason
            elif extra and not teaches(algorithm.objective, items):
                outcomes[rollout.prompt.id] = "equal_rewards"
            elif taught == size:
                outcomes[rollout.prompt.id] = "surplus"
            else:
                assignments.append(Assignment(rollout, items))
                taught += teaches(algorithm.objective, items)
        likely = math.ceil((size - taught) * len(judged) / max(taught, 1))
        further = min(likely, size, size + extra - len(judged), state.ledger.available)
        rounds += further > 0
        prompts = state.ledger.lease(max(0, further))

    metrics = rollout_metrics(judged) | state.shaping.metrics(shaped) | await roles.rewards.check(step)
    if assignments:
        equal = equals_policy(algorithm.reference, step)
        metrics |= await roles.policy.learn(assignments, StepContext(step, equal=equal, kl_coef=state.kl.coef))
        metrics |= state.kl.after(step, metrics, sum(len(one.members()) for one in assignments))
    changed = await roles.policy.follow(step)
    state.next_version()
    for slot in ("policy", "partner") if algorithm.mixes and changed["partner"] else ("policy",):
        shipment = Shipment(state.version, slot, roles.policy.specs)
        fingerprint, _ = await asyncio.gather(roles.policy.send_weights(shipment), roles.rollouts.receive(shipment))
        roles.rollouts.accept(shipment, fingerprint)

    for one in assignments:
        state.ledger.settle(one.rollout.prompt.id, "trained")
    for prompt_id, reason in outcomes.items():
        state.ledger.settle(prompt_id, reason)
    metrics |= {f"dropped/{reason}": float(count) for reason, count in Counter(outcomes.values()).items()}
    metrics |= {"loop/prompts_trained": float(len(assignments)), "loop/epoch": state.ledger.epoch}
    if extra:
        metrics |= {"refill/prompts": float(len(judged) - size), "refill/rounds": float(rounds)}
    loop.record.step(step, metrics)
    state.finish_step()
    return judged


async def verdict(loop: OnlineLoop, rollout: Rollout) -> Feedback:
    if loop.algorithm.judged:
        return await loop.roles.rewards.judge(rollout)
    return Feedback(rollout.prompt.id, (Invalid("not judged"),) * len(rollout.infos))


# With stand-ins


def learned(loop: OnlineLoop) -> Any:
    """All that is left of a run."""
    policy, state = loop.roles.policy, loop.state
    lines = [{name: value for name, value in line.items() if not name.startswith(TIMES)} for line in loop.record.lines]
    batches = [[(one.rollout.prompt, one.rollout.infos, one.items) for one in batch] for batch in policy.learned]
    calls = [
        call for call in policy.stage.calls if not call.endswith((".sample", ".judge", ".probe", ".check", "_engines"))
    ]
    return batches, policy.contexts, lines, calls, state.state()


@given(
    seed=st.integers(0, 2**32),
    algorithm=st.sampled_from(
        [
            {"name": "online_dpo", "samples_per_prompt": 3},
            {"name": "iterative_dpo", "samples_per_prompt": 2, "pairing": "all"},
            {"name": "nash_ema"},
            {"name": "xpo"},
            {"name": "raft"},
            {"name": "grpo", "samples_per_prompt": 3, "kl_coef": 0.0},
            {"name": "ppo", "kl_target": 1.0, "kl_horizon": 10},
        ]
    ),
    refill=st.integers(0, 3),
    transforms=st.sampled_from(
        [(), ({"name": "normalise"},), ({"name": "clip", "low": 0.0, "high": 1.0}, {"name": "normalise"})]
    ),
    prompts=st.integers(4, 30),
    kinds=st.sets(st.sampled_from(["failed", "invalid", "late", "alike"])),
)
@settings(max_examples=60)
def test_the_loop_is_the_plain_one(
    seed: int, algorithm: dict[str, Any], refill: int, transforms: tuple[Any, ...], prompts: int, kinds: set[str]
) -> None:
    def judge(rollout: Rollout) -> list[Outcome]:
        rng = random.Random(f"{seed}/{rollout.prompt.id}")
        rewards: list[Outcome] = [Score(float(rng.randrange(3))) for _ in rollout.infos]
        if "alike" in kinds and rng.random() < 0.5:
            return [rewards[0]] * len(rewards)
        for kind, outcome in (("failed", Failed("x")), ("invalid", Invalid("x")), ("late", TimedOut(1.0))):
            if kind in kinds and len(rewards) > 1 and rng.random() < 0.2:  # a step without a reward ends the run
                rewards[-1] = outcome
        return rewards

    loops = [
        make_loop(
            judge,
            prompts,
            algorithm=algorithm,
            loop={"steps": STEPS, "prompts_per_step": 4, "refill": refill},
            reward={"max_failed_fraction": 1.0, "transforms": list(transforms)},
            run={"seed": seed % 2**16},
            data={"shuffle": bool(seed % 2)},
        )
        for _ in range(2)
    ]

    for loop in loops:
        loop.roles.policy.partner_follows = bool(seed % 3)

    async def plainly(loop: OnlineLoop) -> None:
        for _ in range(STEPS):
            await plain_step(loop)

    asyncio.run(plainly(loops[0]))
    asyncio.run(steps(jumbled(loops[1], seed), STEPS))
    assert learned(loops[1]) == learned(loops[0])
