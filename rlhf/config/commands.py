"""Which settings the commands that train read, for whoever starts one of them elsewhere."""

from __future__ import annotations

from rlhf.config.loader import load
from rlhf.config.sft_checks import load_sft

LOADERS = {"train": load, "sft": load_sft}
"""Command -> what reads its configuration."""
