"""DeepSpeed behind one protocol: `PlacedModel`, a module on this rank's device that computes, and `Trainer`, one that learns too.

With its siblings `deepspeed_zero3` (partitioned parameters), `deepspeed_gradients`, `deepspeed_masters` and `deepspeed_files` the only
place that knows DeepSpeed.

The caller owns the accumulation boundary: any number of `backward` calls, then one `step`. DeepSpeed averages gradients over
ranks; `Trainer.backward` undoes that, so that a loss that is a sum over ranks stays a sum. What makes a mean of it is given to `step`:
how many there are need not be known before all are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import torch
from torch import nn

from rlhf.config.policy import PolicySettings
from rlhf.training.attention import avoid_plans_per_shape
from rlhf.training.deepspeed_files import PlainCheckpointEngine
from rlhf.training.deepspeed_gradients import discard_gradients
from rlhf.training.deepspeed_masters import masters, set_masters
from rlhf.training.deepspeed_zero3 import Sharding, is_partitioned, local_shard, partition, rank_device, whole_numel
from rlhf.training.offloading import Offloading

FLAT_BUFFERS = ("fp32_partitioned_groups_flat", "grad_partitions_flat_buffer", "fp32_groups_gradients_flat")
"""Where DeepSpeed's optimizers keep master weights and gradients besides the inner optimizer's own."""


REDUCE_BUCKET = 500_000_000
"""Elements of the buffer in which gradients are reduced over the ranks, at the most."""
PRESENT = ("initial_lr", "betas", "weight_decay")
"""Settings of the optimizer that a checkpoint remembers too."""


class PlacedModel(Protocol):
    """A module on this rank's device, whole or (at ZeRO stage 3) this rank's shards of it: what computes with it."""

    @property
    def module(self) -> nn.Module:
        """The module itself, for its parameters and its configuration."""
        ...

    def forward(self, *args: Any) -> Any:
        """The module's forward. Collective at stage 3."""
        ...

    def close(self) -> None:
        """Release what DeepSpeed holds; the model is not used afterwards. Safe to call twice."""
        ...


class TrainingDiverged(RuntimeError):
    """A loss or gradient is not finite; nothing was applied."""


def deepspeed_config(settings: PolicySettings, learn: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for the learning engine, or for a frozen model that is only sharded (`learn=False`)."""
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.offload_optimizer != "none" and learn:
        zero["offload_optimizer"] = {"device": settings.offload_optimizer, "pin_memory": torch.cuda.is_available()}
    if settings.offload_parameters != "none":
        zero["offload_param"] = {"device": settings.offload_parameters, "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": settings.dtype == "bf16"},
        "wall_clock_breakdown": False,
        "steps_per_print": None,
    }
    if learn:
        config |= {
            "managed_gradient_accumulation": False,
            "gradient_clipping": settings.max_grad_norm,
            "zero_force_ds_cpu_optimizer": False,
        }
        if settings.zero_stage > 0:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def sharding(settings: PolicySettings, *, learn: bool) -> Sharding | None:
    """The configuration by which a model is sharded while it is loaded; None below stage 3, where every rank holds it whole."""
    return deepspeed_config(settings, learn) if settings.zero_stage == 3 else None


def _partition(model: nn.Module, settings: PolicySettings, config: dict[str, Any]) -> None:
    """At stage 3, shard what is not sharded yet, one parameter after the other; DeepSpeed would first move all of them to the device."""
    if settings.zero_stage < 3:
        return
    for parameter in model.parameters():
        if settings.dtype == "bf16" and parameter.is_floating_point() and not is_partitioned(parameter):
            parameter.data = parameter.data.to(torch.bfloat16)
    partition(model, config)
    for buffer in model.buffers():  # DeepSpeed leaves a sharded model's buffers where they are
        buffer.data = buffer.data.to(rank_device())


def join_process_group(backend: str, meeting: str, rank: int, ranks: int, timeout: timedelta) -> None:
    """Join the group of all ranks; returns when all have.

    Args:
        backend: nccl or gloo.
        meeting: where all meet, as torch's `init_method`.
        timeout: after which a collective call that the others do not make fails.
    """
    deepspeed.init_distributed(
        dist_backend=backend,
        timeout=timeout,
        init_method=meeting,
        rank=rank,
        world_size=ranks,
        verbose=False,
    )


def learning_rate_factor(settings: PolicySettings, total_updates: int) -> Callable[[int], float]:
    """Learning rate as a fraction of the peak, as a function of the optimizer step (from 0)."""

    def factor(update: int) -> float:
        if update < settings.warmup_steps:
            return (update + 1) / settings.warmup_steps
        if settings.schedule == "constant":
            return 1.0
        span = max(1, total_updates - settings.warmup_steps)
        done = min(1.0, (update - settings.warmup_steps) / span)
        shape = 1.0 - done if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return settings.min_learning_rate_ratio + (1.0 - settings.min_learning_rate_ratio) * shape

    return factor


class Trainer:
    """A module with its optimizer and schedule under DeepSpeed.

    Args:
        total_updates: optimizer steps of the whole run, for the learning-rate schedule.
        groups: the optimizer's parameter groups, where some weights learn at another rate; None: all alike.
    """

    def __init__(
        self, model: nn.Module, settings: PolicySettings, total_updates: int, groups: list[dict[str, Any]] | None = None
    ):
        avoid_plans_per_shape()  # encoders that are fine-tuned attend to padded batches
        model.register_state_dict_post_hook(_only_what_learns)
        optimizer = torch.optim.AdamW(
            groups or [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=settings.learning_rate,
            betas=settings.adam_betas,
            weight_decay=settings.weight_decay,
            fused=True,  # an offloaded one too: torch's kernel for CPUs reads each number once, several times as fast as one by one
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(settings, total_updates))
        config = deepspeed_config(settings, learn=True)
        _partition(model, settings, config)
        # Allocated whole, by default 500 million elements however small the model (DeepSpeed 0.19).
        learned = sum(whole_numel(parameter) for parameter in model.parameters() if parameter.requires_grad)
        config["zero_optimization"]["reduce_bucket_size"] = min(REDUCE_BUCKET, learned)
        self.engine, _, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=self._schedule, config=config
        )
        self.engine.checkpoint_engine = PlainCheckpointEngine(self.engine._config)
        self.engine._copy_recovery_script = lambda folder: None  # it would unpickle whatever lies beside it
        self.ranks = torch.distributed.get_world_size()
        self._offloading = Offloading()
        self._norm = 0.0
        self._accumulated = False  # since the last step
        self._max_grad_norm = settings.max_grad_norm
        # Without ZeRO in fp32 DeepSpeed clips but does not keep the norm.
        self.engine.clip_fp32_gradients = self._clip

    def _clip(self) -> None:
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        self._norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm))

    @property
    def module(self) -> nn.Module:
        """The module itself. Its forward is that of `forward`, except under ZeRO-3, where only the latter gathers its parameters."""
        return self.engine.module

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def forward(self, *args: Any) -> Any:
        """The module's forward, through DeepSpeed's hooks."""
        return self.engine(*args)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of a loss that is to be summed over ranks and calls.

        Raises:
            TrainingDiverged: the loss is not finite.
        """
        if not torch.isfinite(loss):
            raise TrainingDiverged(
                f"the loss is {loss.item()}; no update was made. Lower policy.learning_rate or look at the rewards."
            )
        self._accumulated = True
        self.engine.backward(loss * self.ranks)

    def discard(self) -> None:
        """Forget the gradient accumulated since the last step, of a step that was given up between two `backward` calls. Not collective."""
        if self._accumulated:
            discard_gradients(self.engine)
            self._accumulated = False

    def step(self, normaliser: float = 1.0) -> tuple[float, float]:
        """Divide the accumulated gradient, clip it and apply it; returns (gradient norm before clipping, learning rate used).

        Args:
            normaliser: what the sum of all losses is divided by, above 0; the same on all ranks.

        Raises:
            TrainingDiverged: the gradient norm is not finite.
        """
        rate = self.engine.get_lr()[0]
        norm = self._divided_step(float(normaliser))
        self._accumulated = False
        if not math.isfinite(norm):
            raise TrainingDiverged(
                f"the gradient norm is {norm}. Lower policy.learning_rate or look at the last samples."
            )
        return norm, rate

    def _divided_step(self, normaliser: float) -> float:
        """DeepSpeed's optimizers divide by their loss scale, and by the clip at once, where they make the fp32 gradient that is stepped,
        wherever it lies. bf16 and fp32 need no loss scale, so for the time of a step it is the normaliser. Two have none (of DeepSpeed
        0.19): torch's own at stage 0 in fp32, and BF16_Optimizer, of stage 1. Their gradients are fp32 and lie in the open.

        Returns:
            The norm of the divided gradient.
        """
        optimizer = self.engine.optimizer
        scaling = hasattr(optimizer, "loss_scale")
        if scaling:
            optimizer.loss_scale = normaliser
        else:
            for gradient in self._open_gradients():
                gradient.div_(normaliser)
        self.engine.step()
        if scaling:
            optimizer.loss_scale = 1.0  # a loss would be multiplied by it, and a checkpoint remembers it
        norm = self.engine.get_global_grad_norm()
        if norm is None:
            return self._norm
        # Stage 0 in bf16 clips by the right norm, but reports that of the sum.
        return float(norm) if self.engine.zero_optimization() else float(norm) / normaliser

    def _open_gradients(self) -> list[torch.Tensor]:
        flat = getattr(self.engine.optimizer, "fp32_groups_gradients_flat", None)
        if flat is not None:
            return list(flat)
        return [weight.grad for weight in self.module.parameters() if weight.grad is not None]

    def close(self) -> None:
        """Take DeepSpeed's hooks off the module and release its buffers: what hooks keep alive holds, at stage 3, 2 GB of address space
        until the process ends (DeepSpeed 0.19). Safe to call twice."""
        self.engine.destroy()

    def shards(self) -> Iterator[torch.Tensor]:
        """This rank's part of each weight that learns: its ZeRO-3 partition, or the whole of it."""
        return (local_shard(parameter) for parameter in self.module.parameters() if parameter.requires_grad)

    def masters(self) -> list[torch.Tensor]:
        """This rank's fp32 master weights, as the optimizer holds them: flat partitions, or at stage 0 one tensor per weight."""
        return masters(self.engine.optimizer)

    def set_masters(self, values: Iterable[torch.Tensor]) -> None:
        """Overwrite the master weights (one value for each that `masters` gives), and with their rounding the weights that compute.
        Collective."""
        set_masters(self.engine.optimizer, values)

    def offload(self) -> None:
        """Move optimizer states, master weights and gradient buffers to host memory; the weights stay on the device. Until `reload`,
        neither learn nor save."""
        self._offloading.offload(self._states(), self.device, needed=self.module.parameters())

    def reload(self) -> None:
        """Undo `offload`."""
        self._offloading.reload()

    def _states(self) -> Iterator[torch.Tensor]:
        outer = self.engine.optimizer
        optimizer = getattr(outer, "optimizer", outer)
        for state in optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))
        for group in optimizer.param_groups:
            yield from group["params"]
        for name in FLAT_BUFFERS:
            found = getattr(outer, name, None)
            yield from [found] if torch.is_tensor(found) else found or ()

    def save(self, folder: Path, name: str) -> dict[str, str]:
        """Write weights that learn, optimizer and schedule to `folder/name`; collective. Returns the checksum of each file of this rank,
        by its path inside the folder."""
        files = self.engine.checkpoint_engine.written
        files.clear()
        self.engine.save_checkpoint(str(folder), tag=name, save_latest=False, exclude_frozen_parameters=True)
        return {str(file.relative_to(folder)): digest for file, digest in files.items()}

    def load(self, folder: Path, name: str) -> None:
        """Restore what `save` wrote, but for the optimizer's settings, which are those of now; collective.

        Raises:
            FileNotFoundError: no such checkpoint.
            UserError: a file is damaged, or holds what would have to be executed.
        """
        if not (folder / name).is_dir():
            raise FileNotFoundError(f"no DeepSpeed checkpoint {name!r} in {folder}")
        schedule = self._schedule
        present = [{name: group[name] for name in PRESENT} for group in schedule.optimizer.param_groups]
        self.engine.load_checkpoint(str(folder), tag=name, custom_load_fn=_load_what_learns)
        # torch restores the settings with the state, and a learning rate that was lowered for the rest would change nothing.
        schedule.base_lrs = [group["initial_lr"] for group in present]
        for group, own, factor in zip(schedule.optimizer.param_groups, present, schedule.lr_lambdas, strict=True):
            group.update(own, lr=own["initial_lr"] * factor(schedule.last_epoch))
        schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


def _only_what_learns(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Leave all else out of a checkpoint: the model's own files hold it."""
    learned = {prefix + name for name in _names_that_learn(module)}
    for name in [name for name in state if name.startswith(prefix) and name not in learned]:
        del state[name]


def _load_what_learns(src: dict[str, Any], dst: nn.Module) -> None:
    """Restore every weight that learns, and no other.

    Raises:
        RuntimeError: the checkpoint was made with other weights learning.
    """
    differ = src.keys() ^ _names_that_learn(dst)
    if differ:
        raise RuntimeError(
            f"the checkpoint does not hold the weights that learn now ({min(differ)} is in only one of the two): it was made with other "
            "settings under policy.lora"
        )
    dst.load_state_dict(src, strict=False)


def _names_that_learn(module: nn.Module) -> set[str]:
    """With all names of a tied weight."""
    return {name for name, parameter in module.named_parameters(remove_duplicate=False) if parameter.requires_grad}


class Frozen:
    """A model that does not learn: sharded over the ranks at ZeRO stage 3, else whole on the device."""

    def __init__(self, model: nn.Module, settings: PolicySettings, device: torch.device):
        self.module = model.requires_grad_(False).eval()
        self._engine: Any = None
        if settings.zero_stage < 3:
            self.module.to(device)
        else:
            config = deepspeed_config(settings, learn=False)
            _partition(model, settings, config)
            self._engine, _, _, _ = deepspeed.initialize(model=model, config=config)

    def forward(self, *args: Any) -> Any:
        """The module's forward, at stage 3 through DeepSpeed's hooks."""
        return (self.module if self._engine is None else self._engine)(*args)

    def close(self) -> None:
        """Release what DeepSpeed holds. Safe to call twice."""
        if self._engine is not None:
            self._engine.destroy()
