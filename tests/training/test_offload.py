"""An optimizer in host memory steps as one on the device does, and as fast."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from rlhf.cluster.network import free_port
from rlhf.config.cluster import ClusterSettings
from rlhf.config.policy import PolicySettings
from rlhf.training.deepspeed import Trainer
from rlhf.training.deepspeed_zero3 import whole_numel
from rlhf.training.ranks import Member, join
from rlhf.training.weights import whole_weights


def learned(dtype: str, stage: int, offload: str) -> tuple[dict[str, torch.Tensor], Trainer]:
    """The weights of a small network after three steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    settings = PolicySettings(
        model="unused", dtype=dtype, zero_stage=stage, offload_optimizer=offload, learning_rate=1e-2, weight_decay=0.1
    )
    trainer = Trainer(model.to({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]), settings, 3)
    rows = torch.randn(4, 8, dtype=next(model.parameters()).dtype)
    for _ in range(3):
        trainer.backward(trainer.forward(rows).float().square().sum())
        trainer.step()
    weights = {name: tensor.clone() for name, tensor in whole_weights(trainer.engine.module)}
    assert all((weights[name] - start).abs().max() > 1e-3 for name, start in before.items())
    return weights, trainer


def alone() -> None:
    """This process is the only rank, whoever may have left a group in it: an engine in this process does."""
    join(Member(0, 1, "127.0.0.1", free_port()), ClusterSettings(device="cpu"))


@pytest.mark.parametrize(("dtype", "stage"), [("bf16", 2), ("fp32", 3)])
def test_an_offloaded_optimizer_is_fused_and_steps_alike(dtype: str, stage: int) -> None:
    alone()
    device, _ = learned(dtype, stage, "none")
    host, trainer = learned(dtype, stage, "cpu")
    inner = trainer.engine.optimizer.optimizer
    assert type(inner) is torch.optim.AdamW and inner.defaults["fused"]
    assert all(torch.allclose(device[name], host[name], rtol=0, atol=1e-6) for name in device)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_closed_trainer_gives_back_what_it_held(stage: int) -> None:
    """After some tests or trainings in one process none could be forked."""
    alone()
    _, trainer = learned("fp32", stage, "none")
    engine = weakref.ref(trainer.engine)
    trainer.close()
    trainer.close()
    del trainer
    gc.collect()
    assert engine() is None


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_buffer_for_gradients_is_as_large_as_what_is_learned(stage: int) -> None:
    """DeepSpeed's default has 500 million elements: 2 GB of fp32, which stage 3's engine keeps even when it is closed (DeepSpeed 0.19)."""
    alone()
    _, trainer = learned("fp32", stage, "none")
    count = sum(whole_numel(parameter) for parameter in trainer.module.parameters() if parameter.requires_grad)
    assert trainer.engine.optimizer.reduce_bucket_size == count
    trainer.close()
