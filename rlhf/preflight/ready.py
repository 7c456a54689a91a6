"""Everything that is looked at before a run starts, in `--dry-run` and at the beginning of the run alike: what passes here starts.

No weights are loaded and nothing is left running; Ray is not started. The cheapest looks come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.algorithms import Algorithm, make
from rlhf.cluster.devices import uses_gpu
from rlhf.cluster.precision import Choice, choose_here, settled
from rlhf.config import Settings
from rlhf.config.settings import single_process
from rlhf.preflight.ahead import check_ahead
from rlhf.preflight.gpu_fit import GpuFit, gpu_fit
from rlhf.preflight.inputs import Inputs, read_inputs
from rlhf.preflight.machine import check_machine, check_memory, check_room
from rlhf.tracking.folder import check_run_folder
from rlhf.tracking.record import recorded_dtype


@dataclass(frozen=True)
class Ready:
    """What was found.

    Attributes:
        settings: with what was left open decided.
        asked: as they were given, or as debug mode has them.
        seen: what this machine has of what the run needs, a line each.
        gpu_fit: whether the layout fits this machine's GPUs, by an estimate.
    """

    settings: Settings
    asked: Settings
    choice: Choice
    algorithm: Algorithm
    inputs: Inputs
    seen: Sequence[str]
    gpu_fit: GpuFit


def ready(settings: Settings, debug: bool = False, resume: bool = False) -> Ready:
    """Look at all of it. Whether a checkpoint can be continued is asked where it is, in `training.resume`.

    Args:
        debug: the run is for `--debug`: all roles in one process.
        resume: the run in `run.dir` goes on.

    Raises:
        UserError: the run cannot work as configured.
    """
    check_run_folder(settings.run.dir, resume)
    if debug:
        settings = single_process(settings)
    asked, choice = settings, choose_here(settings, recorded_dtype(settings.run.dir) if resume else None)
    settings = settled(settings, choice)
    seen = list(check_machine(settings, debug))
    algorithm = make(settings)
    check_ahead(settings, algorithm, debug)
    inputs = read_inputs(settings)
    if not uses_gpu(settings.cluster):
        check_memory(settings, inputs.shape, algorithm)
    seen.append(check_room(settings, inputs.shape, settings.loop.steps, resume))
    fit = gpu_fit(settings, inputs.shape, algorithm, debug)
    return Ready(settings, asked, choice, algorithm, inputs, seen, fit)
