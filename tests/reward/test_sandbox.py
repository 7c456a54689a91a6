"""Ways around the sandbox's bounds that were tried: memory outside of a process, keyrings, kernel interfaces. As root and as a user."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import rlhf
from rlhf.reward.verifiers import syscalls
from rlhf.reward.verifiers.sandbox import Limits, SandboxError, require_sandbox, run_program
from tests.reward.test_verifier_code import output, score

pytestmark = pytest.mark.engine

LIMITS = Limits(wall_s=240.0, cpu_s=240)

MEMORY = "shmget shmat msgget semget mq_open memfd_create memfd_secret vmsplice splice tee remap_file_pages userfaultfd"
KEYS = "add_key request_key keyctl"
NAMESPACES = "unshare setns clone3 mount umount2 pivot_root chroot fsopen open_tree move_mount mount_setattr"
OTHERS = "ptrace process_vm_readv process_vm_writev pidfd_open pidfd_getfd kcmp process_madvise"
KERNEL = "io_uring_setup bpf perf_event_open open_by_handle_at name_to_handle_at fanotify_init seccomp landlock_create_ruleset"
SOCKETS = "socket bind listen accept accept4 connect"
CALLS = f"{MEMORY} {KEYS} {NAMESPACES} {OTHERS} {KERNEL} {SOCKETS} execveat setuid setresuid capset personality quotactl".split()


def attack(code: str, as_user: bool, limits: Limits = LIMITS) -> str:
    """What the program prints in the sandbox, started by the user of the tests (root, in CI) or by an ordinary one."""
    if not as_user or os.getuid() != 0:
        return output(code, limits)
    command = "import sys; from tests.reward.test_verifier_code import output; from rlhf.reward.verifiers.sandbox import Limits; "
    command += f"print(output(sys.stdin.read(), {limits!r}), end='')"
    argv = [*ordinary_user(), sys.executable, "-B", "-c", command]
    done = subprocess.run(argv, input=code, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ordinary_user() -> list[str]:
    """What makes of a command of root's one of nobody's, who may reach Python and the packages even where they lie in a home that is
    closed: in a mount namespace of its own that home has an open folder in its place, with nothing else in it."""
    needed = [Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), Path(rlhf.__file__).resolve().parents[1]]
    homes = {path: [up for up in reversed(path.parents) if not up.stat().st_mode & 1] for path in needed}
    closed = {path: f"/mnt/{n}" for n, path in enumerate(needed) if homes[path]}
    script = ["mount -t tmpfs none /mnt"]
    script += [f"mkdir {held}; mount --bind {path} {held}" for path, held in closed.items()]
    script += [f"mount -t tmpfs -o mode=755 none {home}" for home in {homes[path][0] for path in closed}]
    script += [f"mkdir -p {path}; mount --bind {held} {path}" for path, held in closed.items()]
    script.append('exec setpriv --reuid=65534 --regid=65534 --clear-groups "$@"')
    return ["unshare", "--mount", "bash", "-ec", "; ".join(script), "bash"]


def numbers(names: list[str]) -> dict[str, int]:
    import pyseccomp

    found = {name: pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) for name in names}
    return {name: number for name, number in found.items() if number >= 0}


@pytest.mark.parametrize("as_user", [False, True])
def test_the_kernel_answers_few_calls(as_user):
    code = f"""
import ctypes, errno, os, socket
libc = ctypes.CDLL(None, use_errno=True)
calls = {numbers(CALLS)!r}
answered = []
for name, number in calls.items():
    result = libc.syscall(number, 0, 0, 0, 0, 0, 0)
    if result != -1 or ctypes.get_errno() != errno.ENOSYS:
        answered.append((name, result, ctypes.get_errno()))
for flags in (0x10000000, 0x00020000, 0x40000000, 0):
    if libc.syscall({numbers(["clone"])["clone"]}, flags | 17, 0, 0, 0, 0) != -1:
        answered.append(("clone", flags))
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET, socket.AF_VSOCK, socket.AF_ALG):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
        try:
            socket.socket(family, kind)
            answered.append((family, kind))
        except OSError:
            pass
try:
    os.write(0, b"x")
    answered.append("its input can be written to")
except OSError:
    pass
print(len(calls), answered)
"""
    found = attack(code, as_user).split(" ", 1)
    assert int(found[0]) > 30 and found[1] == "[]\n"


HOARD = """
import ctypes, errno, fcntl, mmap, os, socket, threading, time  # now: later there may be no file left to read a module from
libc = ctypes.CDLL(None, use_errno=True)
MIB = 2**20
held, kept, total = [], [], 0
def take(what):
    global total
    try:
        while total < 4000 * MIB and (got := what()):
            total += got
    except (OSError, MemoryError):
        pass
def memory():
    kept.append(bytearray(8 * MIB)); return 8 * MIB
def file_in_memory():
    held.append(os.memfd_create("x")); return os.write(held[-1], bytes(8 * MIB))
def shared_segment():
    return 8 * MIB if libc.shmget(0, 8 * MIB, 0o1600) >= 0 else 0
def pipe():
    ends = os.pipe(); held.extend(ends)
    fcntl.fcntl(ends[1], 1031, MIB)
    os.set_blocking(ends[1], False)
    return os.write(ends[1], bytes(MIB))
def shared_mapping():
    kept.append(mmap.mmap(-1, 8 * MIB)); kept[-1].write(bytes(8 * MIB)); return 8 * MIB
def folder():
    kept.append(open(f"file{len(kept)}", "wb", buffering=0)); return kept[-1].write(bytes(8 * MIB))
def connections():
    if not held:
        held.append(socket.socket(socket.AF_UNIX)); held[0].bind("\\0listens"); held[0].listen(4096)
    end = socket.socket(socket.AF_UNIX); end.connect("\\0listens"); end.setblocking(False)
    return end.send(bytes(128 * 2**10))
def pair():
    held.extend(socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)); held[-1].setblocking(False)
    return held[-1].send(bytes(128 * 2**10))
def child():
    ready, done = os.pipe()
    if os.fork() == 0:
        hoard = bytearray(64 * MIB); os.write(done, b"x")
        time.sleep(30)
    os.read(ready, 1); os.close(ready); os.close(done)
    return 64 * MIB
for what in (connections, shared_segment, file_in_memory, folder, child, pair, pipe, memory, shared_mapping):
    take(what)
kept.clear()  # room to say how much it was
print(total // MIB)
"""


@pytest.mark.parametrize("as_user", [False, True])
def test_all_memory_together_is_bounded(as_user):
    limits = replace(LIMITS, memory_bytes=256 * 2**20)
    assert int(attack(HOARD, as_user, limits)) <= 256 + 32 + 64, "its memory, its folder, and pipes"


def test_processes_are_there_for_those_who_ask():
    assert score("import os\ntry: os.fork()\nexcept OSError: pass\ndef square(x): return x * x") == 1.0
    code = "import subprocess\nprint(subprocess.run(['/bin/sh', '-c', 'echo $((6 * 7)) | cat'], capture_output=True).stdout)"
    assert output(code, replace(LIMITS, forks=True)) == "b'42\\n'\n"
    several = "import subprocess\ndef square(x): return int(subprocess.check_output(['/bin/echo', str(x * x)]))"
    assert (score(several), score(several, forks=True)) == (0.0, 1.0)


def test_ordinary_programs_find_what_they_need():
    code = """
import asyncio, concurrent.futures, decimal, glob, json, os, random, re, shutil, signal, socket, sqlite3, sys, tempfile, threading, time
async def slow(n):
    await asyncio.sleep(0.01)
    return n
async def both():
    return await asyncio.gather(slow(1), slow(2)), await asyncio.to_thread(sum, [1, 2])
with concurrent.futures.ThreadPoolExecutor(2) as pool:
    squares = list(pool.map(lambda n: n * n, range(4)))
with tempfile.TemporaryDirectory(dir="/sandbox") as folder:
    with open(f"{folder}/a", "w") as file: file.write("x")
    shutil.copy2(f"{folder}/a", f"{folder}/b"); shutil.copytree(folder, f"{folder}/c"); os.rename(f"{folder}/b", f"{folder}/d")
    names = sorted(os.path.basename(path) for path in glob.glob(f"{folder}/*"))
base = sqlite3.connect(":memory:"); rows = base.execute("select 1 + 1").fetchall()
near, far = socket.socketpair(); near.send(b"hi")
signal.setitimer(signal.ITIMER_REAL, 0.01); signal.signal(signal.SIGALRM, lambda *a: None); time.sleep(0.02)
print(asyncio.run(both()), squares, names, rows, far.recv(2), len(os.urandom(4)), decimal.Decimal("0.1") + 1, sys.stdin.read())
"""
    expected = "([1, 2], 3) [0, 1, 4, 9] ['a', 'c', 'd'] [(2,)] b'hi' 4 1.1 \n"
    assert output(code) == expected


def test_without_a_filter_nothing_is_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    syscalls.syscall_filter.cache_clear()
    try:
        with pytest.raises(SandboxError, match="pyseccomp"):
            require_sandbox()
    finally:
        syscalls.syscall_filter.cache_clear()


def test_a_filter_that_the_kernel_refuses_is_no_wrong_program(monkeypatch):
    monkeypatch.setattr("rlhf.reward.verifiers.sandbox.syscall_filter", lambda forks: b"\0" * 8)
    with pytest.raises(SandboxError, match="limiting system calls: Invalid argument"):
        run_program("print('ran')", "", LIMITS)
