"""How fast the reward service answers: with one client and with 64, batched and one at a time, against the bare model; and a burst.

The services (`rlhf reward serve`) and the bare model run as processes of their own and are measured in turns, round by round, so
that a machine that slows down slows all of them. This process is the clients.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from rlhf.cluster.precision import look
from rlhf.data.assets import resolve
from rlhf.reward.judges.asking import AGAIN, pause_s
from rlhf.tracking.manifest import processor

TOKEN = "benchmark"
MANY = 64
BATCHES = (8, 16, 32, 64, 128)
BARE = {"bare": False, "bare_sorted": True}
"""The bare model, and whether its texts are sorted by length."""
BURST = 10_000
MALFORMED = b'{"responses": "not a list"}'


def bare_model(model: str, texts: Sequence[str], threads: int, orders: Any) -> None:
    """Child process: for each order (batch sizes, whether sorted by length, seconds), the rate of each size in texts per second. Texts are
    tokenised before. Unsorted they come in random order, as to a server; sorted, hardly any padding is left, which no server can have,
    since it would have to know all texts before the first."""
    import torch

    from rlhf.reward.models import load_model
    from rlhf.reward.reading import Example

    torch.set_num_threads(threads)
    loaded = load_model(model)
    ids = loaded.ids([Example((), text) for text in texts])
    module, luck = loaded.module.eval(), random.Random(0)

    @torch.inference_mode()
    def rate(size: int, by_length: bool, limit_s: float) -> float:
        """Over batches of all lengths, in random order."""
        begun, done = time.perf_counter(), 0
        while True:
            luck.shuffle(ids)
            rows = sorted(ids, key=len) if by_length else ids
            starts = list(range(0, len(rows), size))
            luck.shuffle(starts)
            for start in starts:
                batch = rows[start : start + size]
                module(**loaded.batch(batch))
                done += len(batch)
                if time.perf_counter() - begun > limit_s:
                    return done / (time.perf_counter() - begun)

    while (order := orders.recv()) is not None:
        sizes, by_length, limit_s = order
        orders.send({size: rate(size, by_length, limit_s) for size in sizes})


@contextmanager
def bare(
    model: str, texts: Sequence[str], threads: int
) -> Iterator[Callable[[Sequence[int], bool, float], dict[int, float]]]:
    """Asks the child process for the rates of batch sizes, each measured for so many seconds."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    child = multiprocessing.get_context("spawn").Process(target=bare_model, args=(model, texts, threads, theirs))
    child.start()

    def rates(sizes: Sequence[int], by_length: bool, seconds: float) -> dict[int, float]:
        ours.send((sizes, by_length, seconds))
        return ours.recv()

    try:
        yield rates
    finally:
        ours.send(None)
        child.join()


@contextmanager
def service(folder: Path, name: str, reward: dict[str, Any], threads: int, options: Sequence[str]) -> Iterator[str]:
    """`rlhf reward serve`; its URL."""
    config = folder / f"{name}.yaml"
    sections = {"data": {"prompts": "-"}, "policy": {"model": "-"}, "reward": reward}
    sections["cluster"] = {"device": "cpu", "threads": threads}
    config.write_text(json.dumps(sections))  # JSON is YAML
    command = [sys.executable, "-m", "rlhf.cli", "reward", "serve", str(config), "--port", "0", *options]
    environment = os.environ | {"RLHF_REWARD_TOKEN": TOKEN}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        if "http://" not in line:
            raise RuntimeError(f"the service {name} did not start: {line}")
        yield line.split()[-1]
    finally:
        process.terminate()
        process.wait()


async def rate(url: str, texts: Sequence[str], clients: int, per_request: int, seconds: float) -> float:
    """Responses judged per second by `clients`, each of which asks again as soon as it has its answer."""
    done = 0

    async def client(session: aiohttp.ClientSession, number: int, end: float) -> None:
        nonlocal done
        position = number * 97
        while time.perf_counter() < end:
            some = [texts[(position + k) % len(texts)] for k in range(per_request)]
            position += per_request
            await ask(session, url, json.dumps({"responses": some}).encode())
            done += per_request

    async with open_session() as session:
        await asyncio.gather(*(client(session, n, time.perf_counter() + 2.0) for n in range(clients)))  # warm up
        done, begun = 0, time.perf_counter()
        await asyncio.gather(*(client(session, n, begun + seconds) for n in range(clients)))
        return done / (time.perf_counter() - begun)


async def burst(url: str, texts: Sequence[str], truth: Sequence[float]) -> dict[str, Any]:
    """Ask 10,000 times at once, every tenth request malformed. What our own client would ask again is asked again; all else counts."""
    retries, luck = 0, random.Random(0)

    async def one(session: aiohttp.ClientSession, number: int) -> str:
        nonlocal retries
        bad = number % 10 == 0
        body = MALFORMED if bad else json.dumps({"responses": [texts[number % len(texts)]]}).encode()
        for attempt in itertools.count(1):
            try:
                async with session.post(f"{url}/judge", data=body) as reply:
                    status, content = reply.status, await reply.json()
            except aiohttp.ClientConnectionError:
                status, content = 503, {}
            if status not in AGAIN:
                return verdict(bad, status, content, truth[number % len(texts)])
            retries += 1
            await asyncio.sleep(pause_s(attempt, 1.0, luck.random()))
        raise AssertionError

    begun = time.perf_counter()
    async with open_session() as session:
        answers = await asyncio.gather(*(one(session, number) for number in range(BURST)))
    counts: dict[str, int] = {}
    for answer in answers:
        counts[answer] = counts.get(answer, 0) + 1
    return {"requests": BURST, "answers": counts, "retries": retries, "seconds": time.perf_counter() - begun}


def verdict(bad: bool, status: int, content: dict[str, Any], truth: float) -> str:
    """What became of one request, in a word or two."""
    if bad:
        return "refused" if status == 422 else f"malformed, but {status}"
    if status != 200:
        return f"lost: {status}"
    (outcome,) = content["outcomes"]
    return "right" if abs(outcome.get("value", float("nan")) - truth) < 1e-3 else f"wrong: {outcome}"


def open_session() -> aiohttp.ClientSession:
    connections = aiohttp.TCPConnector(limit=1024)
    no_limit = aiohttp.ClientTimeout(total=None)
    return aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {TOKEN}"}, connector=connections, timeout=no_limit, trust_env=False
    )


async def ask(session: aiohttp.ClientSession, url: str, body: bytes) -> None:
    async with session.post(f"{url}/judge", data=body) as reply:
        if reply.status != 200:
            raise RuntimeError(f"{reply.status}: {await reply.text()}")
        await reply.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/demo/reward_model", help="made by examples/movie_reviews/prepare.py")
    parser.add_argument("--texts", default="asset:movie-reviews/reward_test.jsonl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each part in each round")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of the model, served or bare (default: 1, so that clients and HTTP have cores of their own)",
    )
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    texts = [json.loads(line)["text"] for line in Path(resolve(args.texts)).read_text().splitlines()]
    model = {"kind": "model", "path": str(Path(args.model).absolute())}
    single = model | {"batch_size": 1, "max_wait_ms": 0.0}
    measured: dict[str, list[float]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plain = stack.enter_context(bare(model["path"], texts, args.threads))
        url = stack.enter_context(service(folder, "batched", model, args.threads, []))
        local = stack.enter_context(service(folder, "local", model, args.threads, ["--local"]))
        one_by_one = stack.enter_context(service(folder, "single", single, args.threads, ["--local"]))
        parts = {
            "clients_64": (url, MANY, 1),
            "clients_1": (url, 1, 1),
            "clients_8_of_8": (url, 8, 8),
            "clients_64_local": (local, MANY, 1),
            "clients_1_local": (local, 1, 1),
            "clients_64_one_at_a_time": (one_by_one, MANY, 1),
        }
        plain(BATCHES, False, 0.5)  # warm up
        sizes = {name: plain(BATCHES, by_length, 3.0) for name, by_length in BARE.items()}
        for name, rates in sizes.items():
            print(f"{name}, by batch size:", {size: round(value, 1) for size, value in rates.items()}, flush=True)
        for number in range(args.rounds):
            found = {}
            for name, by_length in BARE.items():
                best = max(sizes[name], key=sizes[name].__getitem__)
                found[name] = plain([best], by_length, args.seconds)[best]
            for name, (where, clients, per_request) in parts.items():
                found[name] = asyncio.run(rate(where, texts, clients, per_request, args.seconds))
            for name, value in found.items():
                measured.setdefault(name, []).append(value)
            print(f"round {number + 1}:", {name: round(value, 1) for name, value in found.items()}, flush=True)
        truth = known_scores(model["path"], texts)
        bursts = asyncio.run(burst(url, texts, truth))
    print("burst:", bursts)
    report(measured, sizes, bursts, args)


def known_scores(model: str, texts: Sequence[str]) -> list[float]:
    from rlhf.reward.models import load_model
    from rlhf.reward.reading import Example

    return load_model(model).score([Example((), text) for text in texts]).tolist()


def report(
    measured: dict[str, list[float]],
    sizes: dict[str, dict[int, float]],
    bursts: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """Print and keep medians of the rounds' own ratios."""

    def ratio(part: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(measured[part], measured[other], strict=True))

    ratios = {
        **{
            f"{part}_over_{name}": ratio(part, name)
            for name in BARE
            for part in ("clients_64", "clients_8_of_8", "clients_64_local")
        },
        "clients_64_over_one_at_a_time": ratio("clients_64_local", "clients_64_one_at_a_time"),
        "clients_64_over_clients_1": ratio("clients_64", "clients_1"),
        "burst_right": bursts["answers"].get("right", 0) / (BURST * 9 // 10),
        "burst_refused": bursts["answers"].get("refused", 0) / (BURST // 10),
    }
    for name, value in ratios.items():
        print(f"{name}: {value:.3f}")
    if args.json:
        machine = {
            "cores": len(os.sched_getaffinity(0)),
            "model_threads": args.threads,
            "python": platform.python_version(),
            "processor": processor(),
            "bf16": look(gpu=False).why,
        }
        rates = {name: {"rounds": values, "median": statistics.median(values)} for name, values in measured.items()}
        content = {
            "ratio": ratios,
            "responses_per_second": rates,
            "bare_by_batch_size": sizes,
            "burst": bursts,
            "machine": machine,
        }
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
