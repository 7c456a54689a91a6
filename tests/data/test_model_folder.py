"""Where a model's name leads: a folder, an asset, or a hub's model in the cache or fetched; and what is said where it leads nowhere."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from transformers import AutoConfig

from rlhf.data import model_folder
from rlhf.data.loading_time import weights
from rlhf.data.model_folder import FolderError, find_model, lacks_weights, read_config, size_of
from rlhf.data.model_identity import model_digest

FIRST, SECOND = "a" * 40, "b" * 40
"""Commits."""


@pytest.fixture
def cache(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache with two commits of one model, `main` being the second and `old` the first; nothing can be fetched."""
    repository = tmp_path / "hub" / "models--owner--name"
    for commit in (FIRST, SECOND):
        shutil.copytree(tiny_model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SECOND)
    (repository / "refs" / "old").write_text(FIRST)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model_folder.snapshot.cache_clear()
    yield repository
    model_folder.snapshot.cache_clear()


def test_a_hubs_model_is_found_in_the_cache(cache: Path) -> None:
    assert find_model("owner/name", "here") == str(cache / "snapshots" / SECOND)
    assert find_model("owner/name@old", "here") == str(cache / "snapshots" / FIRST)
    assert find_model(f"owner/name@{FIRST}", "here") == str(cache / "snapshots" / FIRST)
    assert model_digest(find_model("owner/name", "here")) != model_digest(find_model("owner/name@old", "here"))
    assert weights("owner/name@old").nbytes > 0


@pytest.mark.parametrize("name", ["owner/other", "owner/name@new"])
def test_what_is_not_in_the_cache_says_what_it_was_taken_for(cache: Path, name: str) -> None:
    with pytest.raises(FolderError) as refused:
        find_model(name, "`reward.path`")
    said = str(refused.value)
    assert said.startswith(
        f"`reward.path`: there is no folder `{name}`, so it is taken for the name of a model on https://"
    )
    assert "HF_HUB_OFFLINE is set" in said and f"hf download {name.replace('@', ' --revision ')}" in said


@pytest.mark.parametrize(
    ("kind", "fields", "name", "largest"),
    [
        ("gemma3n_text", {"num_hidden_layers": 2, "intermediate_size": [64, 128]}, "intermediate_size", 128),
        ("gemma4_text", {"num_hidden_layers": 6}, "head_dim", 512),
        ("llama", {"num_key_value_heads": 8}, "num_key_value_heads", 8),
        ("gpt2", {}, "num_key_value_heads", None),
    ],
)
def test_a_size_that_differs_between_layers_is_the_largest(
    kind: str, fields: dict, name: str, largest: int | None, tmp_path: Path
) -> None:
    AutoConfig.for_model(kind, **fields).save_pretrained(tmp_path)
    assert size_of(read_config(tmp_path, "here").get_text_config(), name) == largest


def test_a_folder_wins_over_a_name(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.makedirs("owner/name")
    assert find_model("owner/name", "here") == "owner/name"


def test_a_part_of_a_model_is_not_taken_for_the_whole(cache: Path) -> None:
    (cache / "snapshots" / SECOND / "model.safetensors").unlink()
    folder = find_model("owner/name", "here", weights=False)
    assert lacks_weights(Path(folder))
    with pytest.raises(FolderError, match="only a part of it is in this machine's cache"):
        find_model("owner/name", "here")


@pytest.fixture
def hub(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """A hub on the loopback that has `owner/judge`, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            parts = self.path.strip("/").split("/")
            if parts[:5] == ["api", "models", "owner", "judge", "tree"]:
                there = [(file.name, file.stat().st_size) for file in sorted(tiny_model.iterdir())]
                files = [{"type": "file", "path": name, "size": size, "oid": FIRST} for name, size in there]
                self._answer(json.dumps(files).encode())
            elif parts[:4] == ["api", "models", "owner", "judge"]:
                files = [{"rfilename": file.name} for file in sorted(tiny_model.iterdir())]
                self._answer(json.dumps({"id": "owner/judge", "sha": FIRST, "siblings": files}).encode())
            elif parts[:3] == ["owner", "judge", "resolve"]:
                self._answer((tiny_model / parts[-1]).read_bytes())
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        do_HEAD = do_GET

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{len(body)}"')
            self.send_header("X-Repo-Commit", FIRST)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


SCRIPT = """
import sys
from rlhf.data.model_folder import find_model, FolderError
for name in sys.argv[1:]:
    for weights in (False, True):
        try:
            print(find_model(name, "`reward.path`", weights))
        except FolderError as error:
            print(error)
"""


def test_a_model_is_fetched_from_a_hub(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    """The small files alone for the dry run; and what is not there is said, once with a hub that has none of the name."""
    address, asked = hub
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", SCRIPT, "owner/judge@v1", "owner/none"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    small, whole, *none = done.stdout.splitlines()
    assert small == whole and small.endswith(f"models--owner--judge/snapshots/{FIRST}"), done.stdout
    assert (Path(whole) / "model.safetensors").is_file() and (Path(whole) / "tokenizer.json").is_file()
    assert any(path.startswith("GET /api/models/owner/judge/revision/v1") for path in asked)
    for said in none:
        assert (
            f"`owner/none`, so it is taken for the name of a model on {address}, and there is none of that name" in said
        )
