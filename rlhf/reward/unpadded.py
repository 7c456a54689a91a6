"""Reward models without the cost of padding: the transformer inside reads a batch as one long row, text after text.

Right-padded in and right-padded out, so poolings and heads notice nothing. Attention runs text by text (see training/attention.py),
all other layers see the real tokens only. A model that does not give the same numbers in this way stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from rlhf.reward.models import RewardModel
from rlhf.reward.modules import EncoderWithHead
from rlhf.training import attention
from rlhf.training.segments import Segments

TOLERANCE = 0.01
"""Of outputs, as a part of the difference between texts: far above the rounding of fp32, below what a wrong position or neighbour does."""
LENGTHS = (3, 17, 9, 30)
"""Tokens of the texts that the two ways are compared on."""


def without_padding(model: RewardModel) -> bool:
    """Let a model on a CPU compute no padding from now on, if that gives the same outputs; whether it does.

    A GPU would wait for the many small products of attention, and has room for the padding.
    """
    if model.device != "cpu":
        return False
    body = model.module.encoder if isinstance(model.module, EncoderWithHead) else model.module.model.base_model
    batch = model.batch(_sample(model.rows, model.padding))
    before = body.config._attn_implementation
    hooks = []
    with torch.inference_mode():
        try:
            expected = model.module(**batch)
            hooks.append(body.register_forward_pre_hook(_one_row, with_kwargs=True))
            hooks.append(body.register_forward_hook(_padded_rows, with_kwargs=True))
            body.set_attn_implementation(attention.NAME)
            error = (model.module(**batch) - expected).abs().max()
            same = bool(error <= TOLERANCE * (expected.amax(0) - expected.amin(0)).max())
        except Exception:  # noqa: BLE001 - whatever it is that this architecture does not take, the padded way is left
            same = False
    if not same:
        for hook in hooks:
            hook.remove()
        body.set_attn_implementation(before)
    return same


def _sample(vocabulary: int, padding: int) -> list[list[int]]:
    luck = torch.Generator().manual_seed(0)
    rows = [torch.randint(vocabulary, (length,), generator=luck).tolist() for length in LENGTHS]
    return [[(token + 1) % vocabulary if token == padding else token for token in row] for row in rows]


def _one_row(body: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    """Before the body: from `input_ids` and `attention_mask` [n, longest] to one row [1, tokens] and its segments."""
    kwargs = dict(kwargs)
    ids = args[0] if args else kwargs.pop("input_ids")
    mask = kwargs.pop("attention_mask").bool()
    positions = torch.arange(mask.shape[1]).expand_as(mask)
    segments = Segments.of_texts(mask.sum(1).tolist())
    return (), kwargs | {"input_ids": ids[mask][None], "position_ids": positions[mask][None], "segments": segments}


def _padded_rows(body: torch.nn.Module, args: tuple[()], kwargs: dict[str, Any], output: Any) -> Any:
    """After the body: its states [1, tokens, width] as [n, longest, width]."""
    lengths = [segment.length for segment in kwargs["segments"]]

    def padded(states: torch.Tensor) -> torch.Tensor:
        return pad_sequence(states[0].split(lengths), batch_first=True)

    output.last_hidden_state = padded(output.last_hidden_state)
    if output.get("hidden_states") is not None:
        output.hidden_states = tuple(padded(states) for states in output.hidden_states)
    if output.get("pooler_output") is not None:
        output.pooler_output = body.pooler(output.last_hidden_state)
    return output
