"""Sampling ahead of learning against taking turns: the same steps with `loop.staleness` 0 and above, in turns, on this machine.

Engine and trainer compute on a core each (`cluster.threads` 1), whichever of the two is at work; so a synchronous step leaves one of them
idle at any time. The responses' lengths have a long tail of their own: most prompts want a short answer, which ends where the model ends
it, and some a story, which goes on to the limit. Real Ray, vLLM and DeepSpeed. benchmarks/README.md says what is measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import workload
from online_dpo_vs_trl import child, machine, spread

from rlhf.data.assets import resolve
from rlhf.tracking import jsonl
from rlhf.tracking.spans import busy_s

SHORT = 'Is this good or bad? Answer with one word: "{}"'
LONG = 'Write a long story that begins with these words: "{}"'
PROMPT_TOKENS = 96


def main() -> None:
    """Run the rounds, print what was found, write it to the file that `--json` names."""
    args = parse()
    sides = [0, *args.staleness]
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        write_prompts(
            prompts, (workload.WARMUP_STEPS + args.steps + max(sides)) * args.prompts_per_step, args.long_every
        )
        for number in range(1, args.rounds + 1):
            found: dict[str, Any] = {}
            for bound in sides if number % 2 else reversed(sides):
                found[name_of(bound)] = run(args, bound, prompts, Path(folder) / f"round-{number}-{bound}")
                print(f"round {number}: {describe(name_of(bound), found[name_of(bound)])}", flush=True)
            rounds.append(found | {"ratio": ratios(found)})
    summary = {name: spread([one["ratio"][name] for one in rounds]) for name in rounds[0]["ratio"]}
    for name, values in summary.items():
        print(f"{name:40} median {values['median']:.3f}   (min {values['min']:.3f}, max {values['max']:.3f})")
    if args.json is not None:
        setting = machine() | {name: value for name, value in vars(args).items() if name != "json"}
        text = {"benchmark": Path(__file__).stem, "ratio": summary, "setting": setting, "rounds": rounds}
        args.json.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the ratios and all raw numbers there")
    parser.add_argument("--rounds", type=int, default=2, help="paired repetitions (default: 2)")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each side in a round (default: 3)")
    parser.add_argument(
        "--staleness", type=int, nargs="*", default=[1], help="bounds to compare with the synchronous loop (default: 1)"
    )
    parser.add_argument("--prompts-per-step", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8, help="of each prompt, two of which are learned from")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--long-every", type=int, default=4, metavar="N", help="every N-th prompt wants a story")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="settings of all sides")
    return parser.parse_args()


def name_of(bound: int) -> str:
    """Of a side, in the results."""
    return f"staleness_{bound}"


def write_prompts(target: Path, count: int, long_every: int) -> None:
    """So many different prompts; every `long_every`-th wants a long answer."""
    source = Path(resolve("asset:movie-reviews/train_prompts.jsonl"))
    lines = source.read_text(encoding="utf-8").splitlines()
    words = [re.search('"(.*)"', json.loads(line)["prompt"]) for line in lines]
    texts = dict.fromkeys(match.group(1) for match in words if match is not None)
    if len(texts) < count:
        raise ValueError(f"{source} has {len(texts)} different beginnings, and {count} are needed")
    asked = [
        (LONG if place % long_every == 0 else SHORT).format(text)
        for place, text in zip(range(count), texts, strict=False)
    ]
    target.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked), encoding="utf-8")


def run(args: argparse.Namespace, bound: int, prompts: Path, folder: Path) -> dict[str, Any]:
    """One run with this bound: what its counted steps came to. After the last counted step there are as many as sampling may be ahead: for
    those there is nothing left to sample."""
    settings = {
        "run": {"dir": str(folder)},
        "data": {"prompts": str(prompts), "shuffle": False, "max_prompt_tokens": PROMPT_TOKENS},
        "policy": {
            "model": "asset:smollm2-135m-instruct",
            "dtype": "bf16",
            "learning_rate": workload.LEARNING_RATE,
            "micro_batch_tokens": PROMPT_TOKENS
            + 2 * args.max_tokens,  # the least that may be, for pieces that come early
        },
        "rollout": {"max_tokens": args.max_tokens},
        "reward": {"kind": "function", "path": "workload:reward"},
        "algorithm": {"samples_per_prompt": args.samples, "pairing": "best_vs_worst", "beta": workload.BETA},
        "loop": {
            "steps": workload.WARMUP_STEPS + args.steps + bound,
            "prompts_per_step": args.prompts_per_step,
            "staleness": bound,
        },
        "checkpoint": {"every": 0, "export": False},
        "tracking": {"console": "off"},
        "cluster": {"threads": 1},
    }
    config = folder.with_suffix(".yaml")
    config.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    child([sys.executable, "-m", "rlhf.cli", "train", str(config), *args.set])
    return measured(jsonl.read(folder / "metrics.jsonl"), jsonl.read(folder / "spans.jsonl"), args.steps)


def measured(steps: Sequence[dict[str, Any]], spans: Sequence[dict[str, Any]], count: int) -> dict[str, Any]:
    """What the counted steps came to.

    A part is busy while it does what it is there for: the engine while it has a response to write, the policy while it learns. Publishing
    counts for neither, though both take part in it.

    Args:
        steps: the lines of metrics.jsonl.
        spans: those of spans.jsonl.

    Returns:
        seconds_per_step: wall time of all counted steps over their number.
        busy: part -> share of that time.
        busy_seconds_per_step: the same in seconds.
        longer: the part that is busy longer, and bubble: the share of the time in which it is not.
        lengths: percentiles of the responses' lengths, in tokens.
    """
    last_warm_up = next(line for line in steps if line["step"] == workload.WARMUP_STEPS)
    counted = [line for line in steps if workload.WARMUP_STEPS < line["step"] <= workload.WARMUP_STEPS + count]
    window = (last_warm_up["time"], counted[-1]["time"])
    times = {
        what: [(one["start"], one["stop"]) for one in spans if one["what"] == what]
        for what in ("sample", "learn", "publish")
    }
    seconds, publish = window[1] - window[0], busy_s(times["publish"], *window)
    busy = {
        "engine": busy_s([*times["sample"], *times["publish"]], *window) - publish,
        "policy": busy_s(times["learn"], *window),
    }
    longer = max(busy, key=busy.__getitem__)
    lengths = [tokens for span in spans if span["what"] == "sample" for tokens in span["tokens"]]
    return {
        "seconds_per_step": seconds / count,
        "tokens_per_s": sum(line["rollout/tokens"] for line in counted) / seconds,
        "busy": {part: value / seconds for part, value in busy.items()},
        "busy_seconds_per_step": {part: value / count for part, value in busy.items()},
        "publish_seconds_per_step": publish / count,
        "longer": longer,
        "bubble": 1 - busy[longer] / seconds,
        "steps": [
            {"seconds": line["time"] - before["time"], "tokens": line["rollout/tokens"]}
            for before, line in pairwise([last_warm_up, *counted])
        ],
        "lengths": {str(share): float(np.percentile(lengths, share)) for share in (10, 50, 75, 90, 99, 100)},
    }


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Of one round.

    For each bound: seconds per step over the synchronous loop's; the bubble; seconds per step over those in which the longer part is busy,
    and over the longer of the two parts of the synchronous loop, where each has the machine to itself.
    """
    synchronous = found[name_of(0)]
    alone = max(synchronous["busy_seconds_per_step"].values())
    values = {"staleness_0/bubble": synchronous["bubble"]}
    for name, side in found.items():
        if name == name_of(0):
            continue
        values |= {
            f"{name}/seconds_over_synchronous": side["seconds_per_step"] / synchronous["seconds_per_step"],
            f"{name}/tokens_per_s_over_synchronous": side["tokens_per_s"] / synchronous["tokens_per_s"],
            f"{name}/bubble": side["bubble"],
            f"{name}/step_over_longer_part": 1 / (1 - side["bubble"]),
            f"{name}/step_over_longer_part_alone": side["seconds_per_step"] / alone,
        }
    return values


def describe(name: str, side: dict[str, Any]) -> str:
    """A side's round in a line."""
    busy = ", ".join(f"{part} busy {share:.0%}" for part, share in side["busy"].items())
    return f"{name}: {side['seconds_per_step']:.2f} s a step, {side['tokens_per_s']:.1f} tokens/s, {busy}; bubble {side['bubble']:.0%}"


if __name__ == "__main__":
    main()
