"""Settings for records that start no engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.config import Settings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a run may go; the prompts lie beside it."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    return tmp_path / "run"


@pytest.fixture
def settings() -> Callable[..., Settings]:
    """settings(folder, section={field: value}, ...)"""

    def make(folder: Path, **sections: dict) -> Settings:
        tree: dict[str, dict] = {
            "run": {"dir": str(folder), "seed": 7},
            "data": {"prompts": str(folder.parent / "prompts.jsonl")},
            "policy": {"model": "asset:tiny-llama"},
            "reward": {"kind": "function", "path": "builtins:len"},
            "tracking": {"console": "off"},
        }
        for name, values in sections.items():
            tree[name] = tree.get(name, {}) | values
        return Settings.model_validate(tree)

    return make


@pytest.fixture
def lines() -> Callable[[Path], list[dict]]:
    """The lines of a file that must be strict JSON, every one of them."""

    def read(path: Path) -> list[dict]:
        def reject(name: str) -> None:
            pytest.fail(f"{name} is not JSON")

        return [json.loads(text, parse_constant=reject) for text in path.read_text().splitlines()]

    return read
