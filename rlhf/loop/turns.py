"""Whose turn it is on devices that the policy shares with engines and reward models.

While the policy works, engines and reward models that share devices are offloaded; otherwise the policy's optimizer states and
frozen models are offloaded. What the engines lose by it is for the loop to publish again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rlhf.cluster import together
from rlhf.loop.roles import Roles

log = logging.getLogger(__name__)

HAND_BACK_S = 10.0
"""How long handing the devices back may take after an error, in seconds: a rank that hangs is what often caused it."""


@asynccontextmanager
async def policy_turn(roles: Roles) -> AsyncIterator[None]:
    """Inside, the policy has the devices to itself. Does nothing where nobody shares any.

    After an error, of the body or of the turn itself, the devices are handed back as far as that goes, and it is this error that is raised.
    A cancelled turn ends as it is: the run is being ended, its roles will be closed, and whoever ends it may be in a hurry.
    """
    if not roles.turns:
        yield
        return
    loaded = False
    try:
        await together(roles.rollouts.offload(), roles.rewards.offload())
        await roles.policy.reload()
        loaded = True
        yield
    except Exception:
        await _hand_back_if_possible(roles, loaded)
        raise
    await _hand_back(roles)


async def _hand_back(roles: Roles, loaded: bool = True) -> None:
    if loaded:
        await roles.policy.offload()
    await together(roles.rollouts.reload(), roles.rewards.reload())


async def _hand_back_if_possible(roles: Roles, loaded: bool) -> None:
    handing = asyncio.wait_for(_hand_back(roles, loaded), HAND_BACK_S)
    (failed,) = await asyncio.gather(handing, return_exceptions=True)
    if failed is not None:
        log.warning("after an error the policy could not hand its devices back to the engines: %r", failed)
