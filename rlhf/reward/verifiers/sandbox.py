"""Runs Python programs shut off from network, files, other processes and the environment, and within limits.

Owns what a program may see and use. How that is enforced is in `jail`, a script of its own. Knows nothing of rewards.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rlhf.reward.verifiers.syscalls import NoFilter, syscall_filter

JAIL = Path(__file__).with_name("jail.py")
HARNESS = Path(__file__).with_name("harness.py")

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime")
"""What a program sees of the machine, besides Python's own folder."""

ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/sandbox",
    "LANG": "C.UTF-8",
    # Libraries would start a thread for each core, and threads are counted.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}

PATIENCE_S = 10.0
"""The jail keeps the wall clock. It has this much longer to set itself up and to clear up, on a busy machine."""


class SandboxError(RuntimeError):
    """The program could not be shut off, so it was not run."""


@dataclass(frozen=True)
class Limits:
    """What a program may use; None: without limit.

    Attributes:
        wall_s, cpu_s: seconds from start to end, and of computing (of each process).
        memory_bytes: address space of each process.
        processes: how many there may be at once, threads included.
        forks: the program may start others. If not, `memory_bytes` is all that it and its threads can have together.
        disk_bytes: files in its folder, which are kept in memory.
        output_bytes: what is read of its output; a program that writes more is ended.
    """

    wall_s: float | None = 5.0
    cpu_s: int | None = 5
    memory_bytes: int | None = 512 * 2**20
    processes: int = 8
    forks: bool = False
    disk_bytes: int = 32 * 2**20
    output_bytes: int = 2**20


@dataclass(frozen=True)
class Ran:
    """How a program ended.

    Attributes:
        status: exit status, 128 and more for a signal; None if it was ended for want of time or for too much output.
        output: its standard output, at most `output_bytes`.
        verdict: what it wrote to the descriptor that is there for this.
    """

    status: int | None
    output: bytes
    verdict: bytes = b""


def run_program(code: str, stdin: str, limits: Limits) -> Ran:
    """Run a program on this input. Blocks.

    Raises:
        SandboxError: it cannot be shut off here.
    """
    return _run("solution.py", code, lambda _: stdin, limits)


def run_tests(code: str, tests: Sequence[str], nonce: str, limits: Limits) -> Ran:
    """Run code and then tests on what it defines, as `harness` says; its output is thrown away. Blocks.

    Raises:
        SandboxError: it cannot be shut off here.
    """

    def request(verdict: int) -> str:
        return json.dumps({"code": code, "tests": list(tests), "nonce": nonce, "verdict": verdict})

    return _run("harness.py", HARNESS.read_text(encoding="utf-8"), request, limits)


def require_sandbox() -> None:
    """Run a program that does next to nothing.

    Raises:
        SandboxError: programs cannot be shut off here.
    """
    ran = run_program("print('ok')", "", Limits(wall_s=PATIENCE_S))
    if ran.output.strip() != b"ok":
        raise SandboxError(f"Python does not start in the sandbox (status {ran.status})")


def start_shut_off(module: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a module of this package shut off, but with its environment's packages, talking over pipes. It may have one child, and
    has no limits of its own. It ends when the returned process is killed, or when the thread ends that called this.

    An exit status over 128 stands for a signal.
    """
    import rlhf

    package = os.path.dirname(os.path.realpath(rlhf.__file__))
    argv = [sys.executable, "-B", "-m", module, *arguments]
    limits = Limits(wall_s=None, cpu_s=None, memory_bytes=None, processes=2, forks=True)
    environment = ENVIRONMENT | {"PYTHONPATH": os.path.dirname(package)}
    seen = [os.path.realpath(sys.prefix), package]
    plan = _plan(argv, {}, environment, seen, limits) | {"keep": [], "report": None}
    return _start(plan, subprocess.PIPE, [], encoding="utf-8")


def _run(name: str, code: str, stdin: Callable[[int], str], limits: Limits) -> Ran:
    """
    Args:
        stdin: the program's input, given the descriptor for its verdict.
    """
    argv = [_python(), "-I", "-B", name]
    reports, report = os.pipe()
    verdicts, verdict = os.pipe()
    with os.fdopen(reports, "rb") as report_file, os.fdopen(verdicts, "rb") as verdict_file:
        try:
            plan = _plan(argv, {name: code}, ENVIRONMENT, [], limits) | {"keep": [verdict], "report": report}
            with _in_memory(stdin(verdict)) as given:
                process = _start(plan, given, [report, verdict])
        finally:
            os.close(report)
            os.close(verdict)
        return _watch(process, report_file, verdict_file, limits)


def _python() -> str:
    """Without its environment's packages."""
    return os.path.realpath(sys.executable)


def _plan(
    argv: Sequence[str],
    files: Mapping[str, str],
    environment: Mapping[str, str],
    seen: Sequence[str],
    limits: Limits,
) -> dict[str, Any]:
    """What the jail is told, but for the descriptors.

    Raises:
        SandboxError: no filter of system calls can be made.
    """
    try:
        calls = syscall_filter(limits.forks)
    except NoFilter as error:
        raise SandboxError(str(error)) from None
    resources = {
        "RLIMIT_CPU": limits.cpu_s,
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": limits.disk_bytes,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    return {
        "argv": list(argv),
        "files": dict(files),
        "environment": dict(environment),
        "read_only": [*SYSTEM, os.path.realpath(sys.base_prefix), *seen],
        "wall_s": limits.wall_s,
        "processes": limits.processes,
        "disk_bytes": limits.disk_bytes,
        "filter": calls.hex(),
        "limits": {name: value for name, value in resources.items() if value is not None},
    }


def _start(plan: dict[str, Any], stdin: Any, descriptors: Sequence[int], **options: Any) -> subprocess.Popen:
    with _in_memory(json.dumps(plan)) as written:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(JAIL), str(written.fileno())],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=[written.fileno(), *descriptors],
            env={},
            start_new_session=True,
            **options,
        )


def _watch(process: subprocess.Popen[bytes], reports: BinaryIO, verdicts: BinaryIO, limits: Limits) -> Ran:
    """Read until the program has ended, and all that it started with it."""
    assert process.stdout is not None
    longest = None if limits.wall_s is None else limits.wall_s + PATIENCE_S
    try:
        output = process.stdout.read(limits.output_bytes + 1)
        if len(output) > limits.output_bytes:
            return Ran(None, output[: limits.output_bytes])
        process.wait(longest)
    except subprocess.TimeoutExpired:
        raise SandboxError(f"the jail did not end within {longest:g} s") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
    report = reports.read()
    outcome: dict[str, Any] = (
        json.loads(report) if report else {"error": f"the jail ended with status {process.returncode}"}
    )
    if "error" in outcome:
        raise SandboxError(outcome["error"])
    return Ran(outcome["status"], output, verdicts.read())


def _in_memory(text: str) -> BinaryIO:
    """A file with this text that has no name, to be read from its start."""
    file = os.fdopen(os.memfd_create("rlhf", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "w+b", buffering=0)
    file.write(text.encode())
    file.seek(0)
    # Whoever reads it must not keep something in it.
    fcntl.fcntl(
        file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    )
    return file
