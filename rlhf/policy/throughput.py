"""How much of the devices' arithmetic the learning steps use. Pure: told what was learned from and how long that took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.algorithms import Algorithm, PolicyGradient
from rlhf.cluster.gpus import visible_gpu
from rlhf.config import Settings
from rlhf.data.model_folder import find_model, read_config
from rlhf.training.flops import learning_flops
from rlhf.training.shapes import ModelShape, model_shape
from rlhf.types import Assignment


@dataclass(frozen=True)
class Learners:
    """What learns.

    Attributes:
        shape: of the policy.
        critic: whether a critic learns besides, a model of the same architecture with another head.
        trained: whether the policy's weights get gradients, and not only adapters beside them.
        epochs: passes over each assignment.
        ranks: devices that share the work.
        peak: dense bf16 operations per second of one of them; None: not known.
    """

    shape: ModelShape
    critic: bool
    trained: bool
    epochs: int
    ranks: int
    peak: float | None


def learners(settings: Settings, algorithm: Algorithm, device: str) -> Learners:
    """Args: device: a rank's GPU as CUDA spells it; empty for a CPU."""
    folder = find_model(settings.policy.model, "`policy.model`", weights=False)
    objective, gpu = algorithm.objective, visible_gpu([device])
    return Learners(
        shape=model_shape(read_config(folder, "`policy.model`")),
        critic=isinstance(objective, PolicyGradient) and objective.critic is not None,
        trained=settings.policy.lora.rank == 0,
        epochs=settings.loop.epochs_per_step,
        ranks=settings.policy.ranks,
        peak=None if gpu is None else gpu.flops,
    )


class Throughput:
    """Adds up a step's work and its time."""

    def __init__(self, learners: Learners):
        self._learners = learners
        self._flops = self._seconds = 0.0

    def learned(self, assignments: Sequence[Assignment], seconds: float) -> None:
        """The ranks have taken in these, or finished a step of such, which took so long."""
        self._flops += sum(self._of(assignment) for assignment in assignments)
        self._seconds += seconds

    def finish(self) -> dict[str, float]:
        """The metrics of the step that ends here."""
        learners, per_s = self._learners, self._flops / max(self._seconds, 1e-9) / self._learners.ranks
        self._flops = self._seconds = 0.0
        metrics = {"throughput/train_tflops": per_s / 1e12}
        return metrics if learners.peak is None else metrics | {"throughput/mfu": per_s / learners.peak}

    def _of(self, assignment: Assignment) -> float:
        rollout, learners = assignment.rollout, self._learners
        prompt = len(rollout.prompt.token_ids)
        responses = [rollout.infos[member].n_tokens for member in assignment.members()]
        flops = learning_flops(learners.shape, prompt, responses, trained=learners.trained)
        if learners.critic:
            flops += learning_flops(learners.shape, prompt, responses, head=False)
        return learners.epochs * flops
