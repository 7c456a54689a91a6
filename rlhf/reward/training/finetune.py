"""Full fine-tuning of a reward model: all weights, AdamW, any objective, on a DeepSpeed group of one rank or many.

A `Learner` for the supervised group (`rlhf.training.supervised`), its data as `Examples`, and the files of a training under way:
`OUTPUT.training/` holds metrics and checkpoints until the model is complete. One rank runs in this process.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from rlhf.cluster import LocalRuntime, RayRuntime, ResourceRequest, Runtime, uses_gpu
from rlhf.config.cluster import ClusterSettings
from rlhf.config.policy import PolicySettings
from rlhf.data.loading_time import Weights, startup_deadline_s
from rlhf.reward.errors import RewardError
from rlhf.reward.models import RewardModel
from rlhf.reward.modules import EncoderWithHead, parts
from rlhf.reward.training.dataset import PreferenceData
from rlhf.reward.training.group import Group, require_training
from rlhf.reward.training.objectives import Labels, Objective, observing
from rlhf.tracking.jsonl import JsonLines, read
from rlhf.training.checkpoints import Checkpoints
from rlhf.training.deepspeed import sharding
from rlhf.training.model import DTYPES
from rlhf.training.sharded import fill_sharded, set_aside
from rlhf.training.supervised import Batch, Course, Saving, SupervisedGroup, train
from rlhf.training.supervised_rank import Learner
from rlhf.training.weights import in_host_memory, whole_weights

WARMUP_STEPS = 20
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
ADAM_BETAS = (0.9, 0.999)
HEAD_LEARNING_RATE = 1e-3  # a new head starts from noise and must move faster than the encoder
WEIGHTS, OBJECTIVE, START = "weights.safetensors", "objective.pt", "start.safetensors"
METRICS = ("metrics.jsonl", "evaluations.jsonl")
"""Files of a training that are worth keeping with the model."""


@dataclass(frozen=True)
class FullSettings:
    """How to fine-tune.

    Attributes:
        new_head: the head starts from noise and has a learning rate of its own.
        batch_size: texts per optimizer step, over all ranks.
    """

    new_head: bool
    epochs: int
    learning_rate: float
    batch_size: int
    seed: int
    group: Group = Group()


class Texts(NamedTuple):
    """A micro-batch: token ids of its texts, and what is known of them."""

    ids: list[list[int]]
    labels: Labels


class Preferences:
    """Preference data as `Examples`: a unit are texts that must stay together, a loss is a sum over texts or pairs."""

    def __init__(self, data: PreferenceData, ids: list[list[int]], objective: Objective):
        self._data, self._ids, self._objective = data, ids, objective

    def units(self, epoch: int) -> list[np.ndarray]:
        return self._data.units(epoch)

    def cost(self, unit: np.ndarray) -> int:
        return sum(max(1, len(self._ids[i])) for i in unit)

    def batch(self, units: Sequence[np.ndarray]) -> Batch:
        labels = self._data.labels(units)
        ids = [self._ids[i] for unit in units for i in unit]
        # How many things are summed does not depend on what the model says of them.
        _, count = self._objective.loss(torch.zeros(len(ids), self._objective.outputs), labels)
        return Batch(Texts(ids, labels), count)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell these data, for this objective, from others."""
        digest = hashlib.sha256(type(self._objective).__name__.encode())
        for ids in self._ids:
            digest.update(np.array([len(ids), *ids], dtype=np.int64).tobytes())
        labels = self._data.labels(self._data.units(0))
        for tensor in (labels.ratings, labels.pairs, labels.margins, labels.probabilities):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]


class FineTuning(Learner):
    """A reward model and its objective.

    Args:
        model: with weights to start from, in host memory; it is trained in place.
        start: file for these weights under ZeRO-3, in a folder that all ranks share, so that no rank is sent the whole model.
    """

    def __init__(self, model: RewardModel, objective: Objective, settings: FullSettings, start: Path):
        self._model, self._objective, self._settings = model, objective, settings
        self._gradient: torch.Tensor | None = None
        self._start = start if settings.group.zero_stage == 3 else None
        if self._start is not None:
            set_aside(model.module, self._start)

    def build(self) -> nn.Module:
        module, group = self._model.module, self._settings.group
        if self._start is not None:
            shards = sharding(_policy(self._settings, updates=1), learn=True)
            assert shards is not None, "of stage 3, where a start is set aside"
            fill_sharded(module, self._start, DTYPES[group.dtype], shards)
        if group.gradient_checkpointing:
            _transformer(module).gradient_checkpointing_enable({"use_reentrant": False})
        if group.dtype == "bf16":
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
        rate = self._settings.learning_rate
        head_rate = HEAD_LEARNING_RATE if self._settings.new_head else rate
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
    settings: FullSettings,
    folder: Path,
    held_out: PreferenceData | None = None,
) -> float:
    """Train `model` and the state of `objective` in place; returns the mean loss of the last tenth of the steps.

    Repeatable by the seed. Without dropout, neither ranks nor micro-batches change the result but for rounding.

    Args:
        folder: for metrics and checkpoints; unless resumed, what was in it goes.
        held_out: a loss on these is written to `evaluations.jsonl`.

    Raises:
        RewardError: nothing to resume.
        UserError: a loss is not finite, or the checkpoint is of another training.
    """
    return asyncio.run(_fine_tune(model, data, objective, settings, folder, held_out))


async def _fine_tune(
    model: RewardModel,
    data: PreferenceData,
    objective: Objective,
    settings: FullSettings,
    folder: Path,
    held_out: PreferenceData | None,
) -> float:
    group, device = settings.group, model.device
    examples = Preferences(data, model.ids(data.examples), objective)
    largest = max(len(unit) for unit in examples.units(0))
    course = Course(examples, max(1, settings.batch_size // largest), settings.epochs, settings.seed, like_lengths=True)
    measured = None if held_out is None else Preferences(held_out, model.ids(held_out.examples), objective)
    journal = Journal(folder, course.updates, group.resume)
    identity = {"data or objective": examples.fingerprint(), "seed": settings.seed, "batch size": settings.batch_size}
    identity |= {"ranks": group.ranks, "zero stage": group.zero_stage, "dtype": group.dtype}
    checkpoints = Checkpoints(str(folder), keep=1)
    found = checkpoints.latest() if group.resume else None
    saving = Saving(checkpoints, group.checkpoint_every, group.resume, identity, found=found)
    model.module.to("cpu")
    cluster = _cluster(group, model)
    runtime = _runtime(group, cluster)
    # The ranks learn on a copy: at ZeRO-3 on one without weights, which they read; an actor gets one in any case.
    start = copy.copy(model)
    if runtime.local or group.zero_stage == 3:
        start.module = copy.deepcopy(model.module)
    own = copy.deepcopy(objective) if runtime.local else objective
    learner = FineTuning(start, own, settings, folder.absolute() / START)
    try:
        runtime.reserve(ResourceRequest(gpu=uses_gpu(cluster), ranks=group.ranks, engines=0, servers=0))
        team = await SupervisedGroup.start(
            runtime, learner, _policy(settings, course.updates), cluster, settings.seed, course.updates
        )
        await train(team, course, journal, saving, measured, group.eval_every)
        await team.export(str(folder.absolute()))
        await team.close()
    finally:
        runtime.stop()
    _take_over(model, objective, folder)
    model.module.to(device).eval()
    return journal.final_loss()


def _runtime(group: Group, cluster: ClusterSettings) -> Runtime:
    return LocalRuntime() if group.ranks == 1 else RayRuntime(cluster, group.ranks)


def _cluster(group: Group, model: RewardModel) -> ClusterSettings:
    size = Weights(sum(parameter.nbytes for parameter in model.module.parameters()))
    deadline = startup_deadline_s([size])
    return ClusterSettings(
        address=group.address, device=group.device, threads=group.threads, startup_deadline_s=deadline
    )


def _policy(settings: FullSettings, updates: int) -> PolicySettings:
    """The optimizer and DeepSpeed, in the words of the configuration."""
    group = settings.group
    return PolicySettings(
        model="the reward model",
        dtype=group.dtype,
        ranks=group.ranks,
        zero_stage=group.zero_stage,
        learning_rate=settings.learning_rate,
        schedule="linear",
        warmup_steps=min(WARMUP_STEPS, updates),
        min_learning_rate_ratio=0.0,
        adam_betas=ADAM_BETAS,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        micro_batch_tokens=group.micro_batch_tokens,
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


def _empty(folder: Path) -> None:
    """Make way for a new training: what an earlier one left goes, anything else is not ours to delete."""
    if folder.exists():
        own = {*METRICS, WEIGHTS, OBJECTIVE, START, "checkpoints"}
        others = {path.name for path in folder.iterdir() if path.suffix != ".tmp"} - own
        if others:
            raise RewardError(
                f"{folder} is needed for the training's own files, but it holds {min(others)}. Move it away."
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


class Journal:
    """`metrics.jsonl` and `evaluations.jsonl` of a training, and a line on the terminal now and then."""

    def __init__(self, folder: Path, updates: int, resume: bool):
        if resume:
            require_training(folder)
        else:
            _empty(folder)
        self._metrics, self._evaluations = (JsonLines(folder / name) for name in METRICS)
        self._updates, self._shown = updates, max(1, updates // 5)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._metrics.append({"step": step, "time": round(time.time(), 3)} | dict(metrics))
        if step % self._shown == 0:
            print(f"step {step} of {self._updates}, loss {np.mean(self._losses()[-20:]):.3f}", flush=True)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._evaluations.append({"step": step, "time": round(time.time(), 3)} | dict(metrics))

    def rewind(self, step: int) -> None:
        for file in (self._metrics, self._evaluations):
            file.keep(step)

    def final_loss(self) -> float:
        """The mean of the last tenth of the steps that had anything to learn from."""
        losses = self._losses()
        return float(np.mean(losses[-max(1, len(losses) // 10) :]))

    def _losses(self) -> list[float]:
        return [line["train/loss"] for line in read(self._metrics.path) if "train/loss" in line]
