"""Who takes part in an online run."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.policy import PolicyGroup
from rlhf.reward.serving.pool import RewardPool
from rlhf.rollout.pool import RolloutPool


@dataclass(frozen=True)
class Roles:
    """Who takes part.

    Attributes:
        turns: policy and engines share devices. Then the engines sleep while the policy works, and the policy's optimizer
            states and frozen models are offloaded otherwise; reward models that share them are offloaded as the engines sleep.
    """

    policy: PolicyGroup
    rollouts: RolloutPool
    rewards: RewardPool
    turns: bool = False
