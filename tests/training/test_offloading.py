"""Memory that is lent out and taken back."""

from __future__ import annotations

import pytest
import torch

from rlhf.training.offloading import Offloading

CPU = torch.device("cpu")


def test_what_is_offloaded_takes_no_memory_and_comes_back_under_every_view() -> None:
    flat = torch.arange(10.0)
    view, other = flat[2:5], torch.ones(3, dtype=torch.bfloat16)
    offloading = Offloading()
    offloading.offload([flat, view, other], CPU)
    assert flat.untyped_storage().nbytes() == view.untyped_storage().nbytes() == 0
    assert offloading.nbytes == 10 * 4 + 3 * 2
    offloading.reload()
    assert offloading.nbytes == 0
    assert torch.equal(view, torch.tensor([2.0, 3.0, 4.0])) and torch.equal(other, torch.ones(3, dtype=torch.bfloat16))
    view.add_(1)
    assert flat[2] == 3, "a view is still a view"


def test_what_is_needed_stays_though_another_tensor_lies_in_the_same_memory() -> None:
    flat = torch.arange(4.0)
    offloading = Offloading()
    offloading.offload([flat[:2], torch.ones(2)], CPU, needed=[flat])
    assert flat.sum() == 6 and offloading.nbytes == 8


def test_another_devices_tensors_stay() -> None:
    offloading = Offloading()
    offloading.offload([torch.ones(2, device="meta")], CPU)
    assert offloading.nbytes == 0


def test_offloading_twice_is_a_mistake() -> None:
    offloading = Offloading()
    offloading.offload([torch.ones(2)], CPU)
    with pytest.raises(RuntimeError, match="offloaded already"):
        offloading.offload([torch.ones(2)], CPU)
