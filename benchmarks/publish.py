"""Seconds of publishing weights over gloo, against a bare broadcast of the same bytes, on this machine.

A sender and its receivers, each a process on a core of its own (with too few cores, receivers share one), publish SmolLM2-135M (random
values) with the project's own ends, and broadcast one tensor of as many bytes over a group of the same kind, in turns. Under ZeRO-3 the
weights are partitioned over two DeepSpeed ranks, of which the first sends. benchmarks/README.md says what is counted, and how to run it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

import workload
from online_dpo_vs_trl import HERE, spread

from rlhf.cluster.network import free_port
from rlhf.tracking.manifest import processor
from rlhf.training.weights import GATHER_ELEMENTS
from rlhf.transfer.gloo import CAPACITY

CORES = len(os.sched_getaffinity(0))
CASES: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bf16", "receivers": 1, "policy_ranks": 1},
    "fp32": {"dtype": "fp32", "receivers": 1, "policy_ranks": 1},
    "bf16_two_receivers": {"dtype": "bf16", "receivers": 2, "policy_ranks": 1},
    "zero3": {"dtype": "bf16", "receivers": 1, "policy_ranks": 2},
}


def main() -> None:
    """Run the cases, print the ratios, write them to the file that `--json` names."""
    args = parse()
    cases = {name: run(args, **CASES[name]) for name in args.cases}
    for name, case in cases.items():
        print(f"\n{name}: {case['parts']['bytes'] / 1e6:.0f} MB")
        for ratio, values in case["ratio"].items():
            print(f"  {ratio:30} median {values['median']:.3f}   (min {values['min']:.3f}, max {values['max']:.3f})")
        alone = {part: seconds for part, seconds in case["parts"].items() if part not in ("bytes", "meetings")}
        for side in case["rounds"][0]:
            busy = ", ".join(f"{end} {1e3 * seconds[side]:.0f}" for end, seconds in case["processor"].items())
            print(f"  {side}: {1e3 * statistics.median(one[side] for one in case['rounds']):.0f} ms; processor: {busy}")
        print("  alone, ms: " + ", ".join(f"{part} {1e3 * seconds:.0f}" for part, seconds in alone.items()))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        ratio = {f"{name}_{key}": value for name, case in cases.items() for key, value in case["ratio"].items()}
        setting = {
            "cores": CORES,
            "processor": processor(),
            "torch": version("torch"),
            "bucket": args.bucket,
            "gather": args.gather,
            "load_average": os.getloadavg()[1],  # over the last five minutes
        }
        result = {"benchmark": Path(__file__).stem, "ratio": ratio, "setting": setting, "cases": cases}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the ratios and all raw numbers there")
    parser.add_argument("--rounds", type=int, default=9, help="of each case (default: 9)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="(default: all)")
    parser.add_argument(
        "--bucket", type=int, default=CAPACITY, help="bytes of a bucket, at all ends (default: %(default)s)"
    )
    parser.add_argument(
        "--gather",
        type=int,
        default=GATHER_ELEMENTS,
        help="elements that ZeRO-3 gathers at a time (default: %(default)s)",
    )
    return parser.parse_args()


def run(args: argparse.Namespace, dtype: str, receivers: int, policy_ranks: int) -> dict[str, Any]:
    """One case: the rounds' seconds, the ratios, and the seconds of each part alone."""
    ports = {name: free_port() for name in ("port", "meeting-port", "policy-port")}
    common = {
        **ports,
        "ends": 1 + receivers,
        "rounds": args.rounds,
        "dtype": dtype,
        "bucket": args.bucket,
        "gather": args.gather,
    }
    roles: list[dict[str, int]] = [{"rank": 0}, *({"rank": rank} for rank in range(1, 1 + receivers))]
    if policy_ranks > 1:
        roles[0]["policy-rank"] = 0
        roles.append({"policy-rank": 1})
    # Where there are too few cores, all but the sender share the last one.
    children = [start(common | role | {"core": min(number, CORES - 1)}) for number, role in enumerate(roles)]
    found = [line for output in finish(children) for line in workload.results(output)]
    parts: dict[str, float] = {}
    for line in found:
        if line["kind"] == "parts":
            parts |= {name: value for name, value in line.items() if name != "kind"}
    if len({line["fingerprint"] for line in found if line["kind"] == "round"}) != 1:
        sys.exit("what was published is not what arrived")
    ends = [[line for line in found if line["kind"] == "round" and line["rank"] == rank] for rank in (0, 1)]
    rounds = [line["seconds"] for line in ends[0]]
    ratio = {f"{side}_over_publish": spread([one[side] / one["publish"] for one in rounds]) for side in rounds[0]}
    del ratio["publish_over_publish"]
    processor = {
        end: {side: statistics.median(line["processor"][side] for line in lines) for side in rounds[0]}
        for end, lines in zip(("sender", "receiver"), ends, strict=True)
    }
    return {"ratio": ratio, "parts": parts, "processor": processor, "rounds": rounds}


def start(options: dict[str, Any]) -> subprocess.Popen[str]:
    """A process of one role."""
    command = [sys.executable, str(HERE / "publish_ends.py"), *(f"--{name}={value}" for name, value in options.items())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(children: list[subprocess.Popen[str]]) -> list[str]:
    """What they printed. If one fails, the others end too, and this process with its last words."""
    with ThreadPoolExecutor(len(children)) as pool:
        ending = {pool.submit(child.communicate): child for child in children}
        for future in as_completed(ending):
            child = ending[future]
            if child.returncode:
                for other in children:
                    other.kill()
                sys.exit(f"{' '.join(map(str, child.args))}\n{future.result()[1][-3000:]}")
        return [future.result()[0] for future in ending]


if __name__ == "__main__":
    main()
