"""What this room reports to the user."""

from __future__ import annotations

import re

from rlhf.config.loader import UserError

MOST_CHARACTERS = 300


class DataError(UserError):
    """A data file cannot be used; the message names the file, the line and the remedy."""


def in_a_line(error: BaseException) -> str:
    """What a library's exception says, in one line of bounded length: torch adds its C++ frames, transformers pages of advice."""
    said = " ".join(str(error).split("\nException raised from")[0].split()).rstrip(". ") or type(error).__name__
    said = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", said)  # as a person writes it
    return said if len(said) <= MOST_CHARACTERS else said[:MOST_CHARACTERS] + " ..."
