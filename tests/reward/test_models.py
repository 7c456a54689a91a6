"""Trained models of every kind, through their folders: what transformers loads, what the servers' classes say, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.cluster.precision import Bf16
from rlhf.config import UserError
from rlhf.reward.errors import RewardError
from rlhf.reward.folders import Description
from rlhf.reward.models import load_any_model, load_model, new_model
from rlhf.reward.modules import CumulativeLogits, EncoderWithHead, parts
from rlhf.reward.pairwise import feedback, orders
from rlhf.reward.pairwise_model import GeneralPreferenceModel, load_pairwise_model
from rlhf.reward.reading import COMPARISON, Example, as_text
from rlhf.types import Failed
from tests.reward.test_pairwise import judged
from tests.reward.training import fit, texts, write

OUTPUTS = GeneralPreferenceModel.outputs
FULL = ("--method", "full", "--epochs", "3", "--learning-rate", "3e-3")


@pytest.fixture
def rated(tmp_path: Path) -> Path:
    return write(tmp_path / "rated.jsonl", [{"text": text, "rating": rating} for text, rating in texts(80)])


@pytest.fixture
def paired(tmp_path: Path) -> Path:
    made = texts(160)
    pairs = [(a, b) if a[1] > b[1] else (b, a) for a, b in zip(made[::2], made[1::2], strict=True) if a[1] != b[1]]
    rows = [{"prompt": f"p{i % 9}", "chosen": a, "rejected": b} for i, ((a, _), (b, _)) in enumerate(pairs)]
    return write(tmp_path / "paired.jsonl", rows)


def logits(folder: Path, text: str) -> np.ndarray:
    """What transformers alone makes of a text."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")).logits[0].double().numpy()


@pytest.mark.parametrize("base", ["encoder", "tiny_model", "classifier"])
@pytest.mark.engine
def test_a_fine_tuned_reward_is_a_sequence_classifier(base, rated, tmp_path, request):
    fit(request.getfixturevalue(base), rated, tmp_path / "model", *FULL)
    examples = ["aaab", "ababababbbba", "b"]
    rewards = load_model(str(tmp_path / "model")).score([Example((), text) for text in examples])
    assert rewards == pytest.approx([logits(tmp_path / "model", text)[0] for text in examples], abs=1e-5)


def test_half_precision_that_a_cpu_emulates_is_widened(classifier: Path, tmp_path: Path, monkeypatch) -> None:
    """The judge stays the same one: whoever compares fingerprints may sit on another processor."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoTokenizer.from_pretrained(classifier).save_pretrained(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.bfloat16).save_pretrained(tmp_path)
    loaded = []
    for native in (True, False):
        monkeypatch.setattr("rlhf.reward.models.look", lambda gpu, native=native: Bf16(native, "as told"))
        loaded.append(load_any_model(str(tmp_path)))
    kept, widened = ({p.dtype for p in model.module.parameters()} for model in loaded)
    assert (kept, widened) == ({torch.bfloat16}, {torch.float32})
    assert loaded[0].fingerprint() == loaded[1].fingerprint()
    texts = [Example((), "aaab"), Example((), "b")]
    assert loaded[0].score(texts) == pytest.approx(loaded[1].score(texts), abs=0.02)


def test_an_architecture_without_a_classifier_gets_a_head(tiny_model, monkeypatch):
    from transformers import AutoModelForSequenceClassification

    monkeypatch.setattr(AutoModelForSequenceClassification, "_model_mapping", {})
    model = new_model(tiny_model, Description("classifier", "response", 64), 4)
    assert isinstance(model.module, EncoderWithHead)
    assert (model.description.kind, model.description.pooling, model.description.layers) == (
        "encoder_with_head",
        "last",
        (2,),
    )
    assert model.run(model.module, [Example((), "ab"), Example((), "b")]).shape == (2, 4)


def test_padded_batches_keep_from_cudnn_which_plans_for_every_exact_shape(encoder):
    torch.backends.cuda.enable_cudnn_sdp(True)
    new_model(encoder, Description("classifier", "response", 64), 1)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_new_head_has_parts_of_its_own(encoder):
    model = new_model(encoder, Description("classifier", "response", 64), 1)
    module = CumulativeLogits(model.module, torch.tensor([-1.0, 0.5, 2.0]))
    old, new = parts(module)
    assert sum(p.numel() for p in old + new) == sum(p.numel() for p in module.parameters())
    assert sum(p.numel() for p in new) == 16 + 1 + 1 + 2
    assert module.thresholds().tolist() == pytest.approx([-1.0, 0.5, 2.0])


def test_a_trained_gpm_compares_by_its_embeddings(encoder, paired, tmp_path):
    report = fit(encoder, paired, tmp_path / "model", *FULL, "--objective", "gpm", "--dimensions", "4", "--gate")
    assert report["objective"] == "gpm" and "reward_mean" not in report["test"]
    model = load_pairwise_model(str(tmp_path / "model"))
    responses = ["aaaa", "bbbb", "abab"]
    asked = orders(responses)
    reading = model.read(as_text("p1"), [(responses[i], responses[j]) for i, j in asked])
    assert len(reading.ids) == 3 + 1, "each response once, and the prompt"
    answers = dict(zip(asked, reading.answers(list(model.outputs(reading.ids))), strict=True))
    question = "<|user|>p1<|end|>"
    v = [logits(tmp_path / "model", f"{question}<|assistant|>{text}<|end|>")[:4] for text in responses]
    v = [each / np.linalg.norm(each) for each in v]
    gate = np.exp(logits(tmp_path / "model", question)[4:])
    gate *= 2 / gate.sum()
    temperature = load_any_model(str(tmp_path / "model")).description.temperature
    for i, j in asked:
        planes = [v[i][k] * v[j][k + 1] - v[i][k + 1] * v[j][k] for k in (0, 2)]
        assert answers[i, j] == pytest.approx(1 / (1 + np.exp(-(gate @ planes) / temperature)), abs=1e-5)
    matrix = feedback("p", responses, answers).preferences
    assert matrix[0, 1] == pytest.approx(answers[0, 1])


def test_a_gpm_judges_in_a_server(encoder, paired, tmp_path, run, tiny_settings, make_text_rollout, monkeypatch):
    """The loop's judge gives the matrix of the model's own scores, and reads each of four responses once."""
    fit(encoder, paired, tmp_path / "model", *FULL, "--objective", "gpm")
    model = load_pairwise_model(str(tmp_path / "model"))
    read: list[int] = []
    monkeypatch.setattr(
        GeneralPreferenceModel, "outputs", lambda self, ids: (read.append(len(ids)), OUTPUTS(self, ids))[1]
    )
    responses = ["aaaa", "bbbb", "abab", "aabb"]
    settings = tiny_settings(reward={"kind": "pairwise_model", "path": str(tmp_path / "model"), "batch_size": 3})
    verdict = judged(run, settings, make_text_rollout(responses, prompt="p1"))
    assert sum(read) == 4
    reading = model.read(as_text("p1"), [("aaaa", "bbbb"), ("abab", "aabb")])
    expected = reading.answers(list(OUTPUTS(model, reading.ids)))
    assert verdict.preferences[[0, 2], [1, 3]] == pytest.approx(np.array(expected), abs=1e-5)
    assert (verdict.preferences + verdict.preferences.T == 1).all()


def test_a_gpm_hands_on_failures(encoder, paired, tmp_path):
    fit(encoder, paired, tmp_path / "model", *FULL, "--objective", "gpm")
    model = load_pairwise_model(str(tmp_path / "model"))
    assert isinstance(model, GeneralPreferenceModel) and not model.gated
    reading = model.read(as_text("p"), [("a", "b"), ("b", "c"), ("c", "a")])
    rows = list(model.outputs(reading.ids))
    rows[1] = Failed("broken")
    answers = reading.answers(rows)
    assert answers[:2] == [Failed("broken")] * 2 and 0 < answers[2] < 1


def test_a_trained_cross_encoder_reads_both_responses(encoder, rated, tmp_path):
    """It was trained without prompts, so it is not shown the one that it is asked with."""
    report = fit(encoder, rated, tmp_path / "model", *FULL, "--objective", "cross-encoder", "--comparisons", "50")
    assert report["test"]["pairs"] <= 2000
    model = load_pairwise_model(str(tmp_path / "model"))
    reading = model.read(as_text("a prompt"), [("aab", "b")])
    (answer,) = reading.answers(list(model.outputs(reading.ids)))
    temperature = load_any_model(str(tmp_path / "model")).description.temperature
    logit = logits(tmp_path / "model", COMPARISON.format(prompt="", a="aab", b="b"))[0]
    assert answer == pytest.approx(1 / (1 + np.exp(-logit / temperature)), abs=1e-5)


def test_a_cross_encoder_never_loses_response_b(encoder, tmp_path, capsys):
    """A pair that is too long is left out of training, validation and test, with a count; if all are, that is an error."""
    rows = [{"chosen": f"a{i}", "rejected": f"b{i}"} for i in range(60)]
    rows[7]["rejected"] = rows[31]["chosen"] = "long " * 20
    options = ("--method", "full", "--objective", "cross-encoder")
    report = fit(
        encoder, write(tmp_path / "d.jsonl", rows), tmp_path / "model", *options, "--test", str(tmp_path / "d.jsonl")
    )
    assert report["test"]["pairs"] == 58 and report["texts_too_long"] in (0, 2, 4)
    assert ("left out" in capsys.readouterr().out) == (report["texts_too_long"] > 0)
    with pytest.raises(RewardError, match=r"none of the .* pairs fits into the 20 tokens"):
        fit(encoder, tmp_path / "d.jsonl", tmp_path / "other", *options, "--max-tokens", "20")


def test_what_does_not_fit_is_counted(encoder, tmp_path, capsys):
    """A response that is too long is left out, a prompt that is too long loses its beginning; a judge does the same."""
    made = texts(80)
    rows = [{"prompt": f"p{i}", "text": text, "rating": rating} for i, (text, rating) in enumerate(made)]
    for number in range(40):
        rows[number]["prompt"] *= 30
    for number in range(0, 80, 4):
        rows[number]["text"] *= 10
    report = fit(encoder, write(tmp_path / "d.jsonl", rows), tmp_path / "model", *FULL, "--max-tokens", "60")
    assert 0 < report["texts_too_long"] < 20 and report["rows"]["fit"] + report["rows"]["test"] < 60
    assert 0 < report["prompts_cut"] < 40 and report["max_tokens"] == 60
    said = capsys.readouterr().out
    assert "training texts do not fit into 60 tokens: left out" in said
    assert "training texts: the prompt loses its beginning to fit into 60 tokens" in said
    with pytest.raises(
        RewardError, match=r"none of the .* training rows can be read: the response is .* \(--max-tokens\)"
    ):
        fit(encoder, tmp_path / "d.jsonl", tmp_path / "other", *FULL, "--max-tokens", "2")


def test_several_objectives_make_one_reward(encoder, tmp_path):
    rows = [{"text": text, "ratings": {"a": rating, "b": 12 - rating}} for text, rating in texts(80)]
    del rows[0]["ratings"]["b"]
    data = write(tmp_path / "several.jsonl", rows)
    report = fit(encoder, data, tmp_path / "model", *FULL, "--epochs", "40", "--weights", "a=2", "b=-1")
    assert report["objective"] == "more" and sum(report["gradient_weights"].values()) == pytest.approx(1)
    assert all(report["test"]["objectives"][name]["pearson"] > 0.5 for name in "ab")
    model = load_model(str(tmp_path / "model"))
    assert (model.description.objectives, model.description.weights) == (("a", "b"), (2.0, -1.0))
    (reward,) = model.score([Example((), "aaab")])
    a, b = logits(tmp_path / "model", "aaab")
    assert reward == pytest.approx(2 * a - b, abs=1e-5)


def test_ordinal_ratings_give_levels_their_shares(encoder, rated, tmp_path):
    report = fit(encoder, rated, tmp_path / "model", *FULL, "--epochs", "40", "--objective", "ordinal")
    assert report["test"]["pair_accuracy"] > 0.7 and report["units"].startswith("log-odds")
    model = load_model(str(tmp_path / "model"))
    description = model.description
    assert len(description.thresholds) == len(description.levels) - 1
    assert (np.diff(description.thresholds) > 0).all()
    rewards = model.score([Example((), text) for text, _ in texts(80)])
    above = 1 / (1 + np.exp(-(rewards[:, None] - np.array(description.thresholds))))
    expected = description.levels[0] + (above * np.diff(description.levels)).sum(1)
    assert np.corrcoef(expected, [rating for _, rating in texts(80)])[0, 1] > 0.6


def test_soft_pairs_are_reported_with_their_ceiling(encoder, tmp_path):
    made = texts(120)
    rows = []
    for (a, x), (b, y) in zip(made[::2], made[1::2], strict=True):
        if x != y:
            rows.append({"chosen": a if x > y else b, "rejected": b if x > y else a, "probability": 0.75})
    report = fit(encoder, write(tmp_path / "soft.jsonl", rows), tmp_path / "model", *FULL)
    test = report["test"]
    assert test["agreement_ceiling"] == 0.75
    assert test["agreement"] == pytest.approx(0.25 + test["pair_accuracy"] * 0.5)


def test_folders_are_refused_where_they_do_not_belong(encoder, rated, paired, tmp_path):
    fit(encoder, paired, tmp_path / "gpm", *FULL, "--objective", "gpm")
    with pytest.raises(RewardError, match=r"compares two responses \(gpm\).*reward\.kind: pairwise_model"):
        load_model(str(tmp_path / "gpm"))
    fit(encoder, rated, tmp_path / "reward")
    with pytest.raises(RewardError, match=r"scores one response.*reward\.kind: model"):
        load_pairwise_model(str(tmp_path / "reward"))
    with pytest.raises(RewardError, match="labels"):
        fit(tmp_path / "gpm", rated, tmp_path / "again", *FULL)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("rated", ["--objective", "squared"], r"is for .* \(--method full\)"),
        (
            "rated",
            ["--method", "full", "--centring", "0.01"],
            r"\(--centring\) is an option of .* --objective bradley-terry",
        ),
        (
            "rated",
            ["--dimensions", "4"],
            r"\(--dimensions\) is an option of .* --objective gpm, and what is trained is ridge",
        ),
        ("rated", ["--method", "full", "--objective", "more"], "needs several ratings"),
        ("rated", ["--method", "full", "--objective", "gpm", "--dimensions", "3"], "must be even"),
        ("rated", ["--method", "full", "--objective", "gpm", "--gate"], "needs pairs with the field `prompt`"),
        ("paired", ["--method", "full", "--objective", "ordinal"], "fits ratings, but .* has pairs"),
        ("paired", ["--method", "ridge"], "--method logistic"),
        ("halves", ["--method", "full", "--objective", "ordinal"], "whole numbers"),
        ("several", ["--method", "ridge"], "fits one rating, but .* has 2"),
        ("several", ["--method", "full", "--objective", "squared"], "Use --objective more"),
        ("several", ["--method", "full", "--weights", "a=1"], "names a, but the data rates a, b"),
        ("several", ["--method", "full", "--weights", "a=1", "b"], "--weights: `b`: .* Write NAME=NUMBER"),
        ("rated", ["--validation", "1"], "--validation: `1` is not a finite number above 0 and below 1"),
        ("rated", ["--epochs", "0"], "--epochs: `0` is not a whole number of at least 1"),
        ("rated", ["--learning-rate", "0"], "--learning-rate: `0` is not a finite number above 0"),
        ("rated", ["--learning-rate", "nan"], "--learning-rate: `nan` is not a finite number above 0"),
        ("rated", ["--threads", "0"], "--threads: `0` is not a whole number of at least 1"),
        ("rated", ["--margin", "20"], r"\(--margin\): no two ratings of .* are further apart than 20"),
    ],
)
def test_what_cannot_work_or_would_be_ignored_is_refused(data, options, message, encoder, rated, paired, tmp_path):
    paths = {
        "rated": rated,
        "paired": paired,
        "halves": write(tmp_path / "halves.jsonl", [{"text": str(i), "rating": i / 2} for i in range(30)]),
        "several": write(tmp_path / "2.jsonl", [{"text": str(i), "ratings": {"a": i, "b": 0}} for i in range(30)]),
    }
    with pytest.raises(UserError, match=message):
        fit(encoder, paths[data], tmp_path / "model", *options)
    assert not (tmp_path / "model").exists()
