"""Lending a device's memory to others: tensors that nobody needs for a while lie in host memory.

Works on storages, not on tensors: DeepSpeed holds many views of its flat buffers, and a view keeps its memory alive wherever another
tensor over it has moved. A storage that is emptied gives its memory back, and all views are whole again when it is filled.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Offloading:
    """What has left the device, and where it lies meanwhile."""

    def __init__(self) -> None:
        self._kept: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []

    def offload(
        self, tensors: Iterable[torch.Tensor], device: torch.device, needed: Iterable[torch.Tensor] = ()
    ) -> None:
        """Copy to host memory, and empty, what lies behind these tensors. Until `reload`, they must not be touched.

        Args:
            device: whose memory is wanted; tensors elsewhere stay as they are.
            needed: tensors that stay, though some of the others may lie in the same memory.
        """
        if self._kept:
            raise RuntimeError("these tensors are offloaded already")
        staying = {tensor.untyped_storage().data_ptr() for tensor in needed}
        for storage in {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage()
            for tensor in tensors
            if tensor.device.type == device.type
        }.values():
            # Weights that a CPU maps from their file are no memory of ours to give.
            if storage.nbytes() and storage.resizable() and storage.data_ptr() not in staying:
                host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=device.type == "cuda")
                host.untyped_storage().copy_(storage)
                storage.resize_(0)
                self._kept.append((storage, host.untyped_storage()))
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def reload(self) -> None:
        """Bring everything back."""
        for storage, host in self._kept:
            storage.resize_(host.nbytes())
            storage.copy_(host)
        self._kept.clear()

    @property
    def nbytes(self) -> int:
        """Bytes that lie in host memory now."""
        return sum(host.nbytes() for _, host in self._kept)
