"""A small valid configuration, and a way to load variations of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.config import Settings, load

VALID = """\
data:
  prompts: prompts.jsonl
policy:
  model: some/model
reward:
  kind: function
  path: my.module:reward
"""


@pytest.fixture
def valid(tmp_path: Path) -> str:
    """Path of the configuration."""
    path = tmp_path / "run.yaml"
    path.write_text(VALID, encoding="utf-8")
    return str(path)


@pytest.fixture
def load_with(valid: str) -> Callable[..., Settings]:
    return lambda *overrides: load(valid, overrides)
