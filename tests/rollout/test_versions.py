"""Which weights wrote a response: what an engine makes of vLLM's word for it, and what the pool accepts."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from rlhf.cluster.lives import Member
from rlhf.engines.engine import Sampled
from rlhf.engines.sampling import Sampling
from rlhf.rollout import BadResponse, StaleWeights
from rlhf.rollout.engine import RolloutEngine
from rlhf.transfer.versions import Attestation, Versions
from rlhf.types import DATASET_VERSION, Prompt, Shipment, Span
from tests.algorithms.tabular import settings_of

PROMPT = Prompt("p", (1, 2), "p", pair=((3,), (4, 5)))


def engine(*spans: Span) -> RolloutEngine:
    """An engine whose vLLM always answers with three tokens, written as the spans say."""

    class Vllm:
        async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Sampled]:
            return [Sampled(np.arange(3, dtype=np.int32), np.full(3, -1.0, np.float32), "stop", spans)]

    made = RolloutEngine(settings_of(), 0, True, "local", False, mixes=True)
    vllm: Any = Vllm()
    made._started = vllm
    return made


def test_an_engine_keeps_vllms_spans_and_says_which_the_policy_wrote_alone() -> None:
    samplings = [Sampling(1, 8), Sampling(1, 8, mixture=0.5), Sampling(1, 8, temperature=0.0)]
    infos, completions = asyncio.run(engine(Span(0, 1, 3), Span(1, 3, 4)).sample(PROMPT, samplings, with_pair=True))
    for alone, answer in zip((True, False, False), completions, strict=False):
        assert answer.spans == (Span(0, 1, 3, by_policy=alone), Span(1, 3, 4, by_policy=alone))
    assert [one.spans for one in completions[3:]] == [(Span(0, n, DATASET_VERSION, by_policy=False),) for n in (1, 2)]
    assert [info.versions for info in infos] == [(3, 4), (3, 4), (3, 4), (), ()]
    assert all(info.n_learned == info.n_tokens for info in infos)


def test_a_response_without_a_version_is_refused() -> None:
    with pytest.raises(BadResponse, match="does not say which version of the weights wrote it"):
        asyncio.run(engine().sample(PROMPT, [Sampling(1, 8)]))


def versions() -> Versions:
    """Of a pool whose one engine has taken the policy's versions 6 and 7."""
    engine = Member(0)
    made = Versions({engine: {}})
    for version in (6, 7):
        made.reopen({engine: 1})
        made.joined(version - 5)
        made.shipping(Shipment(version, "policy", ()))
        made.attested({engine: Attestation(0, version, "f")})
        made.accept(Shipment(version, "policy", ()), "f")
    return made


TOOL = Span(2, 4, DATASET_VERSION, by_policy=False, learned=False)


@pytest.mark.parametrize(
    "spans",
    [
        (Span(0, 3, 7),),
        (Span(0, 3, 6),),
        (Span(0, 2, 6), TOOL, Span(4, 5, 7)),
        (Span(0, 3, DATASET_VERSION, by_policy=False),),
    ],
)
def test_accepted_weights_may_write_one_after_the_other(spans: tuple[Span, ...]) -> None:
    versions().require_accepted(spans, begun=6)


@pytest.mark.parametrize(
    ("spans", "begun"),
    [
        ((Span(0, 3, 8),), 6),  # does not exist yet
        ((Span(0, 3, 3),), 0),  # was never published
        ((Span(0, 3, 6),), 7),  # older than those that the engines held as it was asked for
        ((Span(0, 2, 7), Span(2, 3, 6)), 6),
        ((Span(0, 2, 7), TOOL, Span(4, 5, 6)), 6),
    ],
)
def test_other_weights_are_refused(spans: tuple[Span, ...], begun: int) -> None:
    with pytest.raises(StaleWeights, match="only weights that were accepted may write"):
        versions().require_accepted(spans, begun)
