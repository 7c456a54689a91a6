"""DeepSpeed compiles an extension when a CPU first needs it, and guards the build with a file.

A process that is killed meanwhile leaves the file behind, and every later run on that host would wait without end.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

ABANDONED_S = 600.0
"""A build takes half a minute; on a busy machine a few."""


def remove_abandoned_locks(root: Path | None = None, now: float | None = None) -> list[Path]:
    """Remove the guards of builds that began so long ago that nobody can be at them. Returns which.

    Args:
        root: folder of PyTorch's extensions; None: where PyTorch builds them.
        now: seconds since the epoch; None: the present.
    """
    if root is None:
        from torch.utils.cpp_extension import get_default_build_root

        root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    now = time.time() if now is None else now
    abandoned = []
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        try:
            if now - lock.stat().st_mtime > ABANDONED_S:
                lock.unlink()
                abandoned.append(lock)
        except FileNotFoundError:
            pass  # another rank was quicker, or the build has ended
    return abandoned
