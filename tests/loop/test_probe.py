"""An engine that holds the right bytes and computes something else stops the run, whatever is sampled."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.algorithms import make
from rlhf.engines.reload import Reload
from rlhf.loop.probe import RESPONSES, TOKENS, probe_samplings, probed_slots
from rlhf.policy import InvariantBroken
from rlhf.policy.probe import Gap, require_small
from tests.loop.test_methods import settings, train


@pytest.mark.parametrize(
    ("method", "engines", "options", "expected"),
    [
        ("online_dpo", 1, [], ()),  # the responses show it
        ("online_dpo", 2, [], ("policy",)),  # on average two engines hide one
        ("online_dpo", 1, ["rollout.top_p=0.9"], ("policy",)),
        ("online_dpo", 1, ["rollout.top_k=5"], ("policy",)),
        ("xpo", 1, [], ("partner",)),
        ("ipo_md", 1, ["algorithm.mixture=0.5"], ("policy", "partner")),
        ("ipo_md", 1, ["algorithm.mixture=0.5", "run.invariants=false"], ()),
    ],
)
def test_what_no_response_shows_is_probed(
    tmp_path: Path, method: str, engines: int, options: list[str], expected: tuple[str, ...]
) -> None:
    chosen = settings(method, tmp_path / "run", *options)
    assert probed_slots(chosen, make(chosen), engines) == expected
    for sampling in probe_samplings(chosen, make(chosen), engines, step=1):
        assert (sampling.top_p, sampling.top_k, sampling.ignore_eos) == (1.0, 0, True)
        assert sampling.mixture == (sampling.source == "partner")


def test_a_probe_is_at_the_temperature_of_the_trainers_log_probs(tmp_path: Path) -> None:
    for method, temperature in (("grpo", 0.7), ("online_dpo", 1.0)):
        chosen = settings(method, tmp_path / "run", "rollout.temperature=0.7")
        assert [one.temperature for one in probe_samplings(chosen, make(chosen), 2, step=1)] == [temperature]


def test_each_engine_and_each_slot_must_agree() -> None:
    sound = {"policy": [Gap(0.01, 0.0), Gap(0.02, 0.0)], "partner": [Gap(0.03, 0.0), Gap(0.0, 0.0)]}
    assert require_small(sound, [0, 1], 0.1) == {"policy/probe_gap": 0.02, "policy/probe_gap_partner": 0.03}
    for gap in (Gap(0.2, 0.01), Gap(math.nan, math.nan)):
        with pytest.raises(InvariantBroken, match="engine 3 holds the weights of the partner .* does not compute"):
            require_small(sound | {"partner": [Gap(0.03, 0.0), gap]}, [0, 3], 0.1)


def test_a_sound_engine_is_not_stopped_by_the_few_tokens_of_a_probe() -> None:
    """Rounding in bf16 as SmolLM2 has it, 0.05 nats on average: hardly any probe of many exceeds the bound; garbage always does."""
    rng = np.random.default_rng(0)
    tokens = RESPONSES * TOKENS
    rounding = np.abs(rng.normal(scale=0.05 * math.sqrt(math.pi / 2), size=(20_000, tokens)))
    garbage = np.abs(rng.normal(scale=1.3 * math.sqrt(math.pi / 2), size=(20_000, tokens)))
    for differences, within in ((rounding, True), (garbage, False)):
        gaps = [Gap(d.mean(), d.std() / math.sqrt(tokens)) for d in differences]
        assert all(gap.within(0.1) == within for gap in gaps)


@pytest.mark.engine
def test_garbage_under_truncated_sampling_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second publication arrives, is attested, and is not put to use as it should be."""
    finish: Callable[..., Any] = Reload.finish
    publications = []

    def spoil(self: Reload, *arguments: Any) -> None:
        finish(self, *arguments)
        publications.append(self)
        if len(publications) == 2:
            self._model.model.norm.weight.data.mul_(-1.0)

    monkeypatch.setattr(Reload, "finish", spoil)
    with pytest.raises(InvariantBroken, match="engine 0 holds the weights of the policy .* compare policy.dtype"):
        train("online_dpo", tmp_path / "run", "rollout.top_p=0.9", "rollout.temperature=0.8", "data.eval_prompts=null")
    (step,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert step["policy/probe_gap"] < 1e-4
    assert "policy/logprob_gap" not in step, "of truncated samples it would mean nothing"
    assert len(publications) == 2
