"""The model that learns, on this device: chunked log-probs, steps of a 0.5B model, and memory against what `rlhf plan` says.

Weights are random, so nothing is downloaded; time and memory do not depend on them.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from common import DEVICE, GPU, GROUPS, Table, attempt, flex_anywhere, forced, pairs, peak, timed

from rlhf.cluster.gpus import visible_gpu
from rlhf.config.policy import PolicySettings
from rlhf.preflight.memory import activations, head
from rlhf.training.model import ChunkedLogProbs, LogProbModel, checkpoint_activations
from rlhf.training.packing import Experience, pack
from rlhf.training.shapes import KNOWN, ModelShape, model_shape
from rlhf.types import Assignment, Completion, Prompt, Rollout, TrainingItem

CHUNK = 1024
UNNEEDED = {"deepspeed", "ray", "vllm", "wandb"}
"""What such a machine may lack."""


def config(smoke: bool) -> Any:
    """Qwen2.5-0.5B's shape, or a very small one of its kind."""
    from transformers import AutoConfig

    kind, fields = KNOWN["qwen2.5-0.5b"]
    small = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, max_position_embeddings=2048,
    )  # fmt: skip
    return AutoConfig.for_model(kind, **fields | (small if smoke else {}))


def model(smoke: bool, checkpointing: bool) -> LogProbModel:
    """In bf16, with random weights, ready to learn."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(DEVICE):
        made = AutoModelForCausalLM.from_config(
            config(smoke), dtype=torch.bfloat16, attn_implementation="packed"
        ).eval()
    if checkpointing:
        checkpoint_activations(made)
    return LogProbModel(made, CHUNK)


def experience(groups: GROUPS, vocabulary: int) -> Experience:
    """A row of random tokens; the lengths of responses count the last token, which is predicted but not read."""
    luck = np.random.default_rng(0)
    assignments, completions = [], []
    for number, (prompt, responses) in enumerate(groups):
        tokens = [luck.integers(vocabulary, size=n).astype(np.int32) for n in responses]
        made = [Completion.of_one_version(str(number), t, np.zeros(len(t), np.float32), 0, "length") for t in tokens]
        text = Prompt(str(number), tuple(luck.integers(vocabulary, size=prompt).tolist()), "")
        rollout = Rollout(text, tuple(one.info() for one in made), None)
        assignments.append(Assignment(rollout, tuple(TrainingItem((i,), (1.0,)) for i in range(len(made)))))
        completions.append(made)
    return pack(assignments, completions, DEVICE)


def logprobs(table: Table, smoke: bool) -> None:
    """Chunked log-probs against a log-softmax over whole logits, both ways: time, memory, and how far they are apart."""
    sizes = [(40, 32, 300)] if smoke else [(8192, 896, 151936), (8192, 4096, 128256)]
    for tokens, width, vocabulary in sizes:
        generator = torch.Generator(DEVICE).manual_seed(0)

        def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
            made = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)  # noqa: B023 - called here
            return made.mul_(scale).requires_grad_()

        hidden, weight = random(tokens, width), random(vocabulary, width, scale=width**-0.5)
        targets = torch.randint(vocabulary, (tokens,), generator=generator, device=DEVICE)

        def naive() -> list[torch.Tensor]:
            logits = torch.nn.functional.linear(hidden, weight).float()  # noqa: B023 - called before the next size
            chosen = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]  # noqa: B023
            return [chosen, *torch.autograd.grad(chosen.mean(), (hidden, weight))]  # noqa: B023

        def chunked(chunk: int) -> list[torch.Tensor]:
            chosen = ChunkedLogProbs.apply(hidden, weight, None, targets, chunk, 1.0, None, False)[0]  # noqa: B023
            return [chosen, *torch.autograd.grad(chosen.mean(), (hidden, weight))]  # noqa: B023

        exact = [x.detach() for x in naive()]
        for name, call in {"naive": naive, "512": partial(chunked, 512), "2048": partial(chunked, 2048)}.items():
            found = call()
            gaps = [
                ((a - b).float().abs().max() / b.float().abs().max()).item() for a, b in zip(found, exact, strict=True)
            ]
            del found
            table.add(
                tokens=tokens, hidden=width, vocabulary=vocabulary, chunk=name, ms=timed(call, 1 if smoke else 5) * 1e3,
                peak_gb=peak(call), gap_logprobs=gaps[0], gap_gradients=max(gaps[1:]),
            )  # fmt: skip
        del exact


def rows(smoke: bool) -> dict[str, GROUPS]:
    """What a rank is given: pairs, groups of eight, and one text after the other."""
    unit = 4 if smoke else 512
    all_ = {
        "pairs": [(unit, (3 * unit // 2,) * 2)] * 4,
        "groups of 8": [(unit, (unit + unit // 2,) * 8)] * 2,
        "texts": [(unit, (3 * unit,))] * 8,
    }
    return {"pairs": all_["pairs"]} if smoke else all_


def operations(shape: ModelShape, row: Experience) -> float:
    """Of one forward and backward pass that computes nothing twice: 6 per weight and token, 12 per pair of tokens, layer and width."""
    tokens, predicted = row.input_ids.shape[1], len(row.targets)
    weights = shape.linear * tokens + shape.vocabulary * shape.hidden * predicted
    return 6 * weights + 12 * shape.layers * shape.queries * pairs(row.segments)


def step(table: Table, smoke: bool) -> None:
    """Optimizer steps with each form of attention: tokens per second, and operations per second as a part of the device's (MFU)."""
    shape, repeats = model_shape(config(smoke)), 1 if smoke else 5
    for checkpointing in (False, True):
        learner = model(smoke, checkpointing)
        optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-6, fused=True)
        with flex_anywhere():
            for name, groups in rows(smoke).items():
                row = experience(groups, shape.vocabulary)
                for form in ("varlen", "flex", "masked", "plain"):
                    if form != "varlen" or (GPU and not row.segments.branches):
                        named = {
                            "row": name,
                            "checkpointing": checkpointing,
                            "form": form,
                            "tokens": row.segments.total,
                        }
                        with forced(form):
                            attempt(
                                table,
                                named,
                                partial(_rate, partial(update, learner, optimizer, row), shape, row, repeats),
                            )
                        optimizer.zero_grad()


def update(learner: LogProbModel, optimizer: torch.optim.Optimizer, row: Experience) -> None:
    (-learner(row)[0].mean()).backward()
    optimizer.step()
    optimizer.zero_grad()


def _rate(call: Callable[[], None], shape: ModelShape, row: Experience, repeats: int) -> dict[str, float | None]:
    seconds = timed(call, repeats)
    rate = operations(shape, row) / seconds
    kind = visible_gpu([torch.cuda.get_device_name()]) if GPU else None
    return {
        "step_ms": seconds * 1e3,
        "tokens_per_s": row.segments.total / seconds,
        "tflops": rate / 1e12,
        "mfu": None if kind is None else rate / kind.flops,
        "peak_gb": peak(call),
    }


def memory(table: Table, smoke: bool) -> None:
    """What a forward and backward pass adds to the weights, against the planner's activations, head and gradients."""
    for checkpointing in (False, True):
        learner = model(smoke, checkpointing)
        shape = model_shape(config(smoke))
        for name, groups in rows(smoke).items():
            row = experience(groups, shape.vocabulary)
            tokens, group = row.input_ids.shape[1], row.segments.longest
            settings = PolicySettings(
                model="m", dtype="bf16", micro_batch_tokens=tokens, logprob_chunk_tokens=CHUNK,
                gradient_checkpointing=checkpointing,
            )  # fmt: skip
            planned = activations(shape, settings, group) + head(shape, settings) + 2 * shape.parameters

            def both_ways() -> None:
                (-learner(row)[0].mean()).backward()  # noqa: B023 - called before the next row

            both_ways()  # what is compiled or allocated for good
            learner.zero_grad()
            found = peak(both_ways)
            learner.zero_grad()
            table.add(
                row=name, checkpointing=checkpointing, tokens=tokens, peak_gb=found, planned_gb=planned / 1e9,
                planned_over_peak=None if found is None else planned / 1e9 / found,
            )  # fmt: skip


def with_deepspeed(table: Table, smoke: bool) -> None:
    """The real trainer on one rank: seconds of a step, and what it holds, against the planner's whole policy."""
    if importlib.util.find_spec("deepspeed") is None:
        table.add(left_out="DeepSpeed is not installed")
        return
    import deepspeed

    from rlhf.preflight.memory import model_states
    from rlhf.training.deepspeed import Trainer

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    deepspeed.init_distributed(dist_backend="nccl" if GPU else "gloo", verbose=False)
    shape = model_shape(config(smoke))
    for stage in (0, 2):
        settings = PolicySettings(model="m", dtype="bf16", zero_stage=stage, logprob_chunk_tokens=CHUNK)
        before = torch.cuda.memory_allocated() if GPU else 0
        trainer = Trainer(model(smoke, False), settings, 100)
        name, groups = next(iter(rows(smoke).items()))
        row = experience(groups, shape.vocabulary)

        def update() -> None:
            trainer.backward(-trainer.forward(row)[0].mean())  # noqa: B023 - called before the next stage
            trainer.step()  # noqa: B023

        seconds = timed(update, 1 if smoke else 5)
        held = (torch.cuda.memory_allocated() - before) / 1e9 if GPU else None
        states = model_states(shape, settings)
        table.add(
            row=name, zero_stage=stage, tokens=row.input_ids.shape[1], step_ms=seconds * 1e3, held_gb=held,
            planned_weights_and_optimizer_gb=(states.weights + states.optimizer) / 1e9, step_peak_gb=peak(update),
        )  # fmt: skip


def machine(table: Table, smoke: bool) -> None:
    """What this is, and the ceilings: the rate of a large bf16 product, and of a copy."""
    import transformers

    size = 256 if smoke else 8192
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = timed(partial(torch.matmul, a, b), 1 if smoke else 10)
    big = torch.empty(2**20 if smoke else 2**32, dtype=torch.uint8, device=DEVICE)
    copy = timed(big.clone, 1 if smoke else 10)
    name = torch.cuda.get_device_name() if GPU else "CPU"
    for what, value in _facts(transformers.__version__, name):
        table.add(what=what, value=value)
    table.add(what="bf16 product, TFLOP/s", value=2 * size**3 / product / 1e12)
    table.add(what="copy, read and written, GB/s", value=2 * big.numel() / copy / 1e9)


def _facts(transformers: str, device: str) -> Iterator[tuple[str, str]]:
    yield "device", device
    yield "torch", torch.__version__
    yield "CUDA", str(torch.version.cuda)
    yield "transformers", transformers
    yield "of what is not needed, imported", " ".join(sorted(UNNEEDED & sys.modules.keys()))
    if GPU:
        yield "memory, GB", f"{torch.cuda.get_device_properties(0).total_memory / 1e9:.1f}"
