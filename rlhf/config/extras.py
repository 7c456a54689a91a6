"""What the distribution is called, and how to install an optional part of it.

The import and the command are `rlhf`; on the public index that name belongs to another project. So whatever tells a user
to install something tells it with `remedy`, from the checkout.
"""

from __future__ import annotations

from rlhf.config.loader import UserError

DISTRIBUTION = "rlhf-online"
"""The name in pyproject.toml, under which `importlib.metadata` finds this package."""


class MissingPackageError(UserError):
    """An optional package is not installed; the message names the extra that brings it."""


def remedy(extra: str) -> str:
    """The sentence that tells how to install what one of pyproject.toml's extras brings."""
    return f"Install it with `pip install -e '.[{extra}]'` in the checkout of rlhf."
