"""The mixture coefficients of the running requests: one logits processor for each of vLLM's two model runners.

A processor keeps beta for each request, as `SamplingParams.extra_args` names it, and mixes the logits before temperature,
top-k and top-p. Which runner an engine uses is vLLM's decision (`runs_on_v2` asks it): on CPU the older one, on a GPU with
Triton Model Runner V2, whose processor was never run on a GPU. The mathematics is in `rlhf.engines.mixture.mix`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from rlhf.engines.mixture import mix, model_of
from rlhf.engines.sampling import MIXTURE_ARGUMENT


def processor_name(arguments: dict[str, Any]) -> str:
    """The processor for an engine with these arguments, as vLLM's `logits_processors` wants it."""
    from vllm import EngineArgs

    v2 = EngineArgs(**arguments).create_engine_config().use_v2_model_runner
    return f"{__name__}:{(MixtureProcessorV2 if v2 else MixtureProcessor).__name__}"


def beta_of(params: SamplingParams) -> float:
    """The partner's exponent that a request asks for; 0 if it names none."""
    return float((params.extra_args or {}).get(MIXTURE_ARGUMENT, 0.0))


def _require_valid(params: SamplingParams) -> None:
    beta = beta_of(params)
    if not 0 <= beta <= 1:
        raise ValueError(f"extra_args['{MIXTURE_ARGUMENT}'] is {beta}, but must lie between 0 (policy) and 1 (partner)")


class MixtureProcessor(LogitsProcessor):
    """For vLLM's older model runner, which tells how requests move between the rows of its batch."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self._config = vllm_config
        self._device = device
        self._beta_of_row: dict[int, float] = {}
        self._beta = torch.zeros(0)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises ValueError for a beta outside [0, 1]."""
        _require_valid(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """A mixture has another likeliest token than the policy, so greedy requests need it too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests; tell the model, before its forward, for which rows the partner's logits are wanted."""
        if batch_update is None:
            return
        process_dict_updates(self._beta_of_row, batch_update, lambda params, *_: beta_of(params) or None)
        rows = sorted(self._beta_of_row)
        self._beta = torch.tensor([self._beta_of_row[row] for row in rows], device=self._device)
        everything = len(rows) == batch_update.batch_size
        model_of(self._config).mixed_rows = None if everything else torch.tensor(rows, device=self._device).long()

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Mix the rows of requests with beta > 0, in place."""
        if not self._beta_of_row:
            return logits
        model = model_of(self._config)
        return mix(logits, model.partner_logits, self._beta, model.mixed_rows)


class MixtureProcessorV2(LogitsProcessorV2):
    """For Model Runner V2, whose rows change at each step and name the slots in which their requests stay.

    Designed by reading vLLM 0.32 and tested with made-up batches; not yet run on a GPU. The rows are not known when the
    logits are computed, so the partner's are computed for all of them.
    """

    def __init__(self, vllm_config: Any, req_states: LogitsProcRequestState):
        self._config = vllm_config
        self._host = np.zeros(req_states.max_num_reqs, dtype=np.float32)
        self._beta = torch.zeros(req_states.max_num_reqs, device=req_states.device)
        self._changed = False

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises ValueError for a beta outside [0, 1]."""
        _require_valid(sampling_params)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """A request enters a slot, which a finished one may have left."""
        self._host[req_idx] = beta_of(sampling_params)
        self._changed = True
        return bool(self._host[req_idx] > 0)

    def apply_staged_writes(self) -> None:
        """Bring what `add_request` noted to the device, once per step."""
        if self._changed:
            self._beta.copy_(torch.from_numpy(self._host))
            self._changed = False

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Mix all rows in place, each with the beta of its request's slot; a row with beta 0 stays as it is."""
        if not self._host[ctx.idx_mapping_np].any():
            return logits
        return mix(logits, model_of(self._config).partner_logits, self._beta[ctx.expanded_idx_mapping], None)
