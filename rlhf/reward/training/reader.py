"""From a file of ratings, pairs or rankings to `PreferenceData`, checked row by row.

Owns what a row may hold:

    text and rating              one text and its rating; or `ratings`: {name: number}, one for each objective
    chosen and rejected          a pair; perhaps `margin` (by how much), `probability` (that chosen is the better, 1/2 to 1)
    responses                    a ranking, best first: all its pairs
    prompt                       in all rows or in none

A prompt may be a chat, a list of {role, content}. So may a text: its last turn is the text, those before it are the prompt.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from rlhf.config.data import Columns
from rlhf.reward.errors import RewardError
from rlhf.reward.reading import Conversation, Example, Input, Text
from rlhf.reward.training.dataset import Pairs, PreferenceData
from rlhf.reward.training.rows import Row, read_preferences

KINDS = {"rated": ("text", "rating", "ratings"), "paired": ("chosen", "rejected"), "ranked": ("responses",)}


def read_data(path: str, columns: Columns | None = None) -> PreferenceData:
    """Read a file (`rows.read_preferences`) of rated, paired or ranked rows; the first row decides which.

    Args:
        columns: names for its columns.

    Raises:
        RewardError: with the file, the line, the field and what is wrong with it.
    """
    rows = read_preferences(path, columns)
    if not rows:
        raise RewardError(f"{path} has no rows. Give a file of ratings or pairs.")
    kind, given = _kind(rows[0]), [row.prompt() for row in rows]
    for row, prompt in zip(rows, given, strict=True):
        if (prompt is None) != (given[0] is None):
            raise row.error("prompt", "give it in every row or in none.")
    prompts = [prompt or () for prompt in given]
    what: Input = "response" if given[0] is None else "conversation"
    if kind == "rated":
        return _rated(rows, prompts, what)
    return _compared(rows, prompts, what, kind)


def _kind(row: Row) -> str:
    for kind, names in KINDS.items():
        if any(row.has(name) for name in names):
            return kind
    raise RewardError(
        f"{row.place}: has the fields {', '.join(row.fields) or '(none)'}. Rated rows need `text` and "
        "`rating` (or `ratings`), paired rows `chosen` and `rejected`, rankings `responses`. Columns of other names are given as "
        "`--columns text=COLUMN rating=COLUMN`."
    )


def _rated(rows: list[Row], prompts: list[Conversation], what: Input) -> PreferenceData:
    examples: list[Text] = [Example(prompt, row.text("text")) for row, prompt in zip(rows, prompts, strict=True)]
    several = rows[0].has("ratings")
    given = [_ratings(row) if several else {"rating": row.number("rating")} for row in rows]
    names = tuple(dict.fromkeys(name for ratings in given for name in ratings))
    table = np.array([[ratings.get(name, np.nan) for name in names] for ratings in given])
    return PreferenceData(examples, np.arange(len(rows)), what, table, names, (1 / len(names),) * len(names))


def _ratings(row: Row) -> dict[str, float]:
    value = row.field("ratings")
    if not isinstance(value, dict):
        raise row.error("ratings", f"must be an object of names and numbers, not {value!r:.60}.")
    # A table of several ratings has all names in every row, and no value where there is none.
    ratings = {name: row.as_number(f"ratings.{name}", number) for name, number in value.items() if number is not None}
    if not ratings:
        raise row.error("ratings", "has no rating. Remove the row; it says nothing.")
    return ratings


def _compared(rows: list[Row], prompts: list[Conversation], what: Input, kind: str) -> PreferenceData:
    examples: list[Text] = []
    numbers: list[int] = []
    pairs: list[tuple[int, int, float, float]] = []
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        texts = _ranking(row) if kind == "ranked" else _pair(row)
        margin = row.number("margin") if row.has("margin") else 0.0
        if margin < 0:
            raise row.error("margin", f"{margin:g} is below 0. Swap `chosen` and `rejected`, or leave it out.")
        probability = row.number("probability") if row.has("probability") else 1.0
        if not 0.5 <= probability <= 1:
            raise row.error(
                "probability",
                f"that `chosen` is the better must be 0.5 to 1, not {probability:g}. Swap `chosen` and `rejected`.",
            )
        start = len(examples)
        pairs += [(start + a, start + b, margin, probability) for a, b in combinations(range(len(texts)), 2)]
        examples += [Example(prompt, text) for text in texts]
        numbers += [number] * len(texts)
    index, margins, probabilities = zip(*((pair[:2], pair[2], pair[3]) for pair in pairs), strict=True)
    comparisons = Pairs(np.array(index), np.array(margins), np.array(probabilities))
    return PreferenceData(examples, np.array(numbers), what, comparisons=comparisons)


def _pair(row: Row) -> list[str]:
    texts = [row.text(name) for name in KINDS["paired"]]
    if texts[0] == texts[1]:
        raise row.error("rejected", "equal to `chosen`. Remove the row; it says nothing.")
    return texts


def _ranking(row: Row) -> list[str]:
    value = row.field("responses")
    if not isinstance(value, list) or len(value) < 2:
        raise row.error("responses", f"must be a list of at least two texts, best first, not {value!r:.60}.")
    texts = [row.as_text(f"responses[{i}]", text) for i, text in enumerate(value)]
    if len(set(texts)) < len(texts):
        raise row.error("responses", "the same text stands in it twice. Remove one.")
    for name in ("margin", "probability"):
        if row.has(name):
            raise row.error(name, "is for pairs; a ranking has many. Remove it, or write the pairs out.")
    return texts
