"""Whether the engines compute what their weights compute: their log-probs of a few tokens against the trainer's.

A fingerprint shows which bytes an engine was given, not what it makes of them. Does not know how the tokens were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import get_args

import torch

from rlhf.cluster import fetch
from rlhf.policy.learner import InvariantBroken
from rlhf.training.packing import Experience, pack
from rlhf.types import Assignment, Completion, Half, Rollout, TrainingItem

Gaps = dict[Half, list[float]]
"""Half of the engines -> mean absolute difference of the log-probs (nats per token), one number for each engine."""


@torch.no_grad()
def probe_gaps(
    rollouts: Sequence[Rollout], models: Mapping[Half, Callable[[Experience], torch.Tensor]], device: torch.device
) -> Gaps:
    """The gaps of engines that answered the same prompt.

    Args:
        rollouts: one of each engine; the source of a completion is the half that wrote it.
        models: fp32 [N] log-probs by the weights that the half was sent, for each half that answered.
    """
    answers = fetch([rollout.completions for rollout in rollouts])
    gaps: Gaps = {}
    for half in get_args(Half):
        written = [[one for one in answer if one.source == half] for answer in answers]
        if any(written):
            gaps[half] = _gaps(rollouts[0], written, models[half], device)
    return gaps


def _gaps(
    rollout: Rollout,
    written: Sequence[Sequence[Completion]],
    model: Callable[[Experience], torch.Tensor],
    device: torch.device,
) -> list[float]:
    completions = [one for answer in written for one in answer]
    engine = torch.tensor([number for number, answer in enumerate(written) for _ in answer], device=device)
    together = Rollout(rollout.prompt, tuple(one.info() for one in completions), None)
    items = tuple(TrainingItem((place,), (1.0,)) for place in range(len(completions)))
    experience = pack([Assignment(together, items)], [completions], device)
    gap = (model(experience) - experience.behaviour).abs()
    writer = engine[experience.response]
    return [gap[writer == number].mean().item() for number in range(len(written))]


def require_small(gaps: Gaps, engines: Sequence[int], allowed: float) -> dict[str, float]:
    """The largest gap of each half, named policy/probe_gap and policy/probe_gap_partner.

    Raises:
        InvariantBroken: some engine's gap exceeds `allowed`.
    """
    for half, of_engines in gaps.items():
        for engine, gap in zip(engines, of_engines, strict=True):
            if not gap <= allowed:  # true of NaN
                raise InvariantBroken(
                    f"engine {engine} holds the weights of the {half} that it was sent, but does not compute with them: on a probe its "
                    f"log-probs differ from the trainer's by {gap:.3g} nats per token on average (allowed by run.max_logprob_gap: "
                    f"{allowed:g}). Either vLLM does not put new weights to use for a model of this kind, or the two compute in different "
                    "precision: compare policy.dtype with rollout.dtype."
                )
    names: dict[Half, str] = {"policy": "policy/probe_gap", "partner": "policy/probe_gap_partner"}
    return {names[half]: max(of_engines) for half, of_engines in gaps.items()}
