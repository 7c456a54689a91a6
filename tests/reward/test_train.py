"""`rlhf reward train` on a tiny encoder: every method learns, is repeatable, and is served as it was trained."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from rlhf.reward import train
from rlhf.reward.dataset import read_data
from rlhf.reward.errors import RewardError
from rlhf.reward.heads import fit_logistic, fit_ridge
from rlhf.reward.models import Example, load_model


def fit(model: Path, data: Path, output: Path, *options: str) -> dict:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    arguments = ["--model", str(model), "--train", str(data), "--output", str(output), "--threads", "1", *options]
    assert train.main(parser.parse_args(arguments)) == 0
    return json.loads((output / train.REPORT).read_text())


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(n: int) -> list[tuple[str, float]]:
    """Texts whose rating is how many of their twelve letters are an a."""
    rng = np.random.default_rng(0)
    made = ["".join(rng.choice(list("aab"), 12)) if i % 2 else "".join(rng.choice(list("abb"), 12)) for i in range(n)]
    return [(text, float(text.count("a"))) for text in made]


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
    low, high = model.score([Example("", "bbbbbbbbbbba"), Example("", "aaaaaaaaabaa")])
    assert low < 4 < 8 < high


def test_logistic_learns_pairs_with_prompts(encoder, paired, tmp_path):
    report = fit(encoder, paired, tmp_path / "model", "--method", "logistic")
    assert report["test"]["pair_accuracy"] > 0.85 and "pearson" not in report["test"]
    assert load_model(str(tmp_path / "model")).description.input == "conversation"


def test_logistic_on_ratings(encoder, rated, tmp_path):
    assert fit(encoder, rated, tmp_path / "model", "--method", "logistic")["test"]["pair_accuracy"] > 0.9


@pytest.mark.parametrize("base", ["encoder", "classifier", "tiny_model"])
def test_full_fine_tuning(base, rated, tmp_path, request):
    options = ("--method", "full", "--epochs", "12", "--learning-rate", "3e-3")
    model = request.getfixturevalue(base)
    report = fit(model, rated, tmp_path / "model", *options)
    assert report["objective"] == ("bradley-terry" if base == "classifier" else "squared")
    assert report["test"]["pair_accuracy"] > 0.8
    again = fit(model, rated, tmp_path / "again", *options)
    assert again["test"] == report["test"]


def test_full_bradley_terry_on_pairs(encoder, paired, tmp_path):
    options = ("--method", "full", "--epochs", "12", "--learning-rate", "3e-3")
    report = fit(encoder, paired, tmp_path / "model", *options)
    assert report["objective"] == "bradley-terry" and report["test"]["pair_accuracy"] > 0.8


def test_an_older_model_is_replaced_but_no_other_folder(encoder, rated, tmp_path):
    fit(encoder, rated, tmp_path / "model")
    fit(encoder, rated, tmp_path / "model", "--seed", "1")
    assert json.loads((tmp_path / "model" / train.REPORT).read_text())["seed"] == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(RewardError, match="not a reward model"):
        fit(encoder, rated, tmp_path / "mine")


def test_ridge_refuses_pairs(encoder, paired, tmp_path):
    with pytest.raises(RewardError, match="--method logistic"):
        fit(encoder, paired, tmp_path / "model", "--method", "ridge")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"text": "x"}', "line 2, field `rating`: missing"),
        ('{"text": "x", "rating": "3"}', "line 2, field `rating`: must be a finite number, not '3'"),
        ('{"text": "x", "rating": NaN}', "line 2, field `rating`: must be a finite number"),
        ('{"text": " ", "rating": 1}', "line 2, field `text`: must be text"),
        ('{"text": "x", "rating": 1, "prompt": "y"}', "line 2, field `prompt`: give it in every row or in none"),
        ("[1]", "line 2: a list"),
        ("{", "line 2: not JSON"),
    ],
)
def test_bad_rows_are_named(tmp_path, second, message):
    (tmp_path / "data.jsonl").write_text('{"text": "a", "rating": 1}\n' + second + "\n")
    with pytest.raises(RewardError, match=message):
        read_data(str(tmp_path / "data.jsonl"))


def test_bad_pairs_and_files_are_named(tmp_path):
    same = write(tmp_path / "same.jsonl", [{"chosen": "x", "rejected": "x"}])
    with pytest.raises(RewardError, match="line 1, field `rejected`: equal"):
        read_data(str(same))
    with pytest.raises(RewardError, match="line 1: has the fields answer"):
        read_data(str(write(tmp_path / "other.jsonl", [{"answer": 1}])))
    with pytest.raises(RewardError, match="no rows"):
        read_data(str(write(tmp_path / "empty.jsonl", [])))
    with pytest.raises(RewardError, match="no data file"):
        read_data(str(tmp_path / "none.jsonl"))


def test_pairs_from_ratings_respect_the_margin(rated):
    data = read_data(str(rated))
    pairs = data.pairs(2.0, 500, np.random.default_rng(0))
    assert len(pairs) == 500
    assert (data.ratings[pairs[:, 0]] - data.ratings[pairs[:, 1]] > 2.0).all()


def test_rows_of_one_prompt_stay_together(tmp_path):
    rows = [{"prompt": f"p{i % 5}", "text": f"t{i}", "rating": i} for i in range(50)]
    rest, part = read_data(str(write(tmp_path / "d.jsonl", rows))).divide(0.2, np.random.default_rng(0))
    assert {e.prompt for e in rest.examples}.isdisjoint(e.prompt for e in part.examples)
    assert (rest.n_rows, part.n_rows) == (40, 10)


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
