"""Reward functions that tests name by import path."""

from __future__ import annotations

import asyncio
import time


async def moody(prompt, response, payload):
    """Length of the response; `bad` raises, `slow` sleeps far past every deadline, `nan` is not a number."""
    if response == "bad":
        raise ValueError("I do not judge this")
    if response == "slow":
        await asyncio.sleep(600)
    if response == "quits":
        raise SystemExit(3)
    return float("nan") if response == "nan" else float(len(response))


def blocking(prompt, response, payload):
    """A plain function; `slow` blocks its thread longer than the deadline of the test."""
    if response == "slow":
        time.sleep(3)
    return float(len(response))


def sees(prompt, response, payload):
    """1 if the prompt's text and payload arrive."""
    return float(prompt == "Say it." and payload["n"] == 3)


def hears(messages, response, payload):
    """The number of turns, if they arrive as {role, content}; the last one's length behind the point."""
    assert all(set(message) == {"role", "content"} for message in messages)
    return len(messages) + len(messages[-1]["content"]) / 100


def hears_all(messages, responses, payload):
    """The same for all responses at once."""
    return [hears(messages, response, payload) for response in responses]


async def compares_turns(messages, a, b, payload):
    """1 if all turns arrive."""
    return float(hears(messages, a, payload) == hears(messages, b, payload) == 4.03)


async def picky(prompt, a, b, payload):
    """The longer one wins with 0.9, and the first place is worth 0.05; `bad` cannot be compared, `odd` gives no probability."""
    if "bad" in (a, b):
        raise ValueError("I do not compare this")
    if "odd" in (a, b):
        return 1.5
    if "none" in (a, b):
        return None
    return (0.9 if len(a) > len(b) else 0.1) + 0.05


BIAS = [0.0]


def fickle(prompt, response, payload):
    """The length of the response plus a number that a test changes; far below zero it turns the order round."""
    return (1 if BIAS[0] > -50 else -1) * float(len(response)) + BIAS[0]


async def gated(prompt, response, payload):
    """Waits until the test opens the gate."""
    INSIDE[0] += 1
    await GATE[0].wait()
    return 1.0


GATE: list[asyncio.Event] = []
INSIDE = [0]


def all_at_once(prompt, responses, payload):
    """Each response's length less the mean length; `few` makes the list too short, `none` makes it no list."""
    if "none" in responses:
        return 3.0
    mean = sum(map(len, responses)) / len(responses)
    return [len(response) - mean for response in responses if response != "few"]


async def all_pairs(prompt, pairs, payload):
    """The longer one wins."""
    return [float(len(a) > len(b)) for a, b in pairs]


CANARIES_SEEN = [0]


def tiring(prompt, response, payload):
    """The length of the response; from the seventh canary on (three judgings of a pair), a little more."""
    CANARIES_SEEN[0] += prompt == "canary"
    return len(response) + (0.01 if CANARIES_SEEN[0] > 6 else 0.0)
