"""`rlhf reward train`: fit a reward or preference model to human preferences, or say what would be trained."""

from __future__ import annotations

from rlhf.config.reward_training import RewardTrainingSettings


def dry_run(settings: RewardTrainingSettings, *, resume: bool) -> None:
    """Print the plan, after everything that can be validated without weights has been."""
    from rlhf.preflight.reward_training import describe_reward_training

    print(describe_reward_training(settings, resume=resume))


def train(settings: RewardTrainingSettings, *, resume: bool) -> None:
    """Train, measure and save.

    Args:
        resume: continue from the last checkpoint of the same training.

    Raises:
        UserError: something the user can put right.
    """
    from rlhf.reward.training import train as training

    training.train(settings, resume=resume)
