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


async def picky(prompt, a, b, payload):
    """The longer one wins with 0.9, and the first place is worth 0.05; `bad` cannot be compared, `odd` gives no probability."""
    if "bad" in (a, b):
        raise ValueError("I do not compare this")
    if "odd" in (a, b):
        return 1.5
    if "none" in (a, b):
        return None
    return (0.9 if len(a) > len(b) else 0.1) + 0.05
