"""What `planner_accuracy.py` measures, each part in a process of its own: bytes as DeepSpeed, torch and vLLM really hold them, and seconds.

Every part prints one line through `workload.report`. Run it through `planner_accuracy.py`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from workload import report

PROMPT, RESPONSE, RESPONSES = 64, 96, 2
"""Tokens of the groups that are packed into a micro-batch."""
MATMULS = 20


def main() -> None:
    """Run the part that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["make", "states", "activations", "cache", "learn"])
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--cache-gb", type=float, default=0.25)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    parts = {"make": make, "states": states, "activations": kept_activations, "cache": cache, "learn": learn}
    parts[args.part](args)


def make(args: argparse.Namespace) -> None:
    """A Llama with random weights and untied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=args.hidden,
        intermediate_size=11 * args.hidden // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(args.model)
    report(parameters=LlamaForCausalLM(config).num_parameters())


def experience(tokens: int, vocabulary: int) -> Any:
    """A packed row of groups, about `tokens` long."""
    from rlhf.training.packing import pack
    from rlhf.types import Assignment, Completion, Prompt, Rollout, TrainingItem

    rng = np.random.default_rng(0)
    assignments, completions = [], []
    for number in range(max(1, tokens // (PROMPT + RESPONSES * RESPONSE))):
        made = [
            Completion.of_one_version(
                str(number),
                rng.integers(vocabulary, size=RESPONSE).astype(np.int32),
                np.zeros(RESPONSE, np.float32),
                0,
                "length",
            )
            for _ in range(RESPONSES)
        ]
        prompt = Prompt(str(number), tuple(rng.integers(vocabulary, size=PROMPT).tolist()), "")
        rollout = Rollout(prompt, tuple(one.info() for one in made), None)
        assignments.append(Assignment(rollout, tuple(TrainingItem((i,), (1.0,)) for i in range(RESPONSES))))
        completions.append(made)
    return pack(assignments, completions, torch.device("cpu"))


def states(args: argparse.Namespace) -> None:
    """Bytes of all tensors that a policy rank holds after a backward pass in which the optimizer's states already exist."""
    import deepspeed

    from rlhf.config.policy import PolicySettings
    from rlhf.training.deepspeed import Frozen, Trainer
    from rlhf.training.loading import load_causal_lm
    from rlhf.training.model import LogProbModel

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    ranks = int(os.environ["WORLD_SIZE"])
    settings = PolicySettings(model=str(args.model), dtype=args.dtype, ranks=ranks, zero_stage=args.stage)

    def load() -> LogProbModel:
        return LogProbModel(load_causal_lm(str(args.model), args.dtype), 64)

    row = experience(256, 8192)
    before = held()
    trainer = Trainer(load(), settings, 10)
    reference = Frozen(load(), settings, trainer.device)
    reference.forward(row)
    for number in range(2):
        logprobs, _ = trainer.forward(row)
        trainer.backward(-logprobs.sum() / 100)
        del logprobs
        found = {key: size for key, size in held().items() if key not in before}
        if number == 0:
            trainer.step()
    buckets = [size for size in found.values() if size % 500_000_000 == 0]
    report(rank=int(os.environ["RANK"]), bytes=sum(found.values()) - sum(buckets), buckets=sum(buckets))


def held() -> dict[int, int]:
    """Address -> bytes of every storage that some tensor in this process keeps."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) not in (torch.Tensor, torch.nn.Parameter) or thing.device.type != "cpu":
            continue
        for tensor in (thing, thing.grad if thing.is_leaf else None):
            if tensor is not None:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


def kept_activations(args: argparse.Namespace) -> None:
    """Bytes that autograd keeps after the forward pass, and how far the process grows until the end of the backward pass."""
    from rlhf.training.loading import load_causal_lm
    from rlhf.training.model import LogProbModel, checkpoint_activations

    causal_lm = load_causal_lm(str(args.model), args.dtype)
    if args.checkpointing:
        checkpoint_activations(causal_lm)
    model = LogProbModel(causal_lm, 256)
    row = experience(args.tokens, causal_lm.config.vocab_size)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    model(experience(256, causal_lm.config.vocab_size))[
        0
    ].sum().backward()  # libraries allocate their own buffers, gradients exist
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ctypes.CDLL(None).malloc_trim(0)  # give back what is free, so that growth is seen
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident size so far
    before = resident("VmRSS")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, _ = model(row)
    logprobs.sum().backward()
    report(tokens=row.input_ids.shape[1], kept=sum(kept.values()), grown=resident("VmHWM") - before)


def resident(name: str) -> int:
    """A size of this process in bytes, from /proc."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def cache(args: argparse.Namespace) -> None:
    """Tokens that vLLM has room for in a key-value cache of a given size."""
    from rlhf.config import Settings
    from rlhf.engines.start import start_engine
    from rlhf.rollout.spec import rollout_spec

    settings = Settings.model_validate(
        {
            "data": {"prompts": "unused", "max_prompt_tokens": 128},
            "policy": {"model": str(args.model), "dtype": args.dtype},
            "reward": {"path": "unused"},
            "rollout": {"max_tokens": 128, "cpu_kv_cache_gb": args.cache_gb},
            "cluster": {"device": "cpu"},
        }
    )
    spec = rollout_spec(settings, str(args.model), backend="local", gpu=False, local=True)
    engine = start_engine(spec, in_process=True)
    config = engine._llm.vllm_config.cache_config
    report(tokens=config.num_gpu_blocks * config.block_size, block=config.block_size)
    engine.close()


def learn(args: argparse.Namespace) -> None:
    """Seconds of the reference's forward and the policy's forward and backward pass, and this machine's rate of matrix products."""
    from rlhf.training.loading import load_causal_lm
    from rlhf.training.model import LogProbModel

    causal_lm = load_causal_lm(str(args.model), args.dtype)
    model = LogProbModel(causal_lm, 256)
    config, row = causal_lm.config, experience(args.tokens, causal_lm.config.vocab_size)

    def step() -> None:
        with torch.no_grad():
            model(row)
        model(row)[0].sum().backward()

    step()
    rate = matmul_rate(row.input_ids.shape[1], config.hidden_size, config.intermediate_size)
    seconds = min(timed(step) for _ in range(3))
    report(tokens=row.input_ids.shape[1], groups=len(row.segments), seconds=seconds, flops=rate)


def matmul_rate(rows: int, inner: int, outer: int) -> float:
    """fp32 operations per second of matrix products as large as those of the model's feed-forward layers."""
    left, right = torch.randn(rows, inner), torch.randn(inner, outer)
    torch.mm(left, right)

    def products() -> None:
        for _ in range(MATMULS):
            torch.mm(left, right)

    return MATMULS * 2 * rows * inner * outer / min(timed(products) for _ in range(3))


def timed(work: Callable[[], None]) -> float:
    """Seconds of this process's own processor time in one call: on one thread, what others do to the machine does not count."""
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
