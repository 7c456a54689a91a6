"""`rlhf reward train` as the tests call it, and data with a simple truth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from rlhf.cli import COMMANDS
from rlhf.commands.grammar import parse
from rlhf.reward.training.saving import REPORT


def fit(model: Path, data: Path, output: Path, *options: str) -> dict:
    """Train, and return the report."""
    reward_train("--model", str(model), "--train", str(data), "--output", str(output), "--threads", "1", *options)
    return json.loads((output / REPORT).read_text())


def reward_train(*arguments: str) -> None:
    """The command, whose errors are raised."""
    COMMANDS["reward train"](parse(["reward", "train", *arguments]))


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(n: int) -> list[tuple[str, float]]:
    """Texts whose rating is how many of their twelve letters are an a."""
    rng = np.random.default_rng(0)
    made = ["".join(rng.choice(list("aab"), 12)) if i % 2 else "".join(rng.choice(list("abb"), 12)) for i in range(n)]
    return [(text, float(text.count("a"))) for text in made]


def cyclic_pairs(n: int) -> list[dict]:
    """Three styles, of which a beats b, b beats c, and c beats a; a text is in a style by the letter that it has most of."""
    rng = np.random.default_rng(0)

    def text(style: int) -> str:
        letters = [letter for i, letter in enumerate("abc") for _ in range(6 if i == style else 1)]
        return "".join(rng.choice(letters, 12))

    return [{"chosen": text(i % 3), "rejected": text((i + 1) % 3)} for i in range(n)]
