"""What the learners of one rank share: what they are given, and what they report whatever the method."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhf.policy.meters import Meters
from rlhf.training.packing import Experience


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


@dataclass(frozen=True)
class Update:
    """One rank's part of one optimizer step.

    Attributes:
        experiences: its micro-batches; an idle one (without items) keeps this rank in step with the others.
        n_groups, n_responses, n_tokens: prompts with items, their used responses and those responses' tokens in this
            update over all ranks: a mean divides by one of them, never by a rank's own count.
    """

    experiences: tuple[Experience, ...]
    n_groups: int
    n_responses: int
    n_tokens: int


def require_equal(logprobs: torch.Tensor, reference: torch.Tensor) -> None:
    """Raises InvariantBroken unless policy and reference give the same log-probs."""
    gap = (logprobs - reference).abs().max().item()
    if not gap < 1e-3:
        raise InvariantBroken(
            f"before the first update the policy's log-probs differ from the reference's by {gap:.3g} nats; they are the same "
            "weights. The model's forward pass is not deterministic (dropout?) or its weights were not loaded as saved."
        )


@torch.no_grad()
def kl_meters(experience: Experience, logprobs: torch.Tensor, reference: torch.Tensor) -> Meters:
    """KL of the policy to the reference (nats) on the tokens that the policy itself wrote: elsewhere these are no estimates of it.

    Names: policy/kl (mean of log pi - log ref per token), policy/kl_k3 (the same by an estimator that is never negative) and
    policy/kl_response (sum over a response's tokens).
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
