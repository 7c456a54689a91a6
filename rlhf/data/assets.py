"""Assets: models and data under names like `asset:tiny-llama`, made on first use.

Owns the cache folder (`$RLHF_CACHE`, by default ~/.cache/rlhf): an asset is built there once, in a temporary folder
that is renamed when it is complete, so a killed or a racing process leaves nothing half made. Owns the registry too: the package's own
recipes (`RECIPES`), those of the examples beside it (`examples/NAME/recipes.py` of the checkout) and those of installed packages (entry
points of the group `rlhf.assets`). Each is a module with a dictionary like `RECIPES`, which every process on every node finds by itself.
Does not know who uses an asset.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import functools
import importlib.metadata
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.packages import Archive, AssetError, fetch_archive

PREFIX = "asset:"
GROUP = "rlhf.assets"
CHECKOUT = Path(__file__).parents[2]
"""Where the examples are, if the package runs from a checkout."""


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
    recipe = RECIPES.get(asset) or registered().get(asset)
    if recipe is None:
        known = sorted({*RECIPES, *registered()})
        near = difflib.get_close_matches(asset, known, n=1, cutoff=0.4)
        hint = f" Did you mean `{PREFIX}{near[0]}`?" if near else ""
        raise AssetError(f"there is no asset `{name:.200}`.{hint} Known assets: {', '.join(known)}.")
    path = _built(asset, recipe)
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


@functools.cache
def registered() -> Mapping[str, Recipe]:
    """The recipes of the examples and of installed packages, by name; an example's come first."""
    found: dict[str, Recipe] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        found |= point.load()
    if (CHECKOUT / "pyproject.toml").is_file():  # in site-packages, `examples` would be another project's
        for path in sorted(CHECKOUT.glob("examples/*/recipes.py")):
            found |= _module(path).RECIPES
    return found


def _module(path: Path) -> Any:
    """The module in this file, whose folder is in no package."""
    spec = importlib.util.spec_from_file_location(f"rlhf_examples.{path.parent.name}", path)
    assert spec is not None and spec.loader is not None, "it is a Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _built(asset: str, recipe: Recipe) -> Path:
    """The finished asset in the cache. Its name carries the recipe's version and keeps the asset's extension."""
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


def downloaded(archive: Archive) -> Path:
    """The archive in the cache, for a recipe. Raises AssetError: see `fetch_archive`."""
    return fetch_archive(archive, cache_folder() / "archives")


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a file of rows, for a recipe."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _build_tiny_llama(target: Path) -> None:
    from rlhf.data.tiny import build_tiny_model

    build_tiny_model(str(target))


def _build_tiny_prompts(target: Path) -> None:
    """A few dozen short prompts, for the smoke run and tests."""
    tasks = ("Name", "Describe", "Praise", "Compare two kinds of")
    things = ("bread", "rain", "a river", "the moon", "cats", "old books", "tea", "music", "a garden", "snow")
    write_jsonl(target, [{"prompt": f"{task} {thing}."} for task in tasks for thing in things])


RECIPES: dict[str, Recipe] = {
    "tiny-llama": Recipe(1, _build_tiny_llama),
    "tiny-prompts.jsonl": Recipe(1, _build_tiny_prompts),
}
