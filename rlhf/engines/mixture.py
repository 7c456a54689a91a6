"""Two models in one vLLM engine, and samples from the geometric mixture of both: the model class and the mathematics.

For a request with coefficient beta each token is drawn from

    softmax((1 - beta) * logits_policy + beta * logits_partner),    proportional to policy^(1 - beta) * partner^beta,

so beta 0 is the policy and beta 1 the partner. Owns: the model that vLLM loads in place of the policy's own architecture,
and what may be mixed. The coefficients of the running requests are kept by `rlhf.engines.mixture_processors`. Knows nothing
of weight versions or of the pool. vLLM imports this module, and only in an engine that mixes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PretrainedConfig
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.utils import init_vllm_registered_model

from rlhf.config.loader import UserError
from rlhf.engines.plugin import MIXTURE_ARCHITECTURE
from rlhf.engines.slots import TwoModels
from rlhf.transfer.buckets import BUCKET_BYTES
from rlhf.types import ModelSlot

CONTEXT_KEY = "rlhf.mixture"


class CannotMix(UserError):
    """The engine cannot hold two models of this kind."""


def mixture_overrides(model: str) -> dict[str, Any]:
    """vLLM's `hf_overrides` that put `GeometricMixtureForCausalLM` in place of the model's own architecture.

    Args:
        model: folder or hub name.

    Raises:
        CannotMix: vLLM cannot run two models of this architecture as one.
    """
    config, _ = PretrainedConfig.get_config_dict(model)
    architecture = next(iter(config.get("architectures") or []), "")
    reason = _why_not(architecture)
    if reason is not None:
        raise CannotMix(
            f"policy.model={model}: the algorithm samples from a mixture of two models, for which the engines must hold both, "
            f"but {reason}. Use a decoder-only text model, or an algorithm that samples from the policy alone."
        )
    return {"architectures": [MIXTURE_ARCHITECTURE], "mixture_of": architecture}


def _why_not(architecture: str) -> str | None:
    if architecture not in ModelRegistry.models:
        return f"vLLM has no implementation of its own for the architecture '{architecture}'"
    if architecture in MODELS_CONFIG_MAP:
        return f"vLLM adapts its settings to {architecture} by name, which would not happen"
    info = ModelRegistry.models[architecture].inspect_model_cls()
    if info.is_pooling_model or not info.is_text_generation_model:
        return f"{architecture} does not generate text"
    if info.attn_type != "decoder":
        return f"{architecture} is not a decoder with attention (vLLM calls it '{info.attn_type}')"
    if info.has_inner_state or info.is_hybrid or info.is_attention_free:
        return f"{architecture} keeps a state other than attention's keys and values"
    if info.supports_multimodal or info.requires_raw_input_tokens:
        return f"{architecture} reads more than token ids"
    return None


class GeometricMixtureForCausalLM(TwoModels):
    """Two models of one architecture, run on the same tokens in one forward.

    Each has weights and a key-value cache of its own, under the prefixes `policy` and `partner`; blocks of the cache are
    assigned to both at once. There is no support for pipeline parallelism, and vLLM refuses it for that reason. Every method
    runs alike on all ranks of tensor parallelism.

    Attributes:
        mixed_rows: rows of the next logits that a request with beta > 0 owns, int64 [m], or None for all rows.
        partner_logits: the partner's logits for those rows, [m, vocabulary], once `compute_logits` has run; None on ranks
            that get no logits, and if no row is mixed.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.policy = _inner_model(vllm_config, "policy")
        self.partner = _inner_model(vllm_config, "partner")
        self.mixed_rows: torch.Tensor | None = None
        self.partner_logits: torch.Tensor | None = None
        # Where vLLM's own layers are found from an engine's configuration: the logits processor has nothing else in common
        # with its model, and a process may hold several engines.
        vllm_config.compilation_config.static_forward_context[CONTEXT_KEY] = self

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Required by vLLM's interface; mixtures take token ids only."""
        return self.policy.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
    ) -> torch.Tensor:
        """Hidden states of both models side by side, [tokens, 2 * hidden]: vLLM carries one tensor per forward.

        The policy's are copied before the partner runs. Under piecewise CUDA graphs (vLLM's choice for batches with prompts in them)
        each of the two compiled models ends in a graph that was captured with a weak reference to its output: to vLLM that memory is free
        as soon as the graph ends, and a graph of the partner's, from the same pool, may have been given it. Within one full
        graph, and without graphs, nothing is reused that early; the copy costs nothing there, since the two are put side by side anyway.
        """
        inputs = {
            "input_ids": input_ids,
            "positions": positions,
            "intermediate_tensors": intermediate_tensors,
            "inputs_embeds": inputs_embeds,
        }
        own = self.policy(**inputs)
        width = own.shape[-1]
        states = own.new_empty(*own.shape[:-1], 2 * width)
        states[..., :width] = own
        states[..., width:] = self.partner(**inputs)
        return states

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The policy's logits, [rows, vocabulary]; the partner's are left in `partner_logits` for the processor."""
        own, partner = hidden_states.chunk(2, dim=-1)
        self.partner_logits = None
        if self.mixed_rows is None:
            self.partner_logits = self.partner.compute_logits(partner.contiguous())
        elif len(self.mixed_rows):
            self.partner_logits = self.partner.compute_logits(partner[self.mixed_rows])
        return self.policy.compute_logits(own.contiguous())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load both models with the same weights, in one pass over the checkpoint. Returns vLLM's parameter names."""
        loaded: set[str] = set()
        for chunk in _chunks(weights):
            for slot, model in (("policy", self.policy), ("partner", self.partner)):
                loaded |= {f"{slot}.{name}" for name in model.load_weights(iter(chunk))}
        return loaded


def _inner_model(vllm_config: VllmConfig, slot: ModelSlot) -> torch.nn.Module:
    config = copy.deepcopy(vllm_config.model_config.hf_config)
    # vLLM finds compiled code again by a hash of the configuration. The code names the attention layers whose cache it
    # uses, so the two models must not share it.
    config.mixture_slot = slot
    with set_model_tag(slot):
        return init_vllm_registered_model(vllm_config, prefix=slot, hf_config=config, architectures=[config.mixture_of])


def _chunks(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """The tensors in lists of about `BUCKET_BYTES`: no second whole checkpoint in memory, and few calls of the loaders."""
    chunk: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        chunk.append((name, tensor))
        size += tensor.nbytes
        if size >= BUCKET_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def model_of(vllm_config: VllmConfig) -> GeometricMixtureForCausalLM:
    """The mixture model of the engine with this configuration, once it is loaded."""
    return vllm_config.compilation_config.static_forward_context[CONTEXT_KEY]


def mix(logits: torch.Tensor, partner: torch.Tensor, beta: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Mix some rows of the policy's logits with the partner's, in place.

    Softmax of the result is the normalised geometric mixture, because a logit is a log-prob up to a constant of its row.

    Args:
        logits: the policy's, float32 [n, vocabulary], finite.
        partner: the partner's for the mixed rows, any float [m, vocabulary], finite.
        beta: the partner's exponent in each of these rows, float32 [m].
        rows: which rows they are, int64 [m]; None: all, so m = n.

    Returns:
        `logits`.
    """
    partner, weight = partner.to(logits.dtype), beta[:, None]
    if rows is None:
        return logits.lerp_(partner, weight)
    logits[rows] = torch.lerp(logits[rows], partner, weight)
    return logits
