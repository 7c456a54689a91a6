"""What a checkpoint that somebody has planted can do: nothing runs, and what is refused is named."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf.cluster import LocalRuntime
from rlhf.config.cluster import ClusterSettings
from rlhf.config.loader import UserError
from rlhf.config.sft import SftPolicySettings
from rlhf.training import torch_files
from rlhf.training.checkpoints import Checkpoints
from rlhf.training.sft import NextToken
from rlhf.training.supervised import SupervisedGroup

PACKAGE = Path(__file__).parents[2] / "rlhf"
UNPICKLE = (
    "pickle.load",
    "pickle.loads",
    "Unpickler",
    "joblib.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "_gather_object",
    "_object_list",
)
"""How calls end that execute what they read, from a file or from another rank."""


class Attack:
    """A pickle of this makes a folder when it is loaded as pickles are."""

    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.target,)


def test_plain_values_come_back_and_nothing_else_does(tmp_path: Path) -> None:
    value = {"shards": [torch.ones(3)], "memory": [], "name": "policy"}
    digest = torch_files.write(value, tmp_path / "file.pt")
    assert torch_files.sha256(tmp_path / "file.pt") == digest
    assert torch.equal(torch_files.read(tmp_path / "file.pt")["shards"][0], torch.ones(3))
    for zipped in (True, False):  # torch reads the format of before 1.6 too
        torch.save(
            {"shards": Attack(tmp_path / "attacked")}, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped
        )
        with pytest.raises(UserError, match=r"file\.pt: .*cannot be read without executing code"):
            torch_files.read(tmp_path / "file.pt")
    (tmp_path / "file.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"file\.pt: the file is damaged"):
        torch_files.read(tmp_path / "file.pt")
    assert not (tmp_path / "attacked").exists()
    torch.load(_written(Attack(tmp_path / "attacked"), tmp_path), weights_only=False)
    assert (tmp_path / "attacked").exists(), "the attack works where pickles are loaded"


def _written(value: object, folder: Path) -> Path:
    torch.save(value, folder / "other.pt")
    return folder / "other.pt"


def seal(checkpoints: Checkpoints, tag: str) -> None:
    """As somebody would who has planted a file: with checksums that fit."""
    (checkpoints.folder / tag / "state.json").unlink()
    (checkpoints.folder / tag / "SHA256SUMS").unlink()
    checkpoints.complete(tag, {"step": 1})
    assert checkpoints.latest() is not None


@pytest.mark.engine
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_no_planted_file_of_deepspeeds_is_executed(tiny_model: Path, run: Callable, tmp_path: Path, stage: int) -> None:
    """With checksums that fit: who can write the folder can plant both."""
    settings = SftPolicySettings(model=str(tiny_model), dtype="fp32", zero_stage=stage)
    cluster = ClusterSettings(device="cpu", threads=1, startup_deadline_s=300)
    checkpoints = Checkpoints(str(tmp_path), keep=1)

    async def attack() -> None:
        group = await SupervisedGroup.start(LocalRuntime(), NextToken(settings), settings, cluster, 0, 2)
        written = await group.save(str(checkpoints.folder), checkpoints.tag(1))
        checkpoints.complete("step-000001", {"step": 1}, written)
        tag, _ = checkpoints.latest()
        await group.load(str(checkpoints.folder), tag)
        folder = checkpoints.folder / tag
        assert not list(folder.rglob("*.py")), "no script that would load pickles lies beside them"
        loaded = sorted(folder.rglob("*.pt"))
        assert len(loaded) == (1 if stage == 0 else 2)
        assert {str(file.relative_to(folder)) for file in loaded} == set(written)
        for file in loaded:
            whole = file.read_bytes()
            torch.save({"module": Attack(tmp_path / "attacked")}, file)
            with pytest.raises(UserError, match=rf"{file.name}: the file is damaged: it has"):
                checkpoints.latest()
            seal(checkpoints, tag)
            with pytest.raises(UserError, match=rf"{file.name}: .*cannot be read without executing code"):
                await group.load(str(checkpoints.folder), tag)
            file.write_bytes(whole)
            seal(checkpoints, tag)
        await group.close()

    run(attack())
    assert not (tmp_path / "attacked").exists()


def test_nothing_in_the_package_loads_pickles() -> None:
    """Calls that execute what they read: there are none, and torch.load always says that it does not."""
    unsafe = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if (
                called.endswith(UNPICKLE)
                or (called == "torch.load" and given.get("weights_only") != "True")
                or given.get("allow_pickle") == "True"
            ):
                unsafe.append(f"{file.relative_to(PACKAGE.parent)}:{node.lineno}: {called}")
    # A process of ours reads there what its parent has written for it.
    assert [place for place in unsafe if not place.startswith("rlhf/preflight/trial.py:")] == []
