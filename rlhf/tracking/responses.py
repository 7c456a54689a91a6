"""What each step learned from: `responses/` in the run folder, if `tracking.responses` is on.

Owns the files: one for each step, `step-000001.npz`, with the prompts in the order in which the step took them, their responses exactly
as they were sampled, and what the judges said of them; and `run.json`, the settings and contents of each start of the run. A file appears
whole or not at all, so the folder can be read while the run goes on. Nothing is unpickled when it is read. Does not know: who fetches
the responses, and what is done with them (`rlhf.loop.keeping`, `rlhf.loop.replay`).
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.config.loader import UserError
from rlhf.tracking.provenance import write_whole
from rlhf.types import Completion, Failed, Feedback, Invalid, Outcome, Score, Span, TimedOut

FOLDER = "responses"
RUN = "run.json"
OUTCOMES: Mapping[str, type[Outcome]] = {kind.__name__: kind for kind in (Score, Invalid, Failed, TimedOut)}
UNREADABLE = (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile)
"""What reading a damaged file may raise."""


@dataclass(frozen=True)
class Taken:
    """A prompt that a step took.

    Attributes:
        place: in the order in which prompts were started, from 0.
        engine: place of the engine that wrote the responses.
        completions: exactly as they were sampled.
        feedback: what the judges said, before `reward.transforms`.
    """

    place: int
    prompt_id: str
    engine: int
    completions: tuple[Completion, ...]
    feedback: Feedback


@dataclass(frozen=True)
class TakenPrompt:
    """The same without the responses: which prompt, and its place."""

    place: int
    prompt_id: str


def write_step(run: str | os.PathLike[str], step: int, taken: Sequence[Taken]) -> None:
    """Write what a step took, in its order; another file of this step is replaced.

    Args:
        run: the run folder.

    Raises:
        OSError: it could not be written.
    """
    path = _path(run, step)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **_arrays(taken))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_step(run: str | os.PathLike[str], step: int) -> list[Taken]:
    """What a step took, in its order.

    Raises:
        UserError: the folder does not have this step, or its file is damaged.
    """
    path = _path(run, step)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return _taken(_facts(arrays), {name: arrays[name] for name in arrays.files})
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def read_prompts(run: str | os.PathLike[str], step: int) -> list[TakenPrompt]:
    """Which prompts a step took, in its order, without reading the responses. Raises as `read_step`."""
    path = _path(run, step)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [TakenPrompt(fact["place"], fact["prompt"]) for fact in _facts(arrays)]
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def steps(run: str | os.PathLike[str]) -> list[int]:
    """The steps that the folder has, ascending."""
    names = [re.fullmatch(r"step-(\d{6,})\.npz", path.name) for path in (Path(run) / FOLDER).glob("step-*.npz")]
    return sorted(int(name[1]) for name in names if name)


def keep(run: str | os.PathLike[str], last_step: int) -> None:
    """Delete the files of steps after `last_step`, which will be done again. Raises OSError."""
    for step in steps(run):
        if step > last_step:
            _path(run, step).unlink()


def note_start(run: str | os.PathLike[str], after: int, described: Mapping[str, Any]) -> None:
    """Write down that the run starts, or goes on, after this step.

    Args:
        described: settings and contents, as JSON (`rlhf.training.resume.remembered`).

    Raises:
        OSError: it could not be written.
    """
    path = Path(run) / FOLDER / RUN
    path.parent.mkdir(exist_ok=True)
    try:
        earlier = [start for start in read_starts(run) if start["after"] < after]
    except UserError:  # there is none yet, or it is damaged
        earlier = []
    write_whole(path, json.dumps([*earlier, {"after": after, **described}], indent=2) + "\n")


def read_starts(run: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """What `note_start` wrote, one after the other: `after`, `settings`, `contents`.

    Raises:
        UserError: the folder has no responses, or the file is damaged.
    """
    path = Path(run) / FOLDER / RUN
    if not path.is_file():
        raise UserError(
            f"{run}: this folder has no recorded responses ({FOLDER}/{RUN}). Runs with tracking.responses=true keep them."
        )
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
        for start in starts:
            if not isinstance(start["after"], int) or not all(
                isinstance(start[part], dict) for part in ("settings", "contents")
            ):
                raise ValueError("not what a run writes there")
        if not starts:
            raise ValueError("it is empty")
    except (*UNREADABLE, RecursionError) as error:
        raise _unreadable(path, error) from error
    return starts


def _path(run: str | os.PathLike[str], step: int) -> Path:
    return Path(run) / FOLDER / f"step-{step:06d}.npz"


def _unreadable(path: Path, error: BaseException) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: there is no such file. The run kept no responses of this step (tracking.responses).")
    return UserError(f"{path}: the file is damaged ({error}). Restore it from a copy.")


def _facts(arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    return json.loads(arrays["facts"].tobytes())


def _arrays(taken: Sequence[Taken]) -> dict[str, np.ndarray]:
    """The file's arrays: docs/run_folder.md describes them."""
    completions = [completion for one in taken for completion in one.completions]
    spans = [
        (number, span.stop, span.version, span.by_policy, span.learned)
        for number, completion in enumerate(completions)
        for span in completion.spans
    ]
    preferences = [one.feedback.preferences for one in taken if one.feedback.preferences is not None]
    facts = json.dumps([_fact(one) for one in taken]).encode()
    return {
        "facts": np.frombuffer(facts, np.uint8),
        "lengths": np.array([len(one.token_ids) for one in completions], np.int32),
        "tokens": _joined([one.token_ids for one in completions], np.int32),
        "logprobs": _joined([one.logprobs for one in completions], np.float32),
        "spans": np.array(spans, np.int32).reshape(-1, 5),
        "preferences": _joined([matrix.ravel() for matrix in preferences], np.float64),
    }


def _joined(parts: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(part.astype(dtype, copy=False) for part in parts)])


def _fact(one: Taken) -> dict[str, Any]:
    feedback = one.feedback
    return {
        "place": one.place,
        "prompt": one.prompt_id,
        "engine": one.engine,
        "responses": [[completion.finish_reason, completion.source] for completion in one.completions],
        "outcomes": [[type(outcome).__name__, *_values(outcome)] for outcome in feedback.outcomes],
        "preferences": feedback.preferences is not None,
        "measures": {name: [float(value) for value in values] for name, values in feedback.measures.items()},
    }


def _values(outcome: Outcome) -> list[Any]:
    match outcome:
        case Score(value):
            return [float(value)]
        case TimedOut(seconds, who):
            return [seconds, who]
        case Invalid(reason) | Failed(reason):
            return [reason]


def _taken(facts: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray]) -> list[Taken]:
    ends = np.cumsum(arrays["lengths"])[:-1]
    tokens, logprobs = np.split(arrays["tokens"], ends), np.split(arrays["logprobs"], ends)
    spans: list[list[Span]] = [[] for _ in arrays["lengths"]]
    for number, stop, version, by_policy, learned in arrays["spans"].tolist():
        start = spans[number][-1].stop if spans[number] else 0
        spans[number].append(Span(start, stop, version, bool(by_policy), bool(learned)))
    taken, number, matrices = [], 0, arrays["preferences"]
    for fact in facts:
        completions = []
        for finish_reason, source in fact["responses"]:
            written = (tokens[number], logprobs[number], tuple(spans[number]))
            completions.append(Completion(fact["prompt"], *written, finish_reason, source))
            number += 1
        size = len(completions) if fact["preferences"] else 0
        matrix, matrices = matrices[: size * size].reshape(size, size), matrices[size * size :]
        outcomes = tuple(OUTCOMES[kind](*values) for kind, *values in fact["outcomes"])
        measures = {name: tuple(values) for name, values in fact["measures"].items()}
        feedback = Feedback(fact["prompt"], outcomes, matrix if size else None, measures)
        taken.append(Taken(fact["place"], fact["prompt"], fact["engine"], tuple(completions), feedback))
    return taken
