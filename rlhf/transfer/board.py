"""Where the two ends of a transfer between GPUs tell each other what travels beside the bytes: a key-value store of the session.

Messages are JSON, so nothing that somebody puts into the store is ever executed. An end that gives up says so here, and those who
wait for it stop.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from rlhf.cluster.network import open_store
from rlhf.transfer.session import TransferFailed, TransferSession

_GIVEN_UP = "given-up"
_LOOK_S = 2.0  # how often one who waits looks whether another has given up


class Board:
    """One end's view of the session's store. Rank 0 holds the store itself.

    Raises:
        TransferFailed: the store cannot be reached within the session's timeout.
    """

    def __init__(self, session: TransferSession, rank: int):
        self._session = session
        timeout = timedelta(seconds=session.timeout_s)
        try:
            store = open_store(session.host, session.port, timeout, serves=rank == 0)
        except RuntimeError as error:  # torch.distributed's own errors derive from it
            raise TransferFailed(
                f"rank {rank} of {session.world_size} could not join the weight transfer at {session.host}:{session.port} "
                f"within {session.timeout_s:g} s: {error}"
            ) from error
        self._store = dist.PrefixStore(session.prefix, store)

    def post(self, key: str, message: Any) -> None:
        """Leave a message (any JSON value) for others."""
        with _reached(key):
            self._store.set(key, json.dumps(message))

    def read(self, key: str) -> Any:
        """The message at this key, once it is there.

        Raises:
            TransferFailed: it did not come within the session's timeout, or another end gave up.
        """
        self.wait([key])
        with _reached(key):
            return json.loads(self._store.get(key))

    def take(self, key: str) -> Any:
        """As `read`, for a message that nobody else reads: it is removed."""
        message = self.read(key)
        self.remove([key])
        return message

    def remove(self, keys: Iterable[str]) -> None:
        """Forget messages that all have read."""
        for key in keys:
            with _reached(key):
                self._store.delete_key(key)

    def wait(self, keys: Sequence[str]) -> None:
        """Until there is a message at each of these keys. Raises as `read`."""
        end = time.monotonic() + self._session.timeout_s
        while True:
            left = max(0.001, min(_LOOK_S, end - time.monotonic()))
            try:
                self._store.wait(list(keys), timedelta(seconds=left))
                return
            except RuntimeError as error:
                self.require_nobody_gave_up(keys[0])
                if time.monotonic() >= end:
                    missing = [key for key in keys if not self._has(key)]
                    raise TransferFailed(
                        f"the weight transfer broke off at {missing[:4]}: nothing came within {self._session.timeout_s:g} s: {error}"
                    ) from error

    def require_nobody_gave_up(self, place: str) -> None:
        """Raises TransferFailed if some end gave up."""
        if self._has(_GIVEN_UP):
            raise TransferFailed(f"at {place}: another end of the weight transfer gave up; its own error says why")

    def _has(self, key: str) -> bool:
        with _reached(key):
            return self._store.check([key])

    @contextmanager
    def others_told(self) -> Iterator[None]:
        """An error in here is made known to the others before it goes on."""
        well = False
        try:
            yield
            well = True
        finally:
            if not well:
                with suppress(RuntimeError):  # the error under way is the one to be seen
                    self._store.set(_GIVEN_UP, "1")


@contextmanager
def _reached(key: str) -> Iterator[None]:
    """The store is asked about this key; it may be gone."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed's own errors derive from it
        raise TransferFailed(f"the weight transfer broke off at {key}: {error}") from error
