"""What a reward source returns becomes the right outcome, and batches are formed as promised."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlhf.reward.errors import RewardError
from rlhf.reward.functions import exact_match, load_function, negative_length, share_of_letter_a
from rlhf.reward.scoring import failure, outcome_of
from rlhf.types import Failed, Invalid, Score


@pytest.mark.parametrize("value", [1, 1.0, True, np.float32(1), torch.tensor(1.0), torch.tensor([1.0])])
def test_numbers_are_scores(value):
    assert outcome_of(value) == Score(1.0)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), -float("inf")])
def test_no_reward_is_invalid(value):
    assert isinstance(outcome_of(value), Invalid)


@pytest.mark.parametrize("value", ["good", [1.0], {}, torch.zeros(2)])
def test_nonsense_is_failed(value):
    assert isinstance(outcome_of(value), Failed)


def test_failure_carries_the_message():
    assert failure(ValueError("why")) == Failed("ValueError: why")


def test_built_in_functions():
    assert share_of_letter_a("", "Aab?", {}) == 0.5
    assert share_of_letter_a("", "", {}) == 0.0
    assert negative_length("", "two words", {}) == -2.0
    assert exact_match("", "It is Paris.", {"answer": "paris"}) == 1.0
    assert exact_match("", "It is Paris.", {}) is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_colon", "not an import path"),
        ("no.such.module:f", "cannot import the module `no.such.module`"),
        ("rlhf.reward.functions:nothing", "It has: .*share_of_letter_a"),
        ("math:sqrt", "must take 3 arguments"),
    ],
)
def test_errors_of_import_paths(path: str, message: str):
    with pytest.raises(RewardError, match=message):
        load_function(path)


def test_a_function_beside_the_run_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_reward_of_this_test.py").write_text("def reward(prompt, response, payload):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    assert load_function("my_reward_of_this_test:reward")("", "", {}) == 1.0
