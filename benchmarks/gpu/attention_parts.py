"""Attention of packed rows on this device: is it right, how fast, how much memory, and what do rows of new lengths cost."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from common import DEVICE, FORMS, GROUPS, Table, attempt, flex_anywhere, once, pairs, peak, row_of, serves, timed

from rlhf.training.attention_scores import Scores
from rlhf.training.segments import Segments

Inputs = list[torch.Tensor]


def inputs(segments: Segments, heads: int, key_heads: int, size: int, dtype: torch.dtype) -> Inputs:
    """Queries, keys and values of a layer; the same for every form."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(1, count, segments.total, size) for count in (heads, key_heads, key_heads)]
    return [torch.randn(s, generator=generator, device=DEVICE).to(dtype).requires_grad_() for s in shapes]


def both_ways(form: str, given: Inputs, segments: Segments, scores: Scores) -> Inputs:
    """Output and gradients."""
    output = FORMS[form](*given, segments, scores)
    upstream = torch.linspace(-1, 1, output.numel(), device=DEVICE).reshape(output.shape).to(output.dtype)
    return [output, *torch.autograd.grad(output, given, upstream)]


def error(mine: Inputs, exact: Inputs) -> tuple[float, float]:
    """Largest error of the output, and of the gradients, each as a part of the largest exact value."""
    gaps = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(mine, exact, strict=True)]
    return gaps[0], max(gaps[1:])


CASES: list[tuple[torch.dtype, tuple[int, int, int], dict[str, Any]]] = [
    (torch.bfloat16, (14, 2, 64), {}),
    (torch.bfloat16, (14, 2, 64), {"window": 20}),
    (torch.bfloat16, (14, 2, 64), {"softcap": 5.0}),
    (torch.bfloat16, (8, 8, 128), {}),
    (torch.float32, (14, 2, 64), {}),
    (torch.bfloat16, (4, 1, 256), {"window": 20, "softcap": 5.0}),
    (torch.bfloat16, (4, 4, 80), {}),
]
"""Type, heads (queries, keys, size) and what is done to scores (windows in units of the rows' lengths), by value: FlexAttention compiles
for each, which takes time."""


def equality(table: Table, smoke: bool) -> None:
    """Every form against plain products in fp64. `right`: no further off than four times plain products in the form's own type."""
    scale = 1 if smoke else 12
    rows: dict[str, GROUPS] = {
        "texts": [(37 * scale, ()), (5, ()), (60 * scale, ())],
        "groups": [(20 * scale, (15 * scale, 9 * scale, 1)), (3, (0, 30 * scale)), (25 * scale, (20 * scale,) * 4)],
    }
    with flex_anywhere():
        for form in ("varlen", "branches", "flex"):
            for dtype, heads, fields in CASES[:3] if smoke else CASES:
                window = fields["window"] * scale if "window" in fields else None
                scores = Scores(heads[2] ** -0.5, window=window, softcap=fields.get("softcap"))
                for name, groups in rows.items():
                    segments = row_of(groups)
                    given = inputs(segments, *heads, dtype)
                    if not serves(form, segments, scores, given[0], given[2]):
                        continue
                    exact = [x.detach().double().requires_grad_() for x in given]
                    truth = both_ways("plain", exact, segments, scores)
                    rounding = error(both_ways("plain", given, segments, scores), truth)
                    found = error(both_ways(form, given, segments, scores), truth)
                    table.add(
                        form=form, row=name, dtype=str(dtype)[6:], heads=str(heads), scores=", ".join(fields),
                        output=found[0], gradients=found[1], plain_output=rounding[0], plain_gradients=rounding[1],
                        right=all(f <= 4 * r + 1e-6 for f, r in zip(found, rounding, strict=True)),
                    )  # fmt: skip


def speed(table: Table, smoke: bool) -> None:
    """Time and memory of one layer with the heads of an 8B model at 8k tokens, forward and both ways, in bf16."""
    unit, shape, repeats = (8, (4, 2, 16), 1) if smoke else (1024, (32, 8, 128), 10)
    rows: dict[str, GROUPS] = {
        "8 texts": [(unit, ())] * 8,
        "4 prompts, 2 responses": [(unit // 2, (3 * unit // 4,) * 2)] * 4,
        "1 prompt, 8 responses": [(unit, (7 * unit // 8,) * 8)],
        "1 text": [(8 * unit, ())],
    }
    scores = Scores(shape[2] ** -0.5)
    with flex_anywhere():
        for name, groups in rows.items():
            segments = row_of(groups)
            given = inputs(segments, *shape, torch.bfloat16)
            for form in FORMS:
                if serves(form, segments, scores, given[0], given[2]):
                    named = {"row": name, "tokens": segments.total, "form": form}
                    attempt(table, named, partial(_cost, form, given, segments, scores, repeats))


def _cost(form: str, given: Inputs, segments: Segments, scores: Scores, repeats: int) -> dict[str, float | None]:
    both = partial(both_ways, form, given, segments, scores)
    forward, whole = timed(partial(FORMS[form], *given, segments, scores), repeats), timed(both, repeats)
    operations = 12 * pairs(segments) * given[0].shape[1] * given[0].shape[3]
    return {
        "forward_ms": forward * 1e3,
        "both_ms": whole * 1e3,
        "tflops": operations / whole / 1e12,
        "peak_gb": peak(both),
    }


def ragged(table: Table, smoke: bool) -> None:
    """What the first visit of a row costs whose lengths were never seen, as every row of a run is."""
    unit, shape = (4, (4, 2, 16)) if smoke else (60, (14, 2, 64))
    scores = Scores(shape[2] ** -0.5)
    with flex_anywhere():
        for form in ("varlen", "flex", "branches", "masked"):
            for number in range(2 if smoke else 8):
                many = [(unit + 3 * number + place, (7 * unit + 11 * number, 5 * unit + place)) for place in range(6)]
                groups = [(prompt + sum(responses), ()) for prompt, responses in many] if form == "varlen" else many
                segments = row_of(groups)
                given = inputs(segments, *shape, torch.bfloat16)
                if not serves(form, segments, scores, given[0], given[2]):
                    break
                both = partial(both_ways, form, given, segments, scores)
                first, again = once(both), once(both)
                table.add(
                    form=form, visit=number + 1, tokens=segments.total, first_ms=first * 1e3, again_ms=again * 1e3
                )
