"""A gradient divided in each loss, and the same gradient divided once, when all losses are there: on every form DeepSpeed keeps one in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhf.config.policy import PolicySettings
from rlhf.training.deepspeed import Trainer
from rlhf.training.weights import whole_weights

CASES = [
    (stage, dtype, offload)
    for stage in (0, 1, 2, 3)
    for dtype in ("fp32", "bf16")
    for offload in ("none", "cpu")
    if stage or offload == "none"
]
"""ZeRO stage, type, and where the optimizer is."""
ON_TWO_RANKS = [(0, "fp32", "none"), (0, "bf16", "none"), (1, "bf16", "none"), (2, "fp32", "cpu"), (3, "bf16", "none")]
"""One of each form."""
CLIPPED, UNCLIPPED = 0.01, 1e9
"""`max_grad_norm` below and above all norms of these steps."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Steps:
    """What three optimizer steps came to: gradient norms before clipping, and all weights of the end in one fp32 vector."""

    norms: list[float]
    weights: torch.Tensor


def steps(
    case: tuple[int, str, str],
    counts: list[int],
    max_grad_norm: float,
    rank: int,
    *,
    at_the_end: bool,
    abandoned: int = 0,
    discard: bool = True,
) -> Steps:
    """Three optimizer steps of a small network, the gradient of each from three losses, on other rows on each rank.

    AdamW does not see a factor that all gradients share, so each step's has its own.

    Args:
        counts: what each step's losses are divided by.
        at_the_end: divide in the step.
        abandoned: before each step, so many losses of one that is given up.
        discard: and whose gradient is discarded.
    """
    stage, dtype, offload = case
    ranks = torch.distributed.get_world_size()
    settings = PolicySettings(
        model="unused", dtype=dtype, ranks=ranks, zero_stage=stage, offload_optimizer=offload, learning_rate=1e-2,
        max_grad_norm=max_grad_norm,
    )  # fmt: skip
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    trainer = Trainer(model.to(DTYPES[dtype]), settings, len(counts))
    torch.manual_seed(1 + rank)
    rows, norms = torch.randn(3, 4, 8).to(DTYPES[dtype]), []
    for count in counts:
        for row in rows[:abandoned]:
            trainer.backward(100 * trainer.forward(row).float().abs().sum())
        if discard:
            trainer.discard()
        for row in rows:
            loss = trainer.forward(row).float().square().sum()
            trainer.backward(loss if at_the_end else loss / count)
        norms.append(trainer.step(count)[0] if at_the_end else trainer.step()[0])
    weights = torch.cat([weight.detach().float().flatten() for _, weight in whole_weights(trainer.module)])
    trainer.close()
    return Steps(norms, weights)


def gap(case: tuple[int, str, str], counts: list[int], max_grad_norm: float, rank: int) -> tuple[float, float]:
    """How far the two are apart: the largest relative difference of a norm, and the largest difference of a weight."""
    early, late = (steps(case, counts, max_grad_norm, rank, at_the_end=at_the_end) for at_the_end in (False, True))
    norms = max(abs(one / other - 1) for one, other in zip(late.norms, early.norms, strict=True))
    return norms, float((late.weights - early.weights).abs().max())
