"""Verdicts remembered by content, for judges whose verdict on the same texts is always the same.

Owns what makes two questions the same. The verdict that was not asked for the longest time is forgotten first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from cachetools import LRUCache

from rlhf.reward.judges.judge import Judge, Texts
from rlhf.reward.scoring import Measured
from rlhf.types import Failed, Prompt, TimedOut


class CachedJudge:
    """A judge in front of another one. Failures are not remembered: the next attempt may pass.

    Measures `cache_hits`: 1 for a remembered verdict, 0 for a new one.
    """

    def __init__(self, judge: Judge, entries: int):
        """
        Args:
            entries: most verdicts remembered.
        """
        self._judge = judge
        self._verdicts: LRUCache[bytes, Any] = LRUCache(entries)
        self._fingerprint = judge.fingerprint()

    async def judge(self, prompt: Prompt, items: Sequence[Texts], deadline_s: float) -> list[Any]:
        keys = [self._key(prompt, texts) for texts in items]
        found = {key: self._verdicts[key] for key in keys if key in self._verdicts}
        new = {key: texts for key, texts in zip(keys, items, strict=True) if key not in found}
        answers = await self._judge.judge(prompt, list(new.values()), deadline_s) if new else []
        fresh = dict(zip(new, answers, strict=True))
        self._verdicts.update({key: one for key, one in fresh.items() if not isinstance(one, Failed | TimedOut)})
        return [_noted(found[key], 1.0) if key in found else _noted(fresh[key], 0.0) for key in keys]

    def fingerprint(self) -> str | None:
        return self._judge.fingerprint()

    def close(self) -> None:
        self._judge.close()

    def _key(self, prompt: Prompt, texts: Texts) -> bytes:
        content = [self._fingerprint, prompt.text, prompt.conversation, dict(prompt.payload), texts]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def _noted(value: Any, hit: float) -> Any:
    """The value with its hit or miss; a failure stays as it is."""
    if isinstance(value, Failed | TimedOut):
        return value
    if isinstance(value, Measured):
        return Measured(value.value, {**value.measures, "cache_hits": hit})
    return Measured(value, {"cache_hits": hit})
