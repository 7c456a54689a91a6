"""Where each policy-gradient method ends on a table, through its declaration and the production kernel.

The world has one prompt and five responses of one or two tokens: the first token is 0 (and the response ends), 1 or 2; then a second
token, 0 or 1, follows, with its own distribution for each first token. The KL-regularised optimum is ref exp(R / beta).
Expectations are exact where a method allows it: every response (or every group) appears once, weighted with its probability.
Whitening is over the tokens of a real batch, so whitened methods are given samples.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf.algorithms import Algorithm, make
from rlhf.algorithms.advantages import advantages, discounted_sums, token_rewards, whiten
from rlhf.algorithms.builders import Dropped
from rlhf.algorithms.kl import kl_estimate
from rlhf.algorithms.policy_gradient import (
    PolicyGradient,
    aggregate,
    importance_correction,
    normaliser,
    policy_loss,
    value_loss,
)
from rlhf.config import Settings
from rlhf.types import Failed
from tests.helpers import make_feedback, make_rollout

RESPONSES = [(0,), (1, 0), (1, 1), (2, 0), (2, 1)]
LENGTHS = torch.tensor([1, 2, 2, 2, 2])
CELLS = torch.tensor([0, 1, 3, 1, 4, 2, 5, 2, 6])
"""Entry of the flat table of log-probs (3 + 2 + 2) that each token of the five responses reads."""
STATES = torch.tensor([0, 0, 1, 0, 1, 0, 2, 0, 2])
"""State before each of these tokens: the prompt, after 1, after 2."""
STARTS = torch.tensor([0, 1, 3, 5, 7])
REWARDS = torch.tensor([0.5, 1.0, -0.4, 0.1, 0.8], dtype=torch.float64)
REFERENCE = torch.tensor([0.4, -0.2, 0.3, 0.5, -0.5, -1.0, 0.6], dtype=torch.float64)
BETA = 0.6
BANDIT = torch.tensor([0, 1, 3])
"""Responses whose first tokens are 0, 1, 2: cut to that token they are a bandit."""


def algorithm(name: str, **choices: Any) -> Algorithm:
    """A built-in method with these choices."""
    sections: dict[str, Any] = {
        "data": {"prompts": "unused"},
        "policy": {"model": "unused"},
        "rollout": {"max_tokens": 77},
        "reward": {"path": "unused:reward", "kind": "function"},
        "algorithm": {"name": name, **choices},
    }
    return make(Settings(**sections))


def declared(name: str, **choices: Any) -> PolicyGradient:
    """Its objective. No bound on rewards or ratios is ever active here."""
    objective = algorithm(name, **choices).objective
    assert isinstance(objective, PolicyGradient)
    return objective


def log_table(logits: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.log_softmax(0) for part in logits.split([3, 2, 2])])


def sequence_logprobs(table: torch.Tensor) -> torch.Tensor:
    response = torch.repeat_interleave(torch.arange(5), LENGTHS)
    return table.new_zeros(5).index_add(0, response, table[CELLS])


OPTIMUM = (sequence_logprobs(log_table(REFERENCE)) + REWARDS / BETA).softmax(0)


class Batch:
    """Responses by number, with the prompt of each, as flat tokens."""

    def __init__(self, numbers: torch.Tensor, group: torch.Tensor, weight: torch.Tensor):
        lengths = LENGTHS[numbers]
        self.response = torch.repeat_interleave(torch.arange(len(numbers)), lengths)
        offset = torch.arange(len(self.response)) - (lengths.cumsum(0) - lengths)[self.response]
        token = STARTS[numbers][self.response] + offset
        self.rewards, self.group, self.weight = REWARDS[numbers], group, weight[self.response]
        self.cells, self.states, self.total = CELLS[token], STATES[token], float(weight.sum())


def every_group(probabilities: torch.Tensor, size: int) -> Batch:
    """All groups of `size` responses, each response weighted with its group's probability."""
    groups = torch.tensor(list(itertools.product(range(5), repeat=size)))
    weight = probabilities[groups].prod(1)
    number = torch.arange(len(groups)).repeat_interleave(size)
    return Batch(groups.flatten(), number, weight.repeat_interleave(size))


def sampled_groups(size: int, count: int) -> Callable[[torch.Tensor], Batch]:
    generator = torch.Generator().manual_seed(0)

    def draw(probabilities: torch.Tensor) -> Batch:
        numbers = torch.multinomial(probabilities, size * count, replacement=True, generator=generator)
        return Batch(numbers, torch.arange(count).repeat_interleave(size), torch.ones(size * count))

    return draw


def end(
    objective: PolicyGradient, draw: Callable[[torch.Tensor], Batch], steps: int = 400, staleness: int = 0
) -> torch.Tensor:
    """Probabilities of the five responses after the method's own updates from the reference.

    Args:
        staleness: each update learns from what the policy of so many updates before wrote, or the first one.
    """
    logits, values = REFERENCE.clone().requires_grad_(True), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    reference = log_table(REFERENCE)
    optimizers = [torch.optim.Adam([logits], lr=0.1), torch.optim.Adam([values], lr=0.1)]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) for optimizer in optimizers]
    writers: deque[torch.Tensor] = deque(maxlen=staleness + 1)
    for _ in range(steps):
        table = log_table(logits)
        writers.append(table.detach())
        batch = draw(sequence_logprobs(writers[0]).exp())
        logprobs, old_values = table[batch.cells], values.detach()[batch.states]
        old = logprobs.detach()
        estimate = advantages(
            objective, batch.rewards, batch.response, batch.group, kl_coef=objective.kl_coef,
            logratio=old - reference[batch.cells], values=old_values,
        )  # fmt: skip
        advantage = whiten([estimate.advantages])[0] if objective.whiten else estimate.advantages
        weights = importance_correction(objective, old, writers[0][batch.cells], batch.response).weights
        tokens = policy_loss(
            objective, logprobs, old, advantage, batch.response,
            kl_coef=objective.kl_coef, reference=reference[batch.cells], weights=weights,
        )  # fmt: skip
        counts: dict[str, Any] = {"n_responses": batch.total, "n_tokens": 2 * batch.total}
        loss = aggregate(objective, tokens.loss * batch.weight, batch.response) / normaliser(objective, **counts)
        if objective.critic is not None:
            assert estimate.returns is not None
            errors = value_loss(values[batch.states], old_values, estimate.returns, objective.critic.value_clip)
            loss = loss + (errors * batch.weight).sum() / batch.total
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    return sequence_logprobs(log_table(logits)).exp().detach()


# Methods whose KL is in the reward: the optimum ref exp(R / beta)


@pytest.mark.parametrize(
    ("name", "size", "choices"),
    [
        ("rloo", 2, {}),
        ("rloo", 2, {"kl_before_baseline": False}),
        ("rloo", 3, {"ratio": "sequence", "aggregation": "seq_mean_token_sum"}),
        ("reinforce_pp", 1, {"whiten": False}),
        ("ppo", 1, {"whiten": False}),
        ("ppo", 1, {"whiten": False, "lam": 0.0}),
        ("ppo", 1, {"whiten": False, "lam": 1.0, "value_clip": None}),
    ],
)
def test_the_regularised_optimum_exactly(name: str, size: int, choices: dict[str, Any]) -> None:
    objective = declared(name, kl_coef=BETA, samples_per_prompt=max(size, 2), **choices)
    learned = end(objective, lambda probabilities: every_group(probabilities, size))
    assert torch.allclose(learned, OPTIMUM, atol=2e-3)


@pytest.mark.parametrize("name", ["ppo", "reinforce_pp"])
def test_the_same_optimum_from_what_older_policies_wrote(name: str) -> None:
    """Also of responses of two tokens, whose weights leave out how the older policy chose the other token: the policy comes to rest."""
    objective = declared(name, kl_coef=BETA, samples_per_prompt=2, whiten=False)
    assert objective.correction == "tis"
    learned = end(objective, lambda probabilities: every_group(probabilities, 1), staleness=4)
    assert torch.allclose(learned, OPTIMUM, atol=2e-3)


@pytest.mark.parametrize(("constant", "without"), [(0.0, 0.36), (1.0, 1.12)])
def test_of_longer_responses_weights_correct_a_part(constant: float, without: float) -> None:
    """The expected gradient on what another policy wrote, 0.016 nats away, against the exact one. Each token's weight makes its own choice
    the present policy's, so that no constant counts; the state before it and what follows stay the other's."""
    away = 0.2 * torch.tensor([1, -1, 0.5, 2, 0, -1, 1], dtype=torch.float64)
    logits, mu = (REFERENCE + away).requires_grad_(True), log_table(REFERENCE)
    table = log_table(logits)
    responses, rewards = sequence_logprobs(table), REWARDS + constant
    assert (responses.exp() * (responses - sequence_logprobs(mu))).sum().item() == pytest.approx(0.016, abs=1e-3)
    (exact,) = torch.autograd.grad(-(responses.exp() * rewards).sum(), logits, retain_graph=True)
    batch = every_group(sequence_logprobs(mu).exp(), 1)
    logprobs, errors = table[batch.cells], {}
    for correction in ("tis", "none"):
        objective = PolicyGradient(clip_low=None, clip_high=None, correction=correction, correction_low=0.0)  # type: ignore[arg-type]
        weights = importance_correction(objective, logprobs.detach(), mu[batch.cells], batch.response).weights
        advantage = (batch.rewards + constant)[batch.response]
        losses = policy_loss(objective, logprobs, logprobs.detach(), advantage, batch.response, weights=weights).loss
        (gradient,) = torch.autograd.grad((losses * batch.weight).sum(), logits, retain_graph=True)
        errors[correction] = ((gradient - exact).norm() / exact.norm()).item()
    assert errors["tis"] == pytest.approx(0.27, abs=0.01)
    assert errors["none"] == pytest.approx(without, abs=0.01)


@pytest.mark.parametrize("name", ["ppo", "reinforce_pp"])
def test_whitening_reward_and_kl_together_does_not_move_the_optimum(name: str) -> None:
    learned = end(declared(name, kl_coef=BETA), sampled_groups(1, 400))
    assert torch.allclose(learned, OPTIMUM, atol=0.03)
    start = sequence_logprobs(log_table(REFERENCE)).exp()
    assert (start - OPTIMUM).abs().max() > 0.1, "there was something to learn"


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_only_k1_in_the_reward_holds_the_policy(estimator: Any) -> None:
    """The expected gradient over every response, from the package's token rewards: exact for k1, next to nothing for the others."""
    logits = (REFERENCE + 0.1 * torch.tensor([1, -1, 0.5, 2, 0, -1, 1], dtype=torch.float64)).requires_grad_(True)
    table, reference = log_table(logits), log_table(REFERENCE)
    responses = sequence_logprobs(table)
    (exact,) = torch.autograd.grad(
        (responses.exp() * (responses - sequence_logprobs(reference))).sum(), logits, retain_graph=True
    )
    batch = every_group(responses.exp().detach(), 1)
    logprobs = table[batch.cells]
    kl = kl_estimate((logprobs - reference[batch.cells]).detach(), estimator)
    to_go = discounted_sums(token_rewards(torch.zeros_like(batch.rewards), batch.response, kl), batch.response, 1.0)
    free = PolicyGradient(clip_low=None, clip_high=None)
    losses = policy_loss(free, logprobs, logprobs.detach(), to_go, batch.response).loss
    (expected,) = torch.autograd.grad((losses * batch.weight).sum(), logits)
    if estimator == "k1":
        assert torch.allclose(expected, exact, atol=1e-12)
        return
    assert expected.norm() < 0.1 * exact.norm()
    with pytest.raises(ValueError, match="use k1"):
        PolicyGradient(kl_placement="reward", kl_estimator=estimator)


# Methods whose KL is in the loss end elsewhere


def bandit_end(objective: PolicyGradient, size: int, rewards: torch.Tensor, steps: int = 500) -> torch.Tensor:
    """Probabilities of three one-token responses after training on every group of `size`."""
    groups = torch.tensor(list(itertools.product(range(3), repeat=size)))
    flat, number = groups.flatten(), torch.arange(len(groups)).repeat_interleave(size)
    each = torch.arange(len(flat))
    logits, reference = REFERENCE[:3].clone().requires_grad_(True), REFERENCE[:3].log_softmax(0)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        table = logits.log_softmax(0)
        weight = table.detach().exp()[groups].prod(1).repeat_interleave(size)
        logprobs, beta = table[flat], objective.kl_coef
        estimate = advantages(objective, rewards[flat], each, number, kl_coef=beta)
        tokens = policy_loss(
            objective, logprobs, logprobs.detach(), estimate.advantages, each, kl_coef=beta, reference=reference[flat]
        )
        optimizer.zero_grad()
        total = aggregate(objective, tokens.loss * weight, each)
        (total / normaliser(objective, n_responses=size, n_tokens=size)).backward()
        optimizer.step()
        schedule.step()
    return logits.detach().softmax(0)


@pytest.mark.parametrize("size", [2, 3])
def test_a_mean_that_contains_the_response_itself_weakens_the_reward_against_a_kl_in_the_loss(size: int) -> None:
    """R - mean is (K-1)/K of R less the mean of the others: on a bandit, ref exp(R (K-1) / (K beta)) with k2."""
    objective = declared("dr_grpo", kl_placement="loss", kl_estimator="k2", kl_coef=BETA)
    expected = (REFERENCE[:3].log_softmax(0) + REWARDS[BANDIT] * (size - 1) / (size * BETA)).softmax(0)
    assert torch.allclose(bandit_end(objective, size, REWARDS[BANDIT]), expected, atol=1e-3)


def test_a_kl_in_the_loss_is_blind_to_what_follows() -> None:
    """Each token's k2 is that of its own state: it ends where pi(a|s) = ref(a|s) exp(mean R after a, under pi / beta')."""
    objective = declared("dr_grpo", kl_placement="loss", kl_estimator="k2", kl_coef=BETA)
    learned = end(objective, lambda probabilities: every_group(probabilities, 2))
    half = REWARDS / (2 * BETA)
    table = log_table(REFERENCE)
    after_1 = (table[3:5] + half[1:3]).softmax(0)
    after_2 = (table[5:7] + half[3:5]).softmax(0)
    first = (table[:3] + torch.stack([half[0], after_1 @ half[1:3], after_2 @ half[3:5]])).softmax(0)
    assert torch.allclose(learned, torch.cat([first[:1], first[1] * after_1, first[2] * after_2]), atol=2e-3)


def test_grpo_ends_at_its_own_point_whatever_the_scale_of_rewards() -> None:
    """With pairs the advantage is sign(R_a - R_b) / sqrt(2), and k3 pulls as the KL of the reference to the policy does:
    pi_a mean_b[A(a, b)] = beta (pi_a - ref_a)."""
    objective = declared("grpo", kl_coef=BETA)
    rewards = REWARDS[BANDIT]
    learned = bandit_end(objective, 2, rewards)
    wins = torch.sign(rewards[:, None] - rewards[None, :]) @ learned / 2**0.5
    assert torch.allclose(learned * wins, BETA * (learned - REFERENCE[:3].softmax(0)), atol=1e-4)
    assert torch.allclose(bandit_end(objective, 2, 10 * rewards), learned, atol=1e-4)
    plain = declared("dr_grpo", kl_placement="loss", kl_estimator="k3", kl_coef=BETA, reward_clip=None)
    assert (bandit_end(plain, 2, 10 * rewards) - bandit_end(plain, 2, rewards)).abs().max() > 0.1


def test_whitening_the_reward_alone_makes_the_pull_depend_on_its_spread() -> None:
    """REINFORCE++-baseline on groups of two: as the KL in a loss above, with beta sigma for beta, sigma the spread it ends with."""
    objective = declared("reinforce_pp_baseline", kl_coef=BETA)
    learned = end(objective, sampled_groups(2, 1000))
    # A = (R_1 - R_2) / 2 on each token; every response but the first has two tokens.
    difference = (REWARDS[:, None] - REWARDS[None, :]) / 2
    weight = learned[:, None] * learned[None, :] * LENGTHS[:, None]
    mean = (weight * difference).sum() / weight.sum()
    sigma = ((weight * (difference - mean).square()).sum() / weight.sum()).sqrt()
    half = REWARDS / (2 * BETA * sigma)
    after_1 = (log_table(REFERENCE)[3:5] + half[1:3]).softmax(0)
    assert torch.allclose(learned[1:3] / learned[1:3].sum(), after_1, atol=0.02)
    after_2 = (log_table(REFERENCE)[5:7] + half[3:5]).softmax(0)
    assert torch.allclose(learned[3:5] / learned[3:5].sum(), after_2, atol=0.02)


@pytest.mark.parametrize("name", ["dr_grpo", "cispo"])
def test_without_a_kl_the_best_response_takes_all(name: str) -> None:
    learned = end(declared(name), lambda probabilities: every_group(probabilities, 2))
    assert learned.argmax() == REWARDS.argmax()
    assert learned.max() > 0.9


# Declarations and their builder


def test_declarations_say_what_their_papers_do() -> None:
    ppo = algorithm("ppo", critic_learning_rate=1e-5, critic_warmup_steps=3, value_clip=None, lam=0.9)
    assert (ppo.objective.critic.learning_rate, ppo.objective.critic.warmup_steps) == (1e-5, 3)
    assert (ppo.objective.critic.value_clip, ppo.objective.critic.lam) == (None, 0.9)
    assert (ppo.objective.whiten, ppo.objective.baseline, ppo.responses_per_prompt) == (True, "none", 1)
    assert algorithm("reinforce_pp").objective.critic is None
    rloo = algorithm("rloo", samples_per_prompt=6)
    assert (rloo.objective.baseline, rloo.objective.kl_before_baseline, rloo.responses_per_prompt) == (
        "leave_one_out", True, 6,
    )  # fmt: skip
    assert not algorithm("rloo", kl_before_baseline=False).objective.kl_before_baseline
    grpo = algorithm("grpo", ratio="sequence", clip_high=0.3).objective
    assert (grpo.baseline, grpo.kl_placement, grpo.kl_estimator) == ("mean_std", "loss", "k3")
    assert (grpo.ratio, grpo.clip_high, grpo.aggregation) == ("sequence", 0.3, "seq_mean_token_mean")
    dr_grpo = algorithm("dr_grpo").objective
    assert (dr_grpo.baseline, dr_grpo.kl_placement) == ("mean", "none")
    assert (dr_grpo.aggregation, dr_grpo.max_tokens) == ("seq_mean_token_sum_norm", 77)
    cispo = algorithm("cispo").objective
    assert (cispo.surrogate, cispo.baseline, cispo.kl_placement) == ("cispo", "mean_std", "none")
    assert (cispo.clip_low, cispo.clip_high, cispo.aggregation) == (None, 4.0, "token_mean")
    baseline = algorithm("reinforce_pp_baseline").objective
    assert (baseline.baseline, baseline.whiten, baseline.kl_estimator) == ("mean", True, "k2")


def test_every_scored_response_is_an_item_identical_ones_too() -> None:
    rollout, rng = make_rollout([[1], [1], [2], [3]]), random.Random(0)
    feedback = make_feedback([0.5, 0.5, Failed("broke"), -1])
    items = algorithm("rloo").build(rollout, feedback, rng)
    assert [(item.members, item.coefficients, item.target) for item in items] == [
        ((0,), (1.0,), 0.5), ((1,), (1.0,), 0.5), ((3,), (1.0,), -1.0),
    ]  # fmt: skip
    alone = make_feedback([Failed("broke"), Failed("broke"), 1.0, Failed("broke")])
    assert algorithm("grpo").build(rollout, alone, rng) == Dropped("too_few_scores")
    assert len(algorithm("ppo").build(rollout, alone, rng)) == 1
    nothing = make_feedback([Failed("broke")] * 4)
    assert algorithm("ppo").build(rollout, nothing, rng) == Dropped("too_few_scores")
