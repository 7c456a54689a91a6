"""Learning from rewards: the policy-gradient loss of algorithms/policy_gradient.py on one rank's micro-batches.

Each call looks at all its micro-batches before it learns from any: the reference's log-probs, the critic's values and, where needed,
the policy's own log-probs, all under the weights that wrote the responses. Advantages follow from these, and stay as they are
through all epochs and updates of the call. All log-probs are at the sampling temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rlhf.algorithms.advantages import advantages, whiten
from rlhf.algorithms.kl import kl_estimate
from rlhf.algorithms.policy_gradient import (
    PolicyGradient,
    aggregate,
    importance_correction,
    policy_loss,
    value_loss,
)
from rlhf.config import Settings
from rlhf.policy.learner import Moment, Update, gap_meters, kl_meters, require_equal
from rlhf.policy.meters import Meters, merge
from rlhf.training.deepspeed import Trainer
from rlhf.training.packing import Experience

LogProbs = Callable[[Experience], torch.Tensor]


@dataclass
class Lesson:
    """What is known of one micro-batch before it is learned from. Tensors [N], without gradient; filled in as they become known.

    Attributes:
        reference: log ref.
        old: log pi of the weights that wrote the responses. If the only visit is under these weights, it brings them along.
        weights: importance weights of the policy term; known with `old`.
        values: the critic's old values.
        learned: whether a token has a loss; None in an idle micro-batch.
        advantages, returns: what policy and critic learn from; None in an idle micro-batch.
    """

    reference: torch.Tensor
    old: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    values: torch.Tensor | None = None
    learned: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None


class GradientLearner:
    """The optimizer steps of the policy, and of its critic if there is one, under a `PolicyGradient` objective.

    Args:
        policy: its forward gives (log-probs at the sampling temperature, entropies).
        reference: fp32 [N] log-probs of the anchor, at the sampling temperature, without gradient.
        critic: its forward gives values; exactly if the objective has a critic.
    """

    def __init__(
        self,
        settings: Settings,
        objective: PolicyGradient,
        policy: Trainer,
        reference: LogProbs,
        critic: Trainer | None = None,
    ):
        self.settings, self.objective = settings, objective
        self.policy, self.reference, self.critic = policy, reference, critic
        self.trainers = {"policy": policy} | ({} if critic is None else {"critic": critic})

    def learn(self, updates: Sequence[Update], moment: Moment) -> Meters:
        """Make the optimizer steps, as often as `loop.epochs_per_step`. Raises as `PolicyRank.learn`."""
        warming_up = self.objective.critic is not None and moment.step <= self.objective.critic.warmup_steps
        lessons, meters = self._prepare(updates, moment)
        for _ in range(self.settings.loop.epochs_per_step):
            for update, row in zip(updates, lessons, strict=True):
                if not warming_up:
                    meters += self._step_policy(update, row, moment)
                if self.critic is not None:
                    meters += self._step_critic(self.critic, update, row)
        return merge(meters)

    # Before learning

    @torch.no_grad()
    def _prepare(self, updates: Sequence[Update], moment: Moment) -> tuple[list[list[Lesson]], list[Meters]]:
        """The lessons of each update's micro-batches, with advantages unless the policy's only visit must come first."""
        look_first = self._must_look_first(len(updates))
        lessons: list[list[Lesson]] = []
        meters: list[Meters] = []
        for update in updates:
            lessons.append([])
            for experience in update.experiences:
                lesson = Lesson(self.reference(experience))
                lessons[-1].append(lesson)
                old = self.policy.forward(experience)[0] if look_first else None
                if self.critic is not None:
                    lesson.values = self.critic.forward(experience)
                if _is_idle(experience):
                    continue
                if old is not None:
                    meters.append(self._compare(experience, lesson, old, moment))
                if old is not None or self.objective.kl_placement != "reward":
                    meters.append(self._estimate(experience, lesson, moment))
                lesson.learned = _item_weights(experience) != 0
        learned = [lesson for row in lessons for lesson in row if lesson.advantages is not None]
        if self.critic is not None:
            meters.append(self._explained_variance(learned))
        if self.objective.whiten:
            masks = [lesson.learned for lesson in learned]
            whitened = whiten([lesson.advantages for lesson in learned], self._total, masks)
            for lesson, advantage in zip(learned, whitened, strict=True):
                lesson.advantages = advantage
        return lessons, meters

    def _must_look_first(self, n_updates: int) -> bool:
        """Whether the policy's log-probs are needed before the visit that learns: it comes after other steps have moved the policy,
        or advantages of other micro-batches (or the critic) need the KL first. Otherwise one forward pass is saved."""
        several = n_updates * self.settings.loop.epochs_per_step > 1
        objective = self.objective
        return several or (objective.kl_placement == "reward" and (objective.whiten or objective.critic is not None))

    def _compare(self, experience: Experience, lesson: Lesson, old: torch.Tensor, moment: Moment) -> Meters:
        """Take in the log-probs of the weights that wrote the responses: their distance to the reference and to the engines."""
        if moment.equal and self.settings.run.invariants:
            require_equal(experience, old, lesson.reference, self.settings.policy.dtype)
        # What the policy did not write has no log-prob that could be compared; it counts as on-policy.
        behaviour = torch.where(experience.by_policy, experience.behaviour, old)
        correction = importance_correction(self.objective, old, behaviour, experience.response)
        lesson.old, lesson.weights = old, correction.weights
        tokens = float(len(old))
        meters = kl_meters(experience, old, lesson.reference) | gap_meters(experience, old)
        return meters | {
            "policy/mismatch_ratio": (correction.ratio.sum().item(), tokens),
            "policy/mismatch_corrected": (correction.altered.float().sum().item(), tokens),
        }

    def _estimate(self, experience: Experience, lesson: Lesson, moment: Moment) -> Meters:
        """Advantages, and returns for a critic."""
        estimate = advantages(
            self.objective,
            experience.coefficients.T @ experience.target,
            experience.response,
            experience.group,
            kl_coef=moment.kl_coef,
            logratio=None if lesson.old is None else lesson.old - lesson.reference,
            values=lesson.values,
        )
        lesson.advantages, lesson.returns = estimate.advantages, estimate.returns
        tokens = float(len(estimate.advantages))
        return {
            "policy/advantage": (estimate.advantages.sum().item(), tokens),
            "policy/advantage_size": (estimate.advantages.abs().sum().item(), tokens),
        }

    def _explained_variance(self, lessons: Sequence[Lesson]) -> Meters:
        """critic/explained_variance: 1 - Var(returns - values) / Var(returns) over the tokens of all ranks."""
        sums = torch.zeros(5, dtype=torch.float64)
        for lesson in lessons:
            assert lesson.returns is not None, "of lessons that are learned from"
            returns = lesson.returns.double()
            error = returns - lesson.values
            parts = (torch.ones_like(returns), returns, returns.square(), error, error.square())
            sums += torch.stack([part.sum() for part in parts]).cpu()
        count, first, second, error_first, error_second = self._total(sums).tolist()
        variance = second / count - (first / count) ** 2
        unexplained = error_second / count - (error_first / count) ** 2
        return {"critic/explained_variance": (1 - unexplained / max(variance, 1e-8), 1.0)}

    def _total(self, sums: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks. Collective."""
        sums = sums.to(self.policy.device)
        torch.distributed.all_reduce(sums)
        return sums.cpu()

    # Learning

    def _step_policy(self, update: Update, lessons: Sequence[Lesson], moment: Moment) -> list[Meters]:
        meters = [
            self._visit(experience, lesson, update, moment)
            for experience, lesson in zip(update.experiences, lessons, strict=True)
        ]
        norm, rate = self.policy.step()
        return [*meters, {"policy/grad_norm": (norm, 1.0), "policy/learning_rate": (rate, 1.0)}]

    def _visit(self, experience: Experience, lesson: Lesson, update: Update, moment: Moment) -> Meters:
        """Forward and backward of one micro-batch through the policy."""
        logprobs, entropy = self.policy.forward(experience)
        if _is_idle(experience):
            # ZeRO-3 compares the ranks' graphs, so an idle one must hang on the same outputs.
            outputs = logprobs + entropy if self.objective.entropy_coef else logprobs
            self.policy.backward(outputs.sum() * 0.0)
            return {}
        meters: Meters = {}
        if lesson.old is None:
            meters |= self._compare(experience, lesson, logprobs.detach(), moment)
        if lesson.advantages is None:
            meters |= self._estimate(experience, lesson, moment)
        tokens = policy_loss(
            self.objective,
            logprobs,
            lesson.old,
            lesson.advantages,
            experience.response,
            kl_coef=moment.kl_coef,
            reference=lesson.reference,
            entropy=entropy,
            weights=lesson.weights,
        )
        counts = {"n_responses": update.n_responses, "n_tokens": update.n_tokens}
        loss = aggregate(self.objective, tokens.loss * _item_weights(experience), experience.response, **counts)
        self.policy.backward(loss)
        moved = kl_estimate(lesson.old - logprobs.detach(), "k3")
        n = float(len(logprobs))
        return meters | {
            "policy/loss": (loss.item(), _n_learned(experience) / update.n_responses),
            "policy/clip_fraction": (tokens.clipped.float().sum().item(), n),
            "policy/ratio": (tokens.ratio.sum().item(), n),
            "policy/kl_old": (moved.sum().item(), n),
            "policy/entropy": (entropy.detach().sum().item(), n),
        }

    def _step_critic(self, critic: Trainer, update: Update, lessons: Sequence[Lesson]) -> list[Meters]:
        meters: list[Meters] = []
        assert self.objective.critic is not None
        clip = self.objective.critic.value_clip
        for experience, lesson in zip(update.experiences, lessons, strict=True):
            values = critic.forward(experience)
            if _is_idle(experience):
                critic.backward(values.sum() * 0.0)
                continue
            assert lesson.values is not None and lesson.returns is not None, "known before anything is learned"
            losses = value_loss(values, lesson.values, lesson.returns, clip) * _item_weights(experience)
            critic.backward(losses.sum() / update.n_tokens)
            n = float(len(values))
            meters.append(
                {
                    "critic/loss": (losses.detach().sum().item(), n),
                    "critic/value": (lesson.values.sum().item(), n),
                    "critic/return": (lesson.returns.sum().item(), n),
                }
            )
        norm, rate = critic.step()
        return [*meters, {"critic/grad_norm": (norm, 1.0), "critic/learning_rate": (rate, 1.0)}]


def _is_idle(experience: Experience) -> bool:
    return not len(experience.target)


def _n_learned(experience: Experience) -> int:
    """Responses that have a loss."""
    return int(torch.count_nonzero(experience.coefficients.T @ experience.weight))


def _item_weights(experience: Experience) -> torch.Tensor:
    """Weight of each token's item, [N]."""
    return (experience.coefficients.T @ experience.weight)[experience.response]
