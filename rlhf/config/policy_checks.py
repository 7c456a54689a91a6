"""Rules between the fields of `policy`, whatever the policy learns from. The findings read like those of `checks.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from rlhf.config.method_checks import changed
from rlhf.config.policy import Dtype, PolicySettings


def policy_problems(policy: PolicySettings, device: Literal["auto", "cpu", "cuda"]) -> Iterator[str]:
    """All findings.

    Args:
        device: `cluster.device`.
    """
    if policy.schedule == "constant" and changed(policy, "min_learning_rate_ratio"):
        yield (
            "`policy.min_learning_rate_ratio` is where `linear` and `cosine` end, but `policy.schedule` is constant. "
            "Remove it, or choose another `policy.schedule`"
        )
    yield from _rates(policy)
    yield from _zero(policy)
    for name in ("offload_optimizer", "offload_parameters"):
        if device == "cpu" and getattr(policy, name) != "none":
            yield (
                f"`policy.{name}`: with `cluster.device: cpu` everything is in host memory already. Set "
                f"`policy.{name}: none`"
            )


def _rates(policy: PolicySettings) -> Iterator[str]:
    """A type that is given needs its own rate only; one that is still to be chosen needs both."""
    if not isinstance(policy.learning_rate, dict):
        return
    possible = get_args(Dtype) if policy.dtype == "auto" else (policy.dtype,)
    missing = [dtype for dtype in possible if dtype not in policy.learning_rate]
    if missing:
        yield (
            f"`policy.learning_rate` has none for {' and '.join(missing)}, and `policy.dtype` is {policy.dtype}. Add it, or give one "
            "number for both"
        )


def _zero(policy: PolicySettings) -> Iterator[str]:
    if policy.offload_parameters != "none" and policy.zero_stage != 3:
        yield (
            "`policy.offload_parameters`: weights can be kept in host memory only when they are sharded, and "
            f"`policy.zero_stage` is {policy.zero_stage}. Set `policy.zero_stage: 3`, or `policy.offload_parameters: "
            "none`"
        )
    if policy.offload_optimizer != "none" and policy.zero_stage == 0:
        yield (
            "`policy.offload_optimizer`: optimizer states can be kept in host memory only when they are sharded, and "
            "`policy.zero_stage` is 0. Set `policy.zero_stage` to 1, 2 or 3, or `policy.offload_optimizer: none`"
        )
