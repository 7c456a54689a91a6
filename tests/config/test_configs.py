"""The configurations that come with the package: one per method for the demo task, and one per method for eight GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.algorithms import make
from rlhf.config import load
from rlhf.config.algorithm import METHODS
from rlhf.config.method_checks import method_warnings

CONFIGS = Path(__file__).parents[2] / "configs"
FOLDERS = ("movie_reviews", "8b")
VARIANTS = {"movie_reviews": {"online_dpo_lora", "rloo_async", "sft"}, "8b": {"rloo_async"}}


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_method_has_one(folder: str) -> None:
    assert {path.stem for path in (CONFIGS / folder).glob("*.yaml")} == set(METHODS) | VARIANTS[folder]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_it_declares_its_method(folder: str, method: str) -> None:
    settings = load(CONFIGS / folder / f"{method}.yaml")
    assert make(settings).name == method
    assert settings.run.dir == f"runs/{folder}/{method}"


@pytest.mark.parametrize("method", METHODS)
def test_the_demo_runs_are_comparable(method: str) -> None:
    """Equal sampled responses, model, judge, held-out prompts and seed as the demo's own configuration."""
    demo, settings = load(CONFIGS / "movie_reviews.yaml"), load(CONFIGS / "movie_reviews" / f"{method}.yaml")

    def responses(s) -> int:
        return s.loop.steps * s.loop.prompts_per_step * sum(source.n for source in make(s).sources)

    assert responses(settings) == responses(demo) == 768
    assert settings.reward == demo.reward and settings.rollout == demo.rollout
    assert settings.policy.model == demo.policy.model and settings.policy.dtype == demo.policy.dtype
    assert settings.data.eval_prompts == demo.data.eval_prompts
    assert settings.run.seed == demo.run.seed and settings.loop.eval_limit == demo.loop.eval_limit


@pytest.mark.parametrize("method", METHODS)
def test_the_large_runs_use_eight_gpus_and_say_that_they_have_not_run(method: str) -> None:
    path = CONFIGS / "8b" / f"{method}.yaml"
    settings = load(path)
    engines = settings.rollout.engines * settings.rollout.tensor_parallel_size
    assert engines + settings.policy.ranks + settings.reward.servers * settings.reward.gpus == 8
    assert path.read_text().startswith("# Designed, not yet run on a GPU")


def test_the_lora_run_differs_from_its_neighbour_in_what_learns_only() -> None:
    full, lora = (load(CONFIGS / "movie_reviews" / f"{name}.yaml") for name in ("online_dpo", "online_dpo_lora"))
    policy = {"lora": full.policy.lora, "learning_rate": full.policy.learning_rate}
    assert lora.policy.lora.rank > 0
    assert lora.model_copy(update={"policy": lora.policy.model_copy(update=policy), "run": full.run}) == full


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_asynchronous_run_differs_from_its_neighbour_in_how_far_it_runs_ahead_only(folder: str) -> None:
    synchronous, ahead = (load(CONFIGS / folder / f"{name}.yaml") for name in ("rloo", "rloo_async"))
    assert ahead.loop.staleness > 0 and ahead.run.dir == f"runs/{folder}/rloo_async"
    loop = ahead.loop.model_copy(update={"staleness": 0})
    assert ahead.model_copy(update={"loop": loop, "run": synchronous.run}) == synchronous
    assert not list(method_warnings(ahead))
    first = (CONFIGS / folder / "rloo_async.yaml").read_text()
    assert first.startswith("# Designed, not yet run on a GPU") == (folder == "8b")


@pytest.mark.parametrize("path", sorted((CONFIGS / "single_gpu").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_single_gpu_runs_use_one_gpu_in_turns(path: Path) -> None:
    settings = load(path)
    assert settings.cluster.placement == "colocated" and settings.cluster.device == "cuda"
    assert settings.policy.ranks == settings.rollout.engines * settings.rollout.tensor_parallel_size == 1
    assert settings.reward.gpus == 0
    assert load(path, ["reward.kind=model", "reward.path=some/folder"]).reward.model == "some/folder", (
        "it shares the GPU"
    )
    assert path.read_text().startswith("# Designed, not yet run on a GPU: one GPU of ")
    assert settings.run.dir == f"runs/single_gpu/{path.stem.rpartition('_')[0]}"
