"""One rank of the policy group: the policy under DeepSpeed, the frozen reference, one device.

It is told what to learn from, fetches those completions by reference, and answers with metrics. All ranks receive the same number
of micro-batches per update, so collective calls always match.
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

from rlhf.algorithms.contrast import Contrast, contrast_loss, response_scores
from rlhf.cluster import fetch, uses_gpu
from rlhf.config import Settings
from rlhf.data.assets import resolve
from rlhf.policy.meters import Meters, item_meters, merge
from rlhf.training.engine import Trainer, gathered, shard_frozen
from rlhf.training.model import LogProbModel, check_forward, load_causal_lm
from rlhf.training.packing import Experience, idle, pack
from rlhf.transfer import TransferSession, WeightSender, WeightSpec, free_port, host_address
from rlhf.transfer.fingerprint import fingerprint
from rlhf.types import Assignment, Completion

GATHER_ELEMENTS = 64 * 2**20
"""Parameters gathered at a time when weights leave the group, in elements."""


class InvariantBroken(RuntimeError):
    """Something that must always hold does not; the run would give wrong results."""


@dataclass(frozen=True)
class UpdateShare:
    """One rank's part of one optimizer step.

    Attributes:
        micro_batches: assignments forwarded together; an empty one keeps this rank in step with the others.
        n_groups: prompts with items in this update, over all ranks: the loss is divided by it.
    """

    micro_batches: tuple[tuple[Assignment, ...], ...]
    n_groups: int


class PolicyRank:
    """See the module. `setup` is collective: it returns when all ranks have called it."""

    def __init__(self, settings: Settings, rank: int, objective: Contrast, total_updates: int):
        self.settings, self.rank, self.objective, self.total_updates = settings, rank, objective, total_updates
        self._sender: WeightSender | None = None

    def address(self) -> tuple[str, int]:
        """Host and a free port for the ranks' rendezvous; asked of rank 0."""
        return host_address(), free_port()

    def setup(self, host: str, port: int) -> None:
        """Join the group, load policy and reference, check the forward pass."""
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
        self.trainer = Trainer(model, settings.policy, self.total_updates)
        self.device = self.trainer.device
        self.reference = shard_frozen(self._model(path), settings.policy, self.device)
        check_forward(
            self.trainer.engine.module, model.causal_lm.config.vocab_size, self.device, settings.run.max_logprob_gap
        )

    def _model(self, path: str) -> LogProbModel:
        policy = self.settings.policy
        temperature = self.settings.rollout.temperature or 1.0
        return LogProbModel(load_causal_lm(path, policy.dtype), policy.logprob_chunk_tokens, temperature)

    # Learning

    def learn(self, updates: Sequence[UpdateShare], first: bool) -> Meters:
        """Make the optimizer steps `updates`, as often as `loop.epochs_per_step`.

        Args:
            first: the policy still equals the reference (checked under `run.invariants`).

        Raises:
            InvariantBroken: policy and reference should agree and do not.
            TrainingDiverged: a loss or gradient is not finite.
        """
        completions = _fetch_completions(batch for update in updates for batch in update.micro_batches)
        references: dict[tuple[int, int], torch.Tensor] = {}
        meters: list[Meters] = []
        for epoch in range(self.settings.loop.epochs_per_step):
            for number, update in enumerate(updates):
                untouched = epoch == 0 and number == 0
                for place, batch in enumerate(update.micro_batches):
                    experience = self._pack(batch, completions)
                    if (number, place) not in references:
                        references[number, place] = self._log_probs_of_reference(experience)
                    reference = references[number, place]
                    equal = first and untouched and place == 0
                    meters.append(self._accumulate(experience, reference, update.n_groups, untouched, equal))
                norm, rate = self.trainer.step()
                meters.append({"policy/grad_norm": (norm, 1.0), "policy/learning_rate": (rate, 1.0)})
        return merge(meters)

    def _accumulate(
        self, experience: Experience, reference: torch.Tensor, n_groups: int, untouched: bool, equal: bool
    ) -> Meters:
        """Forward and backward of one micro-batch.

        Args:
            untouched: the policy's weights are still those that wrote the completions.
            equal: the policy's weights are still those of the reference.
        """
        logprobs, tempered = self.trainer.forward(experience)
        if equal and self.settings.run.invariants:
            _require_equal(logprobs, reference)
        scores = response_scores(
            logprobs, reference, experience.response, experience.coefficients.shape[1], self.objective.reduce
        )
        losses = contrast_loss(self.objective, scores, experience.coefficients, experience.target, experience.weight)
        self.trainer.backward(losses.sum() / n_groups)
        meters = item_meters(self.objective, experience, scores, logprobs, reference)
        if meters:
            meters["policy/loss"] = (losses.sum().item(), float(len(experience.segments)))
        if meters and untouched:
            gap = (tempered - experience.behaviour).abs()
            meters["policy/logprob_gap"] = (gap.sum().item(), float(len(gap)))
        return meters

    @torch.no_grad()
    def measure(self, batches: Sequence[Sequence[Assignment]]) -> Meters:
        """KL of the policy to the reference on given completions: the metrics of `item_meters`, nothing learned."""
        completions = _fetch_completions(batches)
        meters = []
        for batch in batches:
            experience = self._pack(batch, completions)
            logprobs, _ = self.trainer.forward(experience)
            reference = self._log_probs_of_reference(experience)
            scores = response_scores(logprobs, reference, experience.response, experience.coefficients.shape[1], "sum")
            meters.append(item_meters(self.objective, experience, scores, logprobs, reference))
        return merge(meters)

    @torch.no_grad()
    def _log_probs_of_reference(self, experience: Experience) -> torch.Tensor:
        return self.reference(experience)[0]

    def _pack(self, batch: Sequence[Assignment], completions: dict[str, list[Completion]]) -> Experience:
        if not batch:
            return idle(self.device)
        return pack(batch, [completions[assignment.rollout.prompt.id] for assignment in batch], self.device)

    # Weights

    def weight_specs(self) -> list[WeightSpec]:
        """Names, types and whole shapes of the policy's weights, in the order in which `send_weights` sends them."""
        return [
            WeightSpec(name, str(p.dtype).removeprefix("torch."), tuple(getattr(p, "ds_shape", p.shape)))
            for name, p in self._parameters()
        ]

    def open_transfer(self, session: TransferSession) -> None:
        """Rank 0 joins the engines' transfer group as its sender."""
        if self.rank == 0:
            self._sender = WeightSender.open(session)

    def send_weights(self) -> str | None:
        """Send all weights to the engines; rank 0 returns their fingerprint. Collective."""
        weights = self._whole_weights()
        if self._sender is not None:
            return self._sender.send(weights)
        for _ in weights:
            pass
        return None

    def reference_fingerprint(self) -> str:
        """Fingerprint of this rank's part of the reference, which must never change."""
        return fingerprint((name, getattr(p, "ds_tensor", p)) for name, p in self.reference.named_parameters())

    def _parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return list(self.trainer.engine.module.causal_lm.named_parameters())

    def _whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight, whole, one after the other; under ZeRO-3 gathered in chunks. Collective."""
        chunk: list[tuple[str, torch.nn.Parameter]] = []
        size = 0
        for name, parameter in self._parameters():
            chunk.append((name, parameter))
            size += getattr(parameter, "ds_numel", parameter.numel())
            if size >= GATHER_ELEMENTS:
                yield from self._gather(chunk)
                chunk, size = [], 0
        yield from self._gather(chunk)

    @staticmethod
    def _gather(chunk: list[tuple[str, torch.nn.Parameter]]) -> Iterator[tuple[str, torch.Tensor]]:
        with gathered([parameter for _, parameter in chunk]):
            for name, parameter in chunk:
                yield name, parameter.detach()

    # Files

    def save(self, folder: str, tag: str) -> None:
        """Write this rank's part of a checkpoint. Collective."""
        self.trainer.save(Path(folder), tag)

    def load(self, folder: str, tag: str) -> None:
        """Restore what `save` wrote. Collective."""
        self.trainer.load(Path(folder), tag)

    def export(self, folder: str) -> None:
        """Write the policy in Hugging Face format, with its tokenizer, to `folder` on rank 0's machine. Collective."""
        weights = {}
        for name, tensor in self._whole_weights():
            if self.rank == 0:
                weights[name] = tensor.to("cpu", copy=True)
        if self.rank == 0:
            self.trainer.engine.module.causal_lm.save_pretrained(folder, state_dict=weights)
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


def _require_equal(logprobs: torch.Tensor, reference: torch.Tensor) -> None:
    gap = (logprobs - reference).abs().max().item()
    if not gap < 1e-3:
        raise InvariantBroken(
            f"before the first update the policy's log-probs differ from the reference's by {gap:.3g} nats; they are the same "
            "weights. The model's forward pass is not deterministic (dropout?) or its weights were not loaded as saved."
        )
