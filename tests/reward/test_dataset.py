"""Training data: what files may hold, which errors name a row, how rows are divided, and the units and labels of a batch."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config.loader import UserError
from rlhf.reward.reading import Comparison, Example, PromptOnly, as_text
from rlhf.reward.training.dataset import Pairs, PreferenceData
from rlhf.reward.training.reader import read_data
from rlhf.types import Turn


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def read(tmp_path: Path):
    """`read(rows)`: the data of these rows, through a file."""
    return lambda *rows: read_data(write(tmp_path / "data.jsonl", list(rows)))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ('{"text": "a", "rating": 1}', '{"text": "x"}', ":2, field `rating`: missing"),
        (
            '{"text": "a", "rating": 1}',
            '{"text": "x", "rating": "3"}',
            ":2, field `rating`: must be a finite number",
        ),
        (
            '{"text": "a", "rating": 1}',
            '{"text": "x", "rating": NaN}',
            ":2: not JSON: NaN is no number",
        ),
        ('{"text": "a", "rating": 1}', '{"text": " ", "rating": 1}', ":2, field `text`: must be text"),
        (
            '{"text": "a", "rating": 1}',
            '{"text": "x", "rating": 1, "prompt": "y"}',
            "field `prompt`: give it in every row",
        ),
        ('{"text": "a", "rating": 1}', "[1]", ":2: a list, not an object"),
        ('{"text": "a", "rating": 1}', "{", ":2: not JSON"),
        (
            '{"text": "a", "ratings": {"x": 1}}',
            '{"text": "b", "ratings": {"x": "1"}}',
            "field `ratings.x`: must be a finite",
        ),
        ('{"text": "a", "ratings": {"x": 1}}', '{"text": "b", "ratings": {}}', "field `ratings`: has no rating"),
        ('{"text": "a", "ratings": {"x": 1}}', '{"text": "b", "ratings": 3}', "field `ratings`: must be an object"),
        ('{"chosen": "a", "rejected": "b"}', '{"chosen": "x", "rejected": "x"}', ":2, field `rejected`: equal"),
        ('{"chosen": "a", "rejected": "b"}', '{"chosen": "x", "rejected": "y", "margin": -1}', "Swap `chosen`"),
        (
            '{"chosen": "a", "rejected": "b"}',
            '{"chosen": "x", "rejected": "y", "probability": 0.2}',
            "must be 0.5 to 1",
        ),
        (
            '{"responses": ["a", "b"]}',
            '{"responses": ["a"]}',
            ":2, field `responses`: must be a list of at least two",
        ),
        ('{"responses": ["a", "b"]}', '{"responses": ["a", "b", "a"]}', "the same text stands in it twice"),
        ('{"responses": ["a", "b"]}', '{"responses": ["a", "b"], "margin": 1}', "is for pairs"),
        ('{"responses": ["a", "b"]}', '{"responses": ["a", ""]}', r"field `responses\[1\]`: must be text"),
    ],
)
def test_bad_rows_are_named(tmp_path, first, second, message):
    (tmp_path / "data.jsonl").write_text(first + "\n" + second + "\n")
    with pytest.raises(UserError, match=message):
        read_data(str(tmp_path / "data.jsonl"))


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match=":1: has the fields answer"):
        read_data(write(tmp_path / "other.jsonl", [{"answer": 1}]))
    with pytest.raises(UserError, match="no rows"):
        read_data(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(UserError, match="no such file"):
        read_data(str(tmp_path / "none.jsonl"))


def test_a_ranking_is_all_its_pairs(read):
    data = read({"responses": ["best", "good", "bad"]}, {"responses": ["yes", "no"]})
    assert [tuple(data.examples[i].response for i in pair) for pair in data.comparisons.index] == [
        ("best", "good"),
        ("best", "bad"),
        ("good", "bad"),
        ("yes", "no"),
    ]
    assert data.n_rows == 2 and [len(unit) for unit in data.units()] == [3, 2]


def test_a_chat_is_its_last_turn_after_all_the_others(read):
    """The form of many public preference sets, with or without a `prompt` beside it."""
    system, asked = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Recommend a film."}
    chosen, rejected = ({"role": "assistant", "content": text} for text in ("Alien.", "No."))
    conversation = (Turn("system", "Be kind."), Turn("user", "Recommend a film."))
    rows = {"chosen": [system, asked, chosen], "rejected": [system, asked, rejected]}
    expected = [Example(conversation, "Alien."), Example(conversation, "No.")]
    assert read(rows).input == "conversation" and read(rows).examples == expected
    for prompt in ("Recommend a film.", [system, asked]):
        assert read(rows | {"prompt": prompt}).examples == expected
    assert read({"prompt": [system, asked], "chosen": [chosen], "rejected": [rejected]}).examples == expected
    assert read({"responses": [rows["chosen"], rows["rejected"]]}).examples == expected
    assert read({"text": rows["chosen"], "rating": 1}).examples == expected[:1]
    with pytest.raises(UserError, match=":2, field `prompt`: give it in every row"):
        read(rows, {"chosen": "a", "rejected": "b"})
    with pytest.raises(UserError, match=":1, field `rejected`: must be text"):
        read(rows | {"rejected": [system, asked, {"role": "assistant", "content": ""}]})


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"rejected": [{"role": "user", "content": "Another?"}, {"role": "assistant", "content": "b"}]}, "`rejected`"),
        ({"prompt": "Another?"}, "`chosen`"),
    ],
)
def test_texts_of_a_row_answer_one_conversation(read, changed, says):
    """The conversation of the chosen response is not taken for that of the rejected one."""
    row = {
        name: [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": name}]
        for name in ("chosen", "rejected")
    }
    with pytest.raises(UserError, match=f":1, field {says}: answers another conversation"):
        read(row | changed)


def test_turns_without_a_role_are_named(read):
    chat = [{"content": "Which?"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(UserError, match=r":1: field `text` must be .*; text\[0\] needs `role` and `content`"):
        read({"text": chat, "rating": 1})


@pytest.mark.parametrize("prompts", [1, 2, 3])
def test_few_prompts_leave_rows_to_learn_from(read, prompts):
    """All rows of one prompt cannot be held out; two divisions are made of them, for the test and for validation."""
    data = read(*({"prompt": f"p{i % prompts}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(20)))
    rest, test = data.divide(0.2, np.random.default_rng(0))
    fit, validation = rest.divide(0.1, np.random.default_rng(0))
    assert min(fit.n_rows, validation.n_rows, test.n_rows) > 0
    assert fit.n_rows + validation.n_rows + test.n_rows == 20
    if prompts > 1:
        assert not {e.prompt for e in rest.examples} & {e.prompt for e in test.examples}


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_both_parts_have_rows(read, fraction):
    data = read(*({"text": str(i), "rating": i} for i in range(20)))
    assert [part.n_rows for part in data.divide(fraction, np.random.default_rng(0))] in ([19, 1], [1, 19])


def test_margins_and_probabilities_reach_the_labels(read):
    data = read(
        {"chosen": "a", "rejected": "b", "margin": 0.5},
        {"chosen": "c", "rejected": "d", "probability": 0.75},
        {"chosen": "e", "rejected": "f"},
    )
    labels = data.labels(data.units()[1:])
    assert labels.pairs.tolist() == [[0, 1], [2, 3]]
    assert labels.margins.tolist() == [0, 0] and labels.probabilities.tolist() == [0.75, 1]
    assert data.labels(data.units()[:1]).margins.tolist() == [0.5]


def test_several_ratings_may_be_missing(read):
    data = read({"text": "a", "ratings": {"x": 1, "y": 3}}, {"text": "b", "ratings": {"y": 5}})
    assert data.names == ("x", "y") and data.overall[0] == 2 and np.isnan(data.overall[1])
    assert data.labels(data.units()).ratings.isnan().tolist() == [[False, False], [True, False]]


def test_pairs_from_ratings_respect_the_margin(read):
    rng = np.random.default_rng(0)
    data = read(*({"text": f"t{i}", "rating": float(rating)} for i, rating in enumerate(rng.normal(size=100) * 3)))
    pairs = data.pairs(2.0, 500, np.random.default_rng(0))
    assert len(pairs) == 500
    assert (data.overall[pairs[:, 0]] - data.overall[pairs[:, 1]] > 2.0).all()


def test_of_many_ratings_pairs_are_drawn():
    n = 12_000
    ratings = np.random.default_rng(0).normal(size=(n, 1))
    data = PreferenceData([Example((), str(i)) for i in range(n)], np.arange(n), "response", ratings, ("r",), (1.0,))
    pairs = data.pairs(0.5, 300, np.random.default_rng(1))
    assert len(pairs) == 300 and (data.overall[pairs[:, 0]] - data.overall[pairs[:, 1]] > 0.5).all()


def test_rows_of_one_prompt_stay_together(read):
    data = read(*({"prompt": f"p{i % 5}", "text": f"t{i}", "rating": i} for i in range(50)))
    rest, part = data.divide(0.2, np.random.default_rng(0))
    assert {e.prompt for e in rest.examples}.isdisjoint(e.prompt for e in part.examples)
    assert (rest.n_rows, part.n_rows) == (40, 10)


@given(st.lists(st.integers(2, 5), min_size=2, max_size=8), st.integers(0, 100))
def test_dividing_rankings_loses_and_splits_nothing(sizes: list[int], seed: int):
    """Every pair of a ranking is in one part, with the same texts as before."""
    examples = [Example((), f"{row}.{place}") for row, size in enumerate(sizes) for place in range(size)]
    numbers = np.repeat(np.arange(len(sizes)), sizes)
    index = [(a, b) for a, b in combinations(range(len(examples)), 2) if numbers[a] == numbers[b]]
    margins = np.arange(len(index), dtype=float)
    data = PreferenceData(
        examples, numbers, "response", comparisons=Pairs(np.array(index), margins, np.ones(len(index)))
    )

    def named(part: PreferenceData) -> set:
        pairs = part.comparisons
        texts = [(part.examples[a].response, part.examples[b].response) for a, b in pairs.index]
        return set(zip(texts, pairs.margins.tolist(), strict=True))

    rest, part = data.divide(0.4, np.random.default_rng(seed))
    assert named(rest) | named(part) == named(data) and named(rest).isdisjoint(named(part))
    for half in (rest, part):
        assert sum(len(unit) for unit in half.units()) == len(half.examples)
        assert all(len({half.examples[i].response.split(".")[0] for i in unit}) == 1 for unit in half.units())
        assert half.row.tolist() == sorted(half.row.tolist()) and set(half.row) == set(range(half.n_rows))


def test_compared_ratings_come_together_anew_in_each_epoch(read):
    data = read(*({"text": f"t{i}", "rating": i % 3} for i in range(20))).grouped(8, 0.5, seed=1)
    first, again, second = data.units(0), data.units(0), data.units(1)
    assert [len(unit) for unit in first] == [8, 8, 4]
    assert np.concatenate(first).tolist() == np.concatenate(again).tolist() != np.concatenate(second).tolist()
    assert sorted(np.concatenate(second)) == list(range(20))
    labels = data.labels(first[1:])
    batch = np.concatenate(first[1:])
    unit_of = np.repeat([0, 1], [8, 4])
    for winner, loser in labels.pairs.tolist():
        assert data.overall[batch[winner]] - data.overall[batch[loser]] > 0.5 and unit_of[winner] == unit_of[loser]
    expected = sum(int((data.overall[u][:, None] - data.overall[u][None, :] > 0.5).sum()) for u in first[1:])
    assert len(labels.pairs) == expected > 0


def test_comparisons_are_read_in_both_orders(read):
    data = read(
        {"prompt": "p", "chosen": "a", "rejected": "b", "probability": 0.9},
        {"prompt": "q", "chosen": "c", "rejected": "d"},
    )
    compared = data.as_comparisons(data.drawn_pairs(0.0, 10, np.random.default_rng(0)))
    assert compared.examples[:2] == [Comparison(as_text("p"), "a", "b"), Comparison(as_text("p"), "b", "a")]
    labels = compared.labels(compared.units())
    assert labels.pairs.tolist() == [[0, 1], [2, 3]] and labels.probabilities.tolist() == pytest.approx([0.9, 1])


def test_a_gate_reads_each_prompt_once(read):
    data = read({"prompt": "p", "responses": ["a", "b", "c"]}, {"prompt": "q", "responses": ["d", "e"]}).with_prompts()
    assert [len(unit) for unit in data.units()] == [4, 3]
    assert data.examples[3] == PromptOnly(as_text("p")) and data.examples[6] == PromptOnly(as_text("q"))
    units = data.units()[::-1]
    batch, labels = np.concatenate(units), data.labels(units)
    for (a, b), prompt in zip(labels.pairs.tolist(), labels.prompts.tolist(), strict=True):
        first, second, question = (data.examples[batch[i]] for i in (a, b, prompt))
        assert first.prompt == second.prompt == question.prompt and isinstance(question, PromptOnly)
        assert first.response < second.response
    assert len(labels.pairs) == 4


def test_parquet_reads_like_jsonl(tmp_path, read):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": None},
        {"prompt": "q", "chosen": "c", "rejected": "d", "margin": 2.0},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    data = read_data(str(tmp_path / "d.parquet"))
    assert data.examples == read(*rows).examples and data.comparisons.margins.tolist() == [0, 2]
    parquet.write_table(pyarrow.Table.from_pylist([rows[0] | {"chosen": "b"}]), tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=r"bad\.parquet, row 1, field `rejected`: equal"):
        read_data(str(tmp_path / "bad.parquet"))


def test_a_saved_data_set_is_read_offline(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": "a", "ratings": {"x": 1.0, "y": None}}, {"text": "b", "ratings": {"x": 2.0, "y": 3.0}}]
    saved = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}
    )
    saved.save_to_disk(tmp_path / "both")
    saved["train"].save_to_disk(tmp_path / "one")
    for name, n in ((f"hf:{tmp_path}/both", 2), (f"hf:{tmp_path}/both:test", 1), (f"hf:{tmp_path}/one", 2)):
        assert read_data(name).n_rows == n
