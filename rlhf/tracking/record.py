"""The run folder: created once, appended to line by line, cut back on resume.

Disk first: a line is in its file before it goes anywhere else. What shows or sends it (console, Weights & Biases) is a `Sink` and gets the
line as it was written; a sink that fails is warned about once and dropped.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlhf.config import Settings, yamls
from rlhf.config.loader import UserError
from rlhf.config.sft import SftSettings
from rlhf.tracking import responses
from rlhf.tracking.console import make_console
from rlhf.tracking.folder import MANIFEST, REMEDY, check_run_folder
from rlhf.tracking.jsonl import JsonLines
from rlhf.tracking.provenance import write_provenance, write_whole
from rlhf.tracking.sinks import Sinks
from rlhf.tracking.spans import Timing
from rlhf.tracking.wandb import Wandb

log = logging.getLogger(__name__)


class Record:
    """Writes the run folder. After construction no method raises because of a disk, a terminal or a network.

    Attributes:
        folder: the run folder.
        run_id: 8 hexadecimal digits made when the folder was created; a resumed run keeps them.
    """

    def __init__(
        self,
        settings: Settings | SftSettings,
        resume: bool,
        resolve: Callable[[str], str] = str,
        sinks: Sinks | None = None,
    ):
        """Create the run folder, or open it again.

        Args:
            resume: continue the run that the folder holds; call `rewind` next.
            resolve: turns a data path of the settings into a file (for the data hashes of the manifest).
            sinks: what gets the lines besides Weights & Biases; None: the online loop's console.

        Raises:
            UserError: the folder holds a run and `resume` is False, or holds none and it is True, or cannot be written.
        """
        self.folder = Path(settings.run.dir)
        check_run_folder(settings.run.dir, resume)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.run_id = write_provenance(self.folder, settings, resume, resolve)
            self._files = {
                name: JsonLines(self.folder / f"{name}.jsonl")
                for name in ("metrics", "evaluations", "samples", "spans")
            }
            for file in self._files.values():
                file.path.touch()
            self._timings: list[dict[str, Any]] = []  # not yet written
        except OSError as error:
            raise UserError(
                f"run.dir={self.folder}: the run folder cannot be written ({error.strerror or error}). {REMEDY}"
            ) from error
        self._failed_files: set[str] = set()
        if sinks is None:
            assert isinstance(settings, Settings), "fine-tuning brings its own"
            sinks = sinks_of(settings)
        self._sinks = sinks
        self._sinks.add(
            "wandb", lambda: Wandb(settings, self.folder, self.run_id) if settings.tracking.wandb != "off" else None
        )

    def step(self, step: int, metrics: Mapping[str, float], warnings: Sequence[str] = ()) -> None:
        """Record the metrics of a training step (1-based), and the warnings about it; before them all timings so far."""
        self._write_timings()
        line = _line(step, metrics, warnings)
        self._append("metrics", line)
        self._sinks.send(lambda sink: sink.step(line))

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics on held-out prompts, measured after `step` steps (0: before training)."""
        line = _line(step, metrics)
        self._append("evaluations", line)
        self._sinks.send(lambda sink: sink.evaluation(line))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record what the policy wrote in a step: one line per row, with `step` put before the row's own fields."""
        for row in rows:
            self._append("samples", {"step": step} | dict(row))
        self._sinks.send(lambda sink: sink.samples(step, rows))

    def timing(self, timing: Timing) -> None:
        """Record who was busy with what (`spans.jsonl`). There are two for every prompt, so they are written together with the next
        step: a killed process loses those of one step."""
        self._timings.append(timing.line())

    def keeps_responses(self, after: int, described: Mapping[str, Any]) -> None:
        """Note the settings and contents with which the run starts, or goes on after this step, beside the responses that it keeps."""
        self._keep(lambda: responses.note_start(self.folder, after, described))

    def learned_from(self, step: int, taken: Sequence[responses.Taken]) -> None:
        """Keep what a step learned from (`tracking.responses`)."""
        self._keep(lambda: responses.write_step(self.folder, step, taken))

    def _keep(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self.not_kept(error.strerror or str(error))

    def not_kept(self, why: str) -> None:
        """Warn, once, that the responses of a step are not kept."""
        if responses.FOLDER not in self._failed_files:
            self._failed_files.add(responses.FOLDER)
            log.warning(
                "%s: the responses of a step were not kept (%s), so the run cannot be replayed beyond it; training goes on",
                self.folder / responses.FOLDER,
                why,
            )

    def phase(self, text: str) -> None:
        """Show what the run does from now on. It is not written to disk."""
        self._sinks.phase(text)

    def placed(self, lines: Sequence[str]) -> None:
        """Note in manifest.json which actors run on which node in this start of the run, one line per node."""
        self._note("placement", list(lines))

    def computes(self, dtype: str, why: str) -> None:
        """Note in manifest.json the type of weights and activations in this start of the run, and why it is that."""
        self._note("dtype", f"{dtype}: {why}")

    def _note(self, name: str, value: Any) -> None:
        path = self.folder / MANIFEST
        try:
            described = json.loads(path.read_text())
            start = described["resumed"][-1] if described["resumed"] else described
            start[name] = value
            write_whole(path, json.dumps(described, indent=2) + "\n")
        except OSError as error:
            log.warning("%s: %s was not noted (%s); training goes on", path, name, error.strerror or error)

    def rewind(self, step: int) -> None:
        """Forget everything recorded of steps after `step`: they will be done again.

        Raises:
            UserError: the files cannot be rewritten. Continuing would leave two lines for one step.
        """
        try:
            for file in self._files.values():
                file.keep(step)
            responses.keep(self.folder, step)
        except OSError as error:
            raise UserError(
                f"run.dir={self.folder}: the record cannot be cut back to step {step} ({error.strerror or error}). "
                "Free some disk space, or make the folder writable, and use --resume again."
            ) from error

    def close(self) -> None:
        """Write what is left, and let the console and Weights & Biases finish. Safe to call twice."""
        self._write_timings()
        self._sinks.close()

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_timings(self) -> None:
        lines, self._timings = self._timings, []
        if lines:
            self._append("spans", *lines)

    def _append(self, name: str, *lines: Mapping[str, Any]) -> None:
        try:
            self._files[name].extend(lines)
        except OSError as error:
            if name not in self._failed_files:
                self._failed_files.add(name)
                log.warning(
                    "%s: a line was lost (%s); training goes on", self._files[name].path, error.strerror or error
                )


def sinks_of(settings: Settings) -> Sinks:
    """The online loop's console, as `tracking.console` asks for it."""
    sinks = Sinks(settings.run.dir)
    sinks.add("console", lambda: make_console(settings))
    return sinks


def recorded_dtype(folder: str) -> Any:
    """The type in which the run in this folder computes, as its config.yaml says; None without one.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        return None
    try:
        return yamls.parse(path.read_text(encoding="utf-8"))["policy"]["dtype"]
    except (yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: the file is damaged, so that the type in which the run computes (policy.dtype) cannot be read. Restore it, or start "
            "a new run in another run.dir."
        ) from error


def _line(step: int, metrics: Mapping[str, float], warnings: Sequence[str] = ()) -> dict[str, Any]:
    """One line of a metrics file. JSON has no NaN: such a value becomes null, and `warnings` says so."""
    values: dict[str, float | None] = {}
    warnings = list(warnings)
    for name, value in metrics.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        values[name] = number if math.isfinite(number) else None
        if values[name] is None:
            warnings.append(f"{name} is {value}")
    return {"step": step, "time": round(time.time(), 3)} | values | ({"warnings": warnings} if warnings else {})
