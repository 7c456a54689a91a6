"""The demo's data: what is read from the archive, and that the split leaks nothing."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from examples.movie_reviews import recipes


def test_the_split_leaks_nothing():
    snippets = [recipes.Snippet(f"film {i % 900} has {i} good and bad words in it", i % 8 - 4) for i in range(3000)]
    files = recipes.split([*snippets, recipes.Snippet("Too short.", 1.0)])
    for again in ("train_pairs.jsonl", "reward_train_scores.jsonl", "reward_test_scores.jsonl"):
        del files[again]
    texts = {name: {row.get("text") or row["snippet"] for row in rows} for name, rows in files.items()}
    prompts = [row["prompt"] for name in ("train_prompts.jsonl", "eval_prompts.jsonl") for row in files[name]]
    assert all(files.values())
    assert sum(map(len, texts.values())) == len(set().union(*texts.values()))
    assert len(prompts) == len(set(prompts))
    again = recipes.split(snippets[::-1])
    assert {row["text"] for row in again["reward_test.jsonl"]} == texts["reward_test.jsonl"] - {"Too short."}


def test_the_raters_scores_come_with_their_texts():
    scores = [(i % 3, i % 5) for i in range(60)]
    made = recipes.split([recipes.Snippet(f"film {i}", sum(s) / 2, s) for i, s in enumerate(scores)])
    for part in ("train", "test"):
        rated, scored = made[f"reward_{part}.jsonl"], made[f"reward_{part}_scores.jsonl"]
        assert [row["text"] for row in rated] == [row["text"] for row in scored] != []
        assert [row["rating"] for row in rated] == [sum(row["scores"]) / 2 for row in scored]


def test_pairs_are_of_training_sentences_clearly_apart():
    snippets = [recipes.Snippet(f"film {i % 900} has {i} good and bad words in it", i % 8 - 4) for i in range(3000)]
    files, ratings = recipes.split(snippets), {text: rating for text, rating, _ in snippets}
    pairs = files["train_pairs.jsonl"]
    prompts = {row["prompt"]: row["snippet"] for row in files["train_prompts.jsonl"]}
    assert {row["prompt"] for row in pairs} == prompts.keys()
    for row in pairs:
        assert ratings[row["chosen"]] - ratings[row["rejected"]] >= recipes.APART
        assert row["snippet"] == prompts[row["prompt"]] and row["snippet"] in (row["chosen"], row["rejected"])
        assert {row["chosen"], row["rejected"]} <= set(prompts.values())
    assert 0.3 < sum(row["chosen"] == row["snippet"] for row in pairs) / len(pairs) < 0.7

    def key(row: dict) -> str:
        return row["prompt"]

    assert sorted(recipes.pair_up(files["train_prompts.jsonl"][::-1], ratings), key=key) == sorted(pairs, key=key)


def test_without_a_sentence_far_enough_there_is_no_pair():
    rows = [{"prompt": "p", "snippet": "a"}, {"prompt": "q", "snippet": "b"}]
    assert recipes.pair_up(rows, {"a": 0.0, "b": 1.4}) == []
    assert len(recipes.pair_up(rows, {"a": 0.0, "b": 1.5})) == 2


def test_reading_the_sdist(tmp_path: Path):
    table = "1\t2.5\tA  caf\xe9 film,\tx"[:-2] + "\n2\t-1\tBad.\n3\t3\tbad.\n"
    scores = "1\t2.5\t.5\t[2, 3]\n2\t-1\t0\t[-1, -1]\n3\t3\t0\t[3]"
    names = [f"hutto/{name}" for name in (recipes.RATINGS, recipes.SCORES)]
    inner = _tar(dict(zip(names, [table.encode("latin-1"), scores.encode()], strict=True)))
    path = tmp_path / "sdist.tar.gz"
    path.write_bytes(_tar({"v/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    assert recipes.read_snippets(path) == [("A café film,", 2.5, (2, 3)), ("Bad.", -1.0, (-1, -1))]


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()
