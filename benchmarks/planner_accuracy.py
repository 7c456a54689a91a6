"""How far `rlhf plan` is off: its estimates against bytes and seconds measured on this machine, without a GPU.

States of a policy rank at every ZeRO stage (two DeepSpeed ranks, all tensors counted), activations with and without gradient
checkpointing (what autograd keeps, and how far the process grows), room in vLLM's key-value cache, and the time of a learning
step of two models from one measured rate of matrix products. docs/plan.md states what was found.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from online_dpo_vs_trl import CHILD_S, CORES, HERE
from planner_parts import PROMPT, RESPONSE, RESPONSES
from transformers import AutoConfig

from rlhf.cluster.devices import compute_env
from rlhf.cluster.gpus import GpuKind
from rlhf.config.cluster import ClusterSettings
from rlhf.config.policy import PolicySettings
from rlhf.config.rollout import RolloutSettings
from rlhf.data.assets import resolve
from rlhf.preflight.memory import BYTES, activations, engine_memory, head, model_states
from rlhf.preflight.speed import Assumptions, Learners, Work, learn_s
from rlhf.tracking.manifest import processor
from rlhf.training.shapes import ModelShape, model_shape

RANKS = 2
PARTS = ("states", "activations", "cache", "learn")
SMOLLM = "asset:smollm2-135m-instruct"


def main() -> None:
    """Measure, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="which parts (default: all)")
    parser.add_argument("--tokens", type=int, default=1024, help="of a micro-batch (default: 1024)")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in args.parts:
            found[part] = {"states": states, "activations": kept, "cache": cache, "learn": learn}[part](
                Path(folder), args.tokens
            )
            for row in found[part]:
                print(part, " ".join(f"{name} {_shown(value)}" for name, value in row.items()), flush=True)
    if args.json is not None:
        setting = {
            "cores": CORES,
            "python": platform.python_version(),
            "processor": processor(),
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"benchmark": Path(__file__).stem, "setting": setting, "parts": found}, indent=2) + "\n"
        )


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def compared(planned: float, measured: float, **labels: Any) -> dict[str, Any]:
    """A row of the result; the error is how much the plan is above what was measured."""
    return labels | {"planned": planned, "measured": measured, "error": planned / measured - 1}


def states(folder: Path, _: int) -> list[dict[str, Any]]:
    """Policy and reference, gradients and optimizer of each of two ranks, at each stage."""
    model = made(folder / "states", hidden=512, layers=6)
    rows = []
    for dtype in ("bf16", "fp32"):
        for stage in range(4):
            measured = pair("states", model, dtype=dtype, stage=stage)
            settings = PolicySettings(model="m", dtype=dtype, ranks=RANKS, zero_stage=stage)
            need = model_states(shape(model), settings)
            planned = 2 * need.weights + need.gradients + need.optimizer
            rows.append(compared(planned, measured["bytes"], dtype=dtype, stage=stage, buckets=measured["buckets"]))
    return rows


def kept(_: Path, tokens: int) -> list[dict[str, Any]]:
    """Activations of one packed micro-batch of SmolLM2-135M."""
    model, rows = Path(resolve(SMOLLM)), []
    sizes = shape(model)
    for dtype in ("fp32", "bf16"):
        for checkpointing in (False, True):
            options = {"checkpointing": True} if checkpointing else {}
            measured = one("activations", model, dtype=dtype, tokens=tokens, **options)
            settings = PolicySettings(
                model="m",
                dtype=dtype,
                micro_batch_tokens=measured["tokens"],
                gradient_checkpointing=checkpointing,
                logprob_chunk_tokens=256,
            )
            group = PROMPT + RESPONSES * (RESPONSE - 1)
            inputs = sizes.layers * measured["tokens"] * sizes.hidden * BYTES[dtype]
            planned = activations(sizes, settings, group, gpu=False)
            what = {"dtype": dtype, "checkpointing": checkpointing, "tokens": measured["tokens"]}
            rows.append(
                compared(inputs if checkpointing else planned, measured["kept"], what="kept by autograd", **what)
            )
            rows.append(
                compared(planned + head(sizes, settings), measured["grown"], what="growth of the process", **what)
            )
    return rows


def cache(folder: Path, _: int) -> list[dict[str, Any]]:
    """Tokens in a cache of a quarter and of half a GiB."""
    rows = []
    for model, size in ((Path(resolve(SMOLLM)), 0.5), (Path(resolve("asset:tiny-llama")), 0.25)):
        measured = one("cache", model, **{"dtype": "fp32", "cache-gb": size})
        policy = PolicySettings(model="m", dtype="fp32")
        planned = engine_memory(shape(model), RolloutSettings(), policy).room(size * 2**30)
        rows.append(compared(planned, measured["tokens"], model=model.name, gib=size, block=measured["block"]))
    return rows


def learn(folder: Path, tokens: int) -> list[dict[str, Any]]:
    """Processor seconds of learning from one micro-batch on one core, from the rate of matrix products measured in the same process."""
    rows = []
    for model in (made(folder / "learn", hidden=1024, layers=8), Path(resolve(SMOLLM))):
        measured = one("learn", model, threads=1, dtype="fp32", tokens=tokens)
        machine = GpuKind("this machine", 0, measured["flops"], 1, 1, "", 1, 1)
        work = Work(measured["groups"], PROMPT, RESPONSE, RESPONSES, RESPONSES, 1, 1, measured["tokens"], 1)
        learners = Learners(1, 0, checkpointing=False, offloaded_optimizer=False, offloaded_weights=False, nodes=1)
        planned = learn_s(shape(model), machine, work, learners, 4, Assumptions(learn=1.0))
        what = {"model": model.name, "parameters": shape(model).parameters, "gflops": measured["flops"] / 1e9}
        rows.append(compared(planned, measured["seconds"], **what))
    return rows


def shape(model: Path) -> ModelShape:
    """As the planner reads it."""
    return model_shape(AutoConfig.from_pretrained(model))


def made(folder: Path, hidden: int, layers: int) -> Path:
    """A Llama with random weights."""
    one("make", folder, hidden=hidden, layers=layers)
    return folder


def one(part: str, model: Path, threads: int = CORES, **options: Any) -> dict[str, Any]:
    """The result of a part that runs in one process."""
    return child(part, model, {}, threads, **options)


def pair(part: str, model: Path, **options: Any) -> dict[str, Any]:
    """The result of rank 0 of a part that runs in two."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = [
        {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for rank in range(RANKS)
    ]
    with ThreadPoolExecutor(RANKS) as threads:
        results = list(threads.map(lambda place: child(part, model, place, 1, **options), places))
    return results[0]


def child(part: str, model: Path, place: dict[str, str], threads: int, **options: Any) -> dict[str, Any]:
    """Run a part in a process of its own. Exits with the child's last words if it fails."""
    given = [
        word
        for name, value in options.items()
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]
    command = [sys.executable, str(HERE / "planner_parts.py"), part, "--model", str(model), *given]
    environment = {
        **os.environ,
        **place,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    if part == "activations":  # what is freed goes back at once, so that growth is what is in use
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    else:  # freed memory is kept, in huge pages, as in the actors of a run
        environment |= compute_env(ClusterSettings(device="cpu", threads=threads), 1)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CHILD_S, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{' '.join(command)}\nended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


if __name__ == "__main__":
    main()
