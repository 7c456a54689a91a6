"""Asking a service over HTTP: within a deadline, and again after a moment where it is busy or away.

Knows nothing of what is asked. Used by the judges that are elsewhere: `remote`, `llm_judge_endpoint`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf.types import Failed, TimedOut

if TYPE_CHECKING:
    import httpx

AGAIN = (429, 502, 503, 504)
"""Statuses of a service that is busy, starting or behind a proxy that cannot reach it."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0


def pause_s(attempt: int, asked_for: float, luck: float) -> float:
    """Seconds before the next attempt: exponential back-off with full jitter, so that many askers do not come back together.

    Args:
        attempt: failed attempts before this one.
        asked_for: what the service asked for (`Retry-After`), the least that is waited; 0 if it did not.
        luck: uniform on [0, 1].
    """
    return asked_for + luck * min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(attempt, 20))


class Asker:
    """Connections to one service, kept open."""

    def __init__(self, url: str, token: str | None):
        """
        Args:
            token: sent as a bearer token; None: the service wants none.
        """
        import httpx

        self.url = url.rstrip("/")
        # The deadline of a question is kept here, not by the client; a question may wait for its answer as long as it has.
        timeout = httpx.Timeout(None, connect=5.0)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits)
        self._random = random.Random()  # only for pauses

    async def ask(self, method: str, path: str, question: Any, deadline_s: float) -> httpx.Response | Failed | TimedOut:
        """The service's answer with status 200, however often it takes within the deadline; or what it said last instead."""
        import httpx

        clock = asyncio.get_running_loop().time
        end, attempt, problem = clock() + deadline_s, 0, ""
        while True:
            asked_for = 0.0
            try:
                reply = await asyncio.wait_for(
                    self._client.request(method, self.url + path, json=question), end - clock()
                )
            except TimeoutError:
                if not problem:
                    return TimedOut(deadline_s)
                return self._gave_up(problem, attempt, deadline_s)
            except httpx.TransportError as error:
                problem = f"cannot be reached ({type(error).__name__}: {error})"
            except httpx.InvalidURL as error:
                return Failed(f"{self.url} is no address of a service: {error}")
            else:
                if reply.status_code == 200:
                    return reply
                problem = f"answers {reply.status_code}: {reply.text:.300}"
                if reply.status_code not in AGAIN:
                    return Failed(f"{self.url} {problem}")
                asked_for = _seconds(reply.headers)
            pause = pause_s(attempt, asked_for, self._random.random())
            if clock() + pause >= end:
                return self._gave_up(problem, attempt + 1, deadline_s)
            await asyncio.sleep(pause)
            attempt += 1

    def _gave_up(self, problem: str, attempts: int, deadline_s: float) -> Failed:
        return Failed(f"{self.url} {problem}, still after {attempts} attempts in {deadline_s:g} s")


def _seconds(headers: Mapping[str, str]) -> float:
    """What `Retry-After` asks for; a date, which it may also be, is left to the back-off."""
    header = headers.get("Retry-After", "")
    return float(header) if header.isdecimal() else 0.0
