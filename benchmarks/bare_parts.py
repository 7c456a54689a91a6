"""The work that one step cannot do without, each part alone: a child of `online_dpo_vs_trl.py`, prints one result.

vLLM generates a step's responses; plain transformers forwards them once without gradients (the reference), and once
with forward and backward (the policy); AdamW takes one step on fp32 master weights. Rows are padded on the right, each
holding its own copy of the prompt, and all logits are made: what one writes without thinking of speed. Of one whole
batch and eight rows at a time the quicker one counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import workload
from transformers import AutoModelForCausalLM, AutoTokenizer

REPEATS = 3
ROWS = (32, 8)

Sequences = list[tuple[list[int], list[int]]]  # prompt and response token ids


def generate(model: str, prompts: list[list[int]], max_tokens: int) -> tuple[float, float, Sequences]:
    """Median seconds and mean response tokens of a step's generation in a warm engine, and the last responses."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model, dtype="bfloat16", enforce_eager=True, max_model_len=512, max_num_seqs=64, disable_log_stats=True
    )
    seconds, tokens, sequences = [], [], []
    for repeat in range(1 + REPEATS):
        settings = [
            SamplingParams(
                n=workload.SAMPLES_PER_PROMPT,
                max_tokens=max_tokens,
                temperature=1.0,
                seed=repeat * len(prompts) + i,
            )
            for i in range(len(prompts))
        ]
        start = time.perf_counter()
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
        sequences = [
            (ids, list(answer.token_ids))
            for ids, output in zip(prompts, outputs, strict=True)
            for answer in output.outputs
        ]
        tokens.append(sum(len(response) for _, response in sequences))
    return statistics.median(seconds[1:]), statistics.mean(tokens[1:]), sequences


def padded(sequences: Sequences, pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and response mask, each [rows, longest]."""
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    ids = torch.full((len(sequences), longest), pad)
    attended, answered = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        attended[row, :end] = 1
        answered[row, len(prompt) : end] = 1
    return ids, attended, answered


def log_ratio(model: Any, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """A scalar with the arithmetic of a preference loss: response log-probs, every other row counted negative."""
    ids, attended, answered = batch
    logits = model(input_ids=ids, attention_mask=attended, use_cache=False).logits[:, :-1]
    logprobs = torch.gather(logits.float().log_softmax(-1), 2, ids[:, 1:, None]).squeeze(2) * answered[:, 1:]
    sign = torch.ones(len(ids))
    sign[1::2] = -1
    return (logprobs.sum(1) * sign).mean()


def seconds_of(work: Callable[[], object]) -> float:
    """Median seconds of `work`, after one call that is not counted."""
    seconds = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def train(model: str, sequences: Sequences, pad: int) -> dict[str, float]:
    """Median seconds of reference forward, forward and backward, and optimizer step."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    reference_seconds, learning_seconds = [], []
    for rows in ROWS:
        batches = [padded(sequences[i : i + rows], pad) for i in range(0, len(sequences), rows)]

        @torch.no_grad()
        def forward(batches: list = batches) -> None:
            for batch in batches:
                log_ratio(policy, batch)

        def forward_backward(batches: list = batches) -> None:
            policy.zero_grad()
            for batch in batches:
                log_ratio(policy, batch).backward()

        reference_seconds.append(seconds_of(forward))
        learning_seconds.append(seconds_of(forward_backward))
    weights = list(policy.parameters())
    masters = [weight.detach().float() for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=workload.LEARNING_RATE)

    @torch.no_grad()
    def optimizer_step() -> None:
        for master, weight in zip(masters, weights, strict=True):
            master.grad = weight.grad.float()
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        for master, weight in zip(masters, weights, strict=True):
            weight.copy_(master)

    return {
        "reference_forward": min(reference_seconds),
        "forward_backward": min(learning_seconds),
        "optimizer": seconds_of(optimizer_step),
    }


def main() -> None:
    """Time all parts on the last step's prompts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--prompts-per-step", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in workload.read_prompts(args.prompts)[-args.prompts_per_step :]
    ]
    generating, tokens, sequences = generate(args.model, prompts, args.max_tokens)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    workload.report(parts={"generate": generating} | train(args.model, sequences, pad), tokens=tokens)


if __name__ == "__main__":
    main()
