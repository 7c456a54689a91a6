"""One run of TRL's OnlineDPOTrainer on the workload: a child of `online_dpo_vs_trl.py`, prints a result per step."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import workload
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer


class Trainer(OnlineDPOTrainer):
    """Takes the prompts in file order, as the other side does."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


class Stopwatch(TrainerCallback):
    """Prints each counted step, and counts response tokens as a reward function, which is where TRL shows them."""

    __name__ = "stopwatch"

    def __init__(self, eos: int):
        self.eos, self.tokens, self.last = eos, 0, 0.0

    def __call__(self, prompts: list, completions: list, completion_ids: list[list[int]], **_: Any) -> list[float]:
        for ids in completion_ids:
            self.tokens += ids.index(self.eos) + 1 if self.eos in ids else len(ids)
        return [workload.reward("", completion[0]["content"]) for completion in completions]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        now = time.perf_counter()
        if state.global_step > workload.WARMUP_STEPS:
            workload.report(seconds=now - self.last, tokens=self.tokens, trl=version("trl"))
        self.last, self.tokens = now, 0


def main() -> None:
    """Run the steps, each on the next prompts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--prompts-per-step", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--autocast", action="store_true", help="TRL's own bf16 switch, on top of bf16 weights")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    prompts = workload.read_prompts(args.prompts)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    stopwatch = Stopwatch(tokenizer.eos_token_id)
    with tempfile.TemporaryDirectory() as folder:
        config = OnlineDPOConfig(
            output_dir=folder,
            per_device_train_batch_size=args.prompts_per_step,
            gradient_accumulation_steps=1,
            max_steps=args.steps,
            max_new_tokens=args.max_tokens,
            temperature=1.0,
            top_k=0,
            beta=workload.BETA,
            learning_rate=workload.LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            optim="adamw_torch",
            bf16=args.autocast,
            gradient_checkpointing=False,
            use_cpu=True,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16),
            reward_funcs=stopwatch,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in prompts]),
            processing_class=tokenizer,
            callbacks=[stopwatch],
        )
        trainer.train()


if __name__ == "__main__":
    main()
