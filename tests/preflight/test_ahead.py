"""What is looked at before a run that samples ahead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.algorithms import Algorithm, PolicyGradient, make
from rlhf.config import Settings, UserError, load
from rlhf.config.algorithm import OwnAlgorithm
from rlhf.preflight.ahead import check_ahead
from rlhf.preflight.ready import ready

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
HERE = "tests.preflight.test_ahead"


@pytest.mark.parametrize(
    ("override", "off"), [("loop.staleness=1", "loop.staleness=0"), ("loop.stream=always", "loop.stream=auto")]
)
def test_in_debug_mode_on_a_gpu_nothing_is_sampled_ahead(override: str, off: str) -> None:
    """There engines and policy take turns on one GPU. On CPUs they need not."""
    gpu = ["cluster.device=cuda", "rollout.cpu_kv_cache_gb=1.0"]

    def check(*overrides: str) -> None:
        settings = load(TINY, list(overrides))
        check_ahead(settings, make(settings), debug=True)

    with pytest.raises(UserError, match=rf"`{override.partition('=')[0]}`: engines would have to sample.*`--debug`"):
        check(*gpu, override)
    check(*gpu, off)
    check("cluster.device=cpu", override)


def test_fewer_prompts_than_may_be_under_way_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """The tiny run has 40 prompts."""
    ready(load(TINY, ["loop.staleness=4"]))
    assert "loop.staleness" not in caplog.text, "5 x 8 are as many"
    ready(load(TINY, ["loop.staleness=5", "loop.steps=9"]))
    assert "up to 6 x 8 = 48 prompts may be under way" in caplog.text and "holds 40" in caplog.text


def bare(settings: Settings) -> Algorithm:
    """A user's policy gradient, without importance weights."""
    return replace(make(load(TINY, ["algorithm.name=rloo"])), objective=PolicyGradient(correction="none"))


def weighed(settings: Settings) -> Algorithm:
    return replace(bare(settings), objective=PolicyGradient(correction="tis"))


def contrast(settings: Settings) -> Algorithm:
    return make(load(TINY))


def of_the_data_set(settings: Settings) -> Algorithm:
    return replace(contrast(settings), sources=(), dataset_pairs=True)


def own(name: str, staleness: int) -> Settings:
    settings = load(TINY, [f"loop.staleness={staleness}"])
    return settings.model_copy(update={"algorithm": OwnAlgorithm(name=f"{HERE}:{name}")})


@pytest.mark.parametrize(("name", "said"), [("bare", True), ("weighed", False), ("contrast", False)])
def test_an_own_policy_gradient_without_weights_is_said(
    name: str, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    settings = own(name, 1)
    check_ahead(settings, make(settings), debug=False)
    assert ("has `correction` none" in caplog.text) == said


def test_an_own_algorithm_that_samples_nothing_is_refused() -> None:
    settings = own("of_the_data_set", 1)
    with pytest.raises(UserError, match=r"`loop\.staleness`.*no `sources`.*Set `loop\.staleness: 0`"):
        check_ahead(settings, make(settings), debug=False)
    synchronous = own("of_the_data_set", 0)
    check_ahead(synchronous, make(synchronous), debug=False)
