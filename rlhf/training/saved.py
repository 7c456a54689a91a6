"""A checkpoint as a model: the weights that learned, put together from what the ranks wrote, in the model that they started from.

Needs neither the ranks nor their number, and no engine of DeepSpeed: one process, in host memory, which holds the model once and reads
the shards one tensor at a time. Executes nothing of what a file holds (`deepspeed_files`). The result equals the run's own export:
DeepSpeed rounds the weights that compute from the fp32 weights that ZeRO-3 stores, and so does this.
Written for the layout of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from rlhf.config.loader import UserError
from rlhf.config.policy import PolicySettings
from rlhf.data.model_identity import model_digest
from rlhf.training import deepspeed_files, lora
from rlhf.training.checkpoints import read_checkpoint
from rlhf.training.loading import load_causal_lm, save_causal_lm
from rlhf.training.resume import MODEL, RUN
from rlhf.training.weights import whole_weights

TRAINERS = ("policy", "module")
"""Folders of the trainer that is exported: of the online loop, and of supervised fine-tuning."""
PREFIX = "causal_lm."
"""Of the model's weights inside of the module that learns."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose files are sound.

    Attributes:
        step: steps done.
        trainer: folder of what the ranks wrote of the policy.
        settings: of the policy, as the run had them.
        digest: of the model that the run started from; None if the checkpoint does not say.
    """

    step: int
    trainer: Path
    settings: PolicySettings
    digest: str | None


def open_saved(folder: Path) -> Saved:
    """A complete checkpoint of `rlhf train` or `rlhf sft`, after its files have been compared with their checksums.

    Raises:
        UserError: it is none, it is damaged, or another version wrote it.
    """
    state = read_checkpoint(folder)
    trainer = next((folder / name for name in TRAINERS if (folder / name).is_dir()), None)
    run = state.get(RUN) or {}
    if trainer is None or "settings" not in run:
        raise UserError(
            f"{folder}: is no checkpoint that can be exported: it is not of `rlhf train` or `rlhf sft`, or an earlier version wrote it. "
            "Resume that run to its end, which exports its model"
        )
    try:
        settings = PolicySettings.model_validate(run["settings"]["policy"])
    except (ValidationError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: another version of rlhf wrote the checkpoint, with other fields under `policy` ({error}). Export it with that one"
        ) from error
    return Saved(state["step"], trainer, settings, run.get("contents", {}).get(MODEL))


def export_saved(saved: Saved, model: str, folder: Path) -> None:
    """Write the policy in Hugging Face format, with its tokenizer, to `folder`; under LoRA merged, and its adapter to `folder/adapter`.

    Args:
        model: folder of what the run started from, wherever it is now.

    Raises:
        UserError: the model is another one than the run started from, or the checkpoint does not hold its weights.
    """
    settings = saved.settings
    found = model_digest(model)
    if None not in (found, saved.digest) and found != saved.digest:
        raise UserError(
            f"{model}: is not the model that the run of {saved.trainer.parent} started from (its configuration or weights differ). "
            "Name the right one with --model"
        )
    causal_lm = load_causal_lm(model, settings.dtype, settings.lora.quantize_base)
    if settings.lora.rank:
        lora.add_adapters(causal_lm, settings.lora)
    _take(causal_lm, saved)
    adapter = lora.POLICY if settings.lora.rank else None
    save_causal_lm(causal_lm, dict(whole_weights(causal_lm, adapter)), model, str(folder))
    if settings.lora.rank:
        weights = dict(lora.adapter_weights(causal_lm))
        lora.save_adapter(folder / "adapter", lora.adapter_config(settings.lora, model), weights)


@torch.no_grad()
def _take(causal_lm: torch.nn.Module, saved: Saved) -> None:
    """Overwrite the weights that learn with those of the checkpoint; they must be the same ones, of the same shapes."""
    learning = {PREFIX + name: weight for name, weight in causal_lm.named_parameters() if weight.requires_grad}
    stored = _sharded(saved.trainer) if saved.settings.zero_stage == 3 else _whole(saved.trainer, learning)
    left = dict(learning)
    for name, tensor in stored:
        if name not in left or left[name].shape != tensor.shape:
            raise _other_weights(saved, name)
        left.pop(name).copy_(tensor)
    if left:
        raise _other_weights(saved, min(left))


def _other_weights(saved: Saved, name: str) -> UserError:
    return UserError(
        f"{saved.trainer}: the checkpoint and the model `{saved.settings.model}` do not have the same learning weights ({name} is in only "
        "one of the two, or has another shape): files of two runs were mixed. Take another checkpoint"
    )


def _whole(trainer: Path, wanted: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Below stage 3 one file holds all weights, tied ones under each of their names."""
    stored = deepspeed_files.read(_file(trainer, "mp_rank_00_model_states.pt"), map_location="cpu")["module"]
    return ((name, stored[name]) for name in wanted if name in stored)


def _sharded(trainer: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """At stage 3 every rank's file holds its part of the fp32 weights: of each weight, in the order in which they are listed, one slice,
    as long as a weight's fair share rounded up."""
    shapes = deepspeed_files.read(_file(trainer, "zero_pp_rank_0_mp_rank_00_model_states.pt"), map_location="cpu")
    listed = [item for group in shapes["param_shapes"] for item in group.items()]
    parts = [_Part(file) for file in _rank_files(trainer)]
    for name, shape in listed:
        share = -(-shape.numel() // len(parts))
        yield name, torch.cat([part.next(share) for part in parts])[: shape.numel()].view(shape)


class _Part:
    """One rank's fp32 weights, read from their beginning on."""

    def __init__(self, file: Path):
        state = deepspeed_files.read(file, map_location="cpu", mmap=True)["optimizer_state_dict"]
        self._groups: list[torch.Tensor] = list(state["fp32_flat_groups"])
        self._offset = 0

    def next(self, count: int) -> torch.Tensor:
        """The next `count` numbers; a slice may go on in the next group."""
        taken: list[torch.Tensor] = []
        while count:
            some = self._groups[0][self._offset : self._offset + count]
            taken.append(some)
            count -= some.numel()
            self._offset += some.numel()
            if self._offset == self._groups[0].numel():
                self._groups, self._offset = self._groups[1:], 0
        return torch.cat(taken)


def _rank_files(trainer: Path) -> list[Path]:
    """By rank."""
    found = {
        int(match[1]): file
        for file in trainer.iterdir()
        if (match := re.search(r"pp_rank_(\d+)_.*_optim_states\.pt$", file.name))
    }
    return [found[rank] for rank in sorted(found)]


def _file(trainer: Path, name: str) -> Path:
    if not (trainer / name).is_file():
        raise UserError(f"{trainer / name}: the file is missing from the checkpoint. Take another one")
    return trainer / name
