"""Which back end brings new weights to the engines: a pure decision. The pool and whoever plans a run ask here, so that both say the same.

Knows nothing of engines that run; how many share GPUs with the policy is the placement's to say (`rlhf.cluster.devices`).
"""

from __future__ import annotations

from typing import Literal

from rlhf.cluster.devices import shared_engines
from rlhf.config.settings import Settings
from rlhf.transfer.session import Backend


def choose_backend(
    requested: Backend | Literal["auto"], *, local: bool, gpu: bool, engines: int, shared: int
) -> Backend:
    """The back end for weights: always `local` within one process, else what was asked for, else what the devices allow.

    Args:
        requested: `rollout.transfer`.
        local: engines and policy run in one process (debug mode).
        gpu: they run on GPUs.
        engines: how many there are.
        shared: how many of them use GPUs of policy ranks.
    """
    if local:
        return "local"
    if requested != "auto":
        return requested
    if not gpu:
        return "gloo"
    if shared == engines:
        return "ipc"  # NCCL refuses two ranks on one GPU; a rank and the worker on the same GPU need no network at all
    return "gloo" if shared else "nccl"


def backend_of(settings: Settings, *, local: bool, gpu: bool) -> Backend:
    """The back end for a run with these settings. Arguments as for `choose_backend`."""
    rollout = settings.rollout
    shared = len(shared_engines(settings, debug=False))
    return choose_backend(rollout.transfer, local=local, gpu=gpu, engines=rollout.engines, shared=shared)
