"""Several judges as one: combinations against known values, and ensembles of real judges behind the pool."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.cluster import LocalRuntime
from rlhf.config import Settings
from rlhf.config.loader import UserError
from rlhf.config.reward import RewardSettings
from rlhf.reward.judges.ensemble import combine, read_common_set
from rlhf.reward.models import load_model
from rlhf.reward.reading import Example
from rlhf.reward.serving.pool import RewardPool
from rlhf.types import Failed, Feedback, Invalid, Rollout, Score, TimedOut

HERE = "tests.reward.sample_rewards"
LENGTH = {"name": "length", "kind": "function", "path": f"{HERE}:moody"}
LETTER = {"name": "letter", "kind": "function", "path": "rlhf.reward.functions:share_of_letter_a"}
scores = st.lists(st.floats(-50, 50), min_size=2, max_size=6)


def several(**fields: Any) -> dict[str, Any]:
    return {"kind": "several", "path": None, "members": [LENGTH, LETTER], **fields}


def together(combination: str, **fields: Any) -> RewardSettings:
    return RewardSettings.model_validate(several(combine=combination, **fields))


@pytest.mark.parametrize(
    ("combination", "value"), [("mean", 7 / 3), ("worst", 1.0), ("uncertainty", 2.1), ("sum", 1 + 4 - 8)]
)
def test_combinations_have_their_known_values(combination: str, value: float) -> None:
    """Of [1, 2, 4]; the variance is the unbiased one (the biased one would give 2.177778)."""
    assert combine([1.0, 2.0, 4.0], [1.0, 2.0, -2.0], together(combination)) == pytest.approx(value)


@given(scores, st.floats(0, 2))
def test_what_holds_for_any_scores(values: list[float], penalty: float) -> None:
    weights = [1.0] * len(values)
    mean, worst = (combine(values, weights, together(name)) for name in ("mean", "worst"))
    careful = combine(values, weights, together("uncertainty", uncertainty_penalty=penalty))
    assert worst <= mean + 1e-9
    assert careful <= mean + 1e-9
    assert combine(values[::-1], weights, together("worst")) == worst
    assert combine(values, weights, together("sum")) == pytest.approx(mean * len(values))
    assert combine([values[0]] * 3, weights[:1] * 3, together("uncertainty")) == pytest.approx(values[0])


def judged(run: Callable, settings: Settings, rollout: Rollout) -> tuple[Feedback, str]:
    """What a pool in this process says, and the fingerprint of its judge."""
    runtime = LocalRuntime()

    async def scenario() -> tuple[Feedback, str]:
        pool = await RewardPool.start(runtime, settings)
        feedback = await pool.judge(rollout)
        await pool.close()
        return feedback, pool.infos[0].fingerprint

    try:
        return run(scenario())
    finally:
        runtime.stop()


@pytest.fixture
def common_set(tmp_path: Path) -> str:
    path = tmp_path / "common.jsonl"
    rows = [{"response": "a"}, {"response": "abcd", "prompt": "Say it."}, {"response": "bbbbbbb", "n": 3}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_members_are_combined_on_the_scale_of_the_common_set(run, tiny_settings, make_text_rollout, common_set) -> None:
    settings = tiny_settings(reward=several(combine="worst", common_set=common_set))
    feedback, _ = judged(run, settings, make_text_rollout(["aab", "b" * 6]))
    lengths, letters = np.array([1, 4, 7]), np.array([1, 1 / 4, 0])  # of the common set
    expected = [
        min((length - lengths.mean()) / lengths.std(), (letter - letters.mean()) / letters.std())
        for length, letter in ((3, 2 / 3), (6, 0))
    ]
    assert [outcome.value for outcome in feedback.outcomes] == pytest.approx(expected)
    assert feedback.measures["length"] == (3.0, 6.0), "a member's own scores are in its own units"
    assert feedback.measures["letter"] == pytest.approx((2 / 3, 0))
    first = [(3 - lengths.mean()) / lengths.std(), (2 / 3 - letters.mean()) / letters.std()]
    assert feedback.measures["disagreement"][0] == pytest.approx(np.std(first, ddof=1))


def test_a_member_that_fails_is_named_and_the_others_responses_are_judged(
    run, tiny_settings, make_text_rollout
) -> None:
    settings = tiny_settings(reward=several(deadline_s=0.2))
    feedback, _ = judged(run, settings, make_text_rollout(["four", "bad", "slow", "nan"]))
    assert feedback.outcomes[0] == Score(2.0)
    assert feedback.outcomes[1] == Failed(
        'length: ValueError: I do not judge this (tests/reward/sample_rewards.py:12 in moody: raise ValueError("I do not judge this"))'
    )
    assert feedback.outcomes[2] == TimedOut(0.2, who="length")
    assert isinstance(feedback.outcomes[3], Invalid) and feedback.outcomes[3].reason.startswith("length: ")
    assert feedback.measures["letter"] == (0.0,), "of responses with a score only"


def test_an_observer_is_measured_and_counts_for_nothing(run, tiny_settings, make_text_rollout, common_set) -> None:
    watching = {"name": "watching", "kind": "function", "path": f"{HERE}:moody", "weight": 0.0}
    alone = {"name": "letter", "kind": "function", "path": LETTER["path"]}
    settings = tiny_settings(reward=several(members=[alone, watching], combine="worst", common_set=common_set))
    feedback, _ = judged(run, settings, make_text_rollout(["aab", "bad"]))
    letters = np.array([1, 1 / 4, 0])
    expected = [(letter - letters.mean()) / letters.std() for letter in (2 / 3, 1 / 3)]
    assert [outcome.value for outcome in feedback.outcomes] == pytest.approx(expected)
    assert feedback.measures["watching"] == pytest.approx((3.0, np.nan), nan_ok=True), "it refuses `bad`"
    assert "disagreement" not in feedback.measures, "of one"


def test_weights_and_members_transforms_make_a_soft_and(run, tiny_settings, make_text_rollout, tmp_path) -> None:
    path = tmp_path / "references.jsonl"
    header = {"model": "m", "sampling": {}, "judge": {}}
    row = {"prompt": "p", "n_tokens": [1, 1], "cut": [False, False]}
    row["scores"] = {"reward": [0, 0], "length": [2.0, 4.0], "letter": [0.0, 0.0]}
    path.write_text(json.dumps(header) + "\n" + json.dumps(row) + "\n")
    soft = {"transforms": [{"name": "log_sigmoid", "quantile": 0.5}]}
    settings = tiny_settings(
        reward=several(
            combine="sum", members=[LENGTH | soft, LETTER | soft | {"weight": 2.0}], reference_scores=str(path)
        )
    )
    feedback, _ = judged(run, settings, make_text_rollout(["abcd"]))
    expected = -np.log1p(np.exp(-(4 - 3))) - 2 * np.log1p(np.exp(-(0.25 - 0)))
    assert feedback.outcomes[0].value == pytest.approx(expected)
    assert feedback.measures["length"] == (4.0,)


def test_a_prompt_without_reference_scores_is_no_score(run, tiny_settings, make_text_rollout, tmp_path) -> None:
    path = tmp_path / "references.jsonl"
    path.write_text(json.dumps({"model": "m", "sampling": {}, "judge": {}}) + "\n")
    ranked = {"transforms": [{"name": "calibrate"}]}
    reward = several(members=[LENGTH | ranked, LETTER | ranked], combine="worst", reference_scores=str(path))
    feedback, _ = judged(run, tiny_settings(reward=reward), make_text_rollout(["x"]))
    assert isinstance(feedback.outcomes[0], Failed) and "nothing about the prompt p" in feedback.outcomes[0].reason


def test_models_judge_in_an_ensemble_as_they_do_alone(run, tiny_settings, make_text_rollout, classifier) -> None:
    member = {"name": "model", "kind": "model", "path": str(classifier)}
    settings = tiny_settings(reward=several(members=[member, LENGTH]))
    feedback, fingerprint = judged(run, settings, make_text_rollout(["good", "bad text"]))
    alone = load_model(str(classifier)).score([Example((), "good"), Example((), "bad text")])
    assert feedback.measures["model"] == pytest.approx(list(alone), abs=1e-5)
    assert [one.value for one in feedback.outcomes] == pytest.approx([(alone[0] + 4) / 2, (alone[1] + 8) / 2], abs=1e-5)
    assert len(fingerprint) == 16


def test_the_fingerprint_is_of_all_that_decides_the_scores(run, tiny_settings, make_text_rollout, common_set) -> None:
    rollout = make_text_rollout(["x"])

    def fingerprint(**fields: Any) -> str:
        return judged(run, tiny_settings(reward=several(**fields)), rollout)[1]

    same = [fingerprint(), fingerprint(servers=2)]
    others = [
        fingerprint(combine="sum"),
        fingerprint(combine="sum", members=[LENGTH, LETTER | {"weight": 2.0}]),
        fingerprint(members=[LETTER, LENGTH]),
        fingerprint(members=[LENGTH | {"transforms": [{"name": "clip", "low": 0.0}]}, LETTER]),
        fingerprint(common_set=common_set),
    ]
    assert same[0] == same[1]
    assert len({same[0], *others}) == 6


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"response": "x"}', '{"response": "yy"}'], "`letter` gives all 2 responses the score 0"),
        (['{"response": "a"}', '{"response": "bad"}'], "`length` gave 'bad' no score: Failed"),
        (['{"response": "a"}'], "holds 1 responses"),
        (['{"response": "a"}', "nothing"], "common.jsonl:2: not JSON"),
        (['{"response": 3}'], "needs an object with the text `response`"),
    ],
)
def test_a_common_set_that_is_no_use(run, tiny_settings, make_text_rollout, tmp_path, lines, message) -> None:
    path = tmp_path / "common.jsonl"
    path.write_text("\n".join(lines))
    settings = tiny_settings(reward=several(common_set=str(path)))
    with pytest.raises(UserError, match=message):
        judged(run, settings, make_text_rollout(["x"]))


def test_the_common_sets_other_fields_are_the_payload(common_set: str) -> None:
    rows = read_common_set(common_set)
    assert [(prompt.text, dict(prompt.payload), text) for prompt, text in rows] == [
        ("", {}, "a"),
        ("Say it.", {}, "abcd"),
        ("", {"n": 3}, "bbbbbbb"),
    ]
