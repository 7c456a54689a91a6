"""Weights & Biases, which can neither stop nor delay a run.

Every call into its library is made by one background thread that works off a queue, because the library talks to
another process and to the network: whatever it raises is warned about once and switches it off, and however long it
takes, the loop does not wait for it (except `FINISH_S` seconds at the very end). If `online` cannot begin, the run is
kept offline instead, to be sent later with `wandb sync`.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf.config import Settings
from rlhf.config.sft import SftSettings

log = logging.getLogger(__name__)

INIT_S = 30  # wait of the thread for the server before the run is kept offline
FINISH_S = 60  # wait at the end of a run for the last lines to be written or sent
QUEUE_LINES = 10_000  # more than this many unsent lines are not kept in memory; they are in the run folder anyway


class Wandb:
    """Passes the lines of the record on. No method raises or blocks, but `close` waits up to `FINISH_S` seconds."""

    def __init__(
        self, settings: Settings | SftSettings, folder: Path, run_id: str, start: Callable[..., Any] | None = None
    ):
        """
        Args:
            folder: the run folder; offline files go to `wandb/` in it.
            run_id: the id of the W&B run; a resumed run with the same id continues its curves.
            start: makes the W&B run from (settings, folder, run_id); replaced in tests.
        """
        self._queue: queue.Queue[Callable[[Any], None] | None] = queue.Queue(QUEUE_LINES)
        self._arguments = (settings, folder, run_id)
        self._start = start or start_run
        self._off = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def step(self, line: Mapping[str, Any]) -> None:
        """Send the metrics of a step under their own names."""
        values = _numbers(line)
        self._put(lambda run: run.log(values))

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """Send held-out metrics under `eval/`."""
        values = {name if name == "step" else f"eval/{name}": value for name, value in _numbers(line).items()}
        self._put(lambda run: run.log(values))

    def phase(self, text: str) -> None:
        """Not sent."""

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Not sent: they stay in the run folder."""

    def close(self) -> None:
        """Send what is left and end the W&B run."""
        self._put(lambda run: run.finish())
        self._put(None)
        self._thread.join(FINISH_S)
        if self._thread.is_alive():
            self._give_up(f"not finished {FINISH_S} s after the end of the run")

    def _put(self, work: Callable[[Any], None] | None) -> None:
        if self._off:
            return
        try:
            self._queue.put_nowait(work)
        except queue.Full:
            self._give_up(f"{QUEUE_LINES} lines are waiting to be sent")

    def _work(self) -> None:
        try:
            run = self._start(*self._arguments)
            while not self._off and (work := self._queue.get()) is not None:
                work(run)
        except Exception as error:  # noqa: BLE001 - this thread's whole purpose: W&B's failures end here
            self._give_up(repr(error))

    def _give_up(self, reason: str) -> None:
        if not self._off:
            self._off = True
            log.warning(
                "Weights & Biases failed and is off for the rest of this run: %s. All metrics are still written to %s",
                reason,
                self._arguments[1],
            )


def start_run(settings: Settings | SftSettings, folder: Path, run_id: str) -> Any:
    """A W&B run, online if that is asked for and works within `INIT_S` seconds, else offline."""
    if settings.tracking.wandb == "offline":
        return _init(settings, folder, run_id, "offline")
    import wandb

    reason: object
    try:
        if wandb.login(prompt=False):  # no question for a key, which an unattended run would wait on
            return _init(settings, folder, run_id, "online")
        reason = "no API key is configured; set WANDB_API_KEY or run `wandb login`"
    except (wandb.Error, OSError) as error:
        reason = error
    log.warning(
        "Weights & Biases is not reached (%s). The run is kept offline; send it later: `wandb sync %s/wandb/offline-*`",
        reason,
        folder,
    )
    return _init(settings, folder, run_id, "offline")


def _init(settings: Settings | SftSettings, folder: Path, run_id: str, mode: Literal["online", "offline"]) -> Any:
    import wandb

    run = wandb.init(
        project=settings.tracking.project,
        dir=str(folder),
        id=run_id,
        name=folder.resolve().name,
        resume="allow" if mode == "online" else None,
        mode=mode,
        config=settings.model_dump(mode="json"),
        settings=wandb.Settings(
            init_timeout=INIT_S,
            finish_timeout=FINISH_S,
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
        ),
    )
    # Steps are an ordinary metric, because W&B's own counter cannot go back when a run is resumed from a checkpoint.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _numbers(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "warnings" and value is not None}
