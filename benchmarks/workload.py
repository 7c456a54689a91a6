"""What both sides of a comparison work on, so that only the framework differs. Light: reward actors import it."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

PROMPTS_PER_STEP = 16
SAMPLES_PER_PROMPT = 2
MAX_TOKENS = 48
LEARNING_RATE = 1e-6
BETA = 0.1
# The first steps load, compile and allocate; they are run but not counted.
WARMUP_STEPS = 2


def reward(prompt: str, response: str, payload: object = None) -> float:
    """A number in [0, 1) from the text alone. A hash, because it costs nothing, hardly ever ties (a tie would be a pair
    less to train on) and teaches nothing, so that both policies keep writing responses of the same length."""
    return zlib.crc32(response.encode()) / 2**32


@dataclass(frozen=True)
class Step:
    """One counted step of one side.

    Attributes:
        seconds: wall time from the end of the step before to the end of this one.
        tokens: response tokens generated and learned from, end-of-sequence tokens included, padding excluded.
    """

    seconds: float
    tokens: int


def write_prompts(source: Path, target: Path, count: int) -> None:
    """Copy so many prompts, each one once.

    Raises:
        ValueError: the source has too few different prompts.
    """
    texts = dict.fromkeys(json.loads(line)["prompt"] for line in source.read_text(encoding="utf-8").splitlines())
    wanted = list(texts)[:count]
    if len(wanted) < count:
        raise ValueError(f"{source} has {len(wanted)} different prompts, and {count} are needed")
    target.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in wanted), encoding="utf-8")


def read_prompts(path: Path) -> list[str]:
    """The prompts, in order."""
    return [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]


def report(**values: object) -> None:
    """Tell the parent one result: a JSON object on a line of its own, marked, since libraries print too."""
    print("RESULT " + json.dumps(values), flush=True)


def results(output: str) -> list[dict]:
    """The results in a child's output."""
    return [json.loads(line.removeprefix("RESULT ")) for line in output.splitlines() if line.startswith("RESULT ")]
