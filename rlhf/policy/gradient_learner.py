"""Learning from rewards: the policy-gradient loss of algorithms/policy_gradient.py on one rank's micro-batches.

Every piece is looked at as it arrives: the reference's log-probs, the critic's values and, where needed, the policy's own log-probs,
all under the weights that the step starts from; importance weights make up for tokens that older weights wrote. Advantages follow from
these, and stay as they are through all epochs and updates of the loop step. All log-probs are at the sampling temperature.
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
    normaliser,
    policy_loss,
    value_loss,
)
from rlhf.config import Settings
from rlhf.policy.learner import PendingUpdate, StepContext, gap_meters, kl_meters, require_equal
from rlhf.policy.meters import Meters, merge
from rlhf.training.deepspeed import Trainer
from rlhf.training.packing import Experience
from rlhf.types import RankBatch

LogProbs = Callable[[Experience], torch.Tensor]


@dataclass
class MicroBatchTargets:
    """What is known of one micro-batch before it is learned from. Tensors [N], without gradient; filled in as they become known.

    Attributes:
        reference: log ref.
        old: log pi of the weights that the step starts from. If the only visit is under these weights, it brings them along.
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
    """The optimizer steps of the policy, and of its critic if there is one, under a `PolicyGradient` objective; a `Learner`.

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

    def begin(self, step: StepContext) -> None:
        """Start a loop step. Of one that was given up nothing is left."""
        for trainer in self.trainers.values():
            trainer.discard()
        self._step = step
        self._updates: dict[int, PendingUpdate[MicroBatchTargets]] = {}
        self._meters: list[Meters] = []

    def accumulate(self, batch: RankBatch[Experience]) -> None:
        """Learn from a piece at once if the loop step is one visit to each response, with advantages that follow from its group alone.

        Several updates or epochs, whitening and a critic (whose explained variance is reported before it learns) need the whole step:
        then only what must be known beforehand is made here. Raises as `PolicyRank.learn`.
        """
        update = self._updates.setdefault(batch.update, PendingUpdate())
        for experience in update.add(batch):
            targets = self._prepare(experience, batch.update)
            update.targets.append(targets)
            if self._learns_at_once(batch.update):
                update.visits.append(self._visit(experience, targets))

    def finish(self) -> Meters:
        """Complete the targets and make the optimizer steps. Raises as `PolicyRank.learn`."""
        updates, self._updates = dict(sorted(self._updates.items())), {}
        self._complete([targets for update in updates.values() for targets in update.targets])
        warming_up = self.objective.critic is not None and self._step.step <= self.objective.critic.warmup_steps
        for _ in range(self.settings.loop.epochs_per_step):
            for number, update in updates.items():
                if not warming_up:
                    self._step_policy(update, visited=self._learns_at_once(number))
                if self.critic is not None:
                    self._step_critic(self.critic, update)
        return merge(self._meters)

    def _learns_at_once(self, update: int) -> bool:
        whole = self._visits_again() or self.objective.whiten or self.critic is not None
        return update == 0 and not whole

    def _must_look_first(self, update: int) -> bool:
        """Whether the policy's log-probs are needed before the visit that learns: it comes after other steps have moved the policy,
        or advantages of other micro-batches (or the critic) need the KL first. Otherwise one forward pass is saved."""
        objective = self.objective
        kl_first = objective.kl_placement == "reward" and (objective.whiten or objective.critic is not None)
        return update > 0 or self._visits_again() or kl_first

    def _visits_again(self) -> bool:
        """Whether a loop step makes several optimizer steps."""
        return self.settings.loop.updates_per_step * self.settings.loop.epochs_per_step > 1

    # Before learning

    @torch.no_grad()
    def _prepare(self, experience: Experience, update: int) -> MicroBatchTargets:
        """A micro-batch's targets, with advantages unless the policy's only visit must come first."""
        targets = MicroBatchTargets(self.reference(experience))
        old = self.policy.forward(experience)[0] if self._must_look_first(update) else None
        if self.critic is not None:
            targets.values = self.critic.forward(experience)
        if _is_idle(experience):
            return targets
        if old is not None:
            self._meters.append(self._compare(experience, targets, old))
        if old is not None or self.objective.kl_placement != "reward":
            self._meters.append(self._estimate(experience, targets))
        targets.learned = _item_weights(experience) != 0
        return targets

    def _complete(self, targets: Sequence[MicroBatchTargets]) -> None:
        """What needs the whole step's targets."""
        known = [one for one in targets if one.advantages is not None]
        if self.critic is not None:
            self._meters.append(self._explained_variance(known))
        if self.objective.whiten:
            masks = [one.learned for one in known]
            whitened = whiten([one.advantages for one in known], self._total, masks)
            for one, advantage in zip(known, whitened, strict=True):
                one.advantages = advantage

    def _compare(self, experience: Experience, targets: MicroBatchTargets, old: torch.Tensor) -> Meters:
        """Take in the policy's log-probs as the step starts: their distance to the reference and to what the engines computed."""
        if self._step.equal and self.settings.run.invariants:
            require_equal(experience, old, targets.reference, self.settings.policy.dtype)
        # What the policy did not write has no log-prob that could be compared; it counts as on-policy. What older weights of it wrote is
        # off-policy by exactly this ratio, which the correction bounds.
        behaviour = torch.where(experience.by_policy, experience.behaviour, old)
        correction = importance_correction(self.objective, old, behaviour, experience.response)
        targets.old, targets.weights = old, correction.weights
        tokens = float(len(old))
        meters = kl_meters(experience, old, targets.reference) | gap_meters(experience, old, self._step.version)
        return meters | {
            "policy/mismatch_ratio": (correction.ratio.sum().item(), tokens),
            "policy/mismatch_corrected": (correction.altered.float().sum().item(), tokens),
        }

    def _estimate(self, experience: Experience, targets: MicroBatchTargets) -> Meters:
        """Advantages, and returns for a critic."""
        estimate = advantages(
            self.objective,
            experience.coefficients.T @ experience.target,
            experience.response,
            experience.group,
            kl_coef=self._step.kl_coef,
            logratio=None if targets.old is None else targets.old - targets.reference,
            values=targets.values,
        )
        targets.advantages, targets.returns = estimate.advantages, estimate.returns
        tokens = float(len(estimate.advantages))
        return {
            "policy/advantage": (estimate.advantages.sum().item(), tokens),
            "policy/advantage_size": (estimate.advantages.abs().sum().item(), tokens),
        }

    def _explained_variance(self, known: Sequence[MicroBatchTargets]) -> Meters:
        """critic/explained_variance: 1 - Var(returns - values) / Var(returns) over the tokens of all ranks."""
        sums = torch.zeros(5, dtype=torch.float64)
        for targets in known:
            assert targets.returns is not None, "of micro-batches that are learned from"
            returns = targets.returns.double()
            error = returns - targets.values
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

    def _step_policy(self, update: PendingUpdate[MicroBatchTargets], *, visited: bool) -> None:
        """One optimizer step.

        Args:
            visited: the micro-batches have been learned from as they arrived.
        """
        visits = update.visits if visited else [self._visit(experience, targets) for experience, targets in update]
        counts = update.counts
        divisor = normaliser(self.objective, n_responses=counts.n_responses, n_tokens=counts.n_tokens)
        norm, rate = self.policy.step(divisor)
        meters = merge(visits)
        if "policy/loss" in meters:
            loss, learned = meters["policy/loss"]
            meters["policy/loss"] = (loss / divisor, learned / counts.n_responses)
        self._meters += [meters, {"policy/grad_norm": (norm, 1.0), "policy/learning_rate": (rate, 1.0)}]

    def _visit(self, experience: Experience, targets: MicroBatchTargets) -> Meters:
        """Forward and backward of one micro-batch through the policy. policy/loss: its part of the sum, and its responses with a loss."""
        logprobs, entropy = self.policy.forward(experience)
        if _is_idle(experience):
            # ZeRO-3 compares the ranks' graphs, so an idle one must hang on the same outputs.
            outputs = logprobs + entropy if self.objective.entropy_coef else logprobs
            self.policy.backward(outputs.sum() * 0.0)
            return {}
        meters: Meters = {}
        if targets.old is None:
            meters |= self._compare(experience, targets, logprobs.detach())
        if targets.advantages is None:
            meters |= self._estimate(experience, targets)
        tokens = policy_loss(
            self.objective,
            logprobs,
            targets.old,
            targets.advantages,
            experience.response,
            kl_coef=self._step.kl_coef,
            reference=targets.reference,
            entropy=entropy,
            weights=targets.weights,
        )
        loss = aggregate(self.objective, tokens.loss * _item_weights(experience), experience.response)
        self.policy.backward(loss)
        moved = kl_estimate(targets.old - logprobs.detach(), "k3")
        n = float(len(logprobs))
        return meters | {
            "policy/loss": (loss.item(), float(_n_learned(experience))),
            "policy/clip_fraction": (tokens.clipped.float().sum().item(), n),
            "policy/ratio": (tokens.ratio.sum().item(), n),
            "policy/kl_old": (moved.sum().item(), n),
            "policy/entropy": (entropy.detach().sum().item(), n),
        }

    def _step_critic(self, critic: Trainer, update: PendingUpdate[MicroBatchTargets]) -> None:
        assert self.objective.critic is not None
        clip = self.objective.critic.value_clip
        for experience, targets in update:
            values = critic.forward(experience)
            if _is_idle(experience):
                critic.backward(values.sum() * 0.0)
                continue
            assert targets.values is not None and targets.returns is not None, "known before anything is learned"
            losses = value_loss(values, targets.values, targets.returns, clip) * _item_weights(experience)
            critic.backward(losses.sum())
            n = float(len(values))
            self._meters.append(
                {
                    "critic/loss": (losses.detach().sum().item(), n),
                    "critic/value": (targets.values.sum().item(), n),
                    "critic/return": (targets.returns.sum().item(), n),
                }
            )
        norm, rate = critic.step(update.counts.n_tokens)
        self._meters.append({"critic/grad_norm": (norm, 1.0), "critic/learning_rate": (rate, 1.0)})


def _is_idle(experience: Experience) -> bool:
    return not len(experience.target)


def _n_learned(experience: Experience) -> int:
    """Responses that have a loss."""
    return len(experience.response[_item_weights(experience) != 0].unique())


def _item_weights(experience: Experience) -> torch.Tensor:
    """Weight of each token's item, [N]."""
    return (experience.coefficients.T @ experience.weight)[experience.response]
