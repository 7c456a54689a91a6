"""Where actors live and how one waits for them.

Owns: deciding which actor runs on which node with which GPUs (`place`), starting and stopping actors, in Ray (`RayRuntime`)
or in this process (`LocalRuntime`, which is debug mode), who is alive (`lives`) and who has the least to do (`router`), the handles
through which they are called, and references to results that the caller does not want to hold.
Does not know: what any actor does. Rule: every remote wait has a deadline and says who waited for whom.
"""

from rlhf.cluster.calls import (
    ActorDied,
    DeadlineExpired,
    Handle,
    LocalHandle,
    LocalRef,
    RayHandle,
    Ref,
    fetch,
    together,
)
from rlhf.cluster.devices import compute_env, shared_engines, shared_rewards, takes_turns, uses_gpu
from rlhf.cluster.placement import CannotPlace, Placement, Seat, place
from rlhf.cluster.resources import Node, ResourceRequest, actor_name, resource_request
from rlhf.cluster.runtime import LocalRuntime, RayRuntime, Runtime

__all__ = [
    "ActorDied",
    "CannotPlace",
    "DeadlineExpired",
    "Handle",
    "LocalHandle",
    "LocalRef",
    "LocalRuntime",
    "Node",
    "Placement",
    "RayHandle",
    "RayRuntime",
    "Ref",
    "Runtime",
    "Seat",
    "ResourceRequest",
    "actor_name",
    "compute_env",
    "fetch",
    "place",
    "shared_engines",
    "shared_rewards",
    "takes_turns",
    "together",
    "uses_gpu",
    "resource_request",
]
