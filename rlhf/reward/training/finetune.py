"""Full fine-tuning of a reward model: all weights, AdamW, any objective, on a DeepSpeed group of one rank or many.

A `Learner` for the supervised group (`rlhf.training.supervised`) and its data as `Examples`. One rank runs in this process. The files of a
training under way are `journal`'s.
"""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from rlhf.cluster import LocalRuntime, RayRuntime, ResourceRequest, Runtime, uses_gpu
from rlhf.config.cluster import ClusterSettings
from rlhf.config.policy import PolicySettings
from rlhf.config.reward_training import (
    BaseModelSettings,
    FitSettings,
    RewardTrainingSettings,
    TrainingCheckpointSettings,
)
from rlhf.data.loading_time import Weights, startup_deadline_s
from rlhf.reward.models import RewardModel
from rlhf.reward.modules import EncoderWithHead, parts
from rlhf.reward.training.dataset import PreferenceData
from rlhf.reward.training.examples import Preferences, Texts
from rlhf.reward.training.journal import OBJECTIVE, START, WEIGHTS, Journal
from rlhf.reward.training.objectives import Objective, observing
from rlhf.training.checkpoints import Checkpoints
from rlhf.training.deepspeed import sharding
from rlhf.training.model import DTYPES
from rlhf.training.sharded import fill_sharded, set_aside
from rlhf.training.supervised import Course, Saving, SupervisedGroup, train
from rlhf.training.supervised_rank import Learner
from rlhf.training.weights import in_host_memory, whole_weights

ADAM_BETAS = (0.9, 0.999)


class FineTuning(Learner):
    """A reward model and its objective.

    Args:
        model: with weights to start from, in host memory; it is trained in place.
        new_head: the head starts from noise and has a learning rate of its own.
        start: file for these weights under ZeRO-3, in a folder that all ranks share, so that no rank is sent the whole model.
    """

    def __init__(
        self, model: RewardModel, objective: Objective, settings: RewardTrainingSettings, new_head: bool, start: Path
    ):
        self._model, self._objective, self._new_head = model, objective, new_head
        self._base: BaseModelSettings = settings.model
        self._fit: FitSettings = settings.training
        self._gradient: torch.Tensor | None = None
        self._start = start if self._fit.zero_stage == 3 else None
        if self._start is not None:
            set_aside(model.module, self._start)

    def build(self) -> nn.Module:
        module = self._model.module
        if self._start is not None:
            shards = sharding(_optimizer(self._base, self._fit, updates=1), learn=True)
            assert shards is not None, "of stage 3, where a start is set aside"
            fill_sharded(module, self._start, DTYPES[self._base.dtype], shards)
        if self._base.gradient_checkpointing:
            _transformer(module).gradient_checkpointing_enable({"use_reentrant": False})
        if self._base.dtype == "bf16":
            for part in module.modules():
                if isinstance(part, EncoderWithHead):  # its features are fp32 whatever the encoder computes in
                    part.head.__class__ = Fp32Linear
        if observing(self._objective):
            module.head.weight.register_hook(self._add)
        return module

    def _add(self, gradient: torch.Tensor) -> None:
        """Sum up this rank's gradient of the head over the micro-batches."""
        gradient = gradient.detach().float()
        self._gradient = gradient if self._gradient is None else self._gradient + gradient

    def groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """What starts from noise (the head, ordinal thresholds) moves faster."""
        old, new = parts(module)
        rate = self._fit.learning_rate
        head_rate = self._fit.head_learning_rate if self._new_head else rate
        return [{"params": old, "lr": rate}, {"params": new, "lr": head_rate}]

    def inputs(self, batch: Texts | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        self._model.device = str(device)
        padded = self._model.batch([[]] if batch is None else batch.ids)
        return padded["input_ids"], padded["attention_mask"]

    def loss(self, outputs: torch.Tensor, batch: Texts | None) -> torch.Tensor:
        if batch is None:
            return outputs.sum() * 0.0
        return self._objective.loss(outputs.float(), batch.labels.to(outputs.device))[0]

    def mode(self, module: nn.Module, learning: bool) -> None:
        module.train(learning)

    def accumulated(self, count: float) -> None:
        if observing(self._objective):
            # The trainer multiplies losses by the number of ranks, because DeepSpeed will divide gradients by it.
            gradient = self._gradient / (torch.distributed.get_world_size() * count)
            torch.distributed.all_reduce(gradient)
            self._objective.observe(gradient)
            self._gradient = None

    def state(self) -> dict[str, torch.Tensor]:
        return self._objective.state_dict() if observing(self._objective) else {}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        assert observing(self._objective), "another has no state"
        self._objective.load_state_dict(state)

    def export(self, module: nn.Module, folder: Path, main: bool) -> None:
        weights = in_host_memory(whole_weights(module), main)
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
            torch.save(self.state(), folder / OBJECTIVE)


class Fp32Linear(nn.Linear):
    """A linear layer that computes in fp32, whatever its weights are held in."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input.float(), self.weight.float(), self.bias.float())


def _transformer(module: nn.Module) -> PreTrainedModel:
    return next(part for part in module.modules() if isinstance(part, PreTrainedModel))


def fine_tune(
    model: RewardModel,
    data: PreferenceData,
    objective: Objective,
    settings: RewardTrainingSettings,
    folder: Path,
    *,
    new_head: bool,
    resume: bool = False,
    held_out: PreferenceData | None = None,
) -> float:
    """Train `model` and the state of `objective` in place; returns the mean loss of the last tenth of the steps.

    Repeatable by the seed. Without dropout, neither ranks nor micro-batches change the result but for rounding.

    Args:
        folder: for metrics and checkpoints; unless resumed, what was in it is deleted.
        new_head: the head starts from noise and has a learning rate of its own.
        resume: go on from the last checkpoint in `folder`.
        held_out: a loss on these is written to `evaluations.jsonl`.

    Raises:
        RewardError: nothing to resume.
        UserError: a loss is not finite, or the checkpoint is of another training.
    """
    measured = None if held_out is None else Preferences(held_out, model.ids(held_out.examples), objective)
    examples = Preferences(data, model.ids(data.examples), objective)
    largest = max(len(unit) for unit in examples.units(0))
    fit: FitSettings = settings.training
    device = model.device
    course = Course(examples, max(1, fit.batch_size // largest), fit.epochs, settings.run.seed, like_lengths=True)
    journal = Journal(folder, settings, course.updates, resume)
    work = Work(course, journal, _saving(examples, settings, folder, resume), measured)
    asyncio.run(_fine_tune(model, objective, settings, new_head, work))
    _take_over(model, objective, folder)
    model.module.to(device).eval()
    return journal.final_loss()


class Work(NamedTuple):
    """What is learned from, in which order, and who writes it down."""

    course: Course
    journal: Journal
    saving: Saving
    held_out: Preferences | None


def _saving(examples: Preferences, settings: RewardTrainingSettings, folder: Path, resume: bool) -> Saving:
    fit: FitSettings = settings.training
    identity = {"data or objective": examples.fingerprint(), "seed": settings.run.seed, "batch size": fit.batch_size}
    identity |= {"ranks": fit.ranks, "zero stage": fit.zero_stage, "dtype": settings.model.dtype}
    checkpoints = Checkpoints(str(folder), keep=1)
    found = checkpoints.latest() if resume else None
    checkpoint: TrainingCheckpointSettings = settings.checkpoint
    return Saving(checkpoints, checkpoint.every, resume, identity, found=found)


async def _fine_tune(
    model: RewardModel, objective: Objective, settings: RewardTrainingSettings, new_head: bool, work: Work
) -> None:
    model.module.to("cpu")
    fit: FitSettings = settings.training
    folder, updates = work.journal.folder.absolute(), work.course.updates
    cluster = _cluster(settings.cluster, model)
    runtime = _runtime(fit, cluster)
    # The ranks learn on a copy: at ZeRO-3 on one without weights, which they read; an actor gets one in any case.
    start = copy.copy(model)
    if runtime.local or fit.zero_stage == 3:
        start.module = copy.deepcopy(model.module)
    own = copy.deepcopy(objective) if runtime.local else objective
    learner = FineTuning(start, own, settings, new_head, folder / START)
    try:
        runtime.reserve(_request(fit, cluster))
        optimizer = _optimizer(settings.model, fit, updates)
        team = await SupervisedGroup.start(runtime, learner, optimizer, cluster, settings.run.seed, updates)
        await train(team, work.course, work.journal, work.saving, work.held_out, fit.eval_every)
        await team.export(str(folder))
        await team.close()
    finally:
        runtime.stop()


def _runtime(fit: FitSettings, cluster: ClusterSettings) -> Runtime:
    return LocalRuntime() if fit.ranks == 1 else RayRuntime(cluster, fit.ranks)


def _request(fit: FitSettings, cluster: ClusterSettings) -> ResourceRequest:
    """What the ranks ask of a cluster."""
    return ResourceRequest(
        gpu=uses_gpu(cluster),
        ranks=fit.ranks,
        engines=0,
        servers=0,
        policy_nodes=cluster.policy_nodes,
        needs=cluster.node_resources,
    )


def _cluster(cluster: ClusterSettings, model: RewardModel) -> ClusterSettings:
    """With a number for `startup_deadline_s: auto`."""
    if cluster.startup_deadline_s != "auto":
        return cluster
    size = Weights(sum(parameter.nbytes for parameter in model.module.parameters()))
    return cluster.model_copy(update={"startup_deadline_s": startup_deadline_s([size])})


def _optimizer(base: BaseModelSettings, fit: FitSettings, updates: int) -> PolicySettings:
    """The optimizer and DeepSpeed, in the words of the configuration of a policy."""
    return PolicySettings(
        model=base.path,
        dtype=base.dtype,
        ranks=fit.ranks,
        zero_stage=fit.zero_stage,
        learning_rate=fit.learning_rate,
        schedule="linear",
        warmup_steps=min(fit.warmup_steps, updates),
        min_learning_rate_ratio=0.0,
        adam_betas=ADAM_BETAS,
        weight_decay=fit.weight_decay,
        max_grad_norm=fit.max_grad_norm,
        micro_batch_tokens=fit.micro_batch_tokens,
    )


def _take_over(model: RewardModel, objective: Objective, folder: Path) -> None:
    """Read what the ranks have exported."""
    weights = load_file(folder / WEIGHTS)
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            parameter.copy_(weights[name])
    if observing(objective):
        objective.load_state_dict(torch.load(folder / OBJECTIVE, weights_only=True))
    for name in (WEIGHTS, OBJECTIVE, START):
        (folder / name).unlink(missing_ok=True)
