"""What the driver itself costs: the loop, the pools and the record, with engines, reward servers and a policy that compute nothing.

The real `OnlineLoop`, `RolloutPool`, `RewardPool` and `Record` run in this process. In place of the actors behind them stand objects that
answer after a random delay; the delays only keep many prompts in flight, and cost the driver nothing. Counted is this process's CPU time
from the first prompt to the last step, over all responses. The stand-ins' own arithmetic is in it; Ray's is not.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import pstats
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.algorithms import make
from rlhf.cluster import Handle, LocalHandle
from rlhf.config import Settings
from rlhf.data.ledger import Ledger
from rlhf.engines.sampling import Sampling
from rlhf.loop.online import OnlineLoop
from rlhf.loop.roles import Roles
from rlhf.loop.state import RunState
from rlhf.policy import StepContext
from rlhf.policy.kl import KlController
from rlhf.reward.serving.pool import RewardPool
from rlhf.reward.serving.server import RewardServer, ServerInfo
from rlhf.reward.shaping import Shaping
from rlhf.rollout.engine import EngineInfo, RolloutEngine
from rlhf.rollout.pool import RolloutPool
from rlhf.tracking.manifest import processor
from rlhf.tracking.record import Record
from rlhf.tracking.sinks import Sinks
from rlhf.transfer import TransferSession
from rlhf.transfer.versions import Attestation
from rlhf.types import Assignment, CompletionInfo, Feedback, Prompt, Rollout, Score, Shipment, Span

SAMPLES_PER_PROMPT = 2
PROMPT_TOKENS, MAX_TOKENS = 64, 256
TOKEN_S = 0.04
VERDICT_S = 0.2
"""Of a stand-in: seconds for each token of the longest response, and the longest for a prompt's verdicts."""
TARGET_S = 1e-3
FINGERPRINT = "0"


def main() -> None:
    """Run the steps, print what a response cost, write it to the file that `--json` names."""
    args = parse()
    profile = cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        settings = make_settings(args, Path(folder) / "run")
        if args.profile:
            found = profile.runcall(lambda: asyncio.run(measure(settings)))
        else:
            found = asyncio.run(measure(settings))
    print(
        f"{found['cpu_s_per_completion'] * 1e3:.3f} ms of driver CPU per completion (target: under {TARGET_S * 1e3:g}), "
        f"{found['cpu_s_per_prompt'] * 1e3:.3f} ms per prompt; {found['completions']:,} completions in {found['wall_s']:.1f} s, "
        f"of which the driver computed {found['cpu_s']:.1f} s; {found['most_in_flight']:,} requests in flight on {args.engines} engines"
    )
    if args.profile:
        pstats.Stats(profile).strip_dirs().sort_stats("tottime").print_stats(args.profile)
    if args.json is not None:
        setting = {name: getattr(args, name) for name in ("engines", "in_flight", "staleness", "steps", "profile")}
        setting |= {"samples_per_prompt": SAMPLES_PER_PROMPT, "processor": processor()}
        text = {"benchmark": Path(__file__).stem, "found": found, "target_s": TARGET_S, "setting": setting}
        args.json.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")
    parser.add_argument("--engines", type=int, default=256)
    parser.add_argument("--in-flight", type=int, default=10_000, help="prompts (default: 10000)")
    parser.add_argument("--staleness", type=int, default=4, help="loop.staleness (default: 4)")
    parser.add_argument("--steps", type=int, default=15, help="in all (default: 15)")
    parser.add_argument(
        "--profile", type=int, default=0, metavar="N", help="print the N functions that took most; this slows all down"
    )
    return parser.parse_args()


def make_settings(args: argparse.Namespace, folder: Path) -> Settings:
    """As many prompts per step as are in flight together, divided by the steps that sampling may be ahead."""
    return Settings.model_validate(
        {
            "run": {"dir": str(folder)},
            "data": {"prompts": "none.jsonl", "max_prompt_tokens": PROMPT_TOKENS},
            "policy": {"model": "none", "ranks": 64, "micro_batch_tokens": 8192},
            "rollout": {"engines": args.engines, "max_tokens": MAX_TOKENS},
            "reward": {"kind": "function", "path": "none:none", "servers": 16, "max_waiting": 4096},
            "algorithm": {"name": "online_dpo", "samples_per_prompt": SAMPLES_PER_PROMPT},
            "loop": {
                "steps": args.steps,
                "prompts_per_step": args.in_flight // (1 + args.staleness),
                "staleness": args.staleness,
            },
            "cluster": {"device": "cpu", "startup_deadline_s": 60.0},
            "tracking": {"console": "off"},
        }
    )


async def measure(settings: Settings) -> dict[str, Any]:
    """A whole run of the loop."""
    loop_settings = settings.loop
    prompts = loop_settings.steps * loop_settings.prompts_per_step
    data = [
        Prompt(f"{i:016x}", (0,) * PROMPT_TOKENS, f"prompt {i}")
        for i in range(prompts + (1 + loop_settings.staleness) * loop_settings.prompts_per_step)
    ]
    algorithm, runtime = make(settings), StandIns()
    state = RunState(
        Ledger(data, settings.run.seed, settings.data.shuffle),
        KlController(algorithm.objective),
        Shaping.start(settings, data, []),
        run={},
    )
    rollouts = await RolloutPool.start(runtime, settings)
    await rollouts.connect(rollouts.new_session("127.0.0.1", 1))
    rewards = await RewardPool.start(runtime, settings)
    with Record(settings, resume=False, sinks=Sinks(settings.run.dir)) as record:
        loop = OnlineLoop(settings, algorithm, Roles(Policy(), rollouts, rewards), state, record)
        await loop.publish()
        wall, cpu = time.perf_counter(), time.process_time()
        async with loop.producing():
            for _ in range(loop_settings.steps):
                await loop.step()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert state.ledger.settled["trained"] == prompts, state.ledger.settled
    return {
        "cpu_s_per_completion": cpu / (prompts * SAMPLES_PER_PROMPT),
        "cpu_s_per_prompt": cpu / prompts,
        "cpu_s": cpu,
        "wall_s": wall,
        "completions": prompts * SAMPLES_PER_PROMPT,
        "most_in_flight": runtime.most_in_flight,
    }


class StandIns:
    """A runtime that starts stand-ins, in this process, as if they were remote."""

    local = False

    def __init__(self) -> None:
        self._in_flight = self.most_in_flight = 0

    def start(self, name: str, actor: type, *, env: Mapping[str, str]) -> Callable[..., Handle[Any]]:
        return lambda settings, index, *_: LocalHandle(
            name, {RolloutEngine: Engine, RewardServer: Server}[actor](index, self)
        )

    def count(self, change: int) -> None:
        """So many requests more are in flight, or fewer."""
        self._in_flight += change
        self.most_in_flight = max(self.most_in_flight, self._in_flight)


class Engine:
    """Answers as a `RolloutEngine` that goes on with its responses while weights arrive."""

    def __init__(self, index: int, runtime: StandIns):
        self._index, self._runtime, self._version = index, runtime, 0
        self._random = random.Random(index)

    async def ready(self) -> EngineInfo:
        return EngineInfo(self._index, 1, "here", 0, None)

    async def sample(
        self, prompt: Prompt, samplings: Sequence[Sampling], with_pair: bool = False
    ) -> tuple[tuple[CompletionInfo, ...], None]:
        lengths = [self._random.randint(2, sampling.max_tokens) for sampling in samplings for _ in range(sampling.n)]
        before = self._version
        self._runtime.count(1)
        await asyncio.sleep(TOKEN_S * max(lengths))
        self._runtime.count(-1)
        return tuple(self._info(number, length, before) for number, length in enumerate(lengths)), None

    def _info(self, number: int, length: int, before: int) -> CompletionInfo:
        if before == self._version:
            spans: tuple[Span, ...] = (Span(0, length, before),)
        else:
            spans = (Span(0, length // 2, before), Span(length // 2, length, self._version))
        return CompletionInfo(spans, str(number), -1.0, "stop")

    def join_transfer(self, session: TransferSession, rank_offset: int) -> None:
        pass

    def receive_weights(self, shipment: Shipment) -> Attestation:
        self._version = shipment.version
        return Attestation(self._index, shipment.version, FINGERPRINT)


class Server:
    """Answers as a `RewardServer` whose judge says anything."""

    def __init__(self, index: int, runtime: StandIns):
        self._random = random.Random(index)

    async def ready(self) -> ServerInfo:
        return ServerInfo("here", 0, None)

    async def judge(self, prompt: Prompt, completions: None) -> Feedback:
        await asyncio.sleep(self._random.uniform(0, VERDICT_S))
        return Feedback(prompt.id, tuple(Score(self._random.random()) for _ in range(SAMPLES_PER_PROMPT)))


class Policy:
    """Learns nothing, at once."""

    specs: tuple = ()

    async def begin(self, step: StepContext) -> None:
        pass

    async def accumulate(self, assignments: Sequence[Assignment], update: int = 0) -> None:
        pass

    async def finish(self) -> dict[str, float]:
        return {}

    async def learn(self, assignments: Sequence[Assignment], step: StepContext) -> dict[str, float]:
        return {}

    async def follow(self, step: int) -> Mapping[str, bool]:
        return {"reference": False, "partner": False}

    async def check_engines(self, probes: Mapping[int, Rollout]) -> dict[str, float]:
        return {}

    async def send_weights(self, shipment: Shipment) -> str:
        return FINGERPRINT


if __name__ == "__main__":
    main()
