"""Fixtures that several rooms share. The expensive ones live as long as the session."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from rlhf.config.settings import Settings

# No test is timed: how long an example takes says how busy the machine is. The same code gives the same examples, so that a
# change is not blamed for what an earlier one did; `HYPOTHESIS_PROFILE=search` looks for new ones.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# Every test process shares two cores with the engines that it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file begins first: begun last, it would leave one of two test processes idle."""
    items.sort(key=lambda item: item.path.name != "test_end_to_end.py")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny Llama with its tokenizer."""
    from rlhf.data.tiny import build_tiny_model

    folder = tmp_path_factory.mktemp("tiny-llama")
    build_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_settings(tiny_model: Path) -> Callable[..., Settings]:
    """Settings for the tiny model in fp32 on CPU: `tiny_settings(rollout={"engines": 2}, ...)`, one dict per
    section."""

    def make(**sections: dict[str, Any]) -> Settings:
        base: dict[str, dict[str, Any]] = {
            "data": {"prompts": "unused.jsonl", "max_prompt_tokens": 64},
            "policy": {"model": str(tiny_model), "dtype": "fp32"},
            "rollout": {"max_tokens": 48, "cpu_kv_cache_gb": 0.1},
            "reward": {"path": "unused:reward", "kind": "function"},
            "cluster": {"device": "cpu", "threads": 1, "startup_deadline_s": 300, "publish_deadline_s": 120},
        }
        for section, values in sections.items():
            base[section] = base.get(section, {}) | values
        return Settings(**base)

    return make


@pytest.fixture(scope="session")
def ray_runtime() -> Iterator[Any]:
    """A Ray cluster of this session's own, ended with all its processes at the end."""
    from rlhf.cluster import RayRuntime
    from rlhf.config.cluster import ClusterSettings

    runtime = RayRuntime(ClusterSettings(), actors=16)
    yield runtime
    runtime.stop()


@pytest.fixture
def scratch_runtime(ray_runtime: Any) -> Iterator[Any]:
    """The session's Ray runtime for one test, after which the actors that it started end."""
    import ray

    before = len(ray_runtime._actors)
    yield ray_runtime
    for actor in ray_runtime._actors[before:]:
        ray.kill(actor)
    del ray_runtime._actors[before:]


@pytest.fixture(scope="session")
def run() -> Iterator[Callable[[Coroutine], Any]]:
    """Runs a coroutine to its end, always in the same event loop."""
    loop = asyncio.new_event_loop()
    yield loop.run_until_complete
    loop.close()
