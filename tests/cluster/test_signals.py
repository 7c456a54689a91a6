"""SIGTERM ends what runs as Ctrl-C does, once, and whoever takes it over gives it back."""

from __future__ import annotations

import asyncio
import signal
import threading

import pytest

from rlhf import cli
from rlhf.cluster.signals import ended_by_sigterm, sigterm_kept


def test_it_raises_where_the_main_thread_is_and_only_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ended_by_sigterm() as ending:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert ending.told
        signal.raise_signal(signal.SIGTERM)  # nothing: the cleaning up goes on
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_coroutine_cleans_up() -> None:
    cleaned = []

    async def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    with ended_by_sigterm() as ending, pytest.raises(KeyboardInterrupt):
        asyncio.run(work())
    assert ending.told and cleaned


def test_the_command_says_which_it_was(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    ends = {signal.SIGTERM: (143, "rlhf: ended by SIGTERM\n"), signal.SIGINT: (130, "rlhf: interrupted\n")}
    for number, (status, says) in ends.items():
        monkeypatch.setitem(cli.COMMANDS, "train", lambda args, number=number: signal.raise_signal(number))
        assert cli.main(["train", "config.yaml"]) == status
        assert capsys.readouterr().err == says


def test_a_library_that_takes_it_gives_it_back() -> None:
    """As Ray does, whose handler in C++ prints a stack trace and aborts."""
    with ended_by_sigterm() as ending:
        with sigterm_kept():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert ending.told


def test_another_thread_has_no_handlers_to_set() -> None:
    seen = []

    def work() -> None:
        with ended_by_sigterm() as ending, sigterm_kept():
            seen.append(ending.told)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
