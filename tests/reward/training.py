"""`rlhf reward train` as the tests call it, and data with a simple truth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from rlhf.config.arguments import Parser
from rlhf.reward.training import train


def fit(model: Path, data: Path, output: Path, *options: str) -> dict:
    """Train, and return the report."""
    parser = Parser()
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


def cyclic_pairs(n: int) -> list[dict]:
    """Three styles, of which a beats b, b beats c, and c beats a; a text is in a style by the letter that it has most of."""
    rng = np.random.default_rng(0)

    def text(style: int) -> str:
        letters = [letter for i, letter in enumerate("abc") for _ in range(6 if i == style else 1)]
        return "".join(rng.choice(letters, 12))

    return [{"chosen": text(i % 3), "rejected": text((i + 1) % 3)} for i in range(n)]
