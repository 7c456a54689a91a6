"""Losses of responses with spans that are not learned from, against the equations worked out token by token in plain loops.

Each token of each response has a log-prob of its own, that of an unlearned one is NaN wherever it may not be read. So a loss or a gradient
that looks at such a token, or counts it in a mean or a length, cannot equal the one by hand.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.functional import softplus

from rlhf.algorithms import Algorithm, Contrast, PolicyGradient, Preference, Source
from rlhf.algorithms.advantages import advantages, whiten
from rlhf.algorithms.algorithm import Objective
from rlhf.algorithms.builders import Dropped
from rlhf.algorithms.building import build
from rlhf.algorithms.contrast import preference_loss
from rlhf.algorithms.policy_gradient import (
    Critic,
    aggregate,
    importance_correction,
    normaliser,
    policy_loss,
    value_loss,
)
from rlhf.config.algorithm import METHODS
from rlhf.types import (
    DATASET_VERSION,
    Assignment,
    Completion,
    Counts,
    Feedback,
    Prompt,
    Rollout,
    Score,
    Span,
    TrainingItem,
)
from tests.algorithms.tabular import declared, packed

# Kind of span -> version, by_policy, learned. The step starts from version 2.
KINDS = {
    "policy": (2, True, True),
    "older": (1, True, True),
    "mixture": (2, False, True),
    "unlearned": (2, True, False),
    "tool": (DATASET_VERSION, False, False),
}
KL_COEF = 0.3
CRITIC = Critic(model=None, learning_rate=1e-3, warmup_steps=0, value_clip=0.2, lam=0.9)
FURTHER = {
    "means of token log-ratios": Preference((Contrast("square", 0.4, reduce="mean"), Contrast("linear", 0.2))),
    "length against length": Preference((Contrast(scale=0.3, length_coef=0.1, offset=0.2),)),
    "hinge": Preference((Contrast("hinge", 0.5), Contrast("robust", 0.5, flip_rate=0.1, anchored=False))),
    "critic": PolicyGradient(critic=CRITIC, gamma=0.9, whiten=True, kl_placement="reward", correction="icepop"),
    "kl before the baseline": PolicyGradient("mean", kl_placement="reward", kl_before_baseline=True, reward_clip=1.0),
    "sequence ratio": PolicyGradient(
        "mean_std", ratio="sequence", aggregation="seq_mean_token_mean", correction="sequence_mask", gamma=0.8
    ),
    "everything in the loss": PolicyGradient(
        "leave_one_out",
        kl_placement="loss",
        kl_estimator="k3",
        entropy_coef=0.1,
        dual_clip=1.5,
        correction="tis",
        aggregation="seq_mean_token_sum_norm",
        max_tokens=7,
    ),
    "sums": PolicyGradient("mean", aggregation="seq_mean_token_sum", surrogate="cispo", clip_low=None),
}
OBJECTIVES: dict[str, Objective] = {name: declared(name).objective for name in METHODS} | FURTHER


@dataclass
class Answer:
    """One response: its learned tokens by their ids, and which of these the policy alone wrote."""

    tokens: list[int]
    own: list[bool]


@dataclass
class Group:
    """One prompt with what is learned from it; `items` are those that the builder made, before any was left out."""

    assignment: Assignment | Dropped
    items: tuple[TrainingItem, ...]
    answers: list[Answer]


class Tokens:
    """A number of each kind for every token: with gradient under the policy and the critic, without under the others."""

    def __init__(self, n: int, seed: int):
        rng = torch.Generator().manual_seed(seed)

        def draw(scale: float = 1.0) -> torch.Tensor:
            return scale * torch.randn(n, generator=rng, dtype=torch.float64)

        self.old = draw() - 2
        self.policy = (self.old + draw(0.3)).requires_grad_(True)
        self.reference = self.old + draw(0.3)
        self.behaviour = (self.old + draw(0.5)).float().double()
        self.old_values = draw()
        self.values = (self.old_values + draw(0.3)).requires_grad_(True)


def exact(rng: random.Random, low: int = 0) -> float:
    """A number between low and 1 that fp32 holds exactly."""
    return rng.randrange(64 * low + 1, 64) / 64


def make_groups(shapes: Sequence[Any], objective: Objective, tokens: Tokens, seed: int) -> list[Group]:
    """Prompts with the items of a builder that uses every response and every term."""
    rng, made, first = random.Random(seed), [], 0
    for number, shape in enumerate(shapes):
        completions, answers = [], []
        for parts in shape:
            ends = np.cumsum([0, *(n for _, n in parts)]).tolist()
            spans = tuple(Span(a, b, *KINDS[kind]) for a, b, (kind, _) in zip(ends, ends[1:], parts, strict=False))
            ids = np.arange(first, first + ends[-1], dtype=np.int32)
            first += ends[-1]
            logprobs = tokens.behaviour.numpy()[ids].astype(np.float32)
            logprobs[[t for span in spans if not span.by_policy for t in range(span.start, span.stop)]] = np.nan
            completions.append(Completion(str(number), ids, logprobs, spans, "stop"))
            each = [(int(ids[t]), span) for span in spans for t in range(span.start, span.stop) if span.learned]
            answers.append(Answer([token for token, _ in each], [span.by_policy for _, span in each]))
        n = len(shape)
        if isinstance(objective, PolicyGradient):
            items = tuple(TrainingItem((i,), (1.0,), exact(rng, -2), float(rng.random() < 0.8)) for i in range(n))
        else:
            pairs = [((i, (i + 1) % n), (1.0, -1.0)) for i in range(n)] + [((i,), (1.0,)) for i in range(n)]
            terms = range(len(objective.terms))
            items = tuple(TrainingItem(*pair, exact(rng), exact(rng), term) for pair in pairs for term in terms)
        rollout = Rollout(Prompt(str(number), (0, 0), ""), tuple(one.info() for one in completions), completions)
        algorithm = Algorithm("spans", (Source("policy", n),), lambda *_, items=items: items, objective)
        built = build(algorithm, rollout, Feedback(str(number), (Score(0.0),) * n), rng)
        made.append(Group(built if isinstance(built, Dropped) else Assignment(rollout, built), items, answers))
    return made


# The package's way: what learners call, in their order


def packages_loss(objective: Objective, groups: Sequence[Group], tokens: Tokens) -> torch.Tensor:
    assignments = [group.assignment for group in groups if isinstance(group.assignment, Assignment)]
    row = packed(assignments)
    ids = row.targets
    if isinstance(objective, Preference):
        losses = preference_loss(objective, row, tokens.policy[ids], tokens.reference[ids])
        return losses.sum() / Counts.of(assignments).n_groups
    counts = Counts.of(assignments)
    old, reference, values = tokens.old[ids], tokens.reference[ids], tokens.old_values[ids]
    estimate = advantages(
        objective,
        row.coefficients.T @ row.target,
        row.response,
        row.group,
        kl_coef=KL_COEF,
        logratio=old - reference,
        values=values,
    )
    weight = (row.coefficients.T @ row.weight)[row.response]
    (advantage,) = whiten([estimate.advantages], learned=[weight != 0]) if objective.whiten else [estimate.advantages]
    behaviour = torch.where(row.by_policy, row.behaviour.double(), old)
    losses = policy_loss(
        objective,
        tokens.policy[ids],
        old,
        advantage,
        row.response,
        kl_coef=KL_COEF,
        reference=reference,
        entropy=tokens.policy[ids].square(),
        weights=importance_correction(objective, old, behaviour, row.response).weights,
    ).loss
    divisor = normaliser(objective, n_responses=counts.n_responses, n_tokens=counts.n_tokens)
    loss = aggregate(objective, losses * weight, row.response) / divisor
    if objective.critic is None or estimate.returns is None:
        return loss
    critic = value_loss(tokens.values[ids], values, estimate.returns, objective.critic.value_clip)
    return loss + (critic * weight).sum() / counts.n_tokens


# By hand: one token after the other


def contrasts_by_hand(objective: Preference, groups: Sequence[Group], tokens: Tokens) -> torch.Tensor:
    total, prompts = torch.zeros((), dtype=torch.float64), 0
    for group in groups:
        kept = [item for item in group.items if any(group.answers[m].tokens for m in item.members)]
        prompts += bool(kept)
        for item in kept:
            term, h = objective.terms[item.term], torch.zeros((), dtype=torch.float64)
            for member, coefficient in zip(item.members, item.coefficients, strict=True):
                learned, score = group.answers[member].tokens, torch.zeros((), dtype=torch.float64)
                for token in learned:
                    score = score + tokens.policy[token] - (tokens.reference[token] if term.anchored else 0.0)
                if term.reduce == "mean":
                    score = score / max(1, len(learned))
                h = h + coefficient * (score + len(learned) * term.length_coef / term.scale)
            total = total + item.weight * link_by_hand(term, h - term.offset, item.target)
    return total / prompts


def link_by_hand(term: Contrast, h: torch.Tensor, p: float) -> torch.Tensor:
    z = term.scale * h
    if term.link == "linear":
        return z
    if term.link == "square":
        return (h - (p - 0.5) / term.scale) ** 2
    if term.link == "hinge":
        return p * (term.margin - z).clamp(min=0) + (1 - p) * (term.margin + z).clamp(min=0)
    if term.link == "robust":
        p = (p - term.flip_rate) / (1 - 2 * term.flip_rate)
    return p * softplus(-z) + (1 - p) * softplus(z)


def kl_by_hand(estimator: str, lr: Any) -> Any:
    return {"k1": lr, "k2": lr * lr / 2, "k3": np.exp(-lr) - 1 + lr if isinstance(lr, float) else (-lr).exp() - 1 + lr}[
        estimator
    ]


def baselines_by_hand(kind: str, rewards: list[float]) -> list[float]:
    n = len(rewards)
    if kind == "none":
        return rewards
    if n == 1:
        return [0.0]
    mean = sum(rewards) / n
    if kind == "leave_one_out":
        return [reward - (sum(rewards) - reward) / (n - 1) for reward in rewards]
    spread = (sum((reward - mean) ** 2 for reward in rewards) / (n - 1)) ** 0.5 + 1e-6
    return [(reward - mean) / (spread if kind == "mean_std" else 1.0) for reward in rewards]


def estimates_by_hand(objective: PolicyGradient, group: Group, tokens: Tokens) -> dict[int, tuple[float, float]]:
    """Token -> advantage, before whitening, and return. Every response counts in the baseline, also one that has no learned token."""
    old, reference, values = tokens.old.tolist(), tokens.reference.tolist(), tokens.old_values.tolist()
    kl = {
        t: KL_COEF * kl_by_hand(objective.kl_estimator, old[t] - reference[t]) for a in group.answers for t in a.tokens
    }
    rewards = [item.target for item in group.items]
    if objective.reward_clip is not None:
        rewards = [max(-objective.reward_clip, min(objective.reward_clip, reward)) for reward in rewards]
    inside = objective.kl_placement == "reward"
    if inside and objective.kl_before_baseline:
        rewards = [r - sum(kl[t] for t in a.tokens) for r, a in zip(rewards, group.answers, strict=True)]
    found = {}
    for reward, answer in zip(baselines_by_hand(objective.baseline, rewards), group.answers, strict=True):
        following, value_after = 0.0, 0.0
        for token in reversed(answer.tokens):
            immediate = reward if token == answer.tokens[-1] else 0.0
            if inside and not objective.kl_before_baseline:
                immediate -= kl[token]
            if objective.critic is None:
                following = immediate + objective.gamma * following
            else:
                error = immediate + objective.gamma * value_after - values[token]
                following = error + objective.gamma * objective.critic.lam * following
                value_after = values[token]
            found[token] = (following, following + values[token])
    return found


def weights_by_hand(objective: PolicyGradient, answer: Answer, tokens: Tokens) -> list[float]:
    """The importance weight of each learned token; what the policy alone did not write counts as on-policy."""
    gaps = [
        (tokens.old[t] - tokens.behaviour[t]).item() if own else 0.0
        for t, own in zip(answer.tokens, answer.own, strict=True)
    ]
    low, high = objective.correction_low, objective.correction_high
    if objective.correction == "none":
        return [1.0] * len(gaps)
    if objective.correction == "sequence_mask":
        return [float(low <= np.exp(np.mean(gaps)) <= high)] * len(gaps)
    ratios = [float(np.exp(gap)) for gap in gaps]
    if objective.correction == "tis":
        return [min(max(ratio, low), high) for ratio in ratios]
    return [ratio if low <= ratio <= high else 0.0 for ratio in ratios]


def token_loss_by_hand(
    objective: PolicyGradient, log_ratio: torch.Tensor, advantage: float, weight: float, token: int, tokens: Tokens
) -> torch.Tensor:
    ratio, policy = log_ratio.exp(), tokens.policy[token]
    low = None if objective.clip_low is None else 1 - objective.clip_low
    high = None if objective.clip_high is None else 1 + objective.clip_high
    bounded = ratio if low is None and high is None else ratio.clamp(low, high)
    if objective.surrogate == "cispo":
        loss = -bounded.detach() * advantage * policy
    else:
        loss = torch.maximum(-ratio * advantage, -bounded * advantage)
        if objective.dual_clip is not None and advantage < 0:
            loss = loss.clamp(max=-objective.dual_clip * advantage)
    loss = weight * loss
    if objective.kl_placement == "loss":
        loss = loss + KL_COEF * kl_by_hand(objective.kl_estimator, policy - tokens.reference[token])
    return loss - objective.entropy_coef * policy.square()


def gradient_by_hand(objective: PolicyGradient, groups: Sequence[Group], tokens: Tokens) -> torch.Tensor:
    estimates: dict[int, tuple[float, float]] = {}
    for group in groups:
        if isinstance(group.assignment, Assignment):
            estimates |= estimates_by_hand(objective, group, tokens)
    losing = [
        (item.weight, answer)
        for group in groups
        for item, answer in zip(group.items, group.answers, strict=True)
        if item.weight and answer.tokens
    ]
    n_tokens = sum(len(answer.tokens) for _, answer in losing)
    if objective.whiten:
        learned = [estimates[t][0] for _, answer in losing for t in answer.tokens]
        mean, deviation = np.mean(learned), (np.var(learned) + 1e-8) ** 0.5
        estimates = {token: ((a - mean) / deviation, r) for token, (a, r) in estimates.items()}
    total = torch.zeros((), dtype=torch.float64)
    for weight, answer in losing:
        log_ratios = [tokens.policy[t] - tokens.old[t] for t in answer.tokens]
        if objective.ratio == "sequence":
            log_ratios = [sum(log_ratios, torch.zeros(())) / len(log_ratios)] * len(log_ratios)
        corrections = weights_by_hand(objective, answer, tokens)
        parts = [
            token_loss_by_hand(objective, log_ratio, estimates[t][0], correction, t, tokens)
            for t, log_ratio, correction in zip(answer.tokens, log_ratios, corrections, strict=True)
        ]
        divisor = {
            "token_mean": n_tokens,
            "seq_mean_token_mean": len(losing) * len(parts),
            "seq_mean_token_sum": len(losing),
            "seq_mean_token_sum_norm": len(losing) * objective.max_tokens,
        }[objective.aggregation]
        total = total + weight * sum(parts) / divisor
        for token in answer.tokens if objective.critic is not None else ():
            assert objective.critic is not None
            value, old, target = tokens.values[token], tokens.old_values[token], estimates[token][1]
            worst = (value - target) ** 2
            if objective.critic.value_clip is not None:
                near = old + (value - old).clamp(-objective.critic.value_clip, objective.critic.value_clip)
                worst = torch.maximum(worst, (near - target) ** 2)
            total = total + weight * worst / 2 / n_tokens
    return total


RESPONSE = st.lists(st.tuples(st.sampled_from(sorted(KINDS)), st.integers(1, 3)), max_size=3)


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=12)
@given(
    shapes=st.lists(st.lists(RESPONSE, min_size=2, max_size=3), min_size=1, max_size=2), seed=st.integers(0, 2**31 - 1)
)
def test_loss_and_gradient_are_those_of_the_learned_tokens(name: str, shapes: Any, seed: int) -> None:
    objective = OBJECTIVES[name]
    tokens = Tokens(sum(n for shape in shapes for parts in shape for _, n in parts), seed)
    groups = make_groups(shapes, objective, tokens, seed)
    assume(any(isinstance(group.assignment, Assignment) for group in groups))
    learned = [t for group in groups for answer in group.answers for t in answer.tokens]
    leaves = (tokens.policy, tokens.values)
    by_hand = (
        contrasts_by_hand(objective, groups, tokens)
        if isinstance(objective, Preference)
        else gradient_by_hand(objective, groups, tokens)
    )
    expected = torch.autograd.grad(by_hand, leaves, allow_unused=True)
    unlearned = torch.ones(len(tokens.old), dtype=torch.bool).index_fill(
        0, torch.tensor(learned, dtype=torch.int64), False
    )
    for values in (tokens.old, tokens.reference, tokens.behaviour, tokens.old_values):
        values[unlearned] = torch.nan
    loss = packages_loss(objective, groups, tokens)
    assert loss.item() == pytest.approx(by_hand.item(), abs=1e-9)
    for mine, theirs in zip(torch.autograd.grad(loss, leaves, allow_unused=True), expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert torch.allclose(mine, theirs, atol=1e-9)
            assert not mine[unlearned].any()


@pytest.mark.parametrize("objective", [Preference((Contrast(),)), PolicyGradient("mean")], ids=["contrast", "gradient"])
def test_a_prompt_without_a_learned_token_is_dropped_and_a_response_without_one_keeps_its_reward(
    objective: Objective,
) -> None:
    tool, policy = [("tool", 2)], [("policy", 1)]
    silent, mixed = make_groups([[tool, tool], [tool, policy]], objective, Tokens(7, 0), 3)
    assert silent.assignment == Dropped("nothing_learned")
    assert isinstance(mixed.assignment, Assignment)
    weights = [item.weight for item in mixed.assignment.items]
    if isinstance(objective, PolicyGradient):
        assert (weights, mixed.items[1].weight) == ([0.0, 1.0], 1.0)
        assert [item.target for item in mixed.assignment.items] == [item.target for item in mixed.items]
    else:
        assert mixed.assignment.items == tuple(item for item in mixed.items if 1 in item.members)
