"""The whole settings tree."""

from __future__ import annotations

from rlhf.config.algorithm import AlgorithmSettings
from rlhf.config.base import Section
from rlhf.config.checkpoint import CheckpointSettings
from rlhf.config.cluster import ClusterSettings
from rlhf.config.data import DataSettings
from rlhf.config.loop import LoopSettings
from rlhf.config.methods.contrast import OnlineDpo
from rlhf.config.policy import PolicySettings
from rlhf.config.reward import RewardSettings
from rlhf.config.rollout import RolloutSettings
from rlhf.config.run import RunSettings
from rlhf.config.tracking import TrackingSettings


class Settings(Section):
    """Everything a run depends on. Required: `data.prompts`, `policy.model`, and who judges (`reward`)."""

    run: RunSettings = RunSettings()
    data: DataSettings
    policy: PolicySettings
    rollout: RolloutSettings = RolloutSettings()
    reward: RewardSettings = RewardSettings()
    algorithm: AlgorithmSettings = OnlineDpo()
    loop: LoopSettings = LoopSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()
    cluster: ClusterSettings = ClusterSettings()


def single_process(settings: Settings) -> Settings:
    """The same settings for debug mode: one engine on one device, one policy rank and one reward server."""
    return settings.model_copy(
        update={
            "policy": settings.policy.model_copy(update={"ranks": 1}),
            "rollout": settings.rollout.model_copy(update={"engines": 1, "tensor_parallel_size": 1}),
            "reward": settings.reward.model_copy(update={"servers": 1}),
        }
    )
