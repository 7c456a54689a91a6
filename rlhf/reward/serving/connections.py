"""Bounds on what anybody who reaches the port may take of the reward service, before a token has been seen.

Owns how many bytes and seconds a request has, and how many connections there may be: uvicorn with httptools bounds none of
these. Does not know tokens or what is asked; the application (`http`) closes a connection whose token is wrong.
"""

from __future__ import annotations

import asyncio
import resource
from dataclasses import dataclass
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

OTHER_FILES = 256
"""File descriptors that are kept for all else that a service opens."""


@dataclass(frozen=True)
class Bounds:
    """What a connection may take.

    Attributes:
        connections: how many there may be at once.
        head_bytes, head_s: a request's first line and headers: how long, and how long they may take to arrive, from when the
            connection was made or the one before was answered and something arrived.
        request_bytes, body_s: the whole request as it travels, and how long its body may take to arrive, from the end of its head.
    """

    connections: int = 4096
    head_bytes: int = 16 * 2**10
    head_s: float = 10.0
    request_bytes: int = 17 * 2**20
    body_s: float = 60.0

    def protocol(self) -> Any:
        """What `uvicorn.Config` takes for `http`."""
        return partial(BoundedProtocol, bounds=self, strangers={})


def allow_files(bounds: Bounds) -> int:
    """Raise this process's limit on open files as far as the connections need it and it may be; how many connections there may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = bounds.connections + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return max(1, min(bounds.connections, soft - OTHER_FILES))
    return bounds.connections


class BoundedProtocol(HttpToolsProtocol):
    """A connection. One request at a time: a second one that is sent before the first is answered ends it.

    Where there are too many connections, the oldest that has not sent a whole head goes: silent ones do not keep others out.
    """

    def __init__(self, *args: Any, bounds: Bounds, strangers: dict[BoundedProtocol, None], **kwargs: Any):
        """
        Args:
            strangers: of all connections, those that have sent no whole head yet, oldest first.
        """
        super().__init__(*args, **kwargs)
        self._bounds, self._strangers = bounds, strangers
        self._timer: asyncio.TimerHandle | None = None
        self._size = 0  # of the request that is arriving
        self._headed = self._whole = False  # its head is here; all of it is here

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._strangers[self] = None
        self._set_timer(self._bounds.head_s)
        if len(self.connections) > self._bounds.connections:
            next(iter(self._strangers))._drop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._strangers.pop(self, None)
        self._set_timer(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._whole and self.cycle.response_complete:  # the next request begins
            self._size, self._headed, self._whole = 0, False, False
            self._set_timer(self._bounds.head_s)
        room = self._bounds.head_bytes - self._size
        self._size += len(data)
        if self._size > self._bounds.request_bytes:
            self._drop()
            return
        if not self._headed and len(data) > room:
            super().data_received(data[:room])
            if self.transport.is_closing():
                return
            if not self._headed:
                self.send_400_response(f"The request's head is larger than {self._bounds.head_bytes} bytes.")
                return
            data = data[room:]  # type: ignore[unreachable]  # the parser has called `on_headers_complete` meanwhile
        super().data_received(data)

    def on_message_begin(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            raise ValueError("a request before the one before it is answered")  # the parser's caller answers 400
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._headed = True
        self._strangers.pop(self, None)
        self._set_timer(self._bounds.body_s)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._whole = True
        self._set_timer(None)
        super().on_message_complete()

    def _set_timer(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._drop)

    def _drop(self) -> None:
        """Without an answer, for which the other side might not wait."""
        self._strangers.pop(self, None)
        self.transport.abort()
