"""A step of this checkout and of an earlier one: our side of `online_dpo_vs_trl.py`, run by the Pythons of two environments in turns."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import workload
from online_dpo_vs_trl import add_work, all_steps, child, describe, median_seconds, run_rlhf, setting, spread

from rlhf.data.assets import resolve


def main() -> None:
    """Run the rounds, print the ratio, write it to the file that `--json` names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", metavar="PYTHON", help="of an environment in which the earlier checkout is installed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the ratio and all raw numbers there")
    parser.add_argument("--rounds", type=int, default=3, help="paired repetitions (default: 3)")
    parser.add_argument("--steps", type=int, default=5, help="counted steps of each side in a round (default: 5)")
    parser.add_argument("--debug", action="store_true", help="in one process (`rlhf train --debug`), not in Ray")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="settings of both sides")
    add_work(parser)
    parser.set_defaults(trl_autocast=False)  # for the setting that is written down
    args = parser.parse_args()
    pythons = {"before": args.before, "after": sys.executable}
    packages = {
        side: child([python, "-c", "import rlhf; print(rlhf.__file__)"]).strip() for side, python in pythons.items()
    }
    if len(set(packages.values())) < 2:
        parser.error(
            f"both environments run the same package, {packages['after']}: install the earlier checkout in one of its own"
        )
    model, source = resolve("asset:smollm2-135m-instruct"), Path(resolve("asset:movie-reviews/train_prompts.jsonl"))
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        workload.write_prompts(source, prompts, all_steps(args) * args.prompts_per_step)
        for number in range(1, args.rounds + 1):
            found = {}
            for side in ("before", "after") if number % 2 else ("after", "before"):
                run_folder = Path(folder) / f"{side}-{number}"
                found[side] = run_rlhf(args, model, prompts, run_folder, pythons[side])
                print(f"round {number}: {side:6}  {describe(found[side])}", flush=True)
            ratio = median_seconds(found["after"]) / median_seconds(found["before"])
            rounds.append(found | {"ratio": {"seconds_per_step_after_over_before": ratio}})
    ratios = spread([one["ratio"]["seconds_per_step_after_over_before"] for one in rounds])
    print(
        f"seconds_per_step_after_over_before {ratios['median']:.3f} (min {ratios['min']:.3f}, max {ratios['max']:.3f})"
    )
    if args.json is not None:
        summary = {"seconds_per_step_after_over_before": ratios}
        text = {"benchmark": Path(__file__).stem, "ratio": summary, "setting": setting(args), "rounds": rounds}
        args.json.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
