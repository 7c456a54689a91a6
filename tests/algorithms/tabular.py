"""Worlds small enough to solve: one prompt, a few actions, each a response of one token, and a softmax policy over them.

Everything between the policy's log-probs and the loss is the package's own: builders, packing, both kernels. Sampling is replaced by
its expectation: every way in which the algorithm's sources can answer is built once and weighted by its probability.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch

from rlhf.algorithms import Algorithm, Preference, make
from rlhf.algorithms.advantages import advantages
from rlhf.algorithms.builders import Dropped
from rlhf.algorithms.contrast import preference_loss
from rlhf.algorithms.policy_gradient import aggregate, importance_correction, normaliser, policy_loss
from rlhf.config import Settings
from rlhf.config.algorithm import METHODS, OwnAlgorithm
from rlhf.training.packing import Experience, pack
from rlhf.types import Assignment, Completion, Feedback, Prompt, Rollout, Score

# Each action beats the next one: no reward explains these preferences.
CYCLE = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]])
REFERENCE = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()


def settings_of(name: str = "online_dpo", **fields: Any) -> Settings:
    """Settings with this algorithm, and nothing else that matters."""
    algorithm = METHODS.get(name, OwnAlgorithm)(name=name, **fields)
    return Settings(
        data={"prompts": "none"}, policy={"model": "none"}, reward={"path": "none:none"}, algorithm=algorithm
    )


def declared(name: str = "online_dpo", **fields: Any) -> Algorithm:
    """The algorithm under these settings."""
    return make(settings_of(name, **fields))


def answered(tokens: Sequence[Sequence[int]], sources: Sequence[str] | None = None) -> Rollout:
    """A rollout whose completions have these token ids, written by these sources ("policy" if None)."""
    made = [
        Completion.of_one_version(
            "p", np.array(ids, np.int32), np.zeros(len(ids), np.float32), 0, "stop", source=source
        )
        for ids, source in zip(tokens, sources or ["policy"] * len(tokens), strict=True)
    ]
    return Rollout(Prompt("p", (0,), "p"), tuple(completion.info() for completion in made), made)


def scored_by(rewards: Sequence[float], actions: Sequence[int]) -> Feedback:
    """What a reward per action says."""
    return Feedback("p", tuple(Score(float(rewards[action])) for action in actions))


def judged_by(matrix: np.ndarray, actions: Sequence[int]) -> Feedback:
    """What pairwise judges say whose verdicts on actions are `matrix`; a score is the mean probability of beating the others."""
    preferences = matrix[np.ix_(actions, actions)]
    wins = (preferences.sum(1) - 0.5) / max(1, len(actions) - 1)
    return Feedback("p", tuple(Score(float(win)) for win in wins), preferences)


def packed(assignments: Sequence[Assignment]) -> Experience:
    """One micro-batch, in float64, so that a fixed point can be told from rounding."""
    made = pack(assignments, [assignment.rollout.completions for assignment in assignments], torch.device("cpu"))
    return replace(
        made, coefficients=made.coefficients.double(), target=made.target.double(), weight=made.weight.double()
    )


class World:
    """All answers that an algorithm's sources can give, built and packed, and its exact expected loss.

    Args:
        verdicts: rewards of the actions, or the matrix of probabilities with which they beat each other.
        pair: actions of the data set's chosen and rejected response.
    """

    def __init__(self, algorithm: Algorithm, verdicts: np.ndarray | Sequence[float], pair: tuple[int, int] = (0, 1)):
        self.algorithm = algorithm
        self.sources = [source for source in algorithm.sources for _ in range(source.n)]
        names = [source.name for source in self.sources] + ["chosen", "rejected"] * algorithm.dataset_pairs
        judge = judged_by if np.ndim(verdicts) == 2 else scored_by
        self.answers: list[tuple[int, ...]] = []
        assignments = []
        for answers in product(range(len(verdicts)), repeat=len(self.sources)):
            actions = [*answers, *pair] if algorithm.dataset_pairs else list(answers)
            rollout = answered([[action] for action in actions], names)
            built = algorithm.build(rollout, judge(verdicts, actions), random.Random(0))
            if not isinstance(built, Dropped):
                self.answers.append(answers)
                assignments.append(Assignment(rollout, built))
        self.experience = packed(assignments)
        self.written = torch.tensor(self.answers, dtype=torch.int64).reshape(len(self.answers), len(self.sources))
        self.owner = torch.tensor([place for place, one in enumerate(assignments) for _ in one.items])

    def chances(self, policy: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
        """Probability of each of `answers` when the sources sample now, [n_answers]."""
        chances = torch.ones(len(self.answers), dtype=torch.float64)
        for place, source in enumerate(self.sources):
            mixed = ((1 - source.mixture) * policy + source.mixture * partner).softmax(0)
            if source.greedy:
                mixed = torch.nn.functional.one_hot(mixed.argmax(), len(mixed)).double()
            chances *= mixed[self.written[:, place]]
        return chances

    def loss(
        self,
        policy: torch.Tensor,
        reference: torch.Tensor,
        chances: torch.Tensor,
        behaviour: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Expected loss of a policy with these log-probs over the actions, on answers drawn with these chances.

        Args:
            behaviour: log-probs of the policy that wrote the answers; None: this one.
        """
        experience, objective = self.experience, self.algorithm.objective
        logprobs = policy[experience.targets]
        anchor = reference[experience.targets]
        if isinstance(objective, Preference):
            return (preference_loss(objective, experience, logprobs, anchor) * chances[self.owner]).sum()
        old = logprobs.detach()
        estimate = advantages(
            objective,
            experience.coefficients.T @ experience.target,
            experience.response,
            experience.group,
            kl_coef=objective.kl_coef,
            logratio=old - anchor,
        )
        recorded = old if behaviour is None else behaviour[experience.targets]
        weights = importance_correction(objective, old, recorded, experience.response).weights
        losses = policy_loss(objective, logprobs, old, estimate.advantages, experience.response, weights=weights).loss
        losses = losses * chances[experience.group[experience.response]]
        total = aggregate(objective, losses, experience.response)
        return total / normaliser(objective, n_responses=1, n_tokens=1)

    def learn(
        self,
        steps: int,
        rate: float,
        start: torch.Tensor = REFERENCE,
        reference: torch.Tensor | None = None,
        resample: bool = True,
        staleness: int = 0,
    ) -> torch.Tensor:
        """Log-probs over the actions after gradient descent on the expected loss. The reference does not change meanwhile.

        Args:
            start: log-probs of the first policy, [n_actions].
            reference: log-probs of the reference; None: `start`. The engines' partner starts as it and follows the algorithm's rule.
            resample: False: all steps learn from what the first policy wrote, as the epochs of one round do.
            staleness: each step learns from what the policy of so many steps before wrote, or the first one.
        """
        reference = start if reference is None else reference
        partner, rule = reference, self.algorithm.partner
        logits = start.clone().requires_grad_(True)
        writers = deque([(start, partner)], maxlen=staleness + 1 if resample else 1)
        for _ in range(steps):
            policy = logits.log_softmax(0)
            if resample:
                writers.append((policy.detach(), partner))
            loss = self.loss(policy, reference, self.chances(*writers[0]), writers[0][0])
            (gradient,) = torch.autograd.grad(loss, logits)
            with torch.no_grad():
                logits -= rate * gradient
                if rule is not None:
                    partner = rule.decay * partner + (1 - rule.decay) * logits
        return logits.detach().log_softmax(0)


def best_response(
    policy: torch.Tensor, matrix: np.ndarray, tau: float, reference: torch.Tensor, mixture: float
) -> torch.Tensor:
    """ref exp(P(. beats the mixture) / tau), normalised: the policy's log-probs are a fixed point of this at the equilibrium."""
    opponent = ((1 - mixture) * policy + mixture * reference).softmax(0)
    return (reference + torch.from_numpy(matrix) @ opponent / tau).log_softmax(0)


def residual(policy: torch.Tensor, matrix: np.ndarray, tau: float, mixture: float = 0.0) -> float:
    """Largest difference in probability between a policy and its regularised best response to itself (or to its mixture)."""
    return (policy.exp() - best_response(policy, matrix, tau, REFERENCE, mixture).exp()).abs().max().item()


def equilibrium(matrix: np.ndarray, tau: float, mixture: float = 0.0) -> torch.Tensor:
    """The regularised Nash equilibrium's log-probs, by damped iteration of the best response: no loss, no gradient."""
    policy = REFERENCE
    for _ in range(5000):
        policy = (0.9 * policy + 0.1 * best_response(policy, matrix, tau, REFERENCE, mixture)).log_softmax(0)
    return policy
