"""Full fine-tuning on the DeepSpeed group: any split of the same work learns the same, and a killed training goes on as it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.config import UserError
from rlhf.config.reward_training import RewardTrainingSettings
from rlhf.config.reward_training_checks import load_reward_training
from rlhf.reward.errors import RewardError
from rlhf.reward.folders import Description
from rlhf.reward.models import EncoderWithHead, RewardModel, new_model
from rlhf.reward.training import finetune
from rlhf.reward.training.dataset import PreferenceData
from rlhf.reward.training.examples import Preferences
from rlhf.reward.training.finetune import fine_tune
from rlhf.reward.training.objectives import BradleyTerry, GeneralPreference, MultiObjective, Objective, Squared
from rlhf.reward.training.reader import read_data
from tests.reward.conftest import SIZES
from tests.reward.training import fit, reward_train, texts, write

PLACES = {"dtype": "model", "gradient_checkpointing": "model"}
"""Sections of fields that are not in `training`."""


@pytest.fixture(scope="module")
def steady(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an encoder without dropout."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("steady")
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreferenceData:
    """Texts of three lengths with three ratings, one of them sometimes missing."""
    rows = [
        {
            "text": text[: 6 + 3 * (i % 3)],
            "ratings": {"a": rating / 4, "b": i % 5 - 2.0} | ({"length": 1.0 + i % 3} if i % 4 else {}),
        }
        for i, (text, rating) in enumerate(texts(42))
    ]
    return read_data(str(write(tmp_path_factory.mktemp("data") / "rated.jsonl", rows)))


def one_rating(data: PreferenceData) -> PreferenceData:
    return replace(data, ratings=data.ratings[:, :1], names=data.names[:1], weights=(1.0,))


OBJECTIVES: dict[str, tuple[Callable[[], Objective], Callable[[PreferenceData], PreferenceData]]] = {
    "squared": (Squared, one_rating),
    "bradley-terry": (BradleyTerry, lambda data: one_rating(data).grouped(4, 0.1, 0)),
    "gpm": (lambda: GeneralPreference(4), lambda data: one_rating(data).grouped(4, 0.1, 0)),
    "more": (lambda: MultiObjective(3), lambda data: data),
}
ALL = pytest.mark.parametrize("name", OBJECTIVES)


def settings(**fields: Any) -> RewardTrainingSettings:
    made: dict[str, dict[str, Any]] = {
        "run": {"dir": "unused"},
        "data": {"train": "unused"},
        "model": {"path": "unused"},
        "training": {"method": "full", "epochs": 2, "learning_rate": 1e-3, "batch_size": 16},
        "checkpoint": {"every": fields.pop("checkpoint_every", 0)},
        "cluster": {"device": "cpu", "threads": 1},
    }
    for name, value in fields.items():
        made[PLACES.get(name, "training")][name] = value
    return RewardTrainingSettings.model_validate(made)


def start(folder: Path, objective: Objective) -> RewardModel:
    torch.manual_seed(0)
    return new_model(folder, Description("classifier", "response", 64), objective.outputs)


def learn(
    base: Path,
    data: PreferenceData,
    name: str,
    folder: Path,
    model: RewardModel | None = None,
    resume: bool = False,
    **fields: Any,
) -> tuple[list[dict], np.ndarray, Objective]:
    """What was written down, what the model then says, and the objective with its state."""
    make, prepare = OBJECTIVES[name]
    objective = make()
    model = model or start(base, objective)
    fine_tune(model, prepare(data), objective, settings(**fields), folder, new_head=True, resume=resume)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, model.run(model.module, data.examples), objective


def assert_same(got: tuple, expected: tuple, rel: float = 2e-3) -> None:
    for one, other in zip(got[0], expected[0], strict=True):
        for key in ("train/loss", "train/grad_norm", "train/learning_rate", "train/tokens"):
            assert one[key] == pytest.approx(other[key], rel=rel, abs=1e-5), key
    assert got[1] == pytest.approx(expected[1], abs=2e-3)
    if expected[2].observes:
        assert got[2].weights.tolist() == pytest.approx(expected[2].weights.tolist(), rel=1e-2)


@pytest.fixture(scope="module")
def whole(steady: Path, data: PreferenceData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """One rank, one micro-batch, nothing sharded."""
    return {name: learn(steady, data, name, tmp_path_factory.mktemp(name)) for name in OBJECTIVES}


@pytest.mark.engine
@ALL
def test_other_micro_batches_learn_the_same(
    whole: dict, steady: Path, data: PreferenceData, tmp_path: Path, name: str
) -> None:
    got = learn(steady, data, name, tmp_path, zero_stage=2, micro_batch_tokens=30, gradient_checkpointing=True)
    assert_same(got, whole[name])


@pytest.mark.engine
def test_a_model_that_is_sharded_from_the_start_learns_the_same(
    whole: dict, steady: Path, data: PreferenceData, tmp_path: Path
) -> None:
    """The ranks are sent a model without weights and read them; nothing of that is left in the end."""
    assert_same(learn(steady, data, "squared", tmp_path, zero_stage=3), whole["squared"])
    assert not list(tmp_path.glob("*.safetensors"))


class Borrowed:
    """The session's Ray cluster, which a training must not end."""

    local = False

    def __init__(self, runtime: Any):
        self.start = runtime.start

    def reserve(self, request: Any) -> None: ...

    def stop(self) -> None: ...


@pytest.mark.engine
def test_two_ranks_learn_the_same(
    whole: dict,
    steady: Path,
    data: PreferenceData,
    tmp_path: Path,
    scratch_runtime: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hardest of them: its next loss depends on the gradient of all ranks."""
    monkeypatch.setattr(finetune, "_runtime", lambda *_: Borrowed(scratch_runtime))
    assert_same(learn(steady, data, "more", tmp_path, ranks=2, zero_stage=3, micro_batch_tokens=30), whole["more"])


@pytest.mark.engine
def test_bf16_learns_about_the_same(whole: dict, steady: Path, data: PreferenceData, tmp_path: Path) -> None:
    """Also with a head on pooled features, which are fp32."""
    got = learn(steady, data, "squared", tmp_path / "one", dtype="bf16", zero_stage=1)
    assert got[0][-1]["train/loss"] == pytest.approx(whole["squared"][0][-1]["train/loss"], rel=0.1)
    model = new_model(steady, Description("classifier", "response", 64), 1, whole=False)
    assert isinstance(model.module, EncoderWithHead)
    lines, _, _ = learn(steady, data, "squared", tmp_path / "two", model, dtype="bf16", zero_stage=1)
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]


class Killed(Exception):
    """As if the power had failed."""


@pytest.mark.engine
def test_a_resumed_training_equals_the_uninterrupted_one(
    encoder: Path, data: PreferenceData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, and an objective that has a state."""
    expected = learn(encoder, data, "more", tmp_path / "whole")
    plan, observe, updates = {"checkpoint_every": 1}, MultiObjective.observe, []

    def die_in_the_third_update(self: MultiObjective, gradient: torch.Tensor) -> None:
        updates.append(1)
        if len(updates) == 3:
            raise Killed
        observe(self, gradient)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(MultiObjective, "observe", die_in_the_third_update)
        learn(encoder, data, "more", tmp_path / "killed", **plan)
    other = copy.copy(data.rows(np.arange(40)))
    with pytest.raises(Exception, match="made with another data or objective, so the run cannot go on"):
        learn(encoder, other, "more", tmp_path / "killed", resume=True, **plan)
    assert_same(learn(encoder, data, "more", tmp_path / "killed", resume=True, **plan), expected, rel=1e-5)


@pytest.mark.engine
def test_the_command_keeps_the_metrics_with_the_model(encoder: Path, tmp_path: Path) -> None:
    rated = write(tmp_path / "rated.jsonl", [{"text": text, "rating": rating} for text, rating in texts(60)])
    fit(encoder, rated, tmp_path / "model", "--method", "full", "--checkpoint-every", "1", "--eval-every", "1")
    steps = [json.loads(line)["step"] for line in (tmp_path / "model" / "metrics.jsonl").read_text().splitlines()]
    assert load_reward_training(tmp_path / "model" / "config.yaml").training.eval_every == 1
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["data"]["data.train"]["sha256"] and manifest["resumed"] == []
    losses = [
        json.loads(line)["heldout/loss"] for line in (tmp_path / "model" / "evaluations.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, len(steps) + 1)) and len(losses) == len(steps) + 1
    assert losses[-1] < losses[0]
    assert not (tmp_path / "model.training").exists()


def test_what_is_counted_does_not_depend_on_the_division(data: PreferenceData) -> None:
    """Pairs of one unit stay together, so any micro-batches have as many in all."""
    for make, prepare in OBJECTIVES.values():
        prepared, objective = prepare(data), make()
        examples = Preferences(prepared, [[1, 2]] * len(data.examples), objective)
        units = examples.units(0)
        parts = [units[:3], units[3:4], units[4:]]
        assert sum(examples.batch(part).count for part in parts) == examples.batch(units).count > 0


def test_other_data_have_another_fingerprint(data: PreferenceData) -> None:
    ids = [[i] for i in range(len(data.examples))]
    same = Preferences(data, ids, MultiObjective(3)).fingerprint()
    assert Preferences(data, ids, MultiObjective(3)).fingerprint() == same
    assert Preferences(data, ids[::-1], MultiObjective(3)).fingerprint() != same
    assert Preferences(one_rating(data), ids, Squared()).fingerprint() != same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "2"], r"\(--ranks\) is an option of `training.method: full`"),
        (["--gradient-checkpointing"], r"\(--gradient-checkpointing\) is an option of `training.method: full`"),
        (["--method", "full", "--ranks", "0"], "--ranks: `0` is not a whole number of at least 1"),
        (
            ["--method", "full", "--checkpoint-every", "-1"],
            "--checkpoint-every: `-1` is not a whole number of at least 0",
        ),
        (["--method", "full", "--address", "auto"], r"\(--address\): a single rank runs in this process"),
        (["--method", "full", "--resume"], "--resume goes on from a checkpoint"),
    ],
)
def test_options_that_cannot_be_are_named(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        reward_train("--model", "m", "--train", "t", "--output", "o", *options)


def test_files_of_somebody_else_are_not_deleted(encoder: Path, data: PreferenceData, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RewardError, match="holds thesis.tex. Move it away"):
        learn(encoder, data, "more", tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_nothing_to_resume_is_said(encoder: Path, data: PreferenceData, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="no training to go on with"):
        learn(encoder, data, "more", tmp_path / "nothing", resume=True, checkpoint_every=1)
