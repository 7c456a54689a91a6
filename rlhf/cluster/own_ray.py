"""A Ray for one run on this machine alone, which others cannot reach: it listens on the loopback, and its token and its folder can be read
by this user only.

Written for Ray 2.60. On Linux it listens on every interface, writes its token readable for all, and its folder in /tmp writable for all:
who writes there decides what the actors load.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlhf.config.loader import UserError


def own_ray(**options: Any) -> None:
    """`ray.init` of such a Ray, with these options besides."""
    import ray

    keep_token_private()
    with _on_the_loopback():
        ray.init(address="local", include_dashboard=False, _temp_dir=str(session_folder()), **options)


def session_folder() -> Path:
    """Where Ray keeps its sockets and logs, in a folder of this user's: `/tmp/rlhf-UID/ray`. Short, for the sake of Unix sockets. With
    RAY_TMPDIR, where Ray itself makes it: in that folder, not as it, because Ray opens what it is given to everybody.

    Raises:
        UserError: somebody else has made it.
    """
    if named := os.environ.get("RAY_TMPDIR"):
        return Path(named) / "ray"
    folder = _private()
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise UserError(
                f"{folder}: is not a folder of this user's, and Ray's files would lie there. Set RAY_TMPDIR to a short path of your own"
            ) from None
        folder.chmod(0o700)
    return folder / "ray"


def _private() -> Path:
    return Path(f"/tmp/rlhf-{os.getuid()}")


def keep_token_private() -> None:
    """Make the token that Ray would make in the home folder, if none is there, and leave it to nobody else.

    Raises:
        UserError: the home folder cannot hold it.
    """
    if any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    file = Path.home() / ".ray" / "auth_token"
    try:
        if file.exists():
            if file.stat().st_uid == os.getuid():
                file.chmod(0o600)
            return
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent) as whole:  # readable for its user alone
            whole.write(secrets.token_hex(32))
            whole.flush()
            with suppress(FileExistsError):  # another run has just made it
                os.link(whole.name, file)
    except OSError as error:
        raise UserError(
            f"{file}: Ray's token cannot be kept there ({error.strerror or error}). Set RAY_AUTH_TOKEN_PATH to a file that holds one, such "
            "as the output of `openssl rand -hex 32`"
        ) from error


@contextmanager
def _on_the_loopback() -> Iterator[None]:
    """Ray knows this node as 127.0.0.1 and listens there alone, as it does on macOS and Windows; on Linux it replaces that address, also
    where `_node_ip_address` gives it, by one that others reach."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
