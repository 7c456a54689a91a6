"""Tells vLLM about our weight-transfer back ends and our model of two models.

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
MIXTURE_ARCHITECTURE = "GeometricMixtureForCausalLM"
"""vLLM's name for the model that holds policy and partner; nothing of it is imported unless an engine asks for it."""

_MIXTURE_CLASS = "rlhf.engines.mixture:GeometricMixtureForCausalLM"
_CLASSES = {"gloo": "GlooReceiver", "local": "LocalReceiver", "nccl": "NcclReceiver", "ipc": "IpcReceiver"}
_registered = False


def register() -> None:
    """Register every back end under its name in `ENGINE_NAMES`, and the mixture model. Calling it again does nothing."""
    global _registered
    if _registered:
        return
    from vllm import ModelRegistry
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    for backend, name in ENGINE_NAMES.items():
        WeightTransferEngineFactory.register_engine(name, "rlhf.engines.receivers", _CLASSES[backend])
    ModelRegistry.register_model(MIXTURE_ARCHITECTURE, _MIXTURE_CLASS)
    _registered = True
