"""One rank of the policy group: the policy under DeepSpeed, its frozen reference, a critic if the method has one, one device.

It is told what to learn from, whole or piece by piece, fetches those completions by reference, and answers with metrics; how it learns
is up to the learner (`preference_learner`, `gradient_learner`). All ranks receive the same number of micro-batches in each piece, so
collective calls always match.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from rlhf.algorithms import Algorithm, Critic, PolicyGradient, Preference
from rlhf.algorithms.anchors import Fixed, UpdateRule
from rlhf.cluster import fetch
from rlhf.config import Settings
from rlhf.data.model_folder import find_model
from rlhf.engines.nccl import join_nccl
from rlhf.policy.anchor import Anchor, SharedAnchor, needs_adapter
from rlhf.policy.critic import load_critic
from rlhf.policy.gradient_learner import GradientLearner
from rlhf.policy.learner import Lazily, Learner, StepContext, kl_meters
from rlhf.policy.meters import Meters, merge
from rlhf.policy.preference_learner import PreferenceLearner
from rlhf.policy.probe import Gaps, probe_gaps
from rlhf.training import lora
from rlhf.training.deepspeed import Frozen, Trainer, sharding
from rlhf.training.loading import load_causal_lm, save_causal_lm
from rlhf.training.model import (
    FORWARD_TOLERANCE,
    LogProbModel,
    check_forward,
    checkpoint_activations,
)
from rlhf.training.packing import Experience, idle, pack
from rlhf.training.ranks import Member, join, leave, rendezvous
from rlhf.training.weights import described_weights, in_host_memory, whole_weights
from rlhf.transfer import TransferSession, WeightSender, sending_ranks
from rlhf.types import Assignment, Completion, ModelSlot, RankBatch, Rollout, Shipment, WeightSpec

PolicyBatch = RankBatch[tuple[Assignment, ...]]
"""What a rank is given: its completions are not fetched yet."""


class PolicyRank:
    """See the module. `setup` is collective: it returns when all ranks have called it."""

    def __init__(self, rank: int, settings: Settings, algorithm: Algorithm, total_updates: int):
        self.rank, self.settings, self.algorithm, self.total_updates = rank, settings, algorithm, total_updates
        self._sender: WeightSender | None = None
        self._models = ExitStack()  # what DeepSpeed holds of them, until `close`

    def address(self) -> tuple[str, int]:
        """Host and a free port for the ranks' rendezvous; asked of rank 0."""
        return rendezvous()

    def device_name(self) -> str:
        """Of its GPU, as CUDA spells it; empty for a CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""

    def setup(self, host: str, port: int) -> None:
        """Join the group, load the models, check the forward pass."""
        settings = self.settings
        torch.manual_seed(settings.run.seed)
        join(Member(self.rank, settings.policy.ranks, host, port), settings.cluster)
        path = find_model(settings.policy.model, "`policy.model`")
        rules = self._rules()
        model = self._model(path, learn=True)
        if settings.policy.lora.rank:
            lora.add_adapters(
                model.causal_lm,
                settings.policy.lora,
                [name for name, rule in rules.items() if needs_adapter(name, rule)],
            )
        if settings.policy.gradient_checkpointing:
            checkpoint_activations(model.causal_lm)
        self.policy = Trainer(model, settings.policy, self.total_updates - self._critic_updates())
        self._models.callback(self.policy.close)
        self.device = self.policy.device
        anchors = {name: self._anchor(name, path, rule) for name, rule in rules.items()}
        self.reference = anchors["reference"]
        self.partner = anchors.get("partner", self.reference)
        self.start = anchors.get("start", self.reference)
        tolerance = FORWARD_TOLERANCE[settings.policy.dtype]
        check_forward(self.policy.module, model.causal_lm.config.vocab_size, self.device, tolerance)
        self.learner = self._learner(path)

    def _rules(self) -> dict[str, UpdateRule]:
        """The anchors by name. A partner that is missing is the reference; so is a missing start, what an evaluation measures the
        distance to."""
        rules = {"reference": self.algorithm.reference}
        if self.algorithm.partner is not None:
            rules["partner"] = self.algorithm.partner
        if not isinstance(self.algorithm.reference, Fixed) and self.settings.data.eval_prompts is not None:
            rules["start"] = Fixed()
        return rules

    def _model(self, path: str, *, learn: bool) -> LogProbModel:
        policy = self.settings.policy
        return LogProbModel(
            load_causal_lm(path, policy.dtype, policy.lora.quantize_base, sharding(policy, learn=learn)),
            policy.logprob_chunk_tokens,
            self.settings.rollout.temperature or 1.0,
            tempered=isinstance(self.algorithm.objective, PolicyGradient),
        )

    def _anchor(self, name: str, path: str, rule: UpdateRule) -> Anchor:
        if self.settings.policy.lora.rank:
            return SharedAnchor(name, self.policy, rule)
        frozen = Frozen(self._model(path, learn=False), self.settings.policy, self.device)
        self._models.callback(frozen.close)
        return Anchor(name, frozen, rule)

    def _learner(self, path: str) -> Learner:
        objective = self.algorithm.objective
        if isinstance(objective, Preference):
            return PreferenceLearner(self.settings, objective, self.policy, self.reference.forward)
        critic = None if objective.critic is None else self._critic(path, objective.critic)
        return GradientLearner(self.settings, objective, self.policy, self.reference.logprobs, critic)

    def _critic(self, path: str, critic: Critic) -> Trainer:
        settings = self.settings.policy.model_copy(update={"learning_rate": critic.learning_rate})
        adapters = settings.lora if settings.lora.rank else None
        model = load_critic(path, critic.model, settings.dtype, adapters, sharding(settings, learn=True))
        if settings.gradient_checkpointing:
            checkpoint_activations(model.body)
        trainer = Trainer(model, settings, self.total_updates)
        self._models.callback(trainer.close)
        return trainer

    def _critic_updates(self) -> int:
        """Optimizer steps that only the critic makes."""
        objective, loop = self.algorithm.objective, self.settings.loop
        if not isinstance(objective, PolicyGradient) or objective.critic is None:
            return 0
        return objective.critic.warmup_steps * loop.updates_per_step * loop.epochs_per_step

    # Learning

    def learn(self, batches: Sequence[PolicyBatch], step: StepContext) -> Meters:
        """A whole loop step at once: `begin`, `accumulate`, `finish`.

        Raises:
            InvariantBroken: policy and reference should agree and do not.
            TrainingDiverged: a loss or gradient is not finite.
        """
        self.begin(step)
        self.accumulate(batches)
        return self.finish()

    def begin(self, step: StepContext) -> None:
        """Start a loop step, of which `accumulate` will bring pieces."""
        self.learner.begin(step)

    def accumulate(self, batches: Sequence[PolicyBatch]) -> None:
        """Take in a piece of the loop step, or the parts of a piece that belong to several optimizer steps. What the method can learn
        from them alone it learns; the rest it prepares. Raises as `learn`."""
        completions = _fetch_completions(batch for share in batches for batch in share.micro_batches)
        for share in batches:
            experiences = Lazily(len(share.micro_batches), partial(self._pack_one, share, completions))
            self.learner.accumulate(RankBatch(experiences, share.counts, share.update))

    def finish(self) -> Meters:
        """Make the optimizer steps of the loop step, whose pieces are all there. Raises as `learn`."""
        return self.learner.finish()

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
        # Where `LogProbModel` puts the log-probs at the sampling temperature.
        tempered = 0 if isinstance(self.algorithm.objective, PolicyGradient) else 1
        meters = []
        for batch in batches:
            experience = self._pack(batch, completions)
            logprobs = self.policy.forward(experience)[tempered]
            start = self.start.forward(experience)[tempered]  # also of an idle one: under ZeRO-3 both are collective
            meters.append(kl_meters(experience, logprobs, start) if batch else {})
        return merge(meters)

    def probe_gaps(self, rollouts: Sequence[Rollout]) -> Gaps:
        """What `policy.probe.probe_gaps` finds, by the policy and the partner as they are. Collective; the same on all ranks."""
        models = {"policy": lambda experience: self.policy.forward(experience)[0], "partner": self.partner.logprobs}
        return probe_gaps(rollouts, models, self.device)

    def _pack_one(self, share: PolicyBatch, completions: dict[str, list[Completion]], number: int) -> Experience:
        return self._pack(share.micro_batches[number], completions)

    def _pack(self, batch: Sequence[Assignment], completions: dict[str, list[Completion]]) -> Experience:
        if not batch:
            return idle(self.device)
        return pack(batch, [completions[assignment.rollout.prompt.id] for assignment in batch], self.device)

    # Weights

    def weight_specs(self) -> tuple[WeightSpec, ...]:
        """Names, types and whole shapes of the policy's weights, in the order in which `send_weights` sends them."""
        described = lora.described_adapter if self._sends_adapter() else described_weights
        return tuple(
            WeightSpec(name, str(dtype).removeprefix("torch."), shape)
            for name, dtype, shape in described(self._causal_lm)
        )

    def open_transfer(self, session: TransferSession) -> None:
        """Rank 0, or with `ipc` every rank, leaves the engines' transfer group of before, and joins this one as a sender."""
        senders = sending_ranks(session.backend, self.settings.policy.ranks)
        if self._sender is not None:
            self._sender.close()
        if self.rank in senders:
            self._sender = WeightSender.open(session, self.rank, len(senders), join_nccl)

    def send_weights(self, shipment: Shipment) -> str | None:
        """Send all weights of the policy or of the engines' second model; rank 0 returns their fingerprint. Collective."""
        offloaded = shipment.slot == "partner" and self.partner.offloaded
        if offloaded:
            self.partner.reload()
        fingerprint = self._send(self._weights(shipment.slot), shipment)
        if offloaded:
            self.partner.offload(self.device)
        return fingerprint

    def _send(self, weights: Iterable[tuple[str, torch.Tensor]], shipment: Shipment) -> str | None:
        if self._sender is not None:
            return self._sender.send(weights, shipment)
        for _ in weights:  # to take part in gathering
            pass
        return None

    @property
    def _causal_lm(self) -> torch.nn.Module:
        return self.policy.module.causal_lm

    def _sends_adapter(self) -> bool:
        """Whether the engines keep the base and are sent the policy's adapter alone."""
        return self.settings.policy.lora.publish == "adapter"

    def _weights(self, slot: ModelSlot) -> Iterator[tuple[str, torch.Tensor]]:
        if slot == "partner":
            return self.partner.weights()
        return lora.adapter_weights(self._causal_lm) if self._sends_adapter() else self._whole()

    def _whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        return whole_weights(self._causal_lm, lora.POLICY if self.settings.policy.lora.rank else None)

    # Taking turns with engines on the same device

    def offload(self) -> None:
        """Leave only the policy's weights on the device: optimizer states and frozen models move to host memory."""
        for trainer in self.learner.trainers.values():
            trainer.offload()
        for anchor in self._anchors():
            anchor.offload(self.device)

    def reload(self) -> None:
        """Undo `offload`; before everything but `send_weights`."""
        for anchor in self._anchors():
            anchor.reload()
        for trainer in self.learner.trainers.values():
            trainer.reload()

    # Files

    def save(self, folder: str, tag: str) -> dict[str, str]:
        """Write this rank's part of a checkpoint. Collective. Returns the checksum of each large file of this rank, by its path inside."""
        written: dict[str, str] = {}
        for name, trainer in self.learner.trainers.items():
            written |= trainer.save(Path(folder) / tag, name)
        for anchor in self._anchors():
            written |= anchor.save(Path(folder) / tag, self.rank)
        self._save_adapter(Path(folder) / tag / "adapter")
        return written

    def load(self, folder: str, tag: str) -> None:
        """Restore what `save` wrote. Collective."""
        for name, trainer in self.learner.trainers.items():
            trainer.load(Path(folder) / tag, name)
        for anchor in self._anchors():
            anchor.load(Path(folder) / tag, self.rank)

    def export(self, folder: str) -> None:
        """Write the policy in Hugging Face format, with its tokenizer, to `folder` on rank 0's machine; under LoRA its adapter too, in
        peft's format, to `folder/adapter`. Collective."""
        weights = in_host_memory(self._whole(), self.rank == 0)
        if self.rank == 0:
            save_causal_lm(self._causal_lm, weights, find_model(self.settings.policy.model, "`policy.model`"), folder)
        self._save_adapter(Path(folder) / "adapter")

    def _save_adapter(self, folder: Path) -> None:
        """In peft's format, by rank 0; nothing without LoRA. Collective."""
        settings = self.settings.policy
        if settings.lora.rank:
            weights = in_host_memory(lora.adapter_weights(self._causal_lm), self.rank == 0)
            if self.rank == 0:
                lora.save_adapter(
                    folder, lora.adapter_config(settings.lora, find_model(settings.model, "`policy.model`")), weights
                )

    def close(self) -> None:
        """Release the models and leave the group. Safe to call twice."""
        self._models.close()
        leave()


def _fetch_completions(batches: Iterable[Sequence[Assignment]]) -> dict[str, list[Completion]]:
    """Prompt id -> completions, for all assignments in the batches."""
    rollouts = [assignment.rollout for batch in batches for assignment in batch]
    fetched = fetch([rollout.completions for rollout in rollouts])
    return {rollout.prompt.id: completions for rollout, completions in zip(rollouts, fetched, strict=True)}
