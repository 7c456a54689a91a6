"""`hosts.sh` among stand-ins: ssh that runs its command here, Ray that only joins. What ends, and who gets the token."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
HOSTS = ROOT / "launchers" / "local" / "hosts.sh"
SFT = ROOT / "configs" / "movie_reviews" / "sft.yaml"


@pytest.fixture
def started(stage: Any) -> Any:
    """Three hosts whose driver runs."""
    begin(stage)
    stage.until("driver-runs")
    return stage


def begin(stage: Any, *options: str, **environment: str) -> None:
    (stage.folder / "hosts").write_text("# ours\n0 policy_node\n\none rollout_node\ntwo\n")
    stage.start(str(HOSTS), str(stage.folder / "hosts"), options=options, **{"HEAD_IP": "10.0.0.1"} | environment)


def joined(stage: Any) -> set[str]:
    return {path.name for path in (stage.folder / "joined").iterdir()}


def test_success_ends_all_hosts(started: Any) -> None:
    assert joined(started) == {"0", "one", "two"}
    (started.folder / "driver").write_text("0")
    assert started.ended() == 0
    assert not joined(started)
    calls = {name: call for call in started.calls for name in ("--head", "rollout_node", "rlhf train") if name in call}
    assert '--resources={"policy_node": 1}' in calls["--head"].replace("'", "")
    assert calls["rlhf train"].endswith("cluster.address=10.0.0.1:6379")
    (ray,) = [call for call in started.calls if call.startswith("ray start") and "rollout_node" in call]
    assert "--address=10.0.0.1:6379" in ray
    for host in ("0", "one", "two"):  # Ray's files lie where no other user can open them
        assert any(f"--temp-dir={started.folder}/sessions-{host} " in call for call in started.calls), started.calls


def test_it_runs_the_command_that_is_asked_for(stage: Any) -> None:
    stage.arguments[0] = str(SFT)
    begin(stage, RLHF_COMMAND="sft")
    stage.until("driver-runs")
    assert any(call.startswith("rlhf sft") for call in stage.calls)
    (stage.folder / "driver").write_text("0")
    assert stage.ended() == 0


def test_the_token_is_the_same_everywhere_and_in_no_command(started: Any) -> None:
    tokens = {(started.folder / f"token-{host}").read_text() for host in ("0", "one", "two")}
    assert len(tokens) == 1
    assert len(token := tokens.pop()) == 64
    assert token not in (started.folder / "calls").read_text() + started.output
    assert not any(token in path.read_text() for path in started.run_dir.rglob("*") if path.is_file())


def test_hosts_leave_when_the_script_is_killed(started: Any) -> None:
    """Nothing of it can run any more, but ssh's stdin closes. Only the head, on this host, is left to its owner."""
    started.process.send_signal(signal.SIGKILL)
    started.process.wait()
    started.wait_for(lambda: joined(started) <= {"0"}, running=False)
    assert joined(started) <= {"0"}


def test_interrupt_and_failures_end_clean(started: Any) -> None:
    started.process.send_signal(signal.SIGINT)
    assert started.ended() == 143
    assert not joined(started)


def test_a_lost_host_is_the_drivers_to_explain(started: Any) -> None:
    (started.folder / "ray-two-fails").write_text("9")
    started.wait_for(lambda: "a Ray node has ended" in started.output)
    (started.folder / "driver").write_text("3")
    assert started.ended() == 3
    assert not joined(started)


def test_a_host_that_cannot_join_ends_it_before_the_driver(stage: Any) -> None:
    (stage.folder / "ray-one-fails").write_text("1")
    begin(stage)
    assert stage.ended() == 1
    assert "a Ray node did not start" in stage.output
    assert not joined(stage)


def test_a_mistake_in_the_configuration_starts_nothing(stage: Any) -> None:
    begin(stage, "loop.stepz=1")
    assert stage.ended() == 2
    assert not any(call.startswith(("ray", "ssh")) for call in stage.calls)
