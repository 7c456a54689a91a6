"""What `policy.dtype: auto` means for a run: bf16 where every machine that computes has arithmetic for it, else fp32.

One type for all: ranks exchange gradients, and engines must compute what the policy computes. Owns how a machine is asked
and the rule. A CPU without bf16 emulates it, several times slower than fp32.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from rlhf.cluster.devices import uses_gpu
from rlhf.cluster.runtime import THIS_MACHINE, Runtime
from rlhf.config.policy import Dtype
from rlhf.config.settings import Settings
from rlhf.config.sft import SftSettings

Tree = TypeVar("Tree", Settings, SftSettings)

CPU_UNITS = {"avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX", "bf16": "Arm's BF16"}
"""Flag in /proc/cpuinfo -> the instructions it stands for."""
WITHOUT = {
    "ATEN_CPU_CAPABILITY": ("default", "avx2"),
    "ONEDNN_MAX_CPU_ISA": ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni"),
}
"""Environment variable -> values (in small letters) with which torch or oneDNN leaves those instructions alone."""
GPU_FROM = (8, 0)
"""Compute capability of the first NVIDIA GPUs with bf16."""


@dataclass(frozen=True)
class Bf16:
    """Whether a machine computes in bf16, and why that is so, in words: "AVX-512 BF16", "no AVX-512 BF16 and no AMX"."""

    native: bool
    why: str


@dataclass(frozen=True)
class Choice:
    """The type of a run, and why it is that."""

    dtype: Dtype
    why: str


def cpu_bf16(flags: Iterable[str], environ: Mapping[str, str]) -> Bf16:
    """A processor with these flags, under these variables."""
    for variable, values in WITHOUT.items():
        if environ.get(variable, "").lower() in values:
            return Bf16(False, f"{variable}={environ[variable]}")
    units = [unit for flag, unit in CPU_UNITS.items() if flag in flags]
    return Bf16(True, units[0]) if units else Bf16(False, "a processor without AVX-512 BF16 or AMX")


def gpu_bf16(listing: str | None) -> Bf16:
    """GPUs whose names and compute capabilities are listed, one a line as nvidia-smi does; None: nothing lists them."""
    if not listing:
        return Bf16(True, "GPUs, which are taken to have bf16")
    gpus = [line.rpartition(",") for line in listing.splitlines()]
    # A driver that does not know the capability writes [N/A].
    known = [(name, found.groups()) for name, _, text in gpus if (found := re.fullmatch(r"(\d+)\.(\d+)", text.strip()))]
    old = [name for name, capability in known if tuple(map(int, capability)) < GPU_FROM]
    return Bf16(False, f"{old[0]}, a GPU without bf16") if old else Bf16(True, gpus[0][0])


def look(gpu: bool) -> Bf16:
    """The machine that this runs on: its GPUs, or its processor."""
    if gpu:
        return gpu_bf16(_capabilities())
    return cpu_bf16(_flags(), os.environ)


def _capabilities() -> str | None:
    # Asking torch would claim memory on the devices.
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line.partition(":") for line in file]
    except OSError:
        return set()
    found = next((value for name, _, value in lines if name.strip() in ("flags", "Features")), "")
    return set(found.split())


def choose(machines: Mapping[str, Bf16]) -> Choice:
    """The type for all of these machines, given by name: bf16 if each computes in it."""
    emulating = {name: one for name, one in machines.items() if not one.native}
    if emulating:
        return Choice("fp32", "; ".join(f"{name}: {one.why}" for name, one in emulating.items()))
    return Choice("bf16", ", ".join(dict.fromkeys(one.why for one in machines.values())))


def choose_here(settings: Settings | SftSettings, before: Dtype | None = None) -> Choice:
    """What this machine alone would have the run compute in; bf16 that is asked for and only emulated is pointed out.

    Args:
        before: see `settle`.
    """
    here, asked = look(uses_gpu(settings.cluster)), settings.policy.dtype
    if asked == "auto" and before is not None:
        return Choice(before, "as before the run was resumed")
    if asked == "auto":
        return choose({THIS_MACHINE: here})
    slow = (
        ""
        if asked == "fp32" or here.native
        else f", though {THIS_MACHINE} only emulates it, several times slower: {here.why}"
    )
    return Choice(asked, f"as `policy.dtype` says{slow}")


def settle(settings: Tree, runtime: Runtime, before: Dtype | None = None) -> tuple[Tree, Choice]:
    """The settings with one type and one learning rate, by the nodes on which `runtime` has reserved places.

    Args:
        before: the type of the run that is continued; `auto` keeps it, on whatever machine.
    """
    if settings.policy.dtype != "auto":
        choice = Choice(settings.policy.dtype, "as `policy.dtype` says")
    elif before is not None:
        choice = Choice(before, "as before the run was resumed")
    else:
        choice = choose(runtime.ask_nodes(("policy", "rollout"), look, uses_gpu(settings.cluster)))
    return settled(settings, choice), choice


def settled(settings: Tree, choice: Choice) -> Tree:
    """The settings with this type."""
    return settings.model_copy(update={"policy": settings.policy.computing_in(choice.dtype)})
