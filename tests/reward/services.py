"""A reward service on a port of this machine, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from rlhf.cluster import LocalRuntime
from rlhf.config import Settings
from rlhf.data.loading_time import with_startup_deadline
from rlhf.reward.serving.connections import Bounds
from rlhf.reward.serving.http import make_app, server_config
from rlhf.reward.serving.pool import RewardPool

TOKEN = "a-token-of-this-test"


@contextmanager
def reward_service(settings: Settings, bounds: Bounds | None = None) -> Iterator[str]:
    """The service of these settings; its URL."""
    settings = with_startup_deadline(settings)

    async def app() -> Any:
        pool = await RewardPool.start(LocalRuntime(), settings, service=True)
        return make_app(pool, settings, TOKEN)

    with service(app, bounds) as url:
        yield url


@contextmanager
def service(make: Callable[[], Any], bounds: Bounds | None = None) -> Iterator[str]:
    """Any ASGI application, made by a coroutine function on the loop that it will run on; its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    servers: list[uvicorn.Server] = []
    ready = threading.Event()

    async def run() -> None:
        try:
            servers.append(uvicorn.Server(server_config(await make(), bounds)))
        finally:
            ready.set()
        await servers[0].serve(sockets=[listener])

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    ready.wait()
    try:
        yield "http://{}:{}".format(*listener.getsockname())
    finally:
        servers[0].should_exit = True
        thread.join()
        listener.close()
