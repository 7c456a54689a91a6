"""Assets without a network: the cache's promises, the checksums, and the split of the film reviews."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from rlhf.data import assets, movie_reviews, packages
from rlhf.data.assets import Recipe, resolve
from rlhf.data.packages import Archive, AssetError, fetch_archive


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_other_names_come_back_as_they_are(cache: Path):
    assert resolve("some/folder") == "some/folder"
    assert not cache.exists()


def test_tiny_prompts(cache: Path):
    path = Path(resolve("asset:tiny-prompts.jsonl"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.suffix == ".jsonl" and 24 <= len(rows) == len({row["prompt"] for row in rows})


def test_an_asset_is_built_once(cache: Path, monkeypatch: pytest.MonkeyPatch):
    built: list[Path] = []

    def build(target: Path) -> None:
        built.append(target)
        target.mkdir()
        (target / "file.txt").write_text("content")

    monkeypatch.setitem(assets.RECIPES, "thing", Recipe(1, build))
    threads = [threading.Thread(target=resolve, args=("asset:thing",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Path(resolve("asset:thing/file.txt")).read_text() == "content"
    assert len(built) == 1
    monkeypatch.setitem(assets.RECIPES, "thing", Recipe(2, build))
    resolve("asset:thing")
    assert len(built) == 2


def test_a_build_that_breaks_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch):
    def build(target: Path) -> None:
        target.mkdir()
        raise AssetError("no")

    monkeypatch.setitem(assets.RECIPES, "thing", Recipe(1, build))
    with pytest.raises(AssetError, match="no"):
        resolve("asset:thing")
    assert [path.name for path in cache.iterdir()] == [".thing-v1.lock"]


def test_errors_name_the_remedy(cache: Path):
    (cache.parent / "outside").write_text("no part of an asset")
    with pytest.raises(AssetError, match="asset:tiny-llama"):
        resolve("asset:tiny-lama")
    with pytest.raises(AssetError, match="no file"):
        resolve("asset:tiny-llama/none.txt")
    for name in ("../outside", "/etc/hostname", "config.json/x", "none/none", "x" * 5000, "a\0b"):
        with pytest.raises(
            AssetError,
            match="no file `asset:tiny-llama/(?s:.)* in this asset. Name one that is: .*asset:tiny-llama/config.json",
        ):
            resolve(f"asset:tiny-llama/{name}")
    with pytest.raises(AssetError, match="asset:tiny-prompts.jsonl is a file itself"):
        resolve("asset:tiny-prompts.jsonl/x")
    with pytest.raises(AssetError, match=r"no asset `asset:\.\./x`"):
        resolve("asset:../x")


def test_a_changed_archive_is_refused(tmp_path: Path):
    (tmp_path / "a.whl").write_bytes(b"something else")
    with pytest.raises(AssetError, match=r"sha256 is .* Delete it"):
        fetch_archive(Archive("a==1", "a.whl", "0" * 64, 1), tmp_path)


def test_an_archive_put_by_hand_is_taken(tmp_path: Path):
    (tmp_path / "a.whl").write_bytes(b"content")
    archive = Archive("a==1", "a.whl", hashlib.sha256(b"content").hexdigest(), 1)
    assert fetch_archive(archive, tmp_path) == tmp_path / "a.whl"


def test_no_network_says_where_to_put_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(command: list[str], **_) -> subprocess.CompletedProcess:
        assert command[:3] == [sys.executable, "-m", "pip"]
        return subprocess.CompletedProcess(command, 1, "", "ERROR: Could not find a version that satisfies a==1")

    monkeypatch.setattr(packages.subprocess, "run", refuse)
    with pytest.raises(AssetError) as caught:
        fetch_archive(Archive("a==1", "a.whl", "0" * 64, 1), tmp_path / "archives")
    assert "Could not find a version" in str(caught.value) and str(tmp_path / "archives" / "a.whl") in str(caught.value)


def test_the_split_leaks_nothing():
    snippets = [
        movie_reviews.Snippet(f"film {i % 900} has {i} good and bad words in it", i % 8 - 4) for i in range(3000)
    ]
    files = movie_reviews.split([*snippets, movie_reviews.Snippet("Too short.", 1.0)])
    for again in ("train_pairs.jsonl", "reward_train_scores.jsonl", "reward_test_scores.jsonl"):
        del files[again]
    texts = {name: {row.get("text") or row["snippet"] for row in rows} for name, rows in files.items()}
    prompts = [row["prompt"] for name in ("train_prompts.jsonl", "eval_prompts.jsonl") for row in files[name]]
    assert all(files.values())
    assert sum(map(len, texts.values())) == len(set().union(*texts.values()))
    assert len(prompts) == len(set(prompts))
    again = movie_reviews.split(snippets[::-1])
    assert {row["text"] for row in again["reward_test.jsonl"]} == texts["reward_test.jsonl"] - {"Too short."}


def test_the_raters_scores_come_with_their_texts():
    scores = [(i % 3, i % 5) for i in range(60)]
    made = movie_reviews.split([movie_reviews.Snippet(f"film {i}", sum(s) / 2, s) for i, s in enumerate(scores)])
    for part in ("train", "test"):
        rated, scored = made[f"reward_{part}.jsonl"], made[f"reward_{part}_scores.jsonl"]
        assert [row["text"] for row in rated] == [row["text"] for row in scored] != []
        assert [row["rating"] for row in rated] == [sum(row["scores"]) / 2 for row in scored]


def test_pairs_are_of_training_sentences_clearly_apart():
    snippets = [
        movie_reviews.Snippet(f"film {i % 900} has {i} good and bad words in it", i % 8 - 4) for i in range(3000)
    ]
    files, ratings = movie_reviews.split(snippets), {text: rating for text, rating, _ in snippets}
    pairs = files["train_pairs.jsonl"]
    prompts = {row["prompt"]: row["snippet"] for row in files["train_prompts.jsonl"]}
    assert {row["prompt"] for row in pairs} == prompts.keys()
    for row in pairs:
        assert ratings[row["chosen"]] - ratings[row["rejected"]] >= movie_reviews.APART
        assert row["snippet"] == prompts[row["prompt"]] and row["snippet"] in (row["chosen"], row["rejected"])
        assert {row["chosen"], row["rejected"]} <= set(prompts.values())
    assert 0.3 < sum(row["chosen"] == row["snippet"] for row in pairs) / len(pairs) < 0.7

    def key(row: dict) -> str:
        return row["prompt"]

    assert sorted(movie_reviews._pairs(files["train_prompts.jsonl"][::-1], ratings), key=key) == sorted(pairs, key=key)


def test_without_a_sentence_far_enough_there_is_no_pair():
    rows = [{"prompt": "p", "snippet": "a"}, {"prompt": "q", "snippet": "b"}]
    assert movie_reviews._pairs(rows, {"a": 0.0, "b": 1.4}) == []
    assert len(movie_reviews._pairs(rows, {"a": 0.0, "b": 1.5})) == 2


def test_reading_the_sdist(tmp_path: Path):
    table = "1\t2.5\tA  caf\xe9 film,\tx"[:-2] + "\n2\t-1\tBad.\n3\t3\tbad.\n"
    scores = "1\t2.5\t.5\t[2, 3]\n2\t-1\t0\t[-1, -1]\n3\t3\t0\t[3]"
    names = [f"hutto/{name}" for name in (movie_reviews.RATINGS, movie_reviews.SCORES)]
    inner = _tar(dict(zip(names, [table.encode("latin-1"), scores.encode()], strict=True)))
    path = tmp_path / "sdist.tar.gz"
    path.write_bytes(_tar({"v/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    assert movie_reviews.read_snippets(path) == [("A café film,", 2.5, (2, 3)), ("Bad.", -1.0, (-1, -1))]


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()
