"""`rlhf sft`: supervised fine-tuning on conversations, the start that alignment needs. Wires and takes down; trains nothing itself."""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import closing

from rlhf.cluster import LocalRuntime, RayRuntime, ResourceRequest, Runtime, uses_gpu
from rlhf.cluster.precision import settle
from rlhf.config.sft import SftSettings, one_rank
from rlhf.config.sft_checks import check_warm_up
from rlhf.data.assets import resolve
from rlhf.data.conversations import read_examples
from rlhf.data.loading_time import with_startup_deadline
from rlhf.data.model_folder import find_model
from rlhf.tracking.console import SupervisedConsole
from rlhf.tracking.folder import check_run_folder
from rlhf.tracking.record import Record, recorded_dtype
from rlhf.tracking.sinks import Sinks
from rlhf.training.checkpoints import Checkpoints
from rlhf.training.resume import remembered, sft_contents, starting_point
from rlhf.training.sft import Conversations, NextToken
from rlhf.training.supervised import Course, Saving, SupervisedGroup, train

log = logging.getLogger(__name__)


def sft(settings: SftSettings, debug: bool = False, resume: bool = False) -> None:
    """Learn the configured examples, measure, export.

    Args:
        debug: one rank in this process, so that a breakpoint works anywhere.
        resume: continue the run in `run.dir` from its last complete checkpoint.

    Raises:
        UserError: something the user can put right.
    """
    if debug:
        settings = one_rank(settings)
    asyncio.run(FineTuning(settings, debug, resume).run())


class FineTuning:
    """One run, from its files to its files."""

    def __init__(self, settings: SftSettings, debug: bool, resume: bool):
        settings = with_startup_deadline(settings)
        self.settings, self.debug, self.resume = settings, debug, resume
        check_run_folder(settings.run.dir, resume)
        self.examples, self.held_out = read_examples(settings.policy.model, settings.data)
        for field, read in (("examples", self.examples), ("eval_examples", self.held_out)):
            for reason, count in ({} if read is None else read.dropped).items():
                log.warning("data.%s: %d examples are left out (%s)", field, count, reason)
        training = settings.training
        self.course = Course(
            Conversations(self.examples, settings.run.seed), training.batch_size, training.epochs, settings.run.seed
        )
        check_warm_up(settings, self.course.updates)
        self.contents = sft_contents(find_model(settings.policy.model, "`policy.model`", weights=False), self.examples)
        self.start = starting_point(settings, self.contents, self.course.updates) if resume else None
        if self.start is not None:
            log.warning("run.dir=%s: %s", settings.run.dir, "; ".join(self.start.words()))

    async def run(self) -> None:
        """Reserve the devices, start the ranks, take the remaining steps, export."""
        settings = self.settings
        with closing(Sinks(settings.run.dir)) as sinks:
            if settings.tracking.console != "off":
                sinks.add("console", lambda: SupervisedConsole(self.course.updates))
            sinks.phase("reserving devices")
            runtime: Runtime = LocalRuntime() if self.debug else RayRuntime(settings.cluster, settings.policy.ranks)
            try:
                await self._run(runtime, sinks)
            finally:
                runtime.stop()

    async def _run(self, runtime: Runtime, sinks: Sinks) -> None:
        placement = runtime.reserve(_resource_request(self.settings))
        before = recorded_dtype(self.settings.run.dir) if self.resume else None
        settings, choice = settle(self.settings, runtime, before)
        self.settings = settings
        if os.path.isdir(settings.policy.model):
            runtime.check_files({"policy": {"policy.model": os.path.abspath(settings.policy.model)}})
        with Record(settings, self.resume, resolve, sinks) as record:
            record.computes(choice.dtype, choice.why)
            if placement is not None:
                record.placed(placement.lines())
            if settings.checkpoint.every:
                runtime.check_files({"policy": {"run.dir": os.path.abspath(settings.run.dir)}})
            await self._train(runtime, record)

    async def _train(self, runtime: Runtime, record: Record) -> None:
        settings = self.settings
        learner, updates = NextToken(settings.policy), self.course.updates
        record.phase("starting the policy")
        group = await SupervisedGroup.start(
            runtime, learner, settings.policy, settings.cluster, settings.run.seed, updates
        )
        held_out = None if self.held_out is None else Conversations(self.held_out, settings.run.seed)
        record.phase("the policy is ready")
        await train(group, self.course, record, self._saving(), held_out, settings.training.eval_every)
        if settings.checkpoint.export:
            record.phase(f"exporting to {record.folder / 'export'}")
            await group.export(str((record.folder / "export").absolute()))
        await group.close()

    def _saving(self) -> Saving:
        settings = self.settings
        return Saving(
            Checkpoints(settings.run.dir, settings.checkpoint.keep),
            settings.checkpoint.every,
            self.resume,
            identity={},
            run=remembered(settings, self.contents),
            found=None if self.start is None else (self.start.tag, self.start.state),
        )


def _resource_request(settings: SftSettings) -> ResourceRequest:
    """What the ranks want of a cluster."""
    cluster = settings.cluster
    return ResourceRequest(
        gpu=uses_gpu(cluster),
        ranks=settings.policy.ranks,
        engines=0,
        servers=0,
        policy_nodes=cluster.policy_nodes,
        needs=cluster.node_resources,
    )
