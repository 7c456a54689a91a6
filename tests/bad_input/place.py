"""The working directory of a case: files that a run needs, all of them good, for the case to spoil one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

RUN = {
    "run": {"dir": "runs/walk"},
    "data": {"prompts": "prompts.jsonl", "max_prompt_tokens": 64},
    "policy": {"model": "tiny", "dtype": "fp32", "micro_batch_tokens": 512},
    "rollout": {"max_tokens": 32},
    "reward": {"kind": "function", "path": "rlhf.reward.functions:share_of_letter_a"},
    "loop": {"steps": 2, "prompts_per_step": 4},
    "cluster": {"device": "cpu"},
}
SFT = {
    "run": {"dir": "runs/walk"},
    "data": {"examples": "examples.jsonl", "max_tokens": 64},
    "policy": {"model": "tiny", "dtype": "fp32"},
    "training": {"batch_size": 4},
    "cluster": {"device": "cpu"},
}
FUNCTION = "def score(prompt, response, payload):\n    return float(len(response))\n"


def build_sources(folder: Path) -> None:
    """What all cases share and none changes: the tiny model, the same as a classifier, and files of rows."""
    from rlhf.data.tiny import build_tiny_model

    build_tiny_model(folder / "tiny")
    _classifier(folder / "tiny", folder / "judge")
    rows = range(24)
    _rows(folder / "prompts.jsonl", [{"prompt": f"say {n}"} for n in rows])
    _rows(folder / "pairs.jsonl", [{"prompt": f"say {n}", "chosen": "yes", "rejected": "no"} for n in rows])
    _rows(folder / "examples.jsonl", [{"prompt": f"say {n}", "response": "yes"} for n in rows])
    _rows(folder / "ratings.jsonl", [{"text": f"text {n}", "rating": n / 2} for n in rows])
    (folder / "rewards.py").write_text(FUNCTION)
    (folder / "run.yaml").write_text(as_yaml(RUN))
    (folder / "sft.yaml").write_text(as_yaml(SFT))


def _classifier(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_pretrained(source, num_labels=1).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def _rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_yaml(value: Any) -> str:
    """One value as YAML, on one line; the sections of a mapping on a line each."""
    if isinstance(value, Mapping):
        return "".join(f"{json.dumps(str(key))}: {flow(inner)}\n" for key, inner in value.items())
    return flow(value) + "\n"


def flow(value: Any) -> str:
    """JSON, with YAML's names for what it does not have."""
    if isinstance(value, float):
        text = repr(value)
        return {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}.get(text, text)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    return json.dumps(value)


class Place:
    """A working directory, in which links to the shared files stand for their copies. One case after the other uses it.

    Args:
        folder: where it is made; does not exist yet.
        sources: what `build_sources` made.
    """

    def __init__(self, folder: Path, sources: Path):
        self.folder, self.sources = folder, sources
        self.work, self.home = folder / "work", folder / "home"
        self._links = {entry.name: entry for entry in sources.iterdir()}

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """It is the process's own until the end of the block; then what a case has changed is gone, and its modules are forgotten."""
        self._clean()
        changes = {"HOME": str(self.home), "RLHF_CACHE": str(self.home / "cache"), "LANGUAGE": "C"}
        changes |= {"RLHF_REWARD_TOKEN": "token", "OPENAI_API_KEY": "key"}
        folder, path, modules = os.getcwd(), list(sys.path), set(sys.modules)
        with mock.patch.dict(os.environ, changes):
            os.chdir(self.work)
            try:
                yield
            finally:
                os.chdir(folder)
                sys.path[:] = path
                for name in set(sys.modules) - modules:
                    if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(self.work)):
                        del sys.modules[name]
                sys.path_importer_cache.pop(str(self.work), None)
                self._clean()

    def _clean(self) -> None:
        for top in (self.work, self.home):
            top.mkdir(parents=True, exist_ok=True)
        for entry in [*os.scandir(self.work), *os.scandir(self.home)]:
            if entry.is_symlink() and entry.name in self._links:
                continue
            if entry.is_dir(follow_symlinks=False):
                os.chmod(entry.path, 0o700)
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
        for name, source in self._links.items():
            if not os.path.lexists(self.work / name):
                os.symlink(source, self.work / name)

    def names(self) -> set[str]:
        """All paths in it, but what Python keeps of modules."""
        found = (path for top in (self.work, self.home) for path in _below(str(top)))
        return {os.path.relpath(path, self.folder) for path in found if "__pycache__" not in path}

    def write(self, name: str, content: str | bytes) -> str:
        """Write a file in place of what stands there; returns its name."""
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            path.unlink()
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, encoding="utf-8", newline="")
        return name

    def configuration(self, changes: Mapping[str, Any], base: Mapping[str, Any] = RUN, name: str = "bad.yaml") -> str:
        """Write a configuration with these sections merged into `base`."""
        return self.write(name, as_yaml(merged(base, changes)))

    def model(self, name: str = "model", source: str = "tiny") -> Path:
        """A copy of a model folder, whose files may be changed."""
        shutil.copytree(self.sources / source, self.work / name)
        return self.work / name


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, section by section."""
    result = dict(base)
    for name, value in changes.items():
        old = result.get(name)
        result[name] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _below(top: str) -> Iterator[str]:
    for entry in os.scandir(top):
        yield entry.path
        if entry.is_dir(follow_symlinks=False):
            yield from _below(entry.path)
