"""The full loop over two hosts: the policy on both, the engine on the second, driver and reward on the first.

The hosts are network namespaces (`hosts`); Ray, DeepSpeed, gloo and vLLM are the real ones. One run serves both tests, for it takes a
minute and more to start: the second ends it by the loss of a host.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
    "loop.steps=100000",
    f"checkpoint.every={STEPS}",
    "checkpoint.keep=1000",
    "checkpoint.export=false",
    "tracking.console=off",
)


@dataclass
class Run:
    """`rlhf train` on the first host, without an end of its own.

    Attributes:
        seen: which actors have lived on which host.
    """

    hosts: TwoHosts
    folder: Path
    process: subprocess.Popen[str]
    seen: set[tuple[int, str]] = field(default_factory=set)

    def wait(self, until: Callable[[], bool]) -> None:
        """Until something holds; meanwhile see who lives where."""
        end = time.monotonic() + TIMEOUT_S
        while not until():
            assert self.process.poll() is None, self.process.communicate()[0][-6000:]
            assert time.monotonic() < end, "the run has come to nothing"
            for host in (0, 1):
                commands = self.hosts.processes(host).values()
                self.seen |= {(host, title) for title in TITLES if any(one.startswith(title) for one in commands)}
            time.sleep(0.5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    try:
        hosts = TwoHosts()
    except CannotMakeHosts as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("hosts") / "run"
    try:
        hosts.start()
        process = hosts.popen(0, "train", "configs/tiny.yaml", *OPTIONS, f"run.dir={folder}")
        yield Run(hosts, folder, process)
        if process.poll() is None:
            process.kill()
            process.communicate()
    finally:
        hosts.remove()


def lines(path: Path) -> list[dict[str, Any]]:
    """Those that are whole: the run writes on."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def test_the_loop_runs_over_two_hosts(run: Run) -> None:
    run.wait((run.folder / "checkpoints" / f"step-{STEPS:06d}" / "state.json").exists)
    # What the kernel says of who was where ...
    assert run.seen == {
        (0, "ray::PolicyRank"), (1, "ray::PolicyRank"), (1, "ray::RolloutEngine"), (0, "ray::RewardServer"),
    }  # fmt: skip
    # ... and what the record says.
    placement = json.loads((run.folder / "manifest.json").read_text())["placement"]
    assert placement == [f"{ADDRESSES[0]}: policy-0, reward-0", f"{ADDRESSES[1]}: policy-1, rollout-0"]
    metrics = lines(run.folder / "metrics.jsonl")[:STEPS]
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert all(line["policy/logprob_gap"] < 1e-4 for line in metrics), "after each publish over the cable the two agree"
    versions = {line["step"]: line["weight_version"] for line in lines(run.folder / "samples.jsonl")}
    assert all(versions[step] == step - 1 for step in range(1, STEPS + 1))


def test_a_host_that_dies_ends_the_run_with_words(run: Run) -> None:
    """After the test above, which leaves the run at work."""
    assert run.process.poll() is None
    run.hosts.kill_node(1)
    output, _ = run.process.communicate(timeout=TIMEOUT_S)
    assert run.process.returncode != 0
    assert "died while the driver waited for" in output, output[-3000:]
    assert any(name in output for name in ("policy-1", "rollout-0")), output[-3000:]
