"""Files that are no configuration: each is refused at once with its name, the line and a remedy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlhf.config import ConfigError, load, yamls
from rlhf.config.commands import load_any
from rlhf.config.sft_checks import load_sft
from tests.config.conftest import VALID

BOMB = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}\n" for i in range(1, 30)
)
SFT = "data: {examples: rows.jsonl}\npolicy: {model: some/model}\ntraining: {epochs: 2}\n"


def refusal(path: str | Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: &a [*a]", 1, "the alias `*a` stands inside what it names"),
        ("x: 1\na: &a {b: {c: *a}}", 2, "the alias `*a` stands inside what it names"),
        (BOMB, 5, "more than 20,000 values, each as often as aliases repeat it"),
        ("- a\n" * 30_000, 20_000, "more than 20,000 values"),
        ("[" * 10_000, 1, "more than 50 mappings and lists are nested"),
        ("{a: " * 10_000, 1, "more than 50 mappings and lists are nested"),
        ("- " * 10_000, 1, "more than 50 mappings and lists are nested"),
        ("a: " + "x" * 2**20, 1, "characters, and at most 1,048,576 are read"),
        ("\na: !!int x", 2, "the tag `!!int` is not read here"),
        ("a: !!timestamp x", 1, "the tag `!!timestamp` is not read here"),
        ("a: !!python/object/apply:os.system [x]", 1, "is not read here"),
        ("a: " + "9" * 5_000, 1, "a number of 5,000 characters"),
        ("a: " + "9" * 5_000 + ".0", 1, "a number of 5,002 characters"),
        ("a: 1\nb: 2\na: 3", 3, "`a` stands here and on line 1. Remove one"),
        ("? [a]\n: 1", 1, "a key must be a name"),
        ("a: {<<: {b: 1}}", 1, "`<<` merges nothing here"),
        ("loop:\n\tsteps: 1", 2, "a tab stands where YAML wants spaces. Indent with spaces"),
        ('a: "\\ud800"', 1, "U+D800"),
        ('a: "\\0"', 1, "U+0000"),
        ('a: "\\UFFFFFFFF"', 1, "names no character"),
        ("a: 1\nb: \x07", 2, "the character U+0007 is not allowed"),
        ("a: 1\n---\nb: 1", 2, "a second document"),
        ("a: 1\nb: [1", 2, "not valid YAML"),
        ("a: *b", 1, "undefined alias"),
    ],
)
def test_a_text_that_is_no_configuration(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    message = refusal(path)
    assert message.startswith(f"{path}, line {line}: ")
    assert words in message


def test_an_alias_within_the_bounds_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(VALID.replace("prompts: prompts.jsonl", "prompts: &file prompts.jsonl\n  eval_prompts: *file"))
    assert load(path).data.eval_prompts == "prompts.jsonl"


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(VALID, encoding="utf-8-sig")
    assert load(tmp_path / "run.yaml").data.prompts == "prompts.jsonl"


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # nobody writes into it: opening it would wait permanently
    assert "no ordinary file" in refusal(tmp_path / "pipe")
    assert "no ordinary file" in refusal("/dev/zero")
    assert "cannot be read (" in refusal("a\0b.yaml")
    assert "there is no such file" in refusal("")
    assert "cannot be read" in refusal("x" * 5_000)
    (tmp_path / "latin.yaml").write_bytes(b"run:\n  dir: caf\xe9")
    assert refusal(tmp_path / "latin.yaml").startswith(f"{tmp_path / 'latin.yaml'}, line 2: this is not UTF-8 text")


@pytest.mark.parametrize("spelling", ["-0.0", "-0.", "-.0"])
def test_there_is_one_zero(spelling: str) -> None:
    assert str(yamls.parse(spelling)) == "0.0"


@pytest.mark.parametrize(
    "override",
    [
        "loop.steps=\udcff",
        "\udcff.a=1",
        "a.b.c=",
        "=x",
        "=",
        "",
        ".=1",
        "loop.=1",
        "loop={steps: 3}",
        "run.dir=&a [*a]",
    ],
)
def test_an_override_that_cannot_be_read(valid: str, override: str) -> None:
    message = refusal(valid, override)
    assert "override `" in message
    message.encode()  # what was no text in the shell is shown as what it was


def test_the_path_of_every_file_is_expanded_or_refused(valid: str) -> None:
    home = os.path.expanduser("~")
    assert load(valid, ["run.dir=~/runs"]).run.dir == f"{home}/runs"
    assert load(valid, ["data.prompts=~/p.jsonl"]).data.prompts == f"{home}/p.jsonl"
    assert load(valid, ["reward.path=~/model", "reward.kind=model"]).reward.path == f"{home}/model"
    assert "`run.dir` `~nobody-of-this-name` stands for the home" in refusal(valid, "run.dir=~nobody-of-this-name/x")
    assert "`policy.model` is empty text" in refusal(valid, "policy.model=''")
    assert "holds a control character" in refusal(valid, 'run.dir="a\\nb"')
    assert "a system has at most 4,096" in refusal(valid, f"run.dir={'x/' * 3_000}")


def test_the_configuration_of_another_command(tmp_path: Path, valid: str) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text(SFT)
    assert "is a configuration of `rlhf sft`, not of `rlhf train`. Give it to `rlhf sft`" in refusal(path)
    with pytest.raises(ConfigError, match="is a configuration of `rlhf train`, not of `rlhf sft`"):
        load_sft(valid)
    assert load_any(path).training.epochs == 2
    assert load_any(valid, ["loop.steps=7"]).loop.steps == 7


def test_a_field_of_another_method(valid: str) -> None:
    message = refusal(valid, "algorithm.name=grpo", "algorithm.mixture=0.5", "algorithm.beta=0.1")
    assert (
        "`algorithm.mixture` is not a known field of `algorithm.name: grpo`, but of ipo_md, nash_md. Remove it"
        in message
    )
    assert "`algorithm.beta` is not a known field of `algorithm.name: grpo`, but of online_dpo, rdpo" in message
