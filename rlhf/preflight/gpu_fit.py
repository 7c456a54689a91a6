"""Whether a run's layout fits the GPUs that this machine shows, by the planner's estimate.

The dry run refuses what does not fit; the run itself only warns, since an estimate may err and nobody could get past it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from rlhf.algorithms import Algorithm
from rlhf.cluster.devices import uses_gpu
from rlhf.cluster.gpus import visible_gpu
from rlhf.config import Settings
from rlhf.preflight.estimate import Cluster, estimate
from rlhf.preflight.finding import PlanError
from rlhf.preflight.machine import size_in_words
from rlhf.preflight.report import judge_bytes
from rlhf.training.shapes import ModelShape


@dataclass(frozen=True)
class GpuFit:
    """What was found.

    Attributes:
        gpus: each one in words.
        kind: under which the planner knows them; None: it knows no such GPU, or there is none, and nothing was estimated.
        problems: what does not fit, each with the fields that would change it.
        elsewhere: the run may be meant for other GPUs than these (a cluster's), or for this one alone (`--debug`).
    """

    gpus: Sequence[str] = ()
    kind: str | None = None
    problems: Sequence[str] = ()
    elsewhere: bool = False

    def lines(self) -> Iterator[str]:
        """For the plan."""
        yield from self.gpus
        if self.kind is None:
            yield "whether it fits: `rlhf plan --gpu KIND` says so for the kinds of GPU that it knows"
            return
        yield from (f"DOES NOT FIT: {problem}" for problem in self.problems)
        if not self.problems:
            yield "fits"

    def refusal(self) -> str | None:
        """Why the run should not start here, and what helps; None if nothing speaks against it."""
        if not self.problems or self.elsewhere:
            return None
        return f"the run does not fit this machine's GPUs: {'; '.join(self.problems)}. `rlhf plan --gpu {self.kind}` proposes a layout"

    def require(self) -> None:
        """Raises PlanError if there is a refusal."""
        if refusal := self.refusal():
            raise PlanError(refusal)


def gpu_fit(settings: Settings, shape: ModelShape, algorithm: Algorithm, debug: bool) -> GpuFit:
    """Ask the planner about the GPUs that this process sees; nothing where models run on CPUs."""
    if not uses_gpu(settings.cluster):
        return GpuFit()
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    words = [f"GPU {index}: {one.name}, {size_in_words(one.total_memory)}" for index, one in enumerate(found)]
    kind = visible_gpu([one.name for one in found])
    if kind is None:
        return GpuFit(words)
    cluster = Cluster(1, len(found), replace(kind, memory=float(min(one.total_memory for one in found))))
    problems = estimate(settings, shape, algorithm, cluster, judge_bytes(settings)).problems
    return GpuFit(words, kind.name, problems, elsewhere=settings.cluster.address is not None or debug)
