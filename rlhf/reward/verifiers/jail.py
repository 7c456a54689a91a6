"""Runs one program shut off from the machine. A script on its own: `sandbox` starts it, nothing imports it.

    launcher (this script)  makes new namespaces and a root folder of its own, keeps the wall clock, reports how it ended
      init                  first process of the new process space: when it dies, the kernel kills everything in there
        program             what was asked for, under resource limits and without rights

The program sees no network (not even its own loopback), no process but its own, and of the files the operating system's and
Python's, read-only, and an empty folder in memory. It may make few system calls. Needs Linux 5.14 (`mount_setattr`; processes
counted per user namespace) that lets an ordinary user make user namespaces. `sandbox` describes the plan, which comes as JSON on a
file descriptor.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import sys
import time

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
SYS_MOUNT_SETATTR = 442
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
NOBODY = 65534
ROOT = "/proc"  # where the new root is mounted first: a folder that is always there and that holds nothing to be shown
WORK = "/sandbox"
DEVICES = ("null", "zero", "random", "urandom")
OURS = 2  # processes of the process space's user that are not the program's: launcher and init

libc = ctypes.CDLL(None, use_errno=True)


class Filter(ctypes.Structure):
    """The kernel's `sock_fprog`: a BPF program, of instructions of 8 bytes."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def call(what: str, result: int) -> None:
    """Raise what a C function reported."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    words = (text.encode() if text is not None else None for text in (source, target, kind))
    data = options.encode() if options is not None else None
    call(f"mounting {target}", libc.mount(*words, ctypes.c_ulong(flags), data))


def main(plan: dict) -> dict:
    """Start the program and wait. Returns its exit status (negative: the signal that ended it; None: out of time)."""
    isolate(plan)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # not earlier: a change of user forgets it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    problems, problem = os.pipe()  # what kept the program from starting; closed by its start
    began = time.monotonic()
    init = os.fork()
    if init == 0:
        be_init(plan, problem)
    os.close(problem)
    while True:
        pid, status = os.waitpid(init, os.WNOHANG)
        if pid:
            said = os.read(problems, 4096).decode()
            return {"error": said} if said else {"status": os.waitstatus_to_exitcode(status)}
        if plan["wall_s"] is None:
            signal.sigwait({signal.SIGCHLD})
            continue
        left = plan["wall_s"] - (time.monotonic() - began)
        if left <= 0:
            os.kill(init, signal.SIGKILL)
            os.waitpid(init, 0)
            return {"status": None}
        signal.sigtimedwait({signal.SIGCHLD}, left)


def isolate(plan: dict) -> None:
    """New namespaces and a new root. An ordinary user gets the right to mount from the user namespace, so that comes first; root
    mounts as root, because others may not reach Python's folder, and then becomes nobody: no limit on processes binds root."""
    others = CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
    myself = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)
    if os.geteuid() == 0:
        call("a new mount namespace", libc.unshare(CLONE_NEWNS))
        new_root(plan)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        libc.prctl(PR_SET_DUMPABLE, 1)  # else /proc/self would stay root's
        new_user(myself, others)
    else:
        new_user(myself, others | CLONE_NEWNS)
        new_root(plan)
    os.close(myself)


def new_user(myself: int, others: int) -> None:
    """A user namespace in which there is this user alone, and others with it. Full rights within, until a program starts."""
    user, group = os.geteuid(), os.getegid()
    call("a new user and network namespace", libc.unshare(CLONE_NEWUSER | others))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        file = os.open(name, os.O_WRONLY, dir_fd=myself)
        os.write(file, text.encode())
        os.close(file)


def new_root(plan: dict) -> None:
    """Make the root folder, with the program's files in the work folder, and go there."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in plan["read_only"]:
        expose(path)
    os.mkdir(f"{ROOT}/dev")
    for name in DEVICES:
        open(f"{ROOT}/dev/{name}", "w").close()
        mount(f"/dev/{name}", f"{ROOT}/dev/{name}", None, MS_BIND)
    os.mkdir(ROOT + WORK)
    read_only(ROOT)
    mount("tmpfs", ROOT + WORK, "tmpfs", MS_NOSUID | MS_NODEV, f"size={plan['disk_bytes']},nr_inodes=1000,mode=777")
    for name, text in plan["files"].items():
        with open(f"{ROOT}{WORK}/{name}", "w", encoding="utf-8") as file:
            file.write(text)
    os.chdir(ROOT)
    call("pivot_root", libc.syscall(SYS_PIVOT_ROOT[platform.machine()], b".", b"."))
    call("letting the old root go", libc.umount2(b".", MNT_DETACH))
    os.chdir("/")


def expose(path: str) -> None:
    """Show a file, folder or link of the machine at the same place."""
    if not os.path.lexists(path) or os.path.lexists(ROOT + path):
        return  # not on this system, or already there inside another one
    os.makedirs(os.path.dirname(ROOT + path), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), ROOT + path)
        return
    if os.path.isdir(path):
        os.mkdir(ROOT + path)
    else:
        open(ROOT + path, "w").close()
    mount(path, ROOT + path, None, MS_BIND | MS_REC)


def read_only(path: str) -> None:
    """The same for all that is mounted below it."""
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    result = libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), AT_RECURSIVE, ctypes.byref(attributes), size)
    call(f"making {path} read-only", result)


def be_init(plan: dict, problem: int) -> None:
    """Start the program, reap whatever ends, and end as the program did. Never returns."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    program = os.fork()
    if program == 0:
        try:
            be_program(plan, problem)
        except (OSError, ValueError) as error:
            os.write(problem, f"starting the program: {error}".encode())
        os._exit(127)
    while True:
        pid, status = os.wait()
        if pid == program:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def be_program(plan: dict, problem: int) -> None:
    """Become the program. `exec` takes the rights away, since the user is not root."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    keep = sorted({0, 1, 2, problem, *plan["keep"]})
    for low, high in zip(keep, [*keep[1:], 1 << 16], strict=True):
        os.closerange(low + 1, high)
    for name, value in plan["limits"].items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    tasks = plan["processes"] + OURS
    resource.setrlimit(resource.RLIMIT_NPROC, (tasks, tasks))
    call("giving up new rights", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    os.chdir(WORK)
    instructions = bytes.fromhex(plan["filter"])
    allowed = Filter(len(instructions) // 8, instructions)
    call("limiting system calls", libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(allowed), 0, 0))
    os.execve(plan["argv"][0], plan["argv"], plan["environment"])


if __name__ == "__main__":
    with open(int(sys.argv[1]), encoding="utf-8") as given:
        the_plan = json.load(given)
    try:
        outcome = main(the_plan)
    except OSError as error:
        outcome = {"error": str(error)}
    if the_plan["report"] is not None:
        with open(the_plan["report"], "w", encoding="utf-8") as report:
            json.dump(outcome, report)
    sys.exit(outcome.get("status") or 0)
