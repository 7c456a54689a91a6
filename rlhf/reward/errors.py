"""The reward side's errors that end a run. What goes wrong with one response is an outcome instead (`rlhf.types`)."""

from __future__ import annotations

from rlhf.config.loader import UserError


class RewardError(UserError):
    """The reward source cannot be used as configured; the message names it and the remedy."""


class NoServerLeft(RuntimeError):
    """Every reward server has died."""


class Busy(RuntimeError):
    """No server takes more responses now; later one will."""


class TooMany(ValueError):
    """More responses in one request than a server may ever hold."""
