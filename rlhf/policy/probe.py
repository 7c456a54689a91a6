"""Whether the engines compute what their weights compute: their log-probs of a few tokens against the trainer's.

A fingerprint shows which bytes an engine was given, not what it makes of them. Does not know how the tokens were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, get_args

import torch

from rlhf.cluster import fetch
from rlhf.policy.learner import InvariantBroken
from rlhf.training.packing import Experience, pack
from rlhf.types import Assignment, Completion, ModelSlot, Rollout, TrainingItem


class Gap(NamedTuple):
    """Between one engine's log-probs and the trainer's, of n tokens.

    Attributes:
        mean: of the absolute differences, in nats per token.
        error: its standard error, the differences' deviation over the root of n.
    """

    mean: float
    error: float

    def within(self, allowed: float) -> bool:
        """Unless the mean is larger by more than chance explains: in bf16 a few tokens differ much, and a probe has few. False of NaN."""
        return self.mean - 3 * self.error <= allowed


Gaps = dict[ModelSlot, list[Gap]]
"""Slot -> its gap in each engine."""


@torch.no_grad()
def probe_gaps(
    rollouts: Sequence[Rollout], models: Mapping[ModelSlot, Callable[[Experience], torch.Tensor]], device: torch.device
) -> Gaps:
    """The gaps of engines that answered the same prompt.

    Args:
        rollouts: one of each engine; the source of a completion is the slot that wrote it, all of it with the weights that the slot
            was sent last (the pool refuses others).
        models: fp32 [N] log-probs by the weights that the slot was sent, for each slot that answered.
    """
    answers = fetch([rollout.completions for rollout in rollouts])
    gaps: Gaps = {}
    for slot in get_args(ModelSlot):
        written = [[one for one in answer if one.source == slot] for answer in answers]
        if any(written):
            gaps[slot] = _gaps(rollouts[0], written, models[slot], device)
    return gaps


def _gaps(
    rollout: Rollout,
    written: Sequence[Sequence[Completion]],
    model: Callable[[Experience], torch.Tensor],
    device: torch.device,
) -> list[Gap]:
    completions = [one for answer in written for one in answer]
    engine = torch.tensor([number for number, answer in enumerate(written) for _ in answer], device=device)
    together = Rollout(rollout.prompt, tuple(one.info() for one in completions), None)
    items = tuple(TrainingItem((place,), (1.0,)) for place in range(len(completions)))
    experience = pack([Assignment(together, items)], [completions], device)
    differences = (model(experience) - experience.behaviour).abs()
    writer = engine[experience.response]
    of_engines = [differences[writer == number] for number in range(len(written))]
    return [Gap(d.mean().item(), d.std(correction=0).item() / len(d) ** 0.5) for d in of_engines]


def require_small(gaps: Gaps, engines: Sequence[int], allowed: float) -> dict[str, float]:
    """The largest gap of each slot, named policy/probe_gap and policy/probe_gap_partner.

    Raises:
        InvariantBroken: some engine's gap is not within `allowed`.
    """
    for slot, of_engines in gaps.items():
        for engine, gap in zip(engines, of_engines, strict=True):
            if not gap.within(allowed):
                raise InvariantBroken(
                    f"engine {engine} holds the weights of the {slot} that it was sent, but does not compute with them: on a probe its "
                    f"log-probs differ from the trainer's by {gap.mean:.3g} nats per token on average (allowed by run.max_logprob_gap: "
                    f"{allowed:g}). Either vLLM does not put new weights to use for a model of this kind, or the two compute in different "
                    "precision: compare policy.dtype with rollout.dtype."
                )
    names: dict[ModelSlot, str] = {"policy": "policy/probe_gap", "partner": "policy/probe_gap_partner"}
    return {names[slot]: max(gap.mean for gap in of_engines) for slot, of_engines in gaps.items()}
