"""What the engines are asked at each step beside the responses to learn from, so that one sees what they compute.

Where everything that the one engine writes comes from the policy's own distribution, the responses show it by themselves
(`run.max_logprob_gap`). They do not where top-p or top-k cut the distribution, where all is greedy or mixed, and on average they
hide one engine among several; nor where older weights wrote them. There each engine writes a few tokens with either of its models,
untruncated.
"""

from __future__ import annotations

from rlhf.algorithms import Algorithm, PolicyGradient
from rlhf.config import Settings
from rlhf.engines.sampling import Sampling
from rlhf.types import ModelSlot

RESPONSES = 4
TOKENS = 16
"""Of each response. Rounding in bf16 makes single tokens differ by tenths of a nat; a mean over 64 does not."""


def probed_slots(settings: Settings, algorithm: Algorithm, engines: int) -> tuple[ModelSlot, ...]:
    """The models of the engines whose log-probs no response shows; none without `run.invariants`."""
    if not settings.run.invariants:
        return ()
    rollout = settings.rollout
    whole = rollout.temperature > 0 and rollout.top_p == 1 and rollout.top_k == 0
    own = any(source.mixture == 0 and not source.greedy for source in algorithm.sources)
    shown = whole and own and engines == 1 and settings.loop.staleness == 0
    policy: tuple[ModelSlot, ...] = () if shown else ("policy",)
    return (*policy, "partner") if algorithm.mixes else policy


def probe_samplings(settings: Settings, algorithm: Algorithm, engines: int, step: int) -> list[Sampling]:
    """What each engine is asked at this step. The responses always have `TOKENS` tokens, or as many as the engines allow."""
    # The trainer's log-probs are at the sampling temperature for policy gradients, at 1 for contrasts.
    tempered = isinstance(algorithm.objective, PolicyGradient)
    return [
        Sampling(
            n=RESPONSES,
            max_tokens=min(TOKENS, settings.rollout.max_tokens),
            temperature=(settings.rollout.temperature or 1.0) if tempered else 1.0,
            seed=settings.run.seed * 1_000_003 + step,
            source=slot,
            mixture=float(slot == "partner"),
            ignore_eos=True,
            urgent=True,
        )
        for slot in probed_slots(settings, algorithm, engines)
    ]
