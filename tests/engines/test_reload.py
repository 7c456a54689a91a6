"""A reload leaves alone what an update does not bring."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from vllm.model_executor.model_loader.reload.layerwise import record_metadata_for_reloading
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from rlhf.engines.reload import Reload


class Router(nn.Module):
    """A weight that learns beside a buffer of the model's files that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3), requires_grad=False)
        self.register_buffer("scale", torch.zeros(3))

    def load_weights(self, weights: dict[str, torch.Tensor]) -> set[str]:
        for name, tensor in weights.items():
            target = self.get_parameter(name) if name == "weight" else self.get_buffer(name)
            getattr(target, "weight_loader", default_weight_loader)(target, tensor)
        return set(weights)


@pytest.fixture
def router() -> Router:
    model = Router()
    record_metadata_for_reloading(model)
    model.weight.fill_(1.0)
    model.scale.copy_(torch.tensor([0.5, 0.25, 2.0]))
    return model


def test_a_buffer_that_does_not_arrive_keeps_its_value(router: Router) -> None:
    reload, kept, storage = Reload(router), router.scale.clone(), router.scale.data_ptr()
    for value in (2.0, 3.0):
        reload.begin()
        reload.finish(None, router.load_weights({"weight": torch.full((2, 3), value)}))
        assert (router.weight == value).all()
        assert torch.equal(router.scale, kept)
        assert router.scale.data_ptr() == storage


def test_a_buffer_that_arrives_is_taken(router: Router) -> None:
    reload, new = Reload(router), torch.tensor([7.0, 8.0, 9.0])
    reload.begin()
    reload.finish(None, router.load_weights({"weight": torch.ones(2, 3), "scale": new}))
    assert torch.equal(router.scale, new)


def test_a_reload_that_broke_off_leaves_no_trace(router: Router) -> None:
    reload, kept = Reload(router), router.scale.clone()
    reload.begin()
    router.load_weights({"scale": torch.full((3,), 9.0)})
    reload.begin()
    reload.finish(None, router.load_weights({"weight": torch.full((2, 3), 4.0)}))
    assert (router.weight == 4.0).all()
    assert torch.equal(router.scale, kept)
