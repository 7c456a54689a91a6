"""What a Ray of our own leaves to other users of the machine: nothing."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from rlhf.cluster import launching, own_ray
from rlhf.config import UserError


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_token_is_made_for_its_user_alone(home: Path) -> None:
    """Ray itself writes it with the usual mask: readable for all."""
    before = os.umask(0)
    try:
        own_ray.keep_token_private()
    finally:
        os.umask(before)
    token = home / ".ray" / "auth_token"
    assert (mode(token), mode(token.parent)) == (0o600, 0o700)
    assert len(token.read_text()) == 64
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]


def test_a_token_that_is_there_is_kept_and_shut(home: Path) -> None:
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("mine")
    token.chmod(0o644)
    own_ray.keep_token_private()
    assert (token.read_text(), mode(token)) == ("mine", 0o600)


def test_another_place_for_the_token_is_left_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    own_ray.keep_token_private()
    assert not (home / ".ray").exists()


def test_a_home_that_cannot_hold_it_is_named(home: Path) -> None:
    (home / ".ray").write_text("a file")
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN_PATH"):
        own_ray.keep_token_private()


def test_two_that_start_at_once_leave_one_token(home: Path) -> None:
    threads = [threading.Thread(target=own_ray.keep_token_private) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in (home / ".ray").iterdir()] == ["auth_token"]


def test_rays_folder_is_in_one_that_nobody_else_can_open(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = own_ray.session_folder()
    assert folder == Path(f"/tmp/rlhf-{os.getuid()}/ray")
    assert mode(folder.parent) == 0o700
    folder.parent.chmod(0o755)
    assert own_ray.session_folder() == folder
    assert mode(folder.parent) == 0o700
    assert launching.main(["session-folder"]) == 0
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/elsewhere")
    assert launching.main(["session-folder"]) == 0
    assert capsys.readouterr().out.split() == [str(folder), "/tmp/elsewhere/ray"], (
        "Ray gives its own folder the mode 0777"
    )


def test_a_folder_that_somebody_else_made_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name can be guessed, and whoever makes it first could read and change what lies in it."""
    (home / "link").symlink_to(home)
    monkeypatch.setattr(own_ray, "_private", lambda: home / "link")
    with pytest.raises(UserError, match="not a folder of this user's.*RAY_TMPDIR"):
        own_ray.session_folder()
    (home / "other").mkdir()
    monkeypatch.setattr(own_ray, "_private", lambda: home / "other")
    monkeypatch.setattr(os, "getuid", lambda: home.stat().st_uid + 1)
    with pytest.raises(UserError, match="not a folder of this user's.*RAY_TMPDIR"):
        own_ray.session_folder()
