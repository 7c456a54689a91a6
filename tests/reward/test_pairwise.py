"""Pairwise judges: the matrix's promises, what becomes of failures, and a model against its own logits."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.cluster import LocalRuntime
from rlhf.reward.errors import RewardError
from rlhf.reward.functions import COMPARE, load_function, prefers_more_letter_a
from rlhf.reward.pairwise import feedback, orders
from rlhf.reward.pairwise_model import load_pairwise_model
from rlhf.reward.reading import COMPARISON
from rlhf.reward.scoring import probability_of
from rlhf.reward.serving.pool import RewardPool
from rlhf.types import Failed, Feedback, Invalid, Rollout, Score, TimedOut

PICKY = "tests.reward.sample_rewards:picky"
probabilities = st.floats(0, 1)


def judged(run, settings, rollout: Rollout) -> Feedback:
    """The verdict of a pool in this process."""
    runtime = LocalRuntime()

    async def scenario():
        pool = await RewardPool.start(runtime, settings)
        verdict = await pool.judge(rollout)
        await pool.close()
        return verdict

    try:
        return run(scenario())
    finally:
        runtime.stop()


@given(st.integers(2, 5).flatmap(lambda k: st.lists(probabilities, min_size=k * k, max_size=k * k)))
def test_the_matrix_is_a_probability_of_either_winner(values: list[float]) -> None:
    k = math.isqrt(len(values))
    raw = np.array(values).reshape(k, k)
    digests = [str(i) for i in range(k)]
    matrix = feedback("p", digests, {order: raw[order] for order in orders(digests)}).preferences
    assert ((matrix + matrix.T) == 1).all() and (matrix.diagonal() == 0.5).all()
    expected = (raw + 1 - raw.T) / 2
    np.fill_diagonal(expected, 0.5)
    assert matrix == pytest.approx(expected, abs=1e-15)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=5), st.floats(-3, 3))
def test_a_liking_for_the_first_place_cancels(strengths: list[float], bias: float) -> None:
    """Judged with logit s_i - s_j + bias, the average over orders is 1/2 exactly where s_i = s_j, and favours the stronger."""
    digests = [str(i) for i in range(len(strengths))]
    answers = {(i, j): 1 / (1 + math.exp(strengths[j] - strengths[i] - bias)) for i, j in orders(digests)}
    verdict = feedback("p", digests, answers)
    for i, j in permutations(range(len(strengths)), 2):
        margin = strengths[i] - strengths[j]
        assert verdict.preferences[i, j] == pytest.approx(0.5) if margin == 0 else True
        assert (verdict.preferences[i, j] - 0.5) * margin >= -1e-15


def test_a_score_is_the_mean_win_rate_over_the_others() -> None:
    answers = {(0, 1): 1.0, (1, 0): 0.0, (0, 2): 0.8, (2, 0): 0.4, (1, 2): 0.5, (2, 1): 0.5}
    verdict = feedback("p", ["a", "b", "c"], answers)
    assert [outcome.value for outcome in verdict.outcomes] == pytest.approx([(1 + 0.7) / 2, 0.25, (0.3 + 0.5) / 2])


def test_identical_responses_are_not_asked_about() -> None:
    assert orders(["a", "b", "a"]) == [(0, 1), (1, 0), (1, 2), (2, 1)]
    verdict = feedback("p", ["a", "a"], {})
    assert verdict.outcomes == (Score(0.5), Score(0.5))
    assert (verdict.preferences == 0.5).all()


def test_a_failed_order_leaves_the_pair_without_a_verdict() -> None:
    answers = {(0, 1): 0.9, (1, 0): TimedOut(1.0), (0, 2): 0.8, (2, 0): 0.2, (1, 2): Failed("x"), (2, 1): 0.5}
    verdict = feedback("p", ["a", "b", "c"], answers)
    assert np.isnan(verdict.preferences[[0, 1, 1, 2], [1, 0, 2, 1]]).all()
    assert verdict.preferences[0, 2] == pytest.approx(0.8)
    assert verdict.outcomes[1] == TimedOut(1.0), "no comparison with it succeeded"
    assert [verdict.outcomes[i].value for i in (0, 2)] == pytest.approx([0.8, 0.2])


def test_position_bias_and_undecided_pairs_are_measured() -> None:
    answers = {(0, 1): 0.9, (1, 0): 0.3, (0, 2): 1.0, (2, 0): 1.0, (1, 2): 0.5, (2, 1): 0.1, (0, 3): 0.9, (3, 0): None}
    answers |= {(1, 3): TimedOut(1.0), (3, 1): 0.2, (2, 3): 0.2, (3, 2): 0.6}
    measures = feedback("p", ["a", "b", "c", "d"], answers).measures
    assert measures["position_bias"] == pytest.approx((0.2, 1.0, -0.4, -0.2))
    assert measures["undecided"] == (0.0, 1.0, 1.0, 0.0), "a verdict of 1/2 names no winner"


@given(st.floats(-5, 5), st.floats(0.01, 3))
def test_the_sign_of_the_bias_is_that_of_the_liking_for_the_first_place(margin: float, bias: float) -> None:
    def first_wins(margin: float, bias: float) -> float:
        return 1 / (1 + math.exp(-margin - bias))

    for liking in (bias, -bias):
        answers = {(0, 1): first_wins(margin, liking), (1, 0): first_wins(-margin, liking)}
        (measured,) = feedback("p", ["a", "b"], answers).measures["position_bias"]
        assert measured * liking > 0


def test_one_response_alone_has_no_verdict() -> None:
    verdict = feedback("p", ["a"], {})
    assert isinstance(verdict.outcomes[0], Invalid) and verdict.preferences.tolist() == [[0.5]]


@pytest.mark.parametrize(
    ("value", "kind"), [(None, Invalid), (math.nan, Invalid), (1.5, Failed), (-0.1, Failed), ("x", Failed)]
)
def test_what_is_no_probability(value, kind) -> None:
    assert isinstance(probability_of(value), kind)


def test_probabilities_to_rounding() -> None:
    assert (probability_of(torch.tensor(0.25)), probability_of(1 + 1e-9), probability_of(True)) == (0.25, 1.0, 1.0)


def test_a_function_compares_in_both_orders(run, tiny_settings, make_text_rollout) -> None:
    settings = tiny_settings(reward={"kind": "pairwise_function", "path": PICKY})
    verdict = judged(run, settings, make_text_rollout(["long one", "short", "bad", "odd", "none", "short"]))
    assert verdict.preferences[0, 1] == pytest.approx(0.9) and verdict.preferences[1, 5] == 0.5
    assert [outcome.value for outcome in verdict.outcomes[:2]] == pytest.approx([0.9, (0.1 + 0.5) / 2])
    assert verdict.outcomes[2].reason.startswith("ValueError: I do not compare this (")
    assert verdict.outcomes[3] == Failed("the pairwise judge returned 1.5, which is not a probability")
    assert isinstance(verdict.outcomes[4], Invalid)
    assert verdict.outcomes[1] == verdict.outcomes[5]


def test_the_built_in_function(run, tiny_settings, make_text_rollout) -> None:
    settings = tiny_settings(
        reward={"kind": "pairwise_function", "path": "rlhf.reward.functions:prefers_more_letter_a"}
    )
    verdict = judged(run, settings, make_text_rollout(["aa", "ab", "bb"]))
    assert verdict.preferences[0, 2] == pytest.approx(1 / (1 + math.exp(-10)))
    assert verdict.outcomes[0].value > verdict.outcomes[1].value > verdict.outcomes[2].value
    assert prefers_more_letter_a("", "ab", "ba", {}) == 0.5


def test_a_scoring_function_is_no_pairwise_one() -> None:
    with pytest.raises(RewardError, match=r"must take 4 arguments, \(prompt, a, b, payload\)"):
        load_function("rlhf.reward.functions:share_of_letter_a", COMPARE)


def test_a_model_compares_as_its_logits_say(run, tiny_settings, make_text_rollout, classifier, tmp_path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = ["good", "a longer text", ""]
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)  # an untrained model would find all texts alike
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(classifier).save_pretrained(tmp_path)
    settings = tiny_settings(reward={"kind": "pairwise_model", "path": str(tmp_path), "batch_size": 4})
    verdict = judged(run, settings, make_text_rollout(texts))
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    for i, j in permutations(range(3), 2):
        logits = []
        for a, b in ((i, j), (j, i)):
            text = COMPARISON.format(prompt="Say it.", a=texts[a], b=texts[b])
            with torch.no_grad():
                logits.append(model(**tokenizer(text, return_tensors="pt")).logits[0, 0])
        expected = (torch.sigmoid(logits[0]) + 1 - torch.sigmoid(logits[1])) / 2
        assert verdict.preferences[i, j] == pytest.approx(expected.item(), abs=1e-6)
    assert np.std(verdict.preferences) > 0.01


def test_a_text_that_the_model_cannot_read_whole_fails(run, tiny_settings, make_text_rollout, classifier) -> None:
    settings = tiny_settings(reward={"kind": "pairwise_model", "path": str(classifier)})
    verdict = judged(run, settings, make_text_rollout(["good", "bad", "x" * 100]))
    assert isinstance(verdict.outcomes[0], Score) and isinstance(verdict.outcomes[1], Score)
    assert "the reward model reads 128" in verdict.outcomes[2].reason


def test_a_model_that_scores_is_refused(tmp_path, classifier, encoder) -> None:
    from rlhf.reward.models import load_model

    with pytest.raises(RewardError, match="gives no reward"):
        load_pairwise_model(str(encoder))
    trained = load_model(str(classifier))
    trained.read("response")
    trained.save(tmp_path)
    with pytest.raises(RewardError, match=r"scores one response.*reward\.kind: model"):
        load_pairwise_model(str(tmp_path))


@pytest.mark.engine
def test_pairwise_ray_server(run, scratch_runtime, tiny_settings, make_text_rollout) -> None:
    import ray

    async def scenario():
        reward = {"kind": "pairwise_function", "path": PICKY}
        pool = await RewardPool.start(scratch_runtime, tiny_settings(reward=reward))
        return await pool.judge(make_text_rollout(["long one", "short"], keep=ray.put))

    verdict = run(scenario())
    assert verdict.preferences == pytest.approx(np.array([[0.5, 0.9], [0.1, 0.5]]))
