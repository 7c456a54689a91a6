"""What a step and an evaluation report as KL, against the exact one: the tiny model's whole distribution of one next token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.algorithms import Algorithm, Contrast, PolicyGradient, Preference, Source
from rlhf.algorithms.algorithm import Objective
from rlhf.cluster import LocalRef
from rlhf.policy import StepContext
from rlhf.policy.meters import Meters
from rlhf.policy.rank import PolicyRank
from rlhf.training.packing import pack
from rlhf.types import Assignment, Completion, Counts, Prompt, RankBatch, Rollout, TrainingItem

PROMPT = Prompt("p", (7, 11, 13), "")
N = 3000


def assignment(tokens: torch.Tensor, behaviour: torch.Tensor, objective: Objective, first: int = 0) -> Assignment:
    """One-token responses to the prompt, in pairs or with rewards of their own."""
    completions = [
        Completion.of_one_version(str(first), np.array([token], np.int32), np.array([value], np.float32), 0, "stop")
        for token, value in zip(tokens.tolist(), behaviour.tolist(), strict=True)
    ]
    prompt = Prompt(str(first), PROMPT.token_ids, "")
    rollout = Rollout(prompt, tuple(one.info() for one in completions), LocalRef(completions))
    if isinstance(objective, PolicyGradient):
        return Assignment(
            rollout, tuple(TrainingItem((i,), (1.0,), token % 7 == 0) for i, token in enumerate(tokens.tolist()))
        )
    pairs = [(i, i + 1) for i in range(0, len(completions), 2)]
    return Assignment(rollout, tuple(TrainingItem(pair, (1.0, -1.0), weight=1 / len(pairs)) for pair in pairs))


def distributions(rank: PolicyRank, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the next token under policy and reference at the temperature, fp64 [vocabulary]."""
    every = torch.arange(rank.policy.engine.module.causal_lm.config.vocab_size)
    objective = Preference((Contrast(),))
    row = assignment(every, torch.zeros(len(every)), objective)
    experience = pack([row], [row.rollout.completions.value], rank.device)
    with torch.no_grad():
        logits = [rank.policy.forward(experience)[0], rank.reference.logprobs(experience)]
    # Log-probs are logits up to a constant; a policy gradient's are at the sampling temperature already.
    gradient = isinstance(rank.algorithm.objective, PolicyGradient)
    have = rank.settings.rollout.temperature if gradient else 1.0
    policy, reference = ((one.double() * have / temperature).log_softmax(0) for one in logits)
    return policy, reference


def exact(policy: torch.Tensor, reference: torch.Tensor) -> float:
    return (policy.exp() * (policy - reference)).sum().item()


def sample(policy: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.multinomial(policy.exp(), N, replacement=True, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def moved(tiny_settings: Callable) -> Callable[..., PolicyRank]:
    """A policy that has left its reference already."""

    def start(objective: Objective, temperature: float, **loop: int) -> PolicyRank:
        settings = tiny_settings(
            policy={"learning_rate": 3e-3, "max_grad_norm": 1e3},
            rollout={"temperature": temperature},
            loop=loop,
            run={"invariants": False},
        )
        algorithm = Algorithm("test", (Source("policy", 2),), lambda *_: (), objective)
        rank = PolicyRank(0, settings, algorithm, total_updates=100)
        rank.setup(*rank.address())
        learn(rank, [torch.arange(20, 40)] * 6, objective)
        return rank

    return start


def learn(rank: PolicyRank, updates: list[torch.Tensor], objective: Objective, policy: Any = None) -> Meters:
    batches = []
    for number, tokens in enumerate(updates):
        behaviour = torch.zeros(len(tokens)) if policy is None else policy[tokens]
        one = assignment(tokens, behaviour, objective, number)
        batches.append(RankBatch(((one,),), Counts.of([one]), number))
    return rank.learn(batches, StepContext(2, equal=False))


OBJECTIVES = {
    "preference": Preference((Contrast("logistic", scale=0.1),)),
    "gradient": PolicyGradient(baseline="mean", kl_placement="loss", kl_estimator="k2"),
}


@pytest.mark.engine
@pytest.mark.parametrize("temperature", [1.0, 1.6])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_reported_kl_is_that_of_the_policy_that_sampled(
    moved: Callable, objective: Objective, temperature: float
) -> None:
    """In steps of several updates and epochs, and held out; at the temperature of the sampling, which halves or doubles a KL."""
    rank = moved(objective, temperature, epochs_per_step=4)
    policy, reference = distributions(rank, temperature)
    kl, other = exact(policy, reference), exact(*distributions(rank, 1.0 if temperature != 1 else 1.6))
    spread = (policy.exp() * (policy - reference - kl).square()).sum().sqrt().item()
    allowed = 4 * spread / N**0.5
    assert abs(kl - other) > 2 * allowed, "the temperatures can be told apart"

    tokens = sample(policy, 0)
    held_out = rank.measure([(assignment(tokens, policy[tokens], objective),)])
    metrics = learn(rank, [sample(policy, 1), sample(policy, 2)], objective, policy)
    after = exact(*distributions(rank, temperature))
    assert abs(after - kl) > 2 * allowed, "the updates moved the policy"
    for meters in (held_out, metrics):
        total, count = meters["policy/kl"]
        assert total / count == pytest.approx(kl, abs=allowed)
        total, count = meters["policy/kl_k3"]
        assert total / count == pytest.approx(kl, abs=allowed)
