"""One of two ranks on gloo, a process of its own: loads models under ZeRO-3, counts what that takes, and writes what it saw.

`python -m tests.training.sharded_ranks RANK PORT FOLDER`: FOLDER holds the models; RANK.json is written there, and rank 0's weights.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf.config.cluster import ClusterSettings
from rlhf.config.loader import UserError
from rlhf.config.policy import LoraSettings, PolicySettings
from rlhf.policy.critic import load_critic
from rlhf.training import lora, sharded
from rlhf.training.deepspeed import Frozen, Trainer, sharding
from rlhf.training.deepspeed_zero3 import local_shards
from rlhf.training.loading import load_causal_lm
from rlhf.training.model import LogProbModel, check_forward
from rlhf.training.packing import pack_sequences
from rlhf.training.ranks import Member, join, leave
from rlhf.training.weights import in_host_memory, whole_weights
from tests.training import divided

CPU = torch.device("cpu")
PORTION = 20_000
"""Elements read at a time; the models are tiny."""


class Peak(TorchDispatchMode):
    """The most bytes that were in tensors at once: whatever any operation touched, as long as its memory lives."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, made)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self._live.values()))
        return made


def policy(stage: int, **more: Any) -> PolicySettings:
    return PolicySettings(model="unused", dtype="fp32", ranks=2, zero_stage=stage, learning_rate=1e-2, **more)


def steps(model: torch.nn.Module, settings: PolicySettings, rank: int) -> dict[str, torch.Tensor]:
    """The whole weights after two steps on different rows on each rank; on rank 0."""
    trainer = Trainer(model, settings, 2)
    check_forward(trainer.engine.module, 320, CPU, 0.01)
    row = pack_sequences([np.arange(5 + rank, 17 + rank)], [np.arange(12) > 0], CPU)
    for _ in range(2):
        trainer.backward(-trainer.forward(row)[0].sum())
        trainer.step()
    adapter = lora.POLICY if settings.lora.rank else None
    return in_host_memory(whole_weights(trainer.engine.module.causal_lm, adapter), rank == 0)


def refusal(folder: Path) -> str:
    try:
        load_causal_lm(str(folder), "fp32", sharding=sharding(policy(3), learn=True))
    except UserError as error:
        return str(error)
    return "accepted"


def main(rank: int, port: int, folder: Path) -> None:
    join(Member(rank, 2, "127.0.0.1", port), ClusterSettings(device="cpu"))
    sharded.READ_ELEMENTS = PORTION
    seen: dict[str, Any] = {"loaded": {}}
    shards = sharding(policy(3), learn=True)
    for kind in ("tied", "untied", "experts", "buffer", "latent", "twice"):
        torch.manual_seed(rank)
        with Peak() as peak:
            model = load_causal_lm(str(folder / kind), "fp32", sharding=shards)
        resident = sum(shard.numel() * shard.element_size() for shard in local_shards(model))
        whole = {name: tensor.clone() for name, tensor in whole_weights(model)}
        seen["loaded"][kind] = {
            "whole": sum(tensor.nbytes for tensor in whole.values()),
            "largest": max(tensor.nbytes for tensor in whole.values()),
            "resident": resident,
            "peak": peak.bytes,
        }
        frozen = Frozen(LogProbModel(model, 8), policy(3), CPU)
        check_forward(frozen.module, 320, CPU, 0.01)
        if rank == 0:
            save_file(whole, folder / f"loaded-{kind}.safetensors")
    with Peak() as peak:
        load_causal_lm(str(folder / "untied"), "fp32")
    seen["unsharded"] = peak.bytes
    seen["refused"] = {kind: refusal(folder / kind) for kind in ("unfinite", "different", "nohead")}
    for name, adapters in {"full": 0, "lora": 2}.items():
        for stage in (2, 3):
            torch.manual_seed(7)
            settings = policy(stage, lora=LoraSettings(rank=adapters, target_modules=["q_proj", "v_proj"]))
            model = load_causal_lm(str(folder / "buffer"), "fp32", sharding=sharding(settings, learn=True))
            if adapters:
                lora.add_adapters(model, settings.lora)
            weights = steps(LogProbModel(model, 8), settings, rank)
            if rank == 0:
                save_file(weights, folder / f"{name}-{stage}.safetensors")
    critic = load_critic(str(folder / "tied"), str(folder / "critic"), "fp32", None, shards)
    seen["head"] = critic.head.weight.tolist()
    seen["divided"] = [divided.gap(case, [16, 2, 64], divided.CLIPPED, rank) for case in divided.ON_TWO_RANKS]
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    sys.stderr.flush()
    os._exit(0)  # threads of gloo that still run when the interpreter is taken down abort the process now and then
