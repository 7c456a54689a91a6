"""What the learners of one rank share: what they are given, and what they report whatever the method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import torch

from rlhf.policy.meters import Meters
from rlhf.training.packing import Experience

EQUAL_TOLERANCE = {"bf16": (0.15, 2.0), "fp32": (1e-4, 1e-3)}
"""Nats, on the mean and at the most, that rounding alone may put between two forward passes of the same weights.

Where another kernel sums in another order, every layer rounds otherwise, and so does each logit: in bf16 by 0.06 at a logit of 16 to 32.
Measured on SmolLM2-135M with all of its linear layers in another kernel: bf16 0.05 and 0.27, fp32 below 1e-5. One tensor that was
not loaded, or dropout of 0.01, costs 0.45 and 3.5.
"""
WORST = 5
"""How many tokens an error names."""


class InvariantBroken(RuntimeError):
    """Something that must always hold does not; the run would give wrong results."""


@dataclass(frozen=True)
class Moment:
    """When in the run this step happens.

    Attributes:
        step: loop step, from 1.
        equal: the policy still equals the reference (checked under `run.invariants`).
        kl_coef: the present factor on the KL, for policy-gradient methods.
    """

    step: int
    equal: bool
    kl_coef: float = 0.0


class Lazily(Sequence[Experience]):
    """Micro-batches that are packed each time they are asked for and kept by nobody, so that a rank holds the tensors of the one it is
    learning from, not of a whole step.

    Args:
        count: how many there are.
        pack: makes the one with this number; always the same.
    """

    def __init__(self, count: int, pack: Callable[[int], Experience]):
        self._count, self._pack = count, pack

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> Experience: ...
    @overload
    def __getitem__(self, place: slice) -> list[Experience]: ...
    def __getitem__(self, place: int | slice) -> Experience | list[Experience]:
        chosen = range(self._count)[place]
        return self._pack(chosen) if isinstance(chosen, int) else [self._pack(one) for one in chosen]


@dataclass(frozen=True)
class Update:
    """One rank's part of one optimizer step.

    Attributes:
        experiences: its micro-batches, each of which may be made anew whenever it is asked for; an idle one (without items) keeps this
            rank in step with the others.
        n_groups, n_responses, n_tokens: prompts with items, the responses of theirs that have a loss and those responses' tokens in
            this update over all ranks: a mean divides by one of them, never by a rank's own count.
    """

    experiences: Sequence[Experience]
    n_groups: int
    n_responses: int
    n_tokens: int


def require_equal(experience: Experience, logprobs: torch.Tensor, reference: torch.Tensor, dtype: str) -> None:
    """Raises InvariantBroken unless policy and reference give the same log-probs, to the rounding of `dtype` (see `EQUAL_TOLERANCE`)."""
    gap = (logprobs.detach() - reference).abs()
    mean, most = gap.mean().item(), gap.max().item()
    allowed_mean, allowed_most = EQUAL_TOLERANCE[dtype]
    if mean <= allowed_mean and most <= allowed_most:  # false of NaN
        return
    raise InvariantBroken(
        f"before the first update the policy's log-probs differ from the reference's by {mean:.3g} nats on average and {most:.3g} at the "
        f"most (in {dtype}, {allowed_mean:g} and {allowed_most:g} are allowed); they are the same weights. Most of all at "
        f"{_worst(experience, logprobs, reference, gap)}. The model's forward pass is not deterministic (dropout?) or its weights were "
        "not loaded as saved."
    )


def _worst(experience: Experience, logprobs: torch.Tensor, reference: torch.Tensor, gap: torch.Tensor) -> str:
    """The tokens of the micro-batch that differ most: which they are, and both log-probs."""
    found = []
    for place in gap.nan_to_num(nan=torch.inf).topk(min(WORST, len(gap))).indices.tolist():
        response = experience.response[place]
        token = place - int((experience.response < response).sum())
        found.append(
            f"response {int(response)}, token {token} (id {int(experience.targets[place])}): {logprobs[place].item():.4f} and "
            f"{reference[place].item():.4f}"
        )
    return "; ".join(found)


@torch.no_grad()
def kl_meters(experience: Experience, logprobs: torch.Tensor, reference: torch.Tensor) -> Meters:
    """KL(pi_T || ref_T) of the distribution that was sampled from (nats), on the tokens that the policy itself wrote: elsewhere these are
    no estimates of it.

    Names: policy/kl (mean of log pi - log ref per token), policy/kl_k3 (the same by an estimator that is never negative) and
    policy/kl_response (sum over a response's tokens).

    Args:
        logprobs: of the weights that wrote the tokens, at the sampling temperature T, [N].
        reference: of the reference, at T, [N].
    """
    mine = experience.by_policy
    ratio = (logprobs - reference)[mine]
    tokens, responses = float(len(ratio)), float(len(experience.response[mine].unique()))
    return {
        "policy/kl": (ratio.sum().item(), tokens),
        "policy/kl_k3": ((torch.exp(-ratio) - 1 + ratio).sum().item(), tokens),
        "policy/kl_response": (ratio.sum().item(), responses),
    }


@torch.no_grad()
def gap_meters(experience: Experience, tempered: torch.Tensor) -> Meters:
    """policy/logprob_gap: mean absolute difference between the engines' and the trainer's log-probs of the tokens that the policy
    itself wrote (not those of a mixture or of the data set), in nats."""
    gap = (tempered - experience.behaviour).abs()[experience.by_policy]
    return {"policy/logprob_gap": (gap.sum().item(), float(len(gap)))}
