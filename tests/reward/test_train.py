"""`rlhf reward train` on a tiny encoder: every method learns, is repeatable, and is served as it was trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rlhf.reward.errors import RewardError
from rlhf.reward.models import load_model
from rlhf.reward.reading import Example
from rlhf.reward.training.heads import fit_logistic, fit_ridge
from rlhf.reward.training.saving import REPORT
from tests.reward.training import cyclic_pairs, fit, reward_train, texts, write

pytestmark = pytest.mark.engine


@pytest.fixture
def rated(tmp_path: Path) -> Path:
    return write(tmp_path / "rated.jsonl", [{"text": text, "rating": rating} for text, rating in texts(300)])


@pytest.fixture
def paired(tmp_path: Path) -> Path:
    rows = []
    made = texts(600)
    for (one, a), (two, b) in zip(made[::2], made[1::2], strict=True):
        if a != b:
            rows.append({"prompt": "p", "chosen": one if a > b else two, "rejected": two if a > b else one})
    return write(tmp_path / "paired.jsonl", [row | {"prompt": f"p{i}"} for i, row in enumerate(rows)])


def test_ridge_learns_ratings_and_serves_what_it_learned(encoder, rated, tmp_path):
    report = fit(encoder, rated, tmp_path / "model")
    assert report["units"] == "rating"
    assert report["test"]["pair_accuracy"] > 0.9 and report["test"]["pearson"] > 0.9
    assert 0 <= report["test"]["ece"] < 0.15
    model = load_model(str(tmp_path / "model"))
    low, high = model.score([Example((), "bbbbbbbbbbba"), Example((), "aaaaaaaaabaa")])
    assert low < 4 < 8 < high


def test_logistic_learns_pairs_with_prompts(encoder, paired, tmp_path):
    report = fit(encoder, paired, tmp_path / "model", "--method", "logistic")
    assert report["test"]["pair_accuracy"] > 0.85 and "pearson" not in report["test"]
    assert load_model(str(tmp_path / "model")).description.input == "conversation"


@pytest.mark.parametrize("own_test", [False, True])
def test_one_prompt_for_all_pairs(encoder, paired, tmp_path, own_test):
    """Whole prompts cannot be held out then, neither for the test nor for validation: rows are."""
    rows = [json.loads(line) | {"prompt": "Write a line."} for line in paired.read_text().splitlines()]
    data = write(tmp_path / "one.jsonl", rows)
    report = fit(
        encoder, data, tmp_path / "model", "--method", "logistic", *(("--test", str(data)) if own_test else ())
    )
    assert min(report["rows"].values()) > 0
    assert report["rows"]["fit"] + report["rows"]["validation"] == len(rows) - (not own_test) * report["rows"]["test"]


def test_logistic_on_ratings(encoder, rated, tmp_path):
    assert fit(encoder, rated, tmp_path / "model", "--method", "logistic")["test"]["pair_accuracy"] > 0.9


@pytest.mark.parametrize("base", ["encoder", "classifier", "tiny_model"])
def test_full_fine_tuning(base, rated, tmp_path, request):
    options = ("--method", "full", "--epochs", "12", "--learning-rate", "3e-3")
    model = request.getfixturevalue(base)
    report = fit(model, rated, tmp_path / "model", *options)
    assert report["objective"] == ("bradley-terry" if base == "classifier" else "squared")
    assert report["test"]["pair_accuracy"] > 0.8
    assert {"accuracy_longer_wins", "rank_correlation"} <= set(report["test"]["length"])
    assert sum(b["pairs"] for b in report["reliability"]) == report["test"]["pairs"]
    assert (tmp_path / "model" / "reliability.png").stat().st_size > 0
    if base == "encoder":
        assert fit(model, rated, tmp_path / "again", *options)["test"] == report["test"], "the seed decides everything"


def test_full_bradley_terry_on_pairs(encoder, paired, tmp_path):
    options = ("--method", "full", "--epochs", "12", "--learning-rate", "3e-3")
    report = fit(encoder, paired, tmp_path / "model", *options)
    assert report["objective"] == "bradley-terry" and report["test"]["pair_accuracy"] > 0.8


def test_a_cycle_needs_a_general_preference_model(encoder, tmp_path):
    """a beats b beats c beats a: no reward can say so, an embedding in the plane can."""
    data = write(tmp_path / "cycle.jsonl", cyclic_pairs(480))
    options = ("--method", "full", "--epochs", "16", "--learning-rate", "1e-2", "--batch-size", "128")
    gpm = fit(encoder, data, tmp_path / "gpm", *options, "--objective", "gpm")
    reward = fit(encoder, data, tmp_path / "reward", *options)
    assert gpm["test"]["pair_accuracy"] >= 0.95
    assert abs(reward["test"]["pair_accuracy"] - 0.5) < 0.2


def test_an_older_model_is_replaced_but_no_other_folder(encoder, rated, tmp_path):
    fit(encoder, rated, tmp_path / "model")
    fit(encoder, rated, tmp_path / "model", "--seed", "1")
    assert json.loads((tmp_path / "model" / REPORT).read_text())["seed"] == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(RewardError, match="not a reward model"):
        fit(encoder, rated, tmp_path / "mine")


def test_a_file_with_overrides_trains_what_options_do(encoder, rated, tmp_path):
    """Also from the configuration that a training leaves."""
    file = tmp_path / "reward.yaml"
    file.write_text(f"run: {{dir: {tmp_path / 'one'}}}\ndata: {{train: {rated}}}\nmodel: {{path: {encoder}}}\n")
    reward_train(str(file), "cluster.threads=1", "data.margin=1")
    one = json.loads((tmp_path / "one" / REPORT).read_text())
    assert fit(encoder, rated, tmp_path / "two", "--margin", "1")["test"] == one["test"]
    reward_train(str(tmp_path / "one" / "config.yaml"), f"run.dir={tmp_path / 'three'}")
    assert json.loads((tmp_path / "three" / REPORT).read_text())["test"] == one["test"]
    assert json.loads((tmp_path / "three" / "manifest.json").read_text())["seed"] == 0


def test_the_dry_run_says_what_would_be_trained(encoder, paired, tmp_path, capsys):
    options = ("--model", str(encoder), "--train", str(paired), "--output", str(tmp_path / "model"), "--dry-run")
    reward_train(*options, "--method", "full", "--objective", "gpm", "--checkpoint-every", "5")
    said = capsys.readouterr().out
    assert "pairs of whole conversations" in said and "the objective gpm; the model compares two responses" in said
    assert "bert, with a new head" in said and "every 5 optimizer steps" in said
    assert {path.name for path in tmp_path.iterdir()} == {"paired.jsonl"}
    with pytest.raises(RewardError, match="--method logistic"):
        reward_train(*options, "--method", "ridge")


def test_ridge_refuses_pairs(encoder, paired, tmp_path):
    with pytest.raises(RewardError, match="--method logistic"):
        fit(encoder, paired, tmp_path / "model", "--method", "ridge")


def test_heads_recover_a_linear_truth():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(600, 5)) * [1, 10, 0.1, 1, 1] + 3
    truth = features @ [1.0, 0.1, 5.0, 0.0, -1.0]
    ridge = fit_ridge(features[:400], truth[:400], features[400:], truth[400:])
    assert np.corrcoef(ridge(features[400:]), truth[400:])[0, 1] > 0.99
    pairs = np.array([(i, j) if truth[i] > truth[j] else (j, i) for i, j in rng.integers(0, 400, (2000, 2)) if i != j])
    held_out = np.array([(i, i + 1) if truth[400 + i] > truth[401 + i] else (i + 1, i) for i in range(199)])
    logistic = fit_logistic(features[:400], pairs, features[400:], held_out)
    assert np.corrcoef(logistic(features[400:]), truth[400:])[0, 1] > 0.95
