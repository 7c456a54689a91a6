"""Which wire brings the weights, from what is known before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import Settings
from rlhf.transfer.choice import backend_of, choose_backend


def make(ranks: int = 1, engines: int = 1, devices: int = 1, transfer: str = "auto", **cluster: Any) -> Settings:
    return Settings(
        data={"prompts": "p"},
        policy={"model": "m", "ranks": ranks},
        rollout={"engines": engines, "tensor_parallel_size": devices, "transfer": transfer},
        reward={"path": "m:f", "kind": "function"},
        cluster={"device": "cuda"} | cluster,
    )


COLOCATED = {"placement": "colocated"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (make(), "nccl"),
        (make(ranks=4, engines=2), "nccl"),
        (make(**COLOCATED), "ipc"),
        (make(ranks=2, engines=2, **COLOCATED), "ipc"),
        (make(ranks=2, engines=1, **COLOCATED), "ipc"),
        (make(ranks=2, devices=2, **COLOCATED), "ipc"),
        (make(ranks=1, engines=2, placement="mixed", colocated_engines=1), "gloo"),
        (make(transfer="gloo"), "gloo"),
        (make(device="cpu"), "gloo"),
    ],
)
def test_auto_takes_what_the_placement_allows(settings: Settings, expected: str) -> None:
    gpu = settings.cluster.device == "cuda"
    assert backend_of(settings, local=False, gpu=gpu) == expected
    assert backend_of(settings, local=True, gpu=gpu) == "local"


@given(st.booleans(), st.integers(1, 8), st.integers(0, 8))
def test_what_auto_takes_can_be_done(gpu: bool, engines: int, shared: int) -> None:
    shared = min(shared, engines) if gpu else 0
    chosen = choose_backend("auto", local=False, gpu=gpu, engines=engines, shared=shared)
    assert chosen in ("nccl", "ipc", "gloo") if gpu else chosen == "gloo"
    assert chosen != "nccl" or shared == 0, "NCCL refuses two ranks on one GPU"
    assert chosen != "ipc" or shared == engines, "ipc does not leave a GPU"


@given(st.sampled_from(["gloo", "nccl", "ipc"]), st.booleans(), st.integers(1, 8))
def test_what_is_asked_for_is_taken_except_within_one_process(requested: Any, gpu: bool, engines: int) -> None:
    facts: dict[str, Any] = {"gpu": gpu, "engines": engines, "shared": 0}
    assert choose_backend(requested, local=False, **facts) == requested
    assert choose_backend(requested, local=True, **facts) == "local"
