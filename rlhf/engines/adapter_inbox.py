"""A LoRA adapter's way into a vLLM worker: its matrices replace those of the adapter that requests run with, in memory.

Used by the receivers in place of a model that loads weights, when the engine keeps the base and is sent adapters only. vLLM's adapter
manager lives in the worker's model; how requests name the adapter is up to the rollout engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from rlhf.engines.lora import ADAPTER_ID
from rlhf.transfer.fingerprint import Fingerprint
from rlhf.transfer.session import TransferFailed


class AdapterInbox:
    """Collects an adapter's matrices as they arrive; `install` puts them to use.

    Args:
        model: the worker's model, started with LoRA enabled.
        config: peft's `r`, `lora_alpha` and `target_modules`.
    """

    def __init__(self, model: torch.nn.Module, config: Mapping[str, Any]):
        self._manager = model.lora_manager
        self._mapper = getattr(model, "hf_to_vllm_mapper", None)
        self._config = PEFTHelper.from_dict(dict(config))
        self.fingerprint = Fingerprint("policy")
        self._arrived: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copies: the buffers are reused, and vLLM scales the matrices in place."""
        self._arrived |= {name: tensor.to("cpu", copy=True) for name, tensor in self.fingerprint.watch(weights)}
        return set()

    def install(self) -> None:
        """Let requests run with what has arrived from now on, also those that have begun with the adapter before; between two forwards.

        Raises:
            TransferFailed: vLLM would ignore some of it.
        """
        mapper = None if self._mapper is None else self._mapper.get_rename_mapper()
        adapter = LoRAModel.from_lora_tensors(
            ADAPTER_ID,
            self._arrived,
            self._config,
            device="cpu",
            dtype=self._manager.lora_config.lora_dtype,
            weights_mapper=mapper,
        )
        ignored = sorted(set(adapter.loras) - self._adaptable())
        if ignored:
            raise TransferFailed(
                f"vLLM cannot adapt {len(ignored)} of the layers that the policy adapts, for example {ignored[0]}. Set "
                "policy.lora.publish=merged, or leave them out of policy.lora.target_modules"
            )
        self._manager.remove_adapter(ADAPTER_ID)
        self._manager.add_adapter(adapter)
        self._manager.activate_adapter(ADAPTER_ID)

    def _adaptable(self) -> set[str]:
        """Layers that vLLM can adapt, under the policy's names: those that it has fused count as their parts."""
        names = set()
        for name in self._manager.modules:
            prefix, _, last = name.rpartition(".")
            parts = self._manager.packed_modules_mapping.get(last, [last])
            names |= {f"{prefix}.{part}" if prefix else part for part in parts}
        return names
