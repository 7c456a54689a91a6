"""The system calls that a program in the sandbox may make, as a seccomp filter that `jail` installs.

All others answer "not implemented", which libraries know from older kernels. So what keeps memory outside of a process (SysV and
POSIX shared memory, memfd, vmsplice), keyrings, new namespaces, mounts, io_uring, bpf, ptrace, perf events, userfaultfd, file
handles and sockets are out of reach, and so is whatever later kernels add. A pair of connected local sockets can be had, which event
loops need. Not one that listens: what is sent to it before anybody accepts is the kernel's memory, for thousands of connections, though
their descriptors are closed.
"""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from functools import cache

from rlhf.config.extras import remedy

ALLOWED = """
access faccessat faccessat2 stat lstat fstat newfstatat statx statfs fstatfs readlink readlinkat getcwd chdir fchdir
open openat close close_range read readv pread64 preadv preadv2 write writev pwrite64 pwritev pwritev2 lseek sendfile
copy_file_range ftruncate truncate fallocate fadvise64 fsync fdatasync flock fcntl ioctl dup dup2 dup3 pipe pipe2
getdents getdents64 mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink symlinkat
chmod fchmod fchmodat umask utime utimes utimensat getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr
poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd eventfd2
timerfd_create timerfd_settime timerfd_gettime signalfd4
brk mmap munmap mprotect mremap madvise mincore msync membarrier
getsockname getpeername getsockopt setsockopt sendto sendmsg recvfrom recvmsg shutdown
execve exit exit_group wait4 waitid kill tkill tgkill getpid getppid gettid getpgid getpgrp getsid setpgid setsid
getuid geteuid getgid getegid getgroups getresuid getresgid
futex set_robust_list get_robust_list set_tid_address rseq arch_prctl
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait sigaltstack restart_syscall pause
alarm getitimer setitimer timer_create timer_settime timer_gettime timer_getoverrun timer_delete
clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times
getrandom uname sysinfo getrusage getrlimit setrlimit prlimit64 getpriority sched_yield sched_getaffinity getcpu
""".split()

CLONE_THREAD = 0x00010000
CLONE_NEW = 0x7E020000  # all kinds of namespaces
PR_SET_NAME = 15
UNKNOWN = -1  # to a libseccomp that is older than the call


class NoFilter(RuntimeError):
    """No filter can be made here."""


@cache
def syscall_filter(forks: bool) -> bytes:
    """The filter as a BPF program of this machine's kind.

    Args:
        forks: the program may start others. If not, it is one process, with threads: one address space is all that it has.

    Raises:
        NoFilter: pyseccomp, or the library libseccomp that it uses, is not there.
    """
    try:
        import pyseccomp
    except ModuleNotFoundError:
        raise NoFilter(f"the package pyseccomp is not installed. {remedy('verifiers')}") from None
    except RuntimeError as error:
        raise NoFilter(f"the system's library libseccomp.so.2 (Debian's libseccomp2): {error}") from None
    made = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.ENOSYS))
    for name in (*ALLOWED, *(("fork", "vfork") if forks else ())):
        if pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) != UNKNOWN:
            made.add_rule(pyseccomp.ALLOW, name)  # nothing, where this kind of machine has no such call
    made.add_rule(pyseccomp.ALLOW, "socketpair", pyseccomp.Arg(0, pyseccomp.EQ, socket.AF_UNIX))
    made.add_rule(pyseccomp.ALLOW, "prctl", pyseccomp.Arg(0, pyseccomp.EQ, PR_SET_NAME))
    # clone3, whose flags no filter can see, is not there; then libc takes clone.
    seen, wanted = (CLONE_NEW, 0) if forks else (CLONE_NEW | CLONE_THREAD, CLONE_THREAD)
    made.add_rule(pyseccomp.ALLOW, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, seen, wanted))
    with tempfile.TemporaryFile() as file:
        made.export_bpf(file)
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        return file.read()
