"""The SLURM script under a real SLURM of two nodes on this machine; Ray and the driver are stand-ins.

What no stand-in shows: what `srun` makes of a signal, how steps share an allocation, what a requeue leaves of the environment.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch")
SCRIPT = Path(__file__).parents[2] / "launchers" / "slurm" / "train.sbatch"
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
SlurmUser=root
ReturnToService=2
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=main Nodes=n1,n2 Default=YES State=UP
"""

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(shutil.which(program) for program in PROGRAMS),
        reason="needs root and SLURM with munge (Debian: apt-get install slurm-wlm munge)",
    ),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a running SLURM."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "n1", "n2"):
        (folder / name).mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder, ports=free_ports(3)))
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    munge = [f"--{name}={folder}/{file}" for name, file in (("key-file", "key"), ("log-file", "munge.log"))]
    munge += [
        f"--{name}={folder}/munge.{file}"
        for name, file in (("socket", "socket"), ("pid-file", "pid"), ("seed-file", "seed"))
    ]
    daemons: list[subprocess.Popen] = []

    def start(*command: str) -> None:
        with (folder / f"{command[0]}.log").open("a") as log:
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    try:
        start("munged", "--foreground", "--force", *munge)
        until(lambda: (folder / "munge.socket").exists())
        start("slurmctld", "-D")
        start("slurmd", "-D", "-N", "n1")
        start("slurmd", "-D", "-N", "n2")
        until(lambda: asked(environment, "sinfo", "-h", "-t", "idle", "-o", "%D") == "2")
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(30)


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def asked(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()


class Job:
    """A job among stand-ins for Ray and the driver, in a real SLURM."""

    def __init__(self, slurm: dict[str, str], stage: Any):
        self.stage = stage
        for name in ("srun", "scontrol", "scancel"):
            (stage.folder / "bin" / name).unlink()
        setup = stage.folder / "setup.sh"
        setup.write_text(f'export PATH="{stage.folder}/bin:$PATH"\n')
        own = {"RLHF_SETUP": str(setup), "HEAD_IP": "127.0.0.1", "RAY_TMP": str(stage.folder), "GRACE_S": "20"}
        self.environment = slurm | stage.environment | own
        self.id = ""

    def submit(self) -> None:
        options = [
            "--parsable",
            "--gpus-per-node=0",
            f"--output={self.stage.folder}/log",
            f"--chdir={self.stage.folder}",
        ]
        self.id = self.ask("sbatch", *options, str(SCRIPT), *self.stage.arguments)
        assert self.id

    def ask(self, *command: str) -> str:
        return asked(self.environment, *command)

    def shown(self, field: str) -> str:
        shown = self.ask("scontrol", "show", "job", self.id)
        return next(word for word in shown.split() if word.startswith(f"{field}=")).partition("=")[2]

    def until_state(self, *states: str) -> None:
        until(lambda: self.shown("JobState") in states)


@pytest.fixture
def job(slurm: dict[str, str], stage: Any) -> Iterator[Job]:
    made = Job(slurm, stage)
    made.submit()
    until((stage.folder / "driver-runs").exists)
    yield made
    made.ask("scancel", made.id)
    made.until_state("COMPLETED", "FAILED", "CANCELLED")


def test_success_gathers_what_every_node_said(job: Job) -> None:
    (job.stage.folder / "driver").write_text("0")
    job.until_state("COMPLETED")
    assert job.shown("ExitCode") == "0:0"
    logs = job.stage.run_dir / "slurm" / f"{job.id}-0"
    assert (logs / "driver.log").read_text().endswith("a line of the driver's\n")
    for node, name in enumerate(("n1", "n2")):
        assert (logs / f"ray-{name}" / "worker.err").read_text() == f"said by an actor of node {node}"
    assert not (logs / "token").exists()


def test_a_lost_node_ends_the_job_with_the_drivers_status(job: Job) -> None:
    (job.stage.folder / "ray-1-fails").write_text("9")
    until(
        lambda: "Ray ended by itself" in "".join(path.read_text() for path in job.stage.run_dir.rglob("node-1-*.log"))
    )
    (job.stage.folder / "driver").write_text("3")
    job.until_state("FAILED")
    assert job.shown("ExitCode") == "3:0"
    assert job.shown("Restarts") == "0"


def test_the_time_limit_requeues_and_the_restart_resumes(job: Job) -> None:
    job.ask("scancel", "--batch", "--signal=USR1", job.id)
    job.until_state("PENDING")
    (job.stage.folder / "driver").write_text("0")
    job.ask("scontrol", "update", f"jobid={job.id}", "StartTime=now")
    job.until_state("COMPLETED")
    assert job.shown("Restarts") == "1"
    first, second = [call for call in job.stage.calls if call.startswith("rlhf train")]
    assert second == f"{first} --resume"
