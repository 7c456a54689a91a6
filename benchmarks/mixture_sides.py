"""One way of sampling from a mixture: a child of `mixture_decoding.py`, prints one result.

All sides draw the same number of responses of the same length to the same prompts, end-of-sequence or not, at temperature 1
over the whole vocabulary. The median of three repetitions counts, after one that does not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import workload
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LogitsProcessor, LogitsProcessorList

from rlhf.config.settings import Settings

REPEATS = 3
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def in_vllm(args: argparse.Namespace, prompts: list[list[int]], mixes: bool) -> Callable[[], None]:
    """Our engine's own arguments, model and logits processor, under vLLM's offline interface, which can ignore the end of
    a sequence. Log-probs are returned, as training needs them."""
    from rlhf.cluster.devices import claim_threads
    from rlhf.engines.arguments import engine_arguments
    from rlhf.engines.plugin import register
    from rlhf.engines.sampling import MIXTURE_ARGUMENT
    from rlhf.rollout.spec import rollout_environment, rollout_spec

    settings = Settings(
        data={"prompts": str(args.prompts), "max_prompt_tokens": max(map(len, prompts))},
        policy={"model": args.model, "dtype": args.dtype},
        rollout={"max_tokens": args.tokens, "cpu_kv_cache_gb": 2},
        reward={"kind": "function", "path": "workload:reward"},
    )
    os.environ |= rollout_environment(settings, local=False)
    claim_threads(os.environ)  # all cores, as in the pool; by default vLLM leaves one to others
    from vllm import LLM, SamplingParams

    register()
    spec = rollout_spec(settings, args.model, backend="local", gpu=False, local=True, mixes=mixes)
    engine = LLM(**engine_arguments(spec))
    draws = iter(range(1_000_000))

    def sample() -> None:
        params = [
            SamplingParams(
                max_tokens=args.tokens,
                ignore_eos=True,
                seed=next(draws),
                logprobs=0,
                detokenize=False,
                extra_args={MIXTURE_ARGUMENT: args.beta} if mixes else None,
            )
            for _ in prompts
        ]
        engine.reset_prefix_cache()  # every repetition reads its prompts anew
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == args.tokens for output in outputs)

    return sample


class MixIn(LogitsProcessor):
    """Mixes a second model into `generate`: after each step of the first one it runs on the same tokens."""

    def __init__(self, partner: torch.nn.Module, mask: torch.Tensor, beta: float, cached: bool):
        self.partner, self.mask, self.beta = partner, mask, beta
        self.cache = DynamicCache(config=partner.config) if cached else None

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        mask = torch.nn.functional.pad(self.mask, (0, input_ids.shape[1] - self.mask.shape[1]), value=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        start = 0 if self.cache is None else self.cache.get_seq_length()
        logits = self.partner(
            input_ids[:, start:],
            attention_mask=mask,
            position_ids=positions[:, start:],
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            logits_to_keep=1,
        ).logits[:, -1]
        return torch.lerp(scores.float(), logits.float(), self.beta).log_softmax(-1)


def in_transformers(args: argparse.Namespace, prompts: list[list[int]], cached: bool) -> Callable[[], None]:
    """`generate` on one model with the other mixed in."""
    policy, partner = (
        AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype]).eval() for _ in range(2)
    )
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])

    def sample() -> None:
        rows = policy.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=args.tokens,
            eos_token_id=None,
            pad_token_id=0,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            use_cache=cached,
            logits_processor=LogitsProcessorList([MixIn(partner, mask, args.beta, cached)]),
        )
        assert rows.shape[1] == longest + args.tokens

    return sample


def main() -> None:
    """Time one side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=["mixture", "plain", "cache", "no_cache"], required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--beta", type=float, required=True)
    parser.add_argument("--dtype", required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in workload.read_prompts(args.prompts)[: args.requests]
    ]
    if args.side in ("mixture", "plain"):
        sample = in_vllm(args, prompts, mixes=args.side == "mixture")
    else:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        sample = in_transformers(args, prompts, cached=args.side == "cache")
    seconds = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        sample()
        seconds.append(time.perf_counter() - start)
    middle = statistics.median(seconds[1:])
    workload.report(tokens_per_s=len(prompts) * args.tokens / middle, seconds=seconds)


if __name__ == "__main__":
    main()
