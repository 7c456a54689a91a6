"""`rlhf reward serve`: the reward servers of a configuration behind an address, until the process is asked to end.

The service itself is `reward.serving.http`; here are its token, its address, the cluster under it, and its signals.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import uvicorn

from rlhf.cluster import LocalRuntime, RayRuntime, Runtime, resource_request
from rlhf.config import Settings, UserError
from rlhf.config.settings import single_process
from rlhf.data.loading_time import with_startup_deadline
from rlhf.reward.judges.wire import TOKEN
from rlhf.reward.serving.http import make_app, server_config
from rlhf.reward.serving.pool import RewardPool
from rlhf.reward.serving.server import freeze_heap


def serve(settings: Settings, host: str, port: int, local: bool) -> None:
    """Answer until the process is asked to end (Ctrl-C or SIGTERM). Prints the address once requests are accepted.

    Args:
        port: 0: any that is free.
        local: one server in this process, without Ray.

    Raises:
        UserError: the judge, the cluster or the address cannot be used.
    """
    token = os.environ.get(TOKEN)
    if not token:
        token = secrets.token_urlsafe(32)
        print(f"{TOKEN} is not set; the token of this service is {token}", flush=True)
    elif not token.isascii() or token != token.strip():
        raise UserError(f"{TOKEN}: a token travels in a header, so it is of ASCII characters without spaces around it")
    settings = with_startup_deadline(single_process(settings) if local else settings)
    listener = _listen(host, port)
    runtime = LocalRuntime() if local else RayRuntime(settings.cluster, settings.reward.servers)
    try:
        if not local:
            runtime.reserve(replace(resource_request(settings, policy=False), engines=0))
        with asyncio.Runner(loop_factory=uvicorn.Config("").get_loop_factory()) as runner:  # uvloop
            runner.run(_serve(runtime, settings, token, listener))
    finally:
        runtime.stop()


async def _serve(runtime: Runtime, settings: Settings, token: str, listener: socket.socket) -> None:
    pool = await RewardPool.start(runtime, settings, service=True)
    app = make_app(pool, settings, token)
    config = server_config(app)
    freeze_heap()
    listener.listen(config.backlog)  # from here on, nobody is refused
    host, port = listener.getsockname()[:2]
    print(f"{settings.reward.kind} with {settings.reward.servers} server(s) at http://{host}:{port}", flush=True)
    server = _Server(config)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, server.stop)
    await server.serve(sockets=[listener])
    await pool.close()


class _Server(uvicorn.Server):
    """uvicorn would repeat a signal after its end, and the pool and the runtime would not get theirs."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """Answer what has been asked, then end."""
        self.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address, before anything is loaded."""
    if not 0 <= port < 2**16:  # getaddrinfo takes the rest of a division
        raise UserError(f"--port {port}: a port is a number from 0 (any that is free) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host is so long
        raise UserError(
            f"--host {host} --port {port}: this address cannot be used ({error}). Give an address of this machine"
        ) from None
    return listener
