"""Tells vLLM about our weight-transfer back ends.

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`.
"""

from __future__ import annotations

from rlhf.transfer.session import Backend

ENGINE_NAMES: dict[Backend, str] = {
    "gloo": "rlhf_gloo",
    "local": "rlhf_local",
    "nccl": "rlhf_nccl",
    "ipc": "rlhf_ipc",
}
_CLASSES = {"gloo": "GlooReceiver", "local": "LocalReceiver", "nccl": "NcclReceiver", "ipc": "IpcReceiver"}
_registered = False


def register() -> None:
    """Register every back end under its name in `ENGINE_NAMES`. Calling it again does nothing."""
    global _registered
    if _registered:
        return
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    for backend, name in ENGINE_NAMES.items():
        WeightTransferEngineFactory.register_engine(name, "rlhf.transfer.receivers", _CLASSES[backend])
    _registered = True
