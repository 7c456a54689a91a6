"""Which checkpoint a path means, what is refused, and that a command takes a checkpoint for a model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rlhf.cli import main
from rlhf.commands import export as command
from rlhf.commands.export import as_model, find_checkpoint
from rlhf.config import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two complete checkpoints, the remains of a third, and an export."""
    folder = tmp_path / "run"
    for step in (5, 10, 15):
        (folder / "checkpoints" / f"step-{step:06d}" / "policy").mkdir(parents=True)
        if step < 15:
            (folder / "checkpoints" / f"step-{step:06d}" / "state.json").write_text("{}")
    (folder / "manifest.json").write_text("{}")
    (folder / "export").mkdir()
    (folder / "export" / "config.json").write_text("{}")
    return folder


def test_a_run_means_its_last_complete_checkpoint(run: Path) -> None:
    last = run / "checkpoints" / "step-000010"
    for path in (run, run / "checkpoints", last, last / "policy"):
        assert find_checkpoint(path) == last
        assert command.holds_checkpoints(path)
    assert find_checkpoint(run / "checkpoints" / "step-000005").name == "step-000005"
    assert not command.holds_checkpoints(run / "export")


def test_what_is_no_checkpoint_is_said(run: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for path, says in {
        tmp_path / "none": "there is no such folder",
        tmp_path / "other": "is no checkpoint of a run",
        run / "export": "is a model already",
        run / "checkpoints" / "step-000015": "there is no complete checkpoint",
    }.items():
        with pytest.raises(UserError, match=says):
            find_checkpoint(path)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="checkpoint.every above 0.*its end is in .*run/export"):
        find_checkpoint(run)
    with as_model(str(run), "--policy") as model:
        assert model == str(run / "export"), "a run without checkpoints has what it exported"


@pytest.mark.parametrize("name", ["nosuchfolder", "./none", "a/b/c"])
def test_a_model_that_is_nowhere_is_named_with_its_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", name, "--prompt", "Hi"]) == 2
    said = capsys.readouterr().err
    assert f"MODEL: there is no folder `{name}`" in said and "policy.model" not in said


def test_an_export_appears_whole_or_not_at_all(
    run: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(folder: Path, out: Path, model: str | None) -> None:
        out.mkdir()
        save_file(load_file(tiny_model / "model.safetensors"), out / "model.safetensors")
        if model == "fails":
            raise UserError("not so")

    monkeypatch.setattr(command, "_write", write)
    assert main(["export", str(run), "--model", "fails"]) == 2
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "export", "manifest.json"]
    assert main(["export", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "export-step-000010")
    assert (run / "export-step-000010" / "model.safetensors").is_file()
    for out, says in {run: "not an empty folder", tmp_path / "a" / "b": "its folder does not exist"}.items():
        assert main(["export", str(run), "--out", str(out)]) == 2
        assert says in capsys.readouterr().err
    with as_model(str(run), "--policy") as model:
        assert Path(model).parent.parent == run, "where all nodes can read it"
    assert not Path(model).exists()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "_write", full)
    with (
        pytest.raises(UserError, match=r"--policy: .*No space left.*rlhf export .*--out DIR"),
        as_model(str(run), "--policy"),
    ):
        pass
    assert not list(run.glob(".export-*"))
