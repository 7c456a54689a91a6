"""The demo's independent judge: the VADER lexicon, which knows nothing of the reward model and its data."""

from __future__ import annotations

import functools


@functools.cache
def _analyzer():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # vaderSentiment==3.3.2

    return SentimentIntensityAnalyzer()


def vader(text: str) -> float:
    """VADER's compound sentiment of a text: -1 is most negative, 1 most positive; 0 for an empty text."""
    return float(_analyzer().polarity_scores(text)["compound"])
