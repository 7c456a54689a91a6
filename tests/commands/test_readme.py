"""The README's lines under "Use it": each parses, and what it names is there or made by a line before it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rlhf.commands.grammar import parse

ROOT = Path(__file__).parents[2]
BLOCK = re.search(r"## Use it\n\n```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
FRESH, REST = BLOCK.split("# With the demo")
YOURS = ("my_run.yaml", "my_prompts.jsonl", "path/to/model")
"""What the reader brings."""


def commands(text: str) -> list[list[str]]:
    lines = (shlex.split(line, comments=True) for line in text.splitlines())
    return [line for line in lines if line[:1] == ["rlhf"]]


@pytest.mark.parametrize("line", commands(BLOCK), ids=" ".join)
def test_a_line_parses_and_its_files_are_there(line: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if "--help" in line:
        return
    args = parse(line[1:])
    config = getattr(args, "config", None)
    if config is not None and config not in YOURS and not config.startswith("runs/tiny/"):
        assert Path(config).is_file()


def test_a_fresh_clone_needs_nothing_but_what_a_line_before_has_made() -> None:
    train, *rest = commands(FRESH)
    assert train == ["rlhf", "train", "configs/tiny.yaml"]
    assert "dir: runs/tiny" in (ROOT / "configs" / "tiny.yaml").read_text()
    for line in rest:
        assert not set(line) & {*YOURS, "configs/movie_reviews.yaml"}
        assert all("runs/" not in word or word.startswith("runs/tiny") for word in line)
