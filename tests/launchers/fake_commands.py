"""The programs that launch scripts call, as far as the scripts see them: one file, whose first argument is the program's name.

`srun` runs tasks on "nodes" that are this machine and ends as SLURM's does: a task that fails takes the others along, SIGTERM
to srun itself kills them unheard, a signal through `scancel` reaches each task. `ray start` stays until SIGTERM. What was
called is in `calls`, a line each; `$FAKE/...` files steer what fails.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

FAKE = Path(os.environ["FAKE"])


def main() -> int:
    name, *arguments = sys.argv[1:]
    with (FAKE / "calls").open("a", encoding="utf-8") as calls:
        calls.write(shlex.join([name, *arguments]).replace("\n", " ") + "\n")
    return PROGRAMS[name](arguments)


def srun(arguments: list[str]) -> int:
    options = {}
    while arguments[0].startswith("--"):
        option, _, value = arguments.pop(0).partition("=")
        options[option] = value
    hosts = os.environ["SLURM_JOB_NODELIST"].split(",")
    nodes = [hosts.index(options["--nodelist"])] if "--nodelist" in options else range(int(options["--nodes"]))
    tasks = [_task(arguments, node, hosts[node], options.get("--output")) for node in nodes]
    (FAKE / "steps").mkdir(exist_ok=True)
    (FAKE / "steps" / f"{os.environ['SLURM_JOB_ID']}.{os.getpid()}").write_text(
        " ".join(str(task.pid) for task in tasks)
    )

    def kill(*_: object) -> None:
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, signal.SIGKILL)

    signal.signal(signal.SIGTERM, kill)
    status = 0
    while any(task.poll() is None for task in tasks):
        failed = [task.returncode for task in tasks if task.poll()]
        if failed and not status:
            status = failed[0]
            kill()
        time.sleep(0.02)
    return abs(status or max(task.returncode for task in tasks))


def _task(arguments: list[str], node: int, host: str, output: str | None) -> subprocess.Popen:
    own = {
        "SLURM_NODEID": str(node),
        "SLURMD_NODENAME": host,
        "SLURM_CPUS_ON_NODE": "4",
        "SLURM_STEP_ID": str(os.getpid()),
    }
    stream = open(output.replace("%n", str(node)).replace("%N", host), "w") if output else None
    return subprocess.Popen(arguments, env=os.environ | own, stdout=stream, stderr=stream, start_new_session=True)


def scontrol(arguments: list[str]) -> int:
    if arguments[:2] == ["show", "job"]:
        print(f"   Command={os.environ['FAKE_SCRIPT']} CONFIG")
    elif arguments[:2] == ["show", "hostnames"]:
        print(arguments[2].replace(",", "\n"))
    return 0


def scancel(arguments: list[str]) -> int:
    for pid in (FAKE / "steps" / arguments[-1]).read_text().split():
        os.killpg(int(pid), signal.SIGTERM)
    return 0


def ssh(arguments: list[str]) -> int:
    """Runs the command here, with this process's stdin; the host's name arrives as $FAKE_HOST."""
    while arguments[0].startswith("-"):
        del arguments[: 2 if arguments[0] == "-o" else 1]
    host, *command = arguments
    return subprocess.call(["bash", "-c", " ".join(command)], env=os.environ | {"FAKE_HOST": host})


def ray(arguments: list[str]) -> int:
    """`ray start --block`: joined until SIGTERM, or until the file `ray-NODE-fails` names a status to end with."""
    node = os.environ.get("SLURM_NODEID") or os.environ.get("FAKE_HOST", "0")
    token = os.environ.get("RAY_AUTH_TOKEN") or Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    (FAKE / f"token-{node}").write_text(token)
    temp = re.search(r"--temp-dir=(\S+)", " ".join(arguments))
    if temp:
        logs = Path(temp[1]) / "session_latest" / "logs"
        logs.mkdir(parents=True)
        (FAKE / f"folder-{node}").write_text(f"{Path(temp[1]).parent} {Path(temp[1]).parent.stat().st_mode & 0o777:o}")
        (logs / "worker.err").write_text(f"said by an actor of node {node}")
    joined = FAKE / "joined" / node
    joined.parent.mkdir(exist_ok=True)
    fails = FAKE / f"ray-{node}-fails"
    signal.signal(signal.SIGTERM, lambda *_: (joined.unlink(missing_ok=True), sys.exit(0)))
    if not fails.exists():
        joined.touch()
    status = _decision(fails)
    joined.unlink(missing_ok=True)
    return status


def python(arguments: list[str]) -> int:
    """`python -m rlhf.cluster.launching`: the questions about Ray are answered from what the fake `ray` has left."""
    question = arguments[2]
    if question in ("run-folder", "address"):
        return subprocess.call([os.environ["FAKE_PYTHON"], *arguments])
    if question == "session-folder":
        print(FAKE / f"sessions-{os.environ.get('FAKE_HOST', '0')}")
        return 0
    count = int(arguments[arguments.index("--count") + 1]) if question == "nodes" else 1
    while len(list((FAKE / "joined").glob("*"))) < count:
        time.sleep(0.02)
    return 0


def rlhf(arguments: list[str]) -> int:
    """The driver: `driver` holds what it does, a status to end with or `stay`."""
    plan = FAKE / "driver"
    run = next(item for item in arguments if item.startswith("run.dir=")).partition("=")[2]
    Path(run, "manifest.json").touch()
    print("a line of the driver's", flush=True)
    (FAKE / "driver-runs").touch()
    return _decision(plan)


def _decision(path: Path) -> int:
    """The status that the file comes to hold. A file that is just being written reads as empty."""
    while not path.exists() or (text := path.read_text()) in ("", "stay"):
        time.sleep(0.02)
    return int(text)


PROGRAMS = {program.__name__: program for program in (srun, scontrol, scancel, ssh, ray, python, rlhf)}

if __name__ == "__main__":
    sys.exit(main())
