"""The SLURM scripts among stand-ins for SLURM and Ray: how each way of ending ends, and what is left behind."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

SLURM = Path(__file__).parents[2] / "launchers" / "slurm"


def submit(stage: Any, script: str = "train.sbatch", options: tuple[str, ...] = (), **environment: str) -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a,b,c", "SLURM_JOB_NUM_NODES": "3", "HEAD_IP": "10.0.0.1"}
    path = SLURM / script
    stage.start(
        str(path), options=options, **(job | {"FAKE_SCRIPT": str(path), "RAY_TMP": str(stage.folder)} | environment)
    )


def calls_of(stage: Any, program: str) -> list[str]:
    return [call for call in stage.calls if call.startswith(program + " ")]


def nothing_is_left(stage: Any) -> bool:
    return not list((stage.folder / "joined").iterdir()) and not list(stage.run_dir.rglob("token"))


def test_success_ends_all_nodes_and_gathers_the_logs(stage: Any) -> None:
    submit(stage, ROLLOUT_NODES="1", RAY_START_ARGS="--num-cpus=9 --verbose")
    stage.until("driver-runs")
    tokens = {(stage.folder / f"token-{node}").read_text() for node in "012"}
    (token,) = tokens
    assert len(token) == 64
    assert not any(token in call for call in stage.calls), "the secret is on a command line"
    (stage.folder / "driver").write_text("0")
    assert stage.ended() == 0
    assert nothing_is_left(stage)
    head, *workers = sorted(calls_of(stage, "ray"), key=lambda call: "--head" not in call)
    assert "--node-ip-address=10.0.0.1 --port=20007" in head and "policy_node" in head
    assert all("--address=10.0.0.1:20007" in call and call.endswith("--num-cpus=9 --verbose") for call in workers)
    assert sorted("rollout_node" in call for call in workers) == [False, True]
    (driver,) = calls_of(stage, "rlhf")
    assert driver.endswith("cluster.address=10.0.0.1:20007")
    logs = stage.run_dir / "slurm" / "7-0"
    assert (logs / "driver.log").read_text() == "a line of the driver's\n"
    for node, name in enumerate("abc"):
        assert (logs / f"node-{node}-{name}.log").exists()
        assert (logs / f"ray-{name}" / "worker.err").read_text() == f"said by an actor of node {node}"
    assert not list(stage.folder.glob("rlhf-ray-*"))
    folders = [(stage.folder / f"folder-{node}").read_text().split() for node in range(3)]
    assert [mode for _, mode in folders] == ["700"] * 3, (
        "what Ray keeps there is shut to others, who cannot guess its name"
    )
    assert len({name for name, _ in folders}) == 3


def test_the_drivers_failure_is_the_jobs(stage: Any) -> None:
    (stage.folder / "driver").write_text("42")
    submit(stage)
    assert stage.ended() == 42
    assert nothing_is_left(stage) and not calls_of(stage, "scontrol requeue")


def test_a_node_that_ends_lets_the_driver_say_what_it_lost(stage: Any) -> None:
    submit(stage)
    stage.until("driver-runs")
    (stage.folder / "ray-2-fails").write_text("9")
    stage.wait_for(
        lambda: "Ray ended by itself with status 9" in (stage.run_dir / "slurm/7-0/node-2-c.log").read_text()
    )
    assert stage.process.poll() is None, "the other nodes go on until the driver has spoken"
    (stage.folder / "driver").write_text("3")
    assert stage.ended() == 3
    assert nothing_is_left(stage)


def test_a_driver_that_does_not_notice_is_stopped(stage: Any) -> None:
    submit(stage, GRACE_S="0")
    stage.until("driver-runs")
    (stage.folder / "ray-1-fails").write_text("9")
    assert stage.ended() == 1
    assert "goes on without noticing" in stage.output
    assert not list(stage.run_dir.rglob("token"))


def test_a_node_that_does_not_start_ends_the_job_before_the_driver(stage: Any) -> None:
    (stage.folder / "ray-1-fails").write_text("1")
    submit(stage, GRACE_S="0")
    assert stage.ended() == 1
    assert "a Ray node did not start" in stage.output
    assert not calls_of(stage, "rlhf")


def test_a_mistake_in_the_configuration_starts_nothing(stage: Any) -> None:
    submit(stage, options=("loop.stepz=1",))
    assert stage.ended() == 2
    assert "Did you mean `loop.steps`" in stage.output
    assert not calls_of(stage, "ray")


@pytest.mark.parametrize("restart", [0, 3])
def test_preemption_requeues_and_the_restart_resumes(stage: Any, restart: int) -> None:
    submit(stage, SLURM_RESTART_COUNT=str(restart), MAX_RESTARTS="3")
    stage.until("driver-runs")
    stage.process.send_signal(signal.SIGUSR1)
    status = stage.ended()
    assert nothing_is_left(stage)
    if restart == 3:
        assert status == 1 and "not requeued" in stage.output
        return
    assert status == 0 and calls_of(stage, "scontrol requeue") == ["scontrol requeue 7"]
    assert "--resume" not in calls_of(stage, "rlhf")[0]
    (stage.folder / "driver").write_text("0")
    submit(stage, SLURM_RESTART_COUNT="1")
    assert stage.ended() == 0
    assert calls_of(stage, "rlhf")[1].endswith("--resume")
    assert (stage.run_dir / "slurm" / "7-1" / "driver.log").exists()


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_restart_without_a_checkpoint_begins_anew_and_keeps_the_record(stage: Any, checkpoint: bool) -> None:
    """`rlhf train --resume` refuses to delete recorded steps, and nobody is there to decide."""
    stage.run_dir.mkdir()
    for name in ("manifest.json", "metrics.jsonl"):
        (stage.run_dir / name).write_text("{}\n")
    if checkpoint:
        (stage.run_dir / "checkpoints" / "step-000002").mkdir(parents=True)
        (stage.run_dir / "checkpoints" / "step-000002" / "state.json").write_text("{}")
    (stage.folder / "driver").write_text("0")
    submit(stage, SLURM_RESTART_COUNT="1")
    assert stage.ended() == 0
    assert calls_of(stage, "rlhf")[0].endswith("--resume")
    assert (stage.run_dir / "metrics.jsonl").exists() == checkpoint
    assert (stage.run_dir / "metrics.before-restart-1.jsonl").exists() != checkpoint


def test_a_cancelled_job_ends_clean_and_is_not_requeued(stage: Any) -> None:
    submit(stage)
    stage.until("driver-runs")
    stage.process.send_signal(signal.SIGTERM)
    assert stage.ended() == 143
    assert nothing_is_left(stage) and not calls_of(stage, "scontrol requeue")


def test_containers_wrap_every_step(stage: Any) -> None:
    (stage.folder / "driver").write_text("0")
    submit(stage, "train_container.sbatch", IMAGE="reg/rlhf:1", MOUNTS="/data,/models")
    assert stage.ended() == 0
    mounts = ",".join(f"{folder}:{folder}" for folder in (stage.folder, "/data", "/models"))
    for call in calls_of(stage, "srun"):
        assert f"--container-image=reg/rlhf:1 --container-mounts={mounts} --container-workdir={stage.folder}" in call
