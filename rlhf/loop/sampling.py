"""What the engines are asked to write in a step: the responses of each of the algorithm's sources."""

from __future__ import annotations

from collections.abc import Iterable

from rlhf.algorithms import Source
from rlhf.config.rollout import RolloutSettings
from rlhf.engines.sampling import Sampling


def step_samplings(
    sources: Iterable[Source], rollout: RolloutSettings, *, seed: int, step: int, full_length: bool = False
) -> list[Sampling]:
    """One for each source, in their order.

    Args:
        seed: of the run; each step draws with a seed of its own.
        step: from 1.
        full_length: responses go on after the end-of-sequence token.
    """
    return [
        Sampling(
            n=source.n,
            max_tokens=rollout.max_tokens,
            temperature=0.0 if source.greedy else rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            seed=seed * 1_000_003 + step,
            source=source.name,
            mixture=source.mixture,
            ignore_eos=full_length,
        )
        for source in sources
    ]
