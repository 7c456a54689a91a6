"""What a sum of losses is divided by need not be known before the last of them: the step is the same, bit for bit or to rounding."""

from __future__ import annotations

import pytest
import torch

from rlhf.cluster.network import free_port
from rlhf.config.cluster import ClusterSettings
from rlhf.training.ranks import Member, join
from tests.training.divided import CASES, CLIPPED, UNCLIPPED, gap, steps


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> None:
    """Whoever may have left a group in this process: an engine does."""
    join(Member(0, 1, "127.0.0.1", free_port()), ClusterSettings(device="cpu"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_gradient_divided_at_the_end_is_that_of_divided_losses(case: tuple[int, str, str]) -> None:
    assert gap(case, [16, 2, 64], CLIPPED, 0) == (0.0, 0.0), "a power of two rounds nothing"
    norms, weights = gap(case, [7, 3, 41], UNCLIPPED, 0)
    assert norms < (1e-5 if case[1] == "fp32" else 1e-2)
    assert weights < (1e-6 if case[1] == "fp32" else 1e-2)


@pytest.mark.parametrize("case", [(0, "fp32", "none"), (1, "bf16", "none"), (2, "bf16", "cpu")], ids=str)
def test_another_divisor_would_have_been_seen(case: tuple[int, str, str]) -> None:
    one, other = (steps(case, counts, UNCLIPPED, 0, at_the_end=True) for counts in ([16, 2, 64], [8, 2, 64]))
    assert one.norms[0] == other.norms[0] / 2
    assert float((one.weights - other.weights).abs().max()) > 1e-4


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_step_that_was_given_up_leaves_nothing_behind(case: tuple[int, str, str]) -> None:
    """Its losses are discarded, before the first step and between two."""
    whole = steps(case, [7, 3], CLIPPED, 0, at_the_end=True)
    again = steps(case, [7, 3], CLIPPED, 0, at_the_end=True, abandoned=2)
    assert again.norms == whole.norms
    assert torch.equal(again.weights, whole.weights)


@pytest.mark.parametrize("case", [(0, "fp32", "none"), (2, "bf16", "cpu"), (3, "bf16", "none")], ids=str)
def test_what_is_not_discarded_would_have_been_seen(case: tuple[int, str, str]) -> None:
    whole = steps(case, [7], CLIPPED, 0, at_the_end=True)
    assert steps(case, [7], CLIPPED, 0, at_the_end=True, abandoned=1, discard=False).norms != whole.norms
