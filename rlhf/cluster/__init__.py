"""Where actors live and how one waits for them.

Owns: starting and stopping actors, in Ray (`RayRuntime`) or in this process (`LocalRuntime`, which is debug mode), the
handles through which they are called, and references to results that the caller does not want to hold.
Does not know: what any actor does. Rule: every remote wait has a deadline and says who waited for whom.
"""

from rlhf.cluster.handles import ActorDied, DeadlineExpired, Handle, LocalHandle, LocalRef, RayHandle, fetch
from rlhf.cluster.runtime import LocalRuntime, RayRuntime, Runtime, compute_env, uses_gpu

__all__ = [
    "ActorDied",
    "DeadlineExpired",
    "Handle",
    "LocalHandle",
    "LocalRef",
    "LocalRuntime",
    "RayHandle",
    "RayRuntime",
    "Runtime",
    "compute_env",
    "fetch",
    "uses_gpu",
]
