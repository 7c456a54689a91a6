"""One rank of a supervised training: a module under DeepSpeed that learns from the micro-batches it is given.

What is learned is up to a `Learner`: it builds the module and knows its loss. All ranks receive the same number of micro-batches
per update (None where there is nothing for one of them), so collective calls always match.
"""

# ruff: noqa: B027 - the empty methods of `Learner` are hooks, which most learners do without
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf.config.cluster import ClusterSettings
from rlhf.config.policy import PolicySettings
from rlhf.training import torch_files
from rlhf.training.deepspeed import Trainer
from rlhf.training.ranks import Member, join, leave, rendezvous

STATE = "learner.pt"


class Learner(ABC):
    """A model and its loss. Made on the driver and sent to every rank, so it must be small and picklable until `build`."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The module that learns, in host memory. All ranks hold the same random state when they are asked."""

    @abstractmethod
    def inputs(self, batch: Any | None, device: torch.device) -> tuple[Any, ...]:
        """Arguments of the module's forward, for a micro-batch's payload; for None the smallest there are."""

    @abstractmethod
    def loss(self, outputs: Any, batch: Any | None) -> torch.Tensor:
        """The sum of the losses over the micro-batch; 0, with a gradient of 0 for every weight, for None."""

    @abstractmethod
    def export(self, module: nn.Module, folder: Path, main: bool) -> None:
        """Write the result to `folder`. Collective; `main` is true on the one rank that writes."""

    def groups(self, module: nn.Module) -> list[dict[str, Any]] | None:
        """The optimizer's parameter groups; None if all weights learn alike."""
        return None

    def started(self, module: nn.Module, device: torch.device) -> None:
        """Called once the module is ready to learn: to check it. Collective."""

    def mode(self, module: nn.Module, learning: bool) -> None:
        """Called before the module learns, or is measured: to turn dropout on and off, if there is any."""

    def accumulated(self, count: float) -> None:
        """Called when an update's gradient is complete, before the optimizer divides it by `count` and uses it. Collective."""

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must keep beside weights and optimizer; the same on all ranks."""
        return {}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state` returned."""


@dataclass(frozen=True)
class Learned:
    """What one rank reports of a step: its part of the sum of losses; gradient norm before clipping; learning rate."""

    loss: float
    grad_norm: float
    learning_rate: float


class SupervisedRank:
    """See the module. `setup` is collective: it returns when all ranks have called it.

    Args:
        settings: of DeepSpeed and the optimizer; what they say of the model is for the learner to read.
        total_updates: optimizer steps of the whole run, for the learning-rate schedule.
    """

    def __init__(
        self,
        rank: int,
        learner: Learner,
        settings: PolicySettings,
        cluster: ClusterSettings,
        seed: int,
        total_updates: int,
    ):
        self.learner, self.settings, self.cluster = learner, settings, cluster
        self.seed, self.rank, self.total_updates = seed, rank, total_updates
        self._models = ExitStack()  # what DeepSpeed holds of it, until `close`

    def address(self) -> tuple[str, int]:
        """Host and a free port for the ranks' rendezvous; asked of rank 0."""
        return rendezvous()

    def setup(self, host: str, port: int) -> None:
        """Join the group and build the module."""
        torch.manual_seed(self.seed)
        join(Member(self.rank, self.settings.ranks, host, port), self.cluster)
        module = self.learner.build()
        self.trainer = Trainer(module, self.settings, self.total_updates, self.learner.groups(module))
        self._models.callback(self.trainer.close)
        self.learner.started(self._module, self.trainer.device)

    @property
    def _module(self) -> nn.Module:
        return self.trainer.module

    def learn(self, batches: Sequence[Any | None], count: float, step: int) -> Learned:
        """Make one optimizer step.

        Args:
            batches: payloads of this rank's micro-batches; None keeps it in step with the others.
            count: what the sum of the losses is divided by: how many tokens, texts or pairs the update has over all ranks.
            step: its number; what is random in it depends on that and the seed only, so that a resumed run repeats it.

        Raises:
            TrainingDiverged: a loss or gradient is not finite.
        """
        torch.manual_seed((self.seed * 1_000_003 + step) * self.settings.ranks + self.rank)
        self.learner.mode(self._module, learning=True)
        total = 0.0
        for batch in batches:
            outputs = self.trainer.forward(*self.learner.inputs(batch, self.trainer.device))
            loss = self.learner.loss(outputs, batch)
            self.trainer.backward(loss)
            total += loss.item()
        self.learner.accumulated(count)
        norm, rate = self.trainer.step(count)
        return Learned(total, norm, rate)

    @torch.no_grad()
    def measure(self, batches: Sequence[Any | None]) -> float:
        """The sum of the losses over these micro-batches; nothing is learned."""
        self.learner.mode(self._module, learning=False)
        total = 0.0
        for batch in batches:
            outputs = self.trainer.forward(*self.learner.inputs(batch, self.trainer.device))
            total += self.learner.loss(outputs, batch).item()
        return total

    def save(self, folder: str, tag: str) -> dict[str, str]:
        """Write this rank's part of a checkpoint. Collective. Returns the checksum of each of its files, by the path inside."""
        written = self.trainer.save(Path(folder) / tag, "module")
        if self.rank == 0 and self.learner.state():
            written[STATE] = torch_files.write(self.learner.state(), Path(folder) / tag / STATE)
        return written

    def load(self, folder: str, tag: str) -> None:
        """Restore what `save` wrote. Collective."""
        self.trainer.load(Path(folder) / tag, "module")
        if (Path(folder) / tag / STATE).exists():
            self.learner.restore(torch_files.read(Path(folder) / tag / STATE))

    def export(self, folder: str) -> None:
        """Write the result to `folder` on rank 0's machine. Collective."""
        self.learner.export(self._module, Path(folder), main=self.rank == 0)

    def close(self) -> None:
        """Release the module and leave the group. Safe to call twice."""
        self._models.close()
        leave()
