"""Attention of packed rows on a GPU: equal to plain products, without memory for masks or a kernel per length. Skipped without a GPU."""

from __future__ import annotations

import pytest
import torch

from rlhf.training import attention, gpu_attention
from rlhf.training.attention import choose
from rlhf.training.attention_scores import Scores
from rlhf.training.segments import Segments
from tests.training.test_attention import row

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TEXTS = [(370, ()), (5, ()), (610, ())]
GROUPS = [(200, (150, 90, 1)), (3, (0, 300)), (250, (200,) * 4)]


def inputs(total: int, heads: tuple[int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, count, total, heads[2]) for count in (heads[0], heads[1], heads[1])]
    return [torch.randn(s, generator=generator, device="cuda").to(dtype).requires_grad_() for s in shapes]


def both_ways(
    form: attention.Form, given: list[torch.Tensor], segments: Segments, scores: Scores
) -> list[torch.Tensor]:
    output = form(*given, segments, scores)
    upstream = torch.linspace(-1, 1, output.numel(), device="cuda").view(output.shape).to(output.dtype)
    return [output, *torch.autograd.grad(output, given, upstream)]


@pytest.mark.parametrize("heads", [(14, 2, 64), (4, 4, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scores", [Scores(0.1), Scores(0.1, window=100), Scores(0.1, softcap=5.0)], ids=str)
@pytest.mark.parametrize("groups", [TEXTS, GROUPS], ids=["texts", "groups"])
def test_the_chosen_form_is_plain_attention(groups: list, scores: Scores, dtype: torch.dtype, heads: tuple) -> None:
    segments = row(groups)
    given = inputs(segments.total, heads, dtype)
    form = choose(given[0], given[2], segments, scores)
    assert form is not attention.plain and form is not attention.fused
    exact = both_ways(attention.plain, [x.detach().double().requires_grad_() for x in given], segments, scores)
    rounded = both_ways(attention.plain, given, segments, scores)
    for mine, plain, truth in zip(both_ways(form, given, segments, scores), rounded, exact, strict=True):
        allowed = 4 * (plain - truth).abs().max() + 1e-6 * truth.abs().max()
        assert (mine - truth).abs().max() <= allowed


def test_texts_in_bf16_take_flash_attention_and_groups_flex() -> None:
    query = torch.zeros(1, 8, 985, 64, device="cuda", dtype=torch.bfloat16)
    assert choose(query, query, row(TEXTS), Scores(1.0)) is gpu_attention.varlen
    assert choose(query, query, row(GROUPS), Scores(1.0)) is gpu_attention.flex
    assert choose(query.float(), query.float(), row(TEXTS), Scores(1.0)) is gpu_attention.flex


@pytest.mark.parametrize("groups", [[(8192, ())], [(1024, (896,) * 8)]], ids=["text", "group"])
def test_nothing_as_large_as_a_mask_is_held(groups: list) -> None:
    """8,192 tokens: a mask is 67 MB, scores of 32 heads 4.3 GB in bf16; queries, keys, values and gradients are 0.2 GB."""
    segments = row(groups)
    given = inputs(segments.total, (32, 8, 128), torch.bfloat16)
    form = choose(given[0], given[2], segments, Scores(0.1))
    both_ways(form, given, segments, Scores(0.1))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both_ways(form, given, segments, Scores(0.1))
    assert torch.cuda.max_memory_allocated() - before < 1e9


def test_the_branches_fallback_is_plain_attention() -> None:
    segments = row(GROUPS)
    given = inputs(segments.total, (8, 2, 64), torch.float32)
    ours = both_ways(gpu_attention.branches, given, segments, Scores(0.1))
    for mine, plain in zip(ours, both_ways(attention.plain, given, segments, Scores(0.1)), strict=True):
        assert torch.allclose(mine, plain, atol=1e-4 * plain.abs().max().item())


def test_rows_of_new_lengths_compile_nothing() -> None:
    torch._dynamo.utils.counters.clear()
    compiled = []
    for extra in range(6):
        segments = row([(200 + 17 * extra, (150 + 31 * extra, 90)), (300 + extra, ())])
        given = inputs(segments.total, (14, 2, 64), torch.bfloat16)
        both_ways(gpu_attention.flex, given, segments, Scores(0.1))
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert compiled[1:] == [compiled[1]] * 5
