"""The full loop over two hosts: the policy on both, the engine on the second, driver and reward on the first.

The hosts are network namespaces (`hosts`); Ray, DeepSpeed, gloo and vLLM are the real ones. The second test costs a host,
so it comes last.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import ADDRESSES, PORT, CannotMakeHosts, TwoHosts

pytestmark = pytest.mark.engine
STEPS = 2
TIMEOUT_S = 600
TITLES = ("ray::PolicyRank", "ray::RolloutEngine", "ray::RewardServer")
OPTIONS = (
    f"cluster.address={ADDRESSES[0]}:{PORT}",
    "cluster.device=cpu",
    "cluster.policy_nodes=2",
    "cluster.node_resources={rollout: second_host}",
    "cluster.threads=1",
    "policy.ranks=2",
    "rollout.engines=1",
    "data.eval_prompts=null",
    "loop.eval_every=0",
    "loop.prompts_per_step=4",
    "checkpoint.export=false",
    "tracking.console=off",
)


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    try:
        two = TwoHosts()
    except CannotMakeHosts as error:
        pytest.skip(str(error))
    try:
        two.start()
        yield two
    finally:
        two.remove()


def train(hosts: TwoHosts, folder: Path, *overrides: str) -> subprocess.Popen[str]:
    return hosts.popen(0, "train", "configs/tiny.yaml", *OPTIONS, f"run.dir={folder}", *overrides)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def watch(hosts: TwoHosts, process: subprocess.Popen[str], until: Any) -> set[tuple[int, str]]:
    """Wait until something holds or the process ends; meanwhile see which actors live on which host."""
    seen: set[tuple[int, str]] = set()
    end = time.monotonic() + TIMEOUT_S
    while process.poll() is None and not until():
        assert time.monotonic() < end, "the run has come to nothing"
        for host in (0, 1):
            commands = hosts.processes(host).values()
            seen |= {(host, title) for title in TITLES if any(command.startswith(title) for command in commands)}
        time.sleep(0.5)
    return seen


def test_the_loop_runs_over_two_hosts(hosts: TwoHosts, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = train(hosts, folder, f"loop.steps={STEPS}", f"checkpoint.every={STEPS}")
    try:
        seen = watch(hosts, process, until=lambda: False)
    finally:
        process.kill()
    output = process.communicate()[0]
    assert process.returncode == 0, output[-6000:]
    # What the kernel says of who was where ...
    assert seen == {(0, "ray::PolicyRank"), (1, "ray::PolicyRank"), (1, "ray::RolloutEngine"), (0, "ray::RewardServer")}
    # ... and what the record says.
    placement = json.loads((folder / "manifest.json").read_text())["placement"]
    assert placement == [f"{ADDRESSES[0]}: policy-0, reward-0", f"{ADDRESSES[1]}: policy-1, rollout-0"]
    metrics = lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert all(line["policy/logprob_gap"] < 1e-4 for line in metrics), "after each publish over the cable the two agree"
    versions = {line["step"]: line["weight_version"] for line in lines(folder / "samples.jsonl")}
    assert versions == {step: step - 1 for step in range(1, STEPS + 1)}
    assert (folder / "checkpoints" / f"step-{STEPS:06d}" / "state.json").exists()


def test_a_host_that_dies_ends_the_run_with_words(hosts: TwoHosts, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = train(hosts, folder, "loop.steps=100000", "checkpoint.every=0")
    try:
        watch(hosts, process, until=lambda: lines(folder / "metrics.jsonl"))
        assert process.poll() is None, process.communicate()[0][-6000:]
        hosts.kill_node(1)
        output, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "died while the driver waited for" in output, output[-3000:]
    assert any(name in output for name in ("policy-1", "rollout-0")), output[-3000:]
