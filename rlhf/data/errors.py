"""What this room reports to the user."""

from __future__ import annotations

from rlhf.config.loader import UserError


class DataError(UserError):
    """A data file cannot be used; the message names the file, the line and the remedy."""
