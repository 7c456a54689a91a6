"""What launch scripts ask: answers, and messages that name the remedy when there is none."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from rlhf.cluster.launching import address_towards, main, run_folder, wait_for_head, wait_for_nodes
from rlhf.config import UserError

SFT = str(Path(__file__).parents[2] / "configs" / "movie_reviews" / "sft.yaml")
TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")


def test_the_run_folder_is_absolute_and_follows_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_folder(TINY, ["--resume", "run.dir=here"]) == tmp_path / "here"
    assert run_folder(SFT, ["run.dir=there"], "sft") == tmp_path / "there"
    assert main(["run-folder", "--command", "sft", TINY]) == 2, "other settings"
    assert main(["run-folder", TINY, "loop.steps=3", "--resume"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/runs/tiny\n"
    assert main(["run-folder", TINY, "loop.stepz=3"]) == 2
    assert "loop.steps" in capsys.readouterr().err


def test_the_address_is_the_one_of_the_route(capsys: pytest.CaptureFixture[str]) -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert main(["address", "no-such-host.invalid"]) == 2
    assert "HEAD_IP" in capsys.readouterr().err


def test_a_head_that_listens_is_found_and_one_that_does_not_is_named() -> None:
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{head.getsockname()[1]}"
        with pytest.raises(UserError, match=f"nothing answered at {address} within 0 s"):
            wait_for_head(address, 0)
        head.listen()
        wait_for_head(address, 0)


def test_waiting_ends_when_all_nodes_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.cluster.launching.POLL_S", 0)
    joined: list[str] = []

    def alive() -> list[str]:
        joined.append(f"10.0.0.{len(joined) + 1}")
        return joined

    wait_for_nodes(3, 100, alive)
    assert len(joined) == 3
    with pytest.raises(UserError, match=r"2 of 3 nodes joined .* within 0 s: a, b\."):
        wait_for_nodes(3, 0, lambda: ["b", "a"])
