"""One rank of the policy group: the policy under DeepSpeed, its frozen reference, a critic if the method has one, one device.

It is told what to learn from, fetches those completions by reference, and answers with metrics; how it learns is the learner's
affair (`preference_learner`, `gradient_learner`). All ranks receive the same number of micro-batches per update, so collective
calls always match.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
from transformers import AutoTokenizer

from rlhf.algorithms import Algorithm, Critic, PolicyGradient, Preference
from rlhf.algorithms.anchors import Fixed, UpdateRule
from rlhf.cluster import fetch, uses_gpu
from rlhf.config import Settings
from rlhf.data.assets import resolve
from rlhf.policy.anchor import Anchor
from rlhf.policy.critic import load_critic
from rlhf.policy.gradient_learner import GradientLearner
from rlhf.policy.learner import Moment, Update, kl_meters
from rlhf.policy.meters import Meters, merge
from rlhf.policy.preference_learner import PreferenceLearner
from rlhf.training.engine import Trainer, shard_frozen, whole_weights
from rlhf.training.model import FORWARD_TOLERANCE, LogProbModel, check_forward, load_causal_lm
from rlhf.training.packing import Experience, idle, pack
from rlhf.transfer import TransferSession, WeightSender, WeightSpec, free_port, host_address
from rlhf.types import Assignment, Completion, Half


@dataclass(frozen=True)
class UpdateShare:
    """One rank's part of one optimizer step, before its completions are fetched (see `learner.Update`).

    Attributes:
        micro_batches: assignments forwarded together; an empty one keeps this rank in step with the others.
    """

    micro_batches: tuple[tuple[Assignment, ...], ...]
    n_groups: int
    n_responses: int
    n_tokens: int


class PolicyRank:
    """See the module. `setup` is collective: it returns when all ranks have called it."""

    def __init__(self, settings: Settings, rank: int, algorithm: Algorithm, total_updates: int):
        self.settings, self.rank, self.algorithm, self.total_updates = settings, rank, algorithm, total_updates
        self._sender: WeightSender | None = None

    def address(self) -> tuple[str, int]:
        """Host and a free port for the ranks' rendezvous; asked of rank 0."""
        return host_address(), free_port()

    def setup(self, host: str, port: int) -> None:
        """Join the group, load the models, check the forward pass."""
        settings = self.settings
        os.environ |= {
            "RANK": str(self.rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(settings.policy.ranks),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
        }
        torch.manual_seed(settings.run.seed)
        deepspeed.init_distributed(
            dist_backend="nccl" if uses_gpu(settings.cluster) else "gloo",
            timeout=timedelta(seconds=settings.cluster.learn_deadline_s),
            verbose=False,
        )
        path = resolve(settings.policy.model)
        model = self._model(path)
        if settings.policy.gradient_checkpointing:
            model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        self.policy = Trainer(model, settings.policy, self.total_updates - self._critic_updates())
        self.device = self.policy.device
        self.reference = self._anchor("reference", path, self.algorithm.reference)
        self.partner = self.reference
        if self.algorithm.partner is not None:
            self.partner = self._anchor("partner", path, self.algorithm.partner)
        self.start = self.reference
        if not isinstance(self.algorithm.reference, Fixed) and settings.data.eval_prompts is not None:
            self.start = self._anchor("start", path, Fixed())  # what an evaluation measures the distance to
        tolerance = FORWARD_TOLERANCE[settings.policy.dtype]
        check_forward(self.policy.engine.module, model.causal_lm.config.vocab_size, self.device, tolerance)
        self.learner = self._learner(path)

    def _model(self, path: str) -> LogProbModel:
        policy = self.settings.policy
        return LogProbModel(
            load_causal_lm(path, policy.dtype),
            policy.logprob_chunk_tokens,
            self.settings.rollout.temperature or 1.0,
            tempered=isinstance(self.algorithm.objective, PolicyGradient),
        )

    def _anchor(self, name: str, path: str, rule: UpdateRule) -> Anchor:
        return Anchor(name, shard_frozen(self._model(path), self.settings.policy, self.device), rule)

    def _learner(self, path: str) -> PreferenceLearner | GradientLearner:
        objective = self.algorithm.objective
        if isinstance(objective, Preference):
            return PreferenceLearner(self.settings, objective, self.policy, self.reference.logprobs)
        critic = None if objective.critic is None else self._critic(path, objective.critic)
        return GradientLearner(self.settings, objective, self.policy, self.reference.logprobs, critic)

    def _critic(self, path: str, critic: Critic) -> Trainer:
        settings = self.settings.policy.model_copy(update={"learning_rate": critic.learning_rate})
        model = load_critic(path, critic.model, settings.dtype)
        if settings.gradient_checkpointing:
            model.body.gradient_checkpointing_enable({"use_reentrant": False})
        return Trainer(model, settings, self.total_updates)

    def _critic_updates(self) -> int:
        """Optimizer steps that only the critic makes."""
        objective, loop = self.algorithm.objective, self.settings.loop
        if not isinstance(objective, PolicyGradient) or objective.critic is None:
            return 0
        return objective.critic.warmup_steps * loop.updates_per_step * loop.epochs_per_step

    # Learning

    def learn(self, shares: Sequence[UpdateShare], moment: Moment) -> Meters:
        """Make the optimizer steps that the shares describe, as often as `loop.epochs_per_step`.

        Raises:
            InvariantBroken: policy and reference should agree and do not.
            TrainingDiverged: a loss or gradient is not finite.
        """
        completions = _fetch_completions(batch for share in shares for batch in share.micro_batches)
        updates = [
            Update(
                tuple(self._pack(batch, completions) for batch in share.micro_batches),
                share.n_groups,
                share.n_responses,
                share.n_tokens,
            )
            for share in shares
        ]
        return self.learner.learn(updates, moment)

    def follow(self, step: int) -> dict[str, bool]:
        """Let the anchors follow the policy after loop step `step`: name -> whether it changed. Collective.

        Raises:
            InvariantBroken: an anchor that follows now had changed by itself before.
        """
        changed = {anchor.name: anchor.follow(self.policy, step) for anchor in self._anchors()}
        return changed | {"partner": changed[self.partner.name]}

    def check_anchors(self) -> None:
        """Raises InvariantBroken if an anchor's weights are not those that its rule gave it."""
        for anchor in self._anchors():
            anchor.check()

    def _anchors(self) -> list[Anchor]:
        """Reference, partner and start, each model once."""
        return list(dict.fromkeys((self.reference, self.partner, self.start)))

    @torch.no_grad()
    def measure(self, batches: Sequence[Sequence[Assignment]]) -> Meters:
        """KL of the policy to the model the run started from, on given completions (`kl_meters`); nothing is learned."""
        completions = _fetch_completions(batches)
        meters = []
        for batch in batches:
            experience = self._pack(batch, completions)
            logprobs, _ = self.policy.forward(experience)
            start = self.start.logprobs(experience)  # also of an idle one: under ZeRO-3 both forwards are collective
            meters.append(kl_meters(experience, logprobs, start) if batch else {})
        return merge(meters)

    def _pack(self, batch: Sequence[Assignment], completions: dict[str, list[Completion]]) -> Experience:
        if not batch:
            return idle(self.device)
        return pack(batch, [completions[assignment.rollout.prompt.id] for assignment in batch], self.device)

    # Weights

    def weight_specs(self) -> list[WeightSpec]:
        """Names, types and whole shapes of the policy's weights, in the order in which `send_weights` sends them."""
        return [
            WeightSpec(name, str(p.dtype).removeprefix("torch."), tuple(getattr(p, "ds_shape", p.shape)))
            for name, p in self.policy.engine.module.causal_lm.named_parameters()
        ]

    def open_transfer(self, session: TransferSession) -> None:
        """Rank 0 joins the engines' transfer group as its sender."""
        if self.rank == 0:
            self._sender = WeightSender.open(session)

    def send_weights(self, half: Half = "policy") -> str | None:
        """Send all weights of the policy or of the engines' second model; rank 0 returns their fingerprint. Collective."""
        weights = self._weights(half)
        if self._sender is not None:
            return self._sender.send(weights, half)
        for _ in weights:
            pass
        return None

    def _weights(self, half: Half) -> Iterator[tuple[str, torch.Tensor]]:
        return whole_weights(self.policy.engine.module.causal_lm) if half == "policy" else self.partner.weights()

    # Files

    def save(self, folder: str, tag: str) -> None:
        """Write this rank's part of a checkpoint. Collective."""
        for name, trainer in self.learner.trainers.items():
            trainer.save(Path(folder) / tag, name)
        for anchor in self._anchors():
            anchor.save(Path(folder) / tag, self.rank)

    def load(self, folder: str, tag: str) -> None:
        """Restore what `save` wrote. Collective."""
        for name, trainer in self.learner.trainers.items():
            trainer.load(Path(folder) / tag, name)
        for anchor in self._anchors():
            anchor.load(Path(folder) / tag, self.rank)

    def export(self, folder: str) -> None:
        """Write the policy in Hugging Face format, with its tokenizer, to `folder` on rank 0's machine. Collective."""
        weights = {}
        for name, tensor in self._weights("policy"):
            if self.rank == 0:
                weights[name] = tensor.to("cpu", copy=True)
        if self.rank == 0:
            self.policy.engine.module.causal_lm.save_pretrained(folder, state_dict=weights)
            AutoTokenizer.from_pretrained(resolve(self.settings.policy.model)).save_pretrained(folder)

    def close(self) -> None:
        """Leave the group. A lone rank keeps its own for the process's life: DeepSpeed cannot join a second one."""
        if torch.distributed.is_initialized() and self.settings.policy.ranks > 1:
            torch.distributed.destroy_process_group()


def _fetch_completions(batches: Iterable[Sequence[Assignment]]) -> dict[str, list[Completion]]:
    """Prompt id -> completions, for all assignments in the batches."""
    rollouts = [assignment.rollout for batch in batches for assignment in batch]
    fetched = fetch([rollout.completions for rollout in rollouts])
    return {rollout.prompt.id: completions for rollout, completions in zip(rollouts, fetched, strict=True)}
