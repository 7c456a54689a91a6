"""Which settings the commands that train read, for code that starts or shows one of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from rlhf.config.loader import command_of, load, read_raw
from rlhf.config.reward_training import RewardTrainingSettings
from rlhf.config.reward_training_checks import load_reward_training
from rlhf.config.settings import Settings
from rlhf.config.sft import SftSettings
from rlhf.config.sft_checks import load_sft

LOADERS: dict[str, Callable[[str | os.PathLike[str], Sequence[str]], Settings | SftSettings]] = {
    "train": load,
    "sft": load_sft,
}
"""Command that can be submitted to a cluster -> what reads its configuration."""


def load_any(
    path: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> Settings | SftSettings | RewardTrainingSettings:
    """A configuration of any command that trains; its fields tell which.

    Raises:
        ConfigError: with all mistakes found.
    """
    raw, _ = read_raw(os.fspath(path))
    command = (command_of(raw) if isinstance(raw, dict) else None) or "train"
    if command == "reward train":
        return load_reward_training(path, overrides)
    return LOADERS[command](path, overrides)
