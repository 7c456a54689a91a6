"""Assets without a network: the cache's promises, the registry, and the checksums."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlhf.data import assets, packages
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


def test_the_demos_assets_are_registered_beside_the_packages_own():
    registered = assets.registered()
    assert {"smollm2-135m-instruct", "minilm-l6-v2", "movie-reviews"} <= registered.keys()
    assert not registered.keys() & assets.RECIPES.keys()


def test_an_installed_package_registers_its_own(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "extra_assets.py").write_text(
        "from rlhf.data.assets import Recipe\nMINE = {'mine.txt': Recipe(1, lambda target: target.write_text('content'))}\n"
    )
    described = tmp_path / "extra_assets-1.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: extra-assets\nVersion: 1\n")
    (described / "entry_points.txt").write_text("[rlhf.assets]\nmine = extra_assets:MINE\n")
    monkeypatch.syspath_prepend(tmp_path)
    assets.registered.cache_clear()
    try:
        assert Path(resolve("asset:mine.txt")).read_text() == "content"
        with pytest.raises(AssetError, match="Did you mean `asset:mine.txt`?.*Known assets: .*minilm"):
            resolve("asset:mine.text")
    finally:
        assets.registered.cache_clear()


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
