"""Two processes hand weights over within one GPU. Skipped without a GPU; needs torch alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from rlhf.cluster.network import free_port
from rlhf.transfer import TransferSession
from rlhf.transfer.buckets import BUCKET_BYTES
from rlhf.transfer.fingerprint import fingerprint
from rlhf.transfer.ipc import IpcReader, IpcSender
from tests.transfer.test_gloo import POLICY, spec_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROUNDS = 3


def made(device: str) -> list[tuple[str, torch.Tensor]]:
    """Half a GB in small tensors, and one tensor of two and a half buckets."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1000, 2100 + number) for number in range(120)]
    tensors = [torch.randn(shape, generator=generator).bfloat16().to(device) for shape in shapes]
    tensors.append(torch.ones(5 * BUCKET_BYTES // 4, dtype=torch.bfloat16, device=device))
    return [(str(number), tensor) for number, tensor in enumerate(tensors)]


def read(port: int) -> None:
    """The worker, in a process of its own: prints the fingerprint of what arrives in each round."""
    reader = IpcReader(TransferSession("ipc", "127.0.0.1", port, 2, 120), 1)
    specs = [spec_of(*item) for item in made("cpu")]
    for _ in range(ROUNDS):
        taken: list[tuple[str, torch.Tensor]] = []
        reader.receive(specs, taken.extend)
        print(fingerprint(taken), flush=True)


def test_weights_cross_within_a_gpu_through_one_bucket() -> None:
    port = free_port()
    code = f"from tests.gpu.test_ipc import read; read({port})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as worker:
        sender, marks = IpcSender(TransferSession("ipc", "127.0.0.1", port, 2, 120)), []
        weights = made("cuda")
        held = torch.cuda.memory_allocated()
        for _ in range(ROUNDS):
            torch.cuda.reset_peak_memory_stats()
            marks.append(sender.send(weights, POLICY))
            assert torch.cuda.max_memory_allocated() - held < 2 * BUCKET_BYTES
            torch.cuda.ipc_collect()
            assert torch.cuda.memory_allocated() - held < BUCKET_BYTES, "the buffer comes back"
            weights[0][1].add_(1.0)
        printed, _ = worker.communicate(timeout=120)
    assert printed.split()[-ROUNDS:] == marks
    assert len(set(marks)) == ROUNDS
