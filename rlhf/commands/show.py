"""`rlhf config show`: a configuration as a run would take it."""

from __future__ import annotations

from rlhf.config import Settings, show
from rlhf.config.reward_training import RewardTrainingSettings
from rlhf.config.sft import SftSettings


def print_settings(settings: Settings | SftSettings | RewardTrainingSettings) -> None:
    """Every setting with its default, as YAML, and what `policy.dtype: auto` is on this machine."""
    print(show(settings), end="")
    if not isinstance(settings, RewardTrainingSettings) and settings.policy.dtype == "auto":
        from rlhf.cluster.precision import choose_here

        choice = choose_here(settings)
        print(f"# policy.dtype: auto is {choice.dtype} here ({choice.why})")
