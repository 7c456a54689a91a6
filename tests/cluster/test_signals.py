"""SIGTERM ends what runs as Ctrl-C does, once, and whoever takes it over gives it back."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator

import pytest
from ray._private import utils

from rlhf import cli
from rlhf.cluster.signals import ended_by_sigterm, sigterm_kept_from_ray


@pytest.fixture(
    autouse=True, params=[signal.default_int_handler, signal.SIG_IGN], ids=["in front", "in the background"]
)
def in_background(request: pytest.FixtureRequest) -> Iterator[bool]:
    """A job that a script starts with `&` ignores SIGINT from its first moment. Whether this one does."""
    before = signal.signal(signal.SIGINT, request.param)
    yield request.param is signal.SIG_IGN
    signal.signal(signal.SIGINT, before)


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


def test_the_command_says_which_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, in_background: bool
) -> None:
    ends = {signal.SIGTERM: (143, "rlhf: ended by SIGTERM\n")}
    if not in_background:
        ends[signal.SIGINT] = (130, "rlhf: interrupted\n")
    for number, (status, says) in ends.items():
        monkeypatch.setitem(cli.COMMANDS, "train", lambda args, number=number: signal.raise_signal(number))
        assert cli.main(["train", "config.yaml"]) == status
        assert capsys.readouterr().err == says


def test_ray_does_not_take_it() -> None:
    """Its own handlers leave with status 15, or print a stack trace and abort."""
    with ended_by_sigterm() as ending:
        mine = signal.getsignal(signal.SIGTERM)
        with sigterm_kept_from_ray():
            utils.set_sigterm_handler(signal.SIG_IGN)
            assert signal.getsignal(signal.SIGTERM) is mine
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray's C++ does, past Python
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert ending.told


def test_another_thread_has_no_handlers_to_set() -> None:
    seen = []

    def work() -> None:
        with ended_by_sigterm() as ending, sigterm_kept_from_ray():
            seen.append(ending.told)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
