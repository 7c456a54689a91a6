"""Loading new weights into a model that vLLM has loaded before, so that it computes afterwards as if they had been the first.

vLLM's layerwise reload collects each layer's tensors, processes the layer as after its first load (packing, for a CPU) and copies the
result into the memory that was in use before. Owns what that leaves out. Does not know where tensors come from, or whether
they are all there.
"""

from __future__ import annotations

import logging

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)
from vllm.platforms import current_platform

# It warns of every layer without tensors of its own (rotary embeddings, tied output layers); the receivers check better.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)


class Reload:
    """One model's reloads. Made once, while the model is whole: during a reload tied parameters are no longer one.

    Attributes:
        own: names of the parameters that an update must bring.
        tied: names that share a parameter of `own`.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self.own = {name for name, _ in model.named_parameters()}
        self.tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - self.own
        self._kept: dict[str, torch.Tensor] | None = None  # buffers as they were before a reload that has not finished

    def begin(self) -> None:
        """From now on `model.load_weights` collects tensors. A reload that broke off leaves no trace in this one."""
        if self._kept is None:
            self._kept = {name: buffer.clone() for name, buffer in self._persistent_buffers()}
        if current_platform.is_cpu():
            self._forget_packed_experts()
        initialize_layerwise_reload(self._model)
        for layer in self._model.modules():
            info = get_layerwise_info(layer)
            if info.can_load():
                info.load_numel = 0
                info.loaded_weights.clear()

    def finish(self, config: ModelConfig, loaded: set[str]) -> None:
        """Let the model compute with what has arrived.

        Args:
            loaded: vLLM's names of the tensors that arrived.
        """
        finalize_layerwise_reload(self._model, config)
        # A layer whose tensors are all tied to another's loads none itself, so the reload does not process it: on a CPU a tied output
        # layer would go on answering with its packed copy of the old embedding.
        for name in self.tied:
            layer = self._model.get_submodule(name.rpartition(".")[0])
            method = getattr(layer, "quant_method", None)
            if isinstance(method, QuantizeMethodBase):
                method.process_weights_after_loading(layer)
        # The reload makes a layer's tensors anew, and a buffer that does not arrive would hold whatever that memory held.
        assert self._kept is not None, "begin comes first"
        for name, buffer in self._persistent_buffers():
            if name not in loaded:
                buffer.copy_(self._kept[name])
        self._kept = None

    def _persistent_buffers(self) -> list[tuple[str, torch.Tensor]]:
        return [
            (f"{prefix}.{name}" if prefix else name, buffer)
            for prefix, layer in self._model.named_modules()
            for name, buffer in layer.named_buffers(recurse=False)
            if name not in layer._non_persistent_buffers_set
        ]

    def _forget_packed_experts(self) -> None:
        """Experts are packed for a CPU only by a layer that has no kernel yet (`UnquantizedFusedMoEMethod._setup_kernel`): with the
        kernel of the first load the reload would leave them as they arrived, in memory that the kernel takes for packed. On a GPU
        nothing is left out, and captured graphs need the kernel that they were captured with."""
        for layer in self._model.modules():
            method = getattr(layer, "quant_method", None)
            if isinstance(method, FusedMoEMethodBase):
                method.moe_kernel = None
