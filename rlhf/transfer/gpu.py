"""The trainer's end of vLLM's own GPU back ends. Designed by reading vLLM 0.32; not yet run on a GPU.

`nccl`: vLLM's packed broadcast, from the sender's current device. `ipc`: memory handles to tensors on the sender's
GPU, which vLLM sends through its client; here they go through a key-value store beside the session, because the
driver, not the sender, commands the engines. It serves engines on the sender's own GPU only.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist

from rlhf.transfer.fingerprint import Fingerprint
from rlhf.transfer.session import TransferFailed, TransferSession
from rlhf.types import Half


class NcclSender:
    """The trainer's end (rank 0) of vLLM's `nccl` back end."""

    def __init__(self, session: TransferSession):
        from vllm.distributed.weight_transfer.nccl_common import trainer_init
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        info = NCCLTrainerInitInfo(session.host, session.port, session.world_size, rank=0)
        self._group = trainer_init(info)

    def send(self, named_tensors: Iterable[tuple[str, torch.Tensor]], half: Half = "policy") -> str:
        """Broadcast the tensors in packed chunks. Returns their fingerprint when the last one has left."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        total = Fingerprint(half)
        packed_nccl_broadcast_producer(
            iterator=total.watch(named_tensors), group=self._group, src=0, post_iter_func=lambda item: item[1].detach()
        )
        return total.hexdigest()

    def close(self) -> None:
        """Leave the group."""
        self._group.destroy()


class IpcSender:
    """The trainer's end of vLLM's `ipc` back end. The tensors stay allocated until every worker has read them."""

    def __init__(self, session: TransferSession):
        self._store = ipc_store(session, is_sender=True)
        self._workers = session.world_size - 1
        self._round = 0

    def send(self, named_tensors: Iterable[tuple[str, torch.Tensor]], half: Half = "policy") -> str:
        """Publish one memory handle per tensor and wait until all workers have loaded. Returns the fingerprint."""
        from torch.multiprocessing.reductions import reduce_tensor

        total = Fingerprint(half)
        # Handles do not keep memory alive, and a gathered parameter may be freed when the next is asked for.
        kept = [tensor.detach().contiguous() for _, tensor in total.watch(named_tensors)]
        device = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        torch.cuda.synchronize()
        handles = [{device: reduce_tensor(tensor)[1]} for tensor in kept]
        self._store.set(f"handles/{self._round}", pickle.dumps(handles))
        try:
            self._store.wait([f"read/{self._round}/{rank}" for rank in range(1, self._workers + 1)])
        except RuntimeError as error:  # torch.distributed's own errors derive from it
            raise TransferFailed(
                f"not every worker has read the weights within the session's timeout: {error}"
            ) from error
        self._round += 1
        torch.cuda.ipc_collect()
        return total.hexdigest()

    def close(self) -> None:
        """Nothing to release."""


def ipc_store(session: TransferSession, is_sender: bool) -> dist.Store:
    """The key-value store through which handles and receipts of an `ipc` session travel."""
    timeout = timedelta(seconds=session.timeout_s)
    store = dist.TCPStore(session.host, session.port, None, is_sender, timeout, wait_for_workers=False)
    return dist.PrefixStore("rlhf-ipc", store)
