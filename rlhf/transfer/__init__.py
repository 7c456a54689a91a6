"""How new weights get from the policy to the rollout engines, and how one knows that they did.

Owns: the back ends (`gloo`, `nccl`, `ipc`, `local`) and the choice between them (`choice`), the session in which one sender serves all
workers, fingerprints, and who holds which weights (`versions`). Does not know: what a policy, a pool or vLLM is. The sender
(`WeightSender`) lives in policy rank 0, or in every rank; the receivers live inside vLLM's workers (`rlhf.engines.receivers`).
"""

from typing import Any

from rlhf.transfer.session import (
    Backend,
    TransferFailed,
    TransferSession,
    sending_ranks,
)

__all__ = [
    "Backend",
    "TransferFailed",
    "TransferSession",
    "WeightSender",
    "sending_ranks",
]


def __getattr__(name: str) -> Any:
    # The sender needs torch; a driver that only plans does not.
    if name == "WeightSender":
        from rlhf.transfer.sender import WeightSender

        return WeightSender
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
