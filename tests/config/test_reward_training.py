"""The configuration of `rlhf reward train`: a file, overrides and options say the same, and every mistake is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.commands.grammar import parse
from rlhf.config import ConfigError, UserError, show
from rlhf.config.commands import load_any
from rlhf.config.explain import fields_of
from rlhf.config.loader import load
from rlhf.config.reward_training import RewardTrainingSettings
from rlhf.config.reward_training_checks import load_reward_training
from rlhf.config.reward_training_flags import FLAGS, asked

VALID = """\
run: {dir: out}
data: {train: rated.jsonl, margin: 1}
model: {path: some/encoder}
training: {method: full, epochs: 3}
"""
NEEDED = "--model m --train t --output o"


@pytest.fixture
def valid(tmp_path: Path) -> str:
    path = tmp_path / "reward.yaml"
    path.write_text(VALID)
    return str(path)


def by_options(line: str) -> RewardTrainingSettings:
    return load_reward_training(*asked(parse(["reward", "train", *line.split()])))


def test_the_example_can_be_loaded_and_shown(tmp_path: Path) -> None:
    settings = load_reward_training(Path(__file__).parents[2] / "configs" / "reward_model.yaml")
    again = tmp_path / "shown.yaml"
    again.write_text(show(settings))
    assert load_any(again) == settings


OPTIONS: dict[str, tuple[str, Any]] = {
    "--model": ("m2", "m2"),
    "--train": ("t2", "t2"),
    "--columns": ("chosen=better rejected=", {"chosen": "better", "rejected": None}),
    "--test": ("t3", "t3"),
    "--output": ("o2", "o2"),
    "--method": ("logistic", "logistic"),
    "--objective": ("gpm", "gpm"),
    "--centring": ("0.01", 0.01),
    "--dimensions": ("8", 8),
    "--gate": ("", True),
    "--comparisons": ("100", 100),
    "--weights": ("a=0.5 b=2", {"a": 0.5, "b": 2.0}),
    "--margin": ("0.25", 0.25),
    "--validation": ("0.3", 0.3),
    "--max-tokens": ("64", 64),
    "--epochs": ("2", 2),
    "--learning-rate": ("1e-5", 1e-5),
    "--batch-size": ("8", 8),
    "--seed": ("3", 3),
    "--threads": ("2", 2),
    "--device": ("cpu", "cpu"),
    "--ranks": ("2", 2),
    "--zero-stage": ("3", 3),
    "--dtype": ("bf16", "bf16"),
    "--micro-batch-tokens": ("99", 99),
    "--gradient-checkpointing": ("", True),
    "--address": ("auto", "auto"),
    "--checkpoint-every": ("5", 5),
    "--eval-every": ("6", 6),
}


def test_every_option_sets_its_field() -> None:
    assert OPTIONS.keys() == FLAGS.keys()
    plain = {"--method": "--method full"} | dict.fromkeys(("--address",), "--method full --ranks 2")
    for flag, (text, value) in OPTIONS.items():
        before = "" if flag == "--method" else plain.get(flag, "--method full")
        section, name = FLAGS[flag].split(".")
        assert name in (fields_of(RewardTrainingSettings, (section,)) or {})
        settings = by_options(f"{NEEDED} {before} {flag} {text}")
        assert getattr(getattr(settings, section), name) == value, flag


def test_options_win_over_overrides_and_these_over_the_file(valid: str) -> None:
    settings = by_options(f"{valid} training.epochs=4 data.margin=2 --epochs 5 training.batch_size=7")
    assert (settings.training.epochs, settings.data.margin, settings.training.batch_size) == (5, 2.0, 7)
    assert settings.model.path == "some/encoder"


def test_options_alone_have_the_defaults_of_the_fields(valid: str) -> None:
    assert by_options(NEEDED).training == RewardTrainingSettings.model_fields["training"].default
    assert by_options("--model m --train t run.dir=o").run.dir == "o"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "needs a CONFIG, or the options --model, --train and --output. Give --model, --train, --output"),
        ("--model m --output o", "Give --train"),
        (f"{NEEDED} --address nonsense --method full", "--address: `cluster.address` must be `auto`, HOST:PORT"),
        (f"{NEEDED} training.epoch=2", "`training.epoch` is not a known field. Did you mean `training.epochs`?"),
        (f"{NEEDED} --dimensions 1", "--dimensions: `1` is not a whole number of at least 2"),
        (f"{NEEDED} --dimensions 3", "`objective.dimensions` (--dimensions) must be even"),
        (f"{NEEDED} --validation 1", "--validation: `1` is not a finite number above 0 and below 1"),
        (f"{NEEDED} --columns chosen", "--columns: `chosen` must be NAME=COLUMN"),
        (f"{NEEDED} --zero-stage 2", "`training.zero_stage` (--zero-stage) is an option of `training.method: full`"),
        (f"{NEEDED} training.weight_decay=0.1", "`training.weight_decay` is an option of `training.method: full`"),
        (f"{NEEDED} cluster.placement=colocated", "`cluster.placement` is unused by `rlhf reward train`"),
        (f"{NEEDED} cluster.policy_nodes=2", "`cluster.policy_nodes`: without `cluster.address` (--address)"),
    ],
)
def test_a_mistake_names_the_field_or_option_and_the_remedy(line: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        by_options(line)
    assert says in str(caught.value)


def test_a_mistake_in_the_file_has_its_line(valid: str) -> None:
    Path(valid).write_text(VALID.replace("epochs: 3", "epochs: none"))
    with pytest.raises(ConfigError, match=r"reward.yaml: line 4: `training.epochs` must be a whole number"):
        load_reward_training(valid)


def test_it_is_told_from_the_configurations_of_other_commands(valid: str) -> None:
    with pytest.raises(ConfigError, match="is a configuration of `rlhf reward train`, not of `rlhf train`"):
        load(valid)
    assert isinstance(load_any(valid, ["data.margin=2"]), RewardTrainingSettings)
