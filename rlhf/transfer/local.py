"""Weights within one process (debug mode): the sender hands the tensors straight to the engine's loader.

The engine registers its loader when it joins a session; the sender runs it. A session is known by its port number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from rlhf.transfer.session import TransferFailed, TransferSession
from rlhf.types import Shipment

Loader = Callable[[Iterable[tuple[str, torch.Tensor]], Shipment], str]

_loaders: dict[int, Loader] = {}


def register(session: TransferSession, loader: Loader) -> None:
    """From now on `loader` receives what is sent in this session; it returns the fingerprint of what it was given."""
    _loaders[session.port] = loader


def unregister(session: TransferSession) -> None:
    """Forget the session's loader."""
    _loaders.pop(session.port, None)


class LocalSender:
    """The trainer's end. It may be opened before the engine has joined."""

    def __init__(self, session: TransferSession):
        self._session = session

    def send(self, named_tensors: Iterable[tuple[str, torch.Tensor]], shipment: Shipment) -> str:
        """Load the tensors into the shipment's slot of the engine, now, in the caller's thread. Returns their fingerprint."""
        loader = _loaders.get(self._session.port)
        if loader is None:
            raise TransferFailed(
                f"no engine in this process has joined the local session {self._session.port}: "
                "call pool.connect(session) before sending"
            )
        return loader(named_tensors, shipment)

    def close(self) -> None:
        """Nothing to release."""
