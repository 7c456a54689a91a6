"""Attention of packed rows: every form against softmax attention written out, in values and gradients; and the choice of the form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as torch_flex
from torch.utils.checkpoint import checkpoint

from rlhf.training import attention, gpu_attention
from rlhf.training.attention import choose, packed_attention
from rlhf.training.attention_scores import Scores
from rlhf.training.segments import Segment, Segments, blocks, hidden_keys, padded

CPU = torch.device("cpu")
ROWS: dict[str, list[tuple[int, tuple[int, ...]]]] = {
    "texts": [(5, ()), (1, ()), (9, ())],
    "one-response": [(4, (3,)), (2, (0, 6))],
    "groups": [(4, (5, 3)), (1, (1, 0, 7, 2)), (3, ()), (6, (4,))],
    "over-a-block": [(90, (70, 1)), (40, (130, 30))],
}


def row(groups: list[tuple[int, tuple[int, ...]]]) -> Segments:
    made, start = [], 0
    for prompt, responses in groups:
        made.append(Segment(start, prompt, responses))
        start = made[-1].stop
    return Segments(made)


def visible(groups: list[tuple[int, tuple[int, ...]]], scores: Scores) -> torch.Tensor:
    """bool [row, row], from the meaning: who is (group, response or prompt, position), and what that one may see."""
    who = [
        (group, branch, position + (prompt if branch else 0))
        for group, (prompt, responses) in enumerate(groups)
        for branch, size in enumerate((prompt, *responses))
        for position in range(size)
    ]

    def sees(query: tuple[int, int, int], key: tuple[int, int, int]) -> bool:
        related = query[0] == key[0] and key[1] in (0, query[1])
        distance = query[2] - key[2]
        near = scores.window is None or distance < scores.window
        return related and near and (distance >= 0 or not scores.causal)

    return torch.tensor([[sees(query, key) for key in who] for query in who])


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scores: Scores) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    products = q @ k.transpose(2, 3) * scores.scale
    if scores.softcap is not None:
        products = scores.softcap * torch.tanh(products / scores.softcap)
    return products.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def inputs(total: int, heads: int, key_heads: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, total, size), (1, key_heads, total, size), (1, key_heads, total, size)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


@pytest.fixture
def flex_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.13 refuses gradients of FlexAttention on a CPU to users, though its reference has them."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


SCORES = [
    Scores(0.3),
    Scores(0.3, window=4),
    Scores(1.5, softcap=2.0),
    Scores(0.7, window=2, softcap=0.5),
    Scores(0.3, causal=False),
]
HEADS = [(4, 4, 8), (4, 2, 16), (3, 1, 5)]
"""Query heads, key heads, size."""
FORMS = {
    "plain": (attention.plain, lambda scores: True),
    "fused": (attention.fused, lambda scores: scores.softcap is None),
    "flex": (gpu_attention.flex, lambda scores: True),
    "branches": (gpu_attention.branches, lambda scores: scores.softcap is None and scores.window is None),
}
"""Name -> form, and whether it serves such scores."""


@pytest.mark.usefixtures("flex_with_gradients")
@pytest.mark.parametrize("groups", ROWS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_softmax_attention(form: str, groups: str) -> None:
    attend, serves = FORMS[form]
    segments = row(ROWS[groups])
    for scores in filter(serves, SCORES):
        if not scores.causal and groups != "texts":
            continue  # an encoder reads whole texts
        mask = visible(ROWS[groups], scores)
        for heads in HEADS:
            given_ = inputs(segments.total, *heads)
            upstream = torch.randn(given_[0].shape, generator=torch.Generator().manual_seed(1))
            mine, theirs = attend(*given_, segments, scores), written_out(*given_, mask, scores)
            assert torch.allclose(mine, theirs, atol=2e-6), (scores, heads)
            gradients = [torch.autograd.grad((output * upstream).sum(), given_) for output in (mine, theirs)]
            for one, other in zip(*gradients, strict=True):
                assert torch.allclose(one, other, atol=1e-5), (scores, heads)


groups_strategy = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(0, 40), max_size=4).map(tuple)), min_size=1, max_size=5
)


@settings(max_examples=60, deadline=None)
@given(groups_strategy, st.none() | st.integers(1, 30), st.sampled_from([8, 16]))
def test_blocks_are_those_of_the_whole_mask(
    groups: list[tuple[int, tuple[int, ...]]], window: int | None, size: int
) -> None:
    """From lengths alone, against the reduction of a mask of the whole row."""
    runs = padded(row(groups).runs, size)
    length = runs[-1].stop
    fill = length - row(groups).total
    dense = visible([*groups, *([(fill, ())] if fill else [])], Scores(1.0, window=window)).numpy()
    assert dense.shape == (length, length)
    assert length % size == 0 and length >= 2 * size
    tiles = dense.reshape(length // size, size, length // size, size).swapaxes(1, 2)
    found = blocks(runs, size, window, causal=True)
    assert np.array_equal(found.some, tiles.any((2, 3)))
    assert np.array_equal(found.all, tiles.all((2, 3)))


@pytest.mark.parametrize("window", [None, 50])
def test_a_block_mask_is_torchs_own(window: int | None) -> None:
    segments = row([(200, (150, 20, 90)), (70, ()), (300, (1, 260))])
    made = gpu_attention.block_mask(segments, window, CPU, causal=True)
    length = made.seq_lengths[0]
    expected = torch_flex.create_block_mask(made.mask_mod, 1, 1, length, length, "cpu", gpu_attention.BLOCK)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(made, name), getattr(expected, name)), name
    for name in ("kv_indices", "full_kv_indices", "q_indices", "full_q_indices"):
        counts = getattr(made, name.replace("indices", "num_blocks"))
        used = torch.arange(length // gpu_attention.BLOCK) < counts[..., None]
        assert torch.equal(getattr(made, name)[used], getattr(expected, name)[used]), name


@pytest.mark.usefixtures("flex_with_gradients")
def test_whatever_a_form_needs_is_made_once_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    segments, made = row(ROWS["groups"]), []
    real = gpu_attention.block_mask
    monkeypatch.setattr(gpu_attention, "block_mask", lambda *a, **k: made.append(a) or real(*a, **k))
    given_ = [x.detach() for x in inputs(segments.total, 2, 1, 16)]
    for window in (None, None, 3, 3):
        gpu_attention.flex(*given_, segments, Scores(1.0, window=window))
    assert len(made) == 2, "one for each window, however many layers"
    first, second = row([(3, (2, 2)), (3, (2, 2))])
    both = Segments([first, second])
    assert both.hidden(first, None, CPU) is both.hidden(second, None, CPU)
    assert both.hidden(first, 9, CPU) is both.hidden(first, None, CPU), "no window that short"


def test_the_mask_of_a_group() -> None:
    hidden = hidden_keys(Segment(0, 1, (1, 2)), None, CPU).int().tolist()
    assert hidden == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 0, 0]]
    assert not Segment(0, 2, (3,)).branches and not Segment(0, 2, (0, 3)).branches


def test_one_kernel_serves_rows_of_all_lengths(monkeypatch: pytest.MonkeyPatch, flex_with_gradients: None) -> None:
    """What torch would compile on a GPU, in its own operators: rows of other lengths and groups and other windows take the same graph, with
    gradients and under activation checkpointing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    attend = gpu_attention.compiled_flex("aot_eager")
    monkeypatch.setattr(gpu_attention, "flex_kernel", lambda _: attend)
    graphs = []
    rows = ([(100, (90, 80))], [(30, (200, 300)), (500, (1, 1))], [(700, ())], [(3, (4, 5))], [(384, ())])
    for groups, window in zip(rows, (50, 50, 90, 4, 20), strict=True):
        segments, scores = row(groups), Scores(0.25, window=window, softcap=2.0)
        given_ = inputs(segments.total, 4, 2, 16)
        mine = checkpoint(gpu_attention.flex, *given_, segments, scores, use_reentrant=False)
        theirs = attention.plain(*given_, segments, scores)
        assert torch.allclose(mine, theirs, atol=2e-6)
        for one, other in zip(*(torch.autograd.grad(y.square().sum(), given_) for y in (mine, theirs)), strict=True):
            assert torch.allclose(one, other, atol=1e-4)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == 1, "compiled, not torch's reference"
    assert graphs[1:] == [graphs[1]] * 4 and graphs[1] <= 2, "at most once more, for the second length"
    torch._dynamo.reset()


def test_the_form_follows_device_and_row(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, groups, on_cpu = row(ROWS["texts"]), row(ROWS["groups"]), torch.zeros(1, 2, 15, 64)
    assert choose(on_cpu, on_cpu, groups, Scores(1.0)) is attention.plain
    assert choose(on_cpu, on_cpu, texts, Scores(1.0, causal=False)) is attention.fused
    with torch.inference_mode():
        assert choose(on_cpu, on_cpu, texts, Scores(1.0)) is attention.fused
        assert choose(on_cpu, on_cpu, texts, Scores(1.0, softcap=5.0)) is attention.plain

    query = torch.zeros(1, 2, 15, 64, device="meta")  # as good as a GPU: not a CPU

    def served(by_varlen: bool, by_flex: bool, segments: Segments, scores: Scores) -> Any:
        monkeypatch.setattr(gpu_attention, "varlen_serves", lambda *_: by_varlen)
        monkeypatch.setattr(gpu_attention, "flex_serves", lambda *_: by_flex)
        return choose(query, query, segments, scores)

    assert served(True, True, texts, Scores(1.0, window=3)) is gpu_attention.varlen
    assert served(True, True, texts, Scores(1.0, softcap=5.0)) is gpu_attention.flex
    assert served(True, True, groups, Scores(1.0)) is gpu_attention.flex
    assert served(False, True, texts, Scores(1.0)) is gpu_attention.flex
    assert served(False, False, groups, Scores(1.0)) is gpu_attention.branches
    for scores, says in ((Scores(1.0, window=3), "sliding window"), (Scores(1.0, softcap=5.0), "soft-capped")):
        with pytest.raises(ValueError, match=f"{says}.*heads of 64 in torch.float32 needs FlexAttention"):
            served(False, False, groups, scores)


def test_varlen_is_told_bounds_window_and_grouped_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention's window counts the keys before the query; transformers' counts the query too."""
    from torch.nn.attention import varlen as torch_varlen

    calls = []

    def varlen_attn(query: Any, key: Any, value: Any, *bounds: Any, **options: Any) -> torch.Tensor:
        calls.append((query.shape, key.shape, [b.tolist() if torch.is_tensor(b) else b for b in bounds], options))
        return query

    segments = row(ROWS["texts"])
    given_ = inputs(segments.total, 4, 2, 8)
    monkeypatch.setattr(torch_varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(gpu_attention, "varlen_arguments", lambda: frozenset({"scale", "window_size", "enable_gqa"}))
    assert torch.equal(gpu_attention.varlen(*given_, segments, Scores(0.3)), given_[0])
    gpu_attention.varlen(*given_, segments, Scores(0.3, window=4))
    monkeypatch.setattr(gpu_attention, "varlen_arguments", lambda: frozenset({"scale", "window_size"}))
    gpu_attention.varlen(*given_, segments, Scores(0.3, causal=False))
    assert [call[:2] for call in calls] == [((15, 4, 8), (15, 2, 8))] * 3
    assert all(call[2] == [[0, 5, 6, 15], [0, 5, 6, 15], 9, 9] for call in calls)
    assert [call[3] for call in calls] == [
        {"scale": 0.3, "window_size": (-1, 0), "enable_gqa": True},
        {"scale": 0.3, "window_size": (3, 0), "enable_gqa": True},
        {"scale": 0.3, "window_size": (-1, -1)},
    ]


def test_this_torchs_varlen_has_what_is_asked_of_it() -> None:
    assert {"scale", "window_size", "enable_gqa"} <= gpu_attention.varlen_arguments()
    assert not gpu_attention.varlen_serves(*inputs(3, 2, 2, 64)[:2]), "not on a CPU"


def test_what_packed_attention_does_not_compute_is_refused() -> None:
    segments, given_ = row(ROWS["texts"]), inputs(15, 2, 2, 8)
    module = torch.nn.Identity()
    for arguments, says in (
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"position_bias": torch.zeros(2)}, "position_bias"),
        ({"dropout": 0.1}, "dropout"),
        ({"segments": None}, "segments"),
    ):
        with pytest.raises(ValueError, match=says):
            packed_attention(module, *given_, None, **({"segments": segments} | arguments))
    module.is_causal = False
    with pytest.raises(ValueError, match="a window in both directions"):
        packed_attention(module, *given_, None, segments=segments, sliding_window=3)
    with pytest.raises(ValueError, match="share a prompt"):
        packed_attention(module, *given_, None, segments=row([(5, (5, 5))]))
