"""Reward functions that raise whatever a function may raise: each response names what."""

from __future__ import annotations

import asyncio
import functools


class Unspeakable(Exception):
    """An exception that cannot even say what it is."""

    def __str__(self) -> str:
        raise ZeroDivisionError


class OwnBase(BaseException):
    """Not an Exception."""


def deeper(depth):
    return deeper(depth + 1)


RAISED = {
    "stop": (StopIteration, "no more"),
    "stop_async": (StopAsyncIteration, "no more"),
    "own": (OwnBase, "mine"),
    "exit": (SystemExit, 3),
    "closed": (GeneratorExit,),
    "cancelled": (asyncio.CancelledError, "by me"),
    "timeout": (TimeoutError,),
    "unspeakable": (Unspeakable,),
    "long": (ValueError, "x" * 10_000),
}


def score(prompt, response, payload):
    if response == "key":
        return payload["anwser"]
    if response == "recursion":
        return deeper(0)
    if response in RAISED:
        kind, *words = RAISED[response]
        raise kind(*words)
    return float(len(response))


async def score_async(prompt, response, payload):
    await asyncio.sleep(0)
    return score(prompt, response, payload)


def interrupts(prompt, response, payload):
    if response == "interrupt":
        raise KeyboardInterrupt
    return 1.0


def all_at_once(prompt, responses, payload):
    """A generator, so that the error comes while its values are read."""
    for response in responses:
        yield score(prompt, response, payload)


def as_mapping(prompt, responses, payload):
    return {index: 1.0 for index in range(len(responses))}


async def stubborn(prompt, response, payload):
    """Does not want to be cancelled; the test opens the gate."""
    while not GATE[0].is_set():
        try:
            await GATE[0].wait()
        except asyncio.CancelledError:
            continue
    return 1.0


GATE: list[asyncio.Event] = []


class Odd:
    """Neither a number nor something that can be shown."""

    def __float__(self):
        raise OSError("no")

    def __repr__(self):
        raise OSError("no")


def odd(prompt, response, payload):
    return Odd() if response == "odd" else 10**400 if response == "huge" else 1.0


def forgets(prompt, response, payload):
    float(len(response))


def at_times_in_one_line(prompt, response, payload):
    return 1.0 if response else None


def forgets_at_times(prompt, response, payload):
    if response:
        return 1.0


async def forgets_async(prompt, response, payload):
    await asyncio.sleep(0)


def giving_one(function):
    @functools.wraps(function)
    def given(prompt, response, payload):
        function(prompt, response, payload)
        return 1.0

    return given


decorated = giving_one(forgets)


def raises_only(prompt, response, payload):
    raise NotImplementedError


def nested(prompt, response, payload):
    return looked_up(payload) + 1


def looked_up(payload):
    return payload["anwser"]


class Judge:
    """A class, which a path may not name, and an object that it may."""

    def __call__(self, prompt, response, payload):
        return 1.0


judge = Judge()


def yields(prompt, response, payload):
    yield 1.0


async def yields_async(prompt, responses, payload):
    yield 1.0
