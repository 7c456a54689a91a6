"""The demo's independent judge: the VADER lexicon, which knows nothing of the reward model and its data."""

from __future__ import annotations

import functools
import importlib.util

from rlhf.config import MissingPackageError
from rlhf.config.extras import remedy

PACKAGES = ("gguf", "matplotlib", "vaderSentiment")


def check_packages() -> None:
    """Make sure, before minutes of work, that what the examples need beyond the core is installed.

    Raises:
        MissingPackageError: something is not.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(f"the film-review examples need {', '.join(missing)}. {remedy('demo')}")


@functools.cache
def _analyzer():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def vader(text: str) -> float:
    """VADER's compound sentiment of a text: -1 is most negative, 1 most positive; 0 for an empty text."""
    return float(_analyzer().polarity_scores(text)["compound"])
