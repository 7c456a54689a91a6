"""The fingerprint differs whenever the weights do, and only then."""

from __future__ import annotations

import pytest
import torch

from rlhf.transfer.fingerprint import BLOCK, Fingerprint, block_products, block_sums, block_weights, fingerprint


def tensors(n: int = 1000) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [("a", torch.randn(n, generator=generator)), ("b", torch.randn(3, 5, generator=generator).bfloat16())]


def test_equal_weights_have_equal_fingerprints() -> None:
    assert fingerprint(tensors()) == fingerprint(tensors())


@pytest.mark.parametrize("position", [0, 1, 131_071, 131_072, 262_143, 300_000])
def test_one_changed_bit_changes_it(position: int) -> None:
    weights = torch.zeros(300_001)  # more than two blocks, and a tail that does not fill 8 bytes
    before = fingerprint([("w", weights)])
    weights.view(torch.int32)[position] = 1
    assert fingerprint([("w", weights)]) != before


def test_swapping_two_values_changes_it() -> None:
    left, right = torch.zeros(400_000), torch.zeros(400_000)
    left[2], right[2 + 2 * 131_072] = 1.0, 1.0  # the same place in two blocks
    assert fingerprint([("w", left)]) != fingerprint([("w", right)])


def test_name_shape_dtype_and_order_count() -> None:
    weights = torch.arange(6, dtype=torch.float32)
    seen = {
        fingerprint([("w", weights)]),
        fingerprint([("v", weights)]),
        fingerprint([("w", weights.reshape(2, 3))]),
        fingerprint([("w", weights.view(torch.int32))]),
        fingerprint(reversed(tensors())),
        fingerprint(tensors()),
    }
    assert len(seen) == 6


def test_memory_layout_does_not_count() -> None:
    weights = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    strided = weights.t().contiguous().t()
    inside = torch.cat([torch.zeros(1), weights.reshape(-1)])[1:].reshape(3, 4)  # starts at an odd offset
    assert fingerprint([("w", weights)]) == fingerprint([("w", strided)]) == fingerprint([("w", inside)])


def test_watching_passes_the_tensors_on() -> None:
    total = Fingerprint()
    passed = list(total.watch(tensors()))
    assert [name for name, _ in passed] == ["a", "b"]
    assert total.hexdigest() == fingerprint(tensors())


def test_empty_and_small_tensors() -> None:
    assert fingerprint([("w", torch.zeros(0))]) != fingerprint([("w", torch.zeros(1, dtype=torch.int8))])


def test_the_slot_that_weights_are_meant_for_counts() -> None:
    marks = []
    for slot in ("policy", "partner"):
        total = Fingerprint(slot)
        list(total.watch(tensors()))
        marks.append(total.hexdigest())
    assert marks[0] == fingerprint(tensors()) != marks[1]


@pytest.mark.parametrize("words", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 7 * BLOCK + 5])
def test_blocks_together_have_the_sums_of_blocks_alone(words: int) -> None:
    """A GPU works on many at once, a CPU on one after the other, and both must attest the same."""
    values = torch.randint(-(2**62), 2**62, (words,), generator=torch.Generator().manual_seed(1))
    expected = [
        int((values[start : start + BLOCK] * block_weights(values.device)[: words - start]).sum())
        for start in range(0, words, BLOCK)
    ]
    assert block_products(values).tolist() == expected
    for at_once in (1, 2, 64):
        assert block_sums(values, at_once).tolist() == expected


def test_the_digest_has_its_known_value() -> None:
    assert fingerprint([("w", torch.arange(300_001, dtype=torch.int32))]) == "ea3569cabae4a441"
