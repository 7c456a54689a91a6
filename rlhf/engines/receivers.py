"""The engine's end of a weight transfer: runs inside each vLLM worker, through vLLM's weight-transfer interface.

All back ends load through vLLM's layerwise reload (`rlhf.engines.reload`; on CPU vLLM repacks weights after loading, so they must
never be written in place), take the fingerprint of the bytes that arrived, and refuse an update that leaves a parameter
unloaded. An update goes into one slot of the model (`rlhf.engines.slots`); the other is not touched. Or it is a LoRA adapter, which
leaves the model's own weights alone (`rlhf.engines.adapter_inbox`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from rlhf.engines.adapter_inbox import AdapterInbox
from rlhf.engines.nccl import join_nccl
from rlhf.engines.reload import Reload
from rlhf.engines.slots import checksum, slots
from rlhf.transfer import gloo
from rlhf.transfer.fingerprint import Fingerprint
from rlhf.transfer.ipc import CudaMemory, IpcReader
from rlhf.transfer.nccl import NcclGroup
from rlhf.transfer.session import TransferFailed, TransferSession
from rlhf.types import ModelSlot, WeightSpec

_NOT_JOINED = "weights were announced before this engine joined a transfer session"


@dataclass
class JoinInfo(WeightTransferInitInfo):
    """The session, and the rank of this engine's first worker in it."""

    session: dict[str, Any]
    rank_offset: int


@dataclass
class Announcement(WeightTransferUpdateInfo):
    """The tensors to come, as parallel lists: vLLM carries plain values between its processes."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]

    def specs(self) -> list[WeightSpec]:
        return [WeightSpec(n, d, tuple(s)) for n, d, s in zip(self.names, self.dtypes, self.shapes, strict=True)]


@dataclass
class Delivery(WeightTransferUpdateInfo):
    """The tensors themselves (only within one process)."""

    weights: Iterable[tuple[str, torch.Tensor]]


class _WatchedModel:
    """Stands in for the model while weights arrive, so that every byte that is loaded was also fingerprinted."""

    def __init__(self, model: torch.nn.Module, slot: ModelSlot):
        self._model = model
        self.fingerprint = Fingerprint(slot)
        self.loaded: set[str] = set()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        names = self._model.load_weights(self.fingerprint.watch(weights)) or set()
        self.loaded |= names
        return names


class _Attesting(WeightTransferEngine):
    """What all back ends share. Subclasses load through `self._watched`."""

    init_info_cls = JoinInfo
    update_info_cls = Announcement
    supports_draft_weight_update = False
    _watched: _WatchedModel | AdapterInbox

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._reloads = {slot: Reload(part) for slot, part in slots(model).items()}
        self._slot: ModelSlot = "policy"

    def aim(self, slot: ModelSlot) -> None:
        """The next update goes into this slot."""
        self.set_weight_update_target(slots(self._default_model)[slot], self._default_model_config)
        self._slot = slot

    def start_weight_update(self) -> None:
        self._reloads[self._slot].begin()
        self._watched = _WatchedModel(self.model, self._slot)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        missing = sorted(self._reloads[self._slot].own - self._loaded())
        if missing:
            raise TransferFailed(
                f"{len(missing)} of the engine's parameters were not in the update and would have kept their old "
                f"values, for example {missing[0]}: the policy must send every tensor of its checkpoint"
            )

    def finish_weight_update(self) -> None:
        self._reloads[self._slot].finish(self.model_config, self._loaded())

    def _loaded(self) -> set[str]:
        assert isinstance(self._watched, _WatchedModel), "start_weight_update comes first"
        return self._watched.loaded

    def receive_adapter(self, update_info: dict[str, Any], config: dict[str, Any]) -> None:
        """Take a LoRA adapter, whole: vLLM's three steps of an update are for the model's own weights, and end in forgetting adapters.

        Args:
            config: peft's `r`, `lora_alpha` and `target_modules`.
        """
        self._watched = AdapterInbox(self._default_model, config)
        self.receive_weights(self.parse_update_info(update_info))
        self._watched.install()

    def attested(self) -> str:
        """Fingerprint of the last update, over the bytes as they arrived."""
        return self._watched.fingerprint.hexdigest()

    def held(self, slot: ModelSlot) -> str:
        """Checksum of what this slot holds now."""
        return checksum(slots(self._default_model)[slot])

    def shutdown(self) -> None:
        """Nothing to release."""


class GlooReceiver(_Attesting):
    """The worker's end of `gloo`."""

    _group: torch.distributed.ProcessGroup | None = None

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        self.shutdown()
        rank = init_info.rank_offset + self.parallel_config.rank
        self._group = gloo.join(TransferSession(**init_info.session), rank)

    def receive_weights(self, update_info: Announcement) -> None:
        if self._group is None:
            raise TransferFailed(_NOT_JOINED)
        gloo.receive(self._group, update_info.specs(), self._watched.load_weights)

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.shutdown()
            self._group = None


class LocalReceiver(_Attesting):
    """The engine's end of `local`: the tensors are here already."""

    update_info_cls = Delivery

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        """Nothing to join."""

    def receive_weights(self, update_info: Delivery) -> None:
        self._watched.load_weights(update_info.weights)


class NcclReceiver(_Attesting):
    """The worker's end of `nccl`."""

    _group: NcclGroup | None = None

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        self.shutdown()
        rank = init_info.rank_offset + self.parallel_config.rank
        self._group = NcclGroup(TransferSession(**init_info.session), rank, self.device, join_nccl)

    def receive_weights(self, update_info: Announcement) -> None:
        if self._group is None:
            raise TransferFailed(_NOT_JOINED)
        self._group.receive(update_info.specs(), self._watched.load_weights)

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


class IpcReceiver(_Attesting):
    """The worker's end of `ipc`."""

    _reader: IpcReader | None = None

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        rank = init_info.rank_offset + self.parallel_config.rank
        self._reader = IpcReader(TransferSession(**init_info.session), rank, CudaMemory(self.device))

    def receive_weights(self, update_info: Announcement) -> None:
        if self._reader is None:
            raise TransferFailed(_NOT_JOINED)
        self._reader.receive(update_info.specs(), self._watched.load_weights)


class AttestingWorker:
    """Mixed into vLLM's worker class (`worker_extension_cls`): what the rollout engine may ask of a worker."""

    if TYPE_CHECKING:
        weight_transfer_engine: Any  # vLLM's worker has it

    def aim(self, slot: ModelSlot) -> None:
        """The next weight update goes into this slot of the model."""
        self.weight_transfer_engine.aim(slot)

    def receive_adapter(self, update_info: dict[str, Any], config: dict[str, Any]) -> None:
        """Take the policy's LoRA adapter and use it from now on."""
        self.weight_transfer_engine.receive_adapter(update_info, config)

    def attest(self) -> str:
        """Fingerprint of the weights this worker received last."""
        return self.weight_transfer_engine.attested()

    def held(self, slot: ModelSlot) -> str:
        """Checksum of the weights that this slot of the worker's model holds (`rlhf.engines.slots.checksum`)."""
        return self.weight_transfer_engine.held(slot)
