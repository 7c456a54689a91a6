"""What a run keeps of what it learned from: read back as it was, cut back on resume, and never unpickled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config.loader import UserError
from rlhf.tracking.responses import (
    Taken,
    keep,
    note_start,
    read_prompts,
    read_starts,
    read_step,
    steps,
    write_step,
)
from rlhf.types import Completion, Failed, Feedback, Invalid, Score, Span, TimedOut

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
LOGPROBS = st.floats(width=32, allow_infinity=False)
REASONS = st.text(max_size=5)
OUTCOMES = st.one_of(
    NUMBERS.map(Score), REASONS.map(Invalid), REASONS.map(Failed), st.builds(TimedOut, NUMBERS, REASONS)
)


@st.composite
def completions(draw: st.DrawFn, prompt_id: str) -> Completion:
    lengths = draw(st.lists(st.integers(1, 4), max_size=3))
    stops = np.cumsum([0, *lengths]).tolist()
    spans = tuple(
        Span(start, stop, draw(st.integers(-1, 9)), draw(st.booleans()), draw(st.booleans()))
        for start, stop in zip(stops, stops[1:], strict=False)
    )
    tokens = draw(st.lists(st.integers(0, 2**31 - 1), min_size=stops[-1], max_size=stops[-1]))
    logprobs = draw(st.lists(LOGPROBS, min_size=stops[-1], max_size=stops[-1]))
    finish, source = draw(st.sampled_from(("stop", "length"))), draw(st.sampled_from(("policy", "chosen")))
    return Completion(prompt_id, np.array(tokens, np.int32), np.array(logprobs, np.float32), spans, finish, source)


@st.composite
def takens(draw: st.DrawFn) -> Taken:
    prompt_id = draw(st.text(max_size=4))
    made = tuple(draw(st.lists(completions(prompt_id), max_size=3)))
    k = len(made)
    outcomes = tuple(draw(st.lists(OUTCOMES, min_size=k, max_size=k)))
    matrix = draw(st.none() | st.just(k)) if k else None
    numbers = st.lists(st.floats(), min_size=k * k, max_size=k * k)
    preferences = None if matrix is None else np.array(draw(numbers)).reshape(k, k)
    measures = draw(st.dictionaries(st.text(max_size=3), st.lists(st.floats(), max_size=3).map(tuple), max_size=2))
    feedback = Feedback(prompt_id, outcomes, preferences, measures)
    return Taken(draw(st.integers(0, 10**9)), prompt_id, draw(st.integers(0, 999)), made, feedback)


def same(one: Taken, other: Taken) -> bool:
    """Equal to the bit; NaN is NaN."""
    for mine, theirs in zip(one.completions, other.completions, strict=True):
        assert mine.token_ids.dtype == theirs.token_ids.dtype == np.int32
        assert mine.logprobs.dtype == theirs.logprobs.dtype == np.float32
        assert mine.token_ids.tobytes() == theirs.token_ids.tobytes()
        np.testing.assert_array_equal(mine.logprobs, theirs.logprobs)
        facts = [(some.prompt_id, some.spans, some.finish_reason, some.source) for some in (mine, theirs)]
        assert facts[0] == facts[1]
        assert repr(mine.info()) == repr(theirs.info()), "what the driver plans with follows from it"
    matrices = [some.feedback.preferences for some in (one, other)]
    assert (matrices[0] is None) == (matrices[1] is None)
    if matrices[0] is not None:
        np.testing.assert_array_equal(*matrices)
    plain = [
        repr(replace(some, completions=(), feedback=replace(some.feedback, preferences=None))) for some in (one, other)
    ]
    assert plain[0] == plain[1]
    return True


@given(st.lists(takens(), max_size=4))
def test_what_is_read_is_what_was_written(tmp_path_factory: pytest.TempPathFactory, taken: Sequence[Taken]) -> None:
    run = tmp_path_factory.mktemp("run")
    write_step(run, 3, taken)
    assert all(same(*pair) for pair in zip(read_step(run, 3), taken, strict=True))
    assert [(one.place, one.prompt_id) for one in read_prompts(run, 3)] == [(one.place, one.prompt_id) for one in taken]
    assert steps(run) == [3]
    assert [path.name for path in (run / "responses").iterdir()] == ["step-000003.npz"]


def one(tokens: int = 5, responses: int = 1) -> Taken:
    made = [
        Completion.of_one_version("p", np.arange(tokens, dtype=np.int32), np.zeros(tokens, np.float32), 0, "stop")
        for _ in range(responses)
    ]
    return Taken(0, "p", 0, tuple(made), Feedback("p", (Score(0.5),) * responses))


def test_a_token_takes_eight_bytes_and_a_response_about_a_hundred(tmp_path: Path) -> None:
    """As the documentation of the field says."""
    sizes = {}
    for number, (tokens, responses) in enumerate(((10, 100), (1010, 100), (10, 300))):
        write_step(tmp_path, number, [one(tokens, responses)])
        sizes[tokens, responses] = (tmp_path / "responses" / f"step-{number:06d}.npz").stat().st_size
    assert sizes[1010, 100] - sizes[10, 100] == 8 * 1000 * 100
    assert 0 <= (sizes[10, 300] - sizes[10, 100]) / 200 - 8 * 10 <= 100


def test_steps_that_will_be_done_again_are_deleted(tmp_path: Path) -> None:
    for step in (1, 2, 3, 1234567):
        write_step(tmp_path, step, [one()])
    assert steps(tmp_path) == [1, 2, 3, 1234567]
    keep(tmp_path, 2)
    assert steps(tmp_path) == [1, 2]


def test_a_step_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_step(tmp_path, 1, [one(5)])

    def full(file: Any, **arrays: np.ndarray) -> None:
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        write_step(tmp_path, 1, [one(7)])
    assert len(read_step(tmp_path, 1)[0].completions[0].token_ids) == 5


@pytest.mark.parametrize("cut", [0, 10, 400, -30])
def test_a_damaged_file_is_named(tmp_path: Path, cut: int) -> None:
    write_step(tmp_path, 1, [one()])
    path = tmp_path / "responses" / "step-000001.npz"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"step-000001\.npz: the file is damaged"):
        read_step(tmp_path, 1)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    write_step(tmp_path, 1, [one()])
    path = tmp_path / "responses" / "step-000001.npz"
    data = bytearray(path.read_bytes())
    place = data.index(np.arange(5, dtype=np.int32).tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        read_step(tmp_path, 1)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("it was unpickled",)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    write_step(tmp_path, 1, [one()])
    np.savez(tmp_path / "responses" / "step-000001.npz", facts=np.array([Harmful()], dtype=object))
    for read in (read_step, read_prompts):
        with pytest.raises(UserError, match="damaged"):
            read(tmp_path, 1)


def test_a_missing_step_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step-000004\.npz: there is no such file.*tracking\.responses"):
        read_step(tmp_path, 4)


def test_each_start_is_noted_and_one_that_is_done_again_replaced(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no recorded responses.*tracking\.responses=true"):
        read_starts(tmp_path)
    for after, seed in ((0, 1), (4, 2), (8, 3), (4, 4)):
        note_start(tmp_path, after, {"settings": {"run": {"seed": seed}}, "contents": {}})
    starts = read_starts(tmp_path)
    assert [(start["after"], start["settings"]["run"]["seed"]) for start in starts] == [(0, 1), (4, 4)]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "[1]", '[{"after": 0}]', '[{"after": "0", "settings": {}, "contents": {}}]']
)
def test_damaged_starts_are_named_and_do_not_stop_a_run(tmp_path: Path, text: str) -> None:
    path = tmp_path / "responses" / "run.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UserError, match=r"run\.json: the file is damaged"):
        read_starts(tmp_path)
    note_start(tmp_path, 2, {"settings": {}, "contents": {}})
    assert json.loads(path.read_text()) == [{"after": 2, "settings": {}, "contents": {}}]
