"""The evidence script's raters: preference probabilities against counting every two raters, and the calibration against them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "movie_reviews" / "reward_models.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("reward_models_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def raters(example, tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"text": f"t{i}", "scores": rng.integers(-4, 5, rng.integers(3, 8)).tolist()} for i in range(12)]
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return example.Raters(str(path))


def test_preferences_count_every_two_raters(raters):
    pairs = np.array([(i, j) for i in range(12) for j in range(12)])
    expected = [
        np.mean([(a > b) + 0.5 * (a == b) for a in raters.scores[i] for b in raters.scores[j]]) for i, j in pairs
    ]
    assert raters.preference(pairs) == pytest.approx(np.array(expected))


def test_halves_are_a_division(raters):
    one, other = raters.halves(np.random.default_rng(0))
    sizes = np.array([len(scores) for scores in raters.scores])
    assert one * (sizes // 2) + other * (sizes - sizes // 2) == pytest.approx(raters.mean * sizes)


def test_calibration_against_the_raters(example, raters):
    pairs = np.array([(i, j) for i in range(12) for j in range(12) if i != j])
    true = raters.preference(pairs)
    same = example.compare(true, raters, pairs)
    assert same["rater_rms"] == same["rater_ece"] == 0
    assert same["rater_agreement"] == pytest.approx(np.maximum(true, 1 - true).mean())
    assert example.rater_calibration(np.full(4, 0.9), np.full(4, 0.6)) == pytest.approx(0.3)


def test_pairs_are_written_with_the_likelier_one_first(example, raters, tmp_path):
    example.write_pairs(raters, 40, str(tmp_path / "pairs.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    number = {text: i for i, text in enumerate(raters.texts)}
    pairs = np.array([(number[row["chosen"]], number[row["rejected"]]) for row in rows])
    assert [row["probability"] for row in rows] == pytest.approx(raters.preference(pairs), abs=1e-6)
    assert min(row["probability"] for row in rows) >= 0.5 and len(rows) == 40
