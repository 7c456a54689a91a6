"""What a replay may change of the recorded run, and what it may not: each by its field, before anything starts."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.cluster import LocalRef
from rlhf.config import Settings, UserError
from rlhf.loop import keeping
from rlhf.loop.judged import JudgedRollout
from rlhf.loop.keeping import Keeping
from rlhf.loop.replay import compare
from rlhf.loop.run import Training, check_replay
from rlhf.tracking import Record
from rlhf.tracking.responses import Taken, note_start, read_prompts, steps, write_step
from rlhf.types import Feedback, Prompt, Rollout

STEPS = 4


@pytest.fixture
def settings(tmp_path: Path, tiny_settings: Callable[..., Settings]) -> Callable[..., Settings]:
    """The replay's settings, with changes: `settings(loop={"steps": 3})`."""
    rows = "".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(8))
    (tmp_path / "prompts.jsonl").write_text(rows)

    def make(**sections: dict[str, Any]) -> Settings:
        base: dict[str, dict[str, Any]] = {
            "run": {"dir": str(tmp_path / "replay")},
            "data": {"prompts": str(tmp_path / "prompts.jsonl")},
            "reward": {"kind": "function", "path": "rlhf.reward.functions:share_of_letter_a"},
            "loop": {"steps": STEPS, "prompts_per_step": 2},
            "tracking": {"console": "off"},
        }
        for section, values in sections.items():
            base[section] = base.get(section, {}) | values
        return tiny_settings(**base)

    return make


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(tmp_path / "recorded")


def record(run: str, settings: Settings, kept: range = range(1, STEPS + 1), after: int = 0) -> None:
    """What a run with these settings would leave of these steps."""
    Path(run).mkdir(exist_ok=True)
    training = Training(settings, debug=False, resume=False)
    note_start(run, after, training.state.run)
    for step in kept:
        prompts = training.state.ledger.lease(2)
        taken = [Taken(i, one.id, 0, (), Feedback(one.id, ())) for i, one in enumerate(prompts)]
        write_step(run, step, taken)
        for one in prompts:
            training.state.ledger.settle(one.id, "trained")


def refusal(run: str, settings: Settings) -> str:
    with pytest.raises(UserError) as caught:
        check_replay(settings, debug=False, replay=run)
    return str(caught.value)


def test_the_same_settings_are_replayed(run: str, settings: Callable[..., Settings]) -> None:
    record(run, settings(tracking={"responses": True}, rollout={"engines": 3}))
    here = settings(tracking={"wandb": "offline"}, rollout={"engines": 3}, cluster={"threads": 2})
    assert check_replay(here, debug=False, replay=run) == f"replays the steps of {run}"


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("run", {"seed": 1}),
        ("data", {"shuffle": False}),
        ("loop", {"prompts_per_step": 1}),
        ("loop", {"refill": 1}),
        ("loop", {"staleness": 1}),
        ("loop", {"stream": "always"}),
    ],
)
def test_what_gives_another_order_is_refused(
    run: str, settings: Callable[..., Settings], section: str, change: dict[str, Any]
) -> None:
    record(run, settings())
    (field,) = change
    said = refusal(run, settings(**{section: change}))
    assert f"{section}.{field}: was" in said and f"rlhf train {run}/config.yaml --replay {run}" in said


def test_other_prompts_are_refused(run: str, settings: Callable[..., Settings], tmp_path: Path) -> None:
    record(run, settings())
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "say something else"}) + "\n")
    assert "data.prompts: these are other prompts" in refusal(run, settings(loop={"prompts_per_step": 2}))


def test_with_refill_what_decides_who_is_replaced_is_fixed_too(run: str, settings: Callable[..., Settings]) -> None:
    refill = {"loop": {"refill": 1}}
    record(run, settings(**refill))
    other = {"algorithm": {"name": "online_dpo", "beta": 0.7}}
    assert "algorithm.beta: was" in refusal(run, settings(**refill, **other))


def test_what_only_changes_what_is_learned_is_said(run: str, settings: Callable[..., Settings]) -> None:
    record(run, settings())
    here = settings(policy={"ranks": 2, "learning_rate": 1e-4}, loop={"steps": 3})
    said = check_replay(here, debug=False, replay=run)
    assert all(change in said for change in ("policy.ranks 1 -> 2", "policy.learning_rate", "loop.steps 4 -> 3"))


def test_other_settings_in_the_middle_of_the_recorded_run_are_said(run: str, settings: Callable[..., Settings]) -> None:
    record(run, settings(algorithm={"name": "online_dpo", "beta": 0.7}), range(1, 1))
    record(run, settings(), after=2)
    said = check_replay(settings(), debug=False, replay=run)
    assert "(before it was resumed after step 2) algorithm.beta 0.7 -> 0.1" in said


@pytest.mark.parametrize(
    ("kept", "says"), [(range(1, 4), "Set loop.steps=3"), (range(2, 5), "A replay begins with step 1")]
)
def test_missing_steps_are_refused(run: str, settings: Callable[..., Settings], kept: range, says: str) -> None:
    record(run, settings(), kept)
    assert says in refusal(run, settings())


def test_a_run_that_kept_nothing_is_refused(run: str, settings: Callable[..., Settings]) -> None:
    Path(run).mkdir()
    assert "tracking.responses=true" in refusal(run, settings())


# What came of it


def leave(folder: Path, loss: float, weights: bytes | None = None, **more: float) -> str:
    folder.mkdir()
    lines = [{"step": step, "time": 1.0, "policy/loss": 0.5 if step == 1 else loss, **more} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if weights is not None:
        (folder / "export").mkdir()
        (folder / "export" / "model.safetensors").write_bytes(weights)
    return str(folder)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"loss": 0.25}, "equals RUN: the metrics of all 2 steps"),
        ({"loss": 0.25, "time/step": 3.0}, "equals RUN: the metrics of all 2 steps"),
        (
            {"loss": 0.25, "weights": b"one"},
            "equals RUN: the metrics of all 2 steps and every byte of the exported weights",
        ),
        (
            {"loss": 0.25, "weights": b"two"},
            "equals RUN in the metrics of all 2 steps, but its exported weights differ",
        ),
        ({"loss": 0.75}, "differs from RUN from step 2 on: policy/loss was 0.25 and is 0.75"),
        ({"loss": 0.25, "policy/kl": 0.0}, "differs from RUN from step 1 on: policy/kl was None and is 0.0"),
    ],
)
def test_it_is_said_whether_a_replay_came_out_the_same(tmp_path: Path, other: dict[str, Any], says: str) -> None:
    run = leave(tmp_path / "run", 0.25, b"one", **{"time/step": 1.0, "policy/probe_gap": 1e-6})
    again = leave(tmp_path / "again", **other)
    assert compare(run, again) == "the replay " + says.replace("RUN", run)


# Keeping


def judged(prompt_id: str, place: int, completions: Any) -> JudgedRollout:
    return JudgedRollout(Rollout(Prompt(prompt_id, (1,), "x"), (), completions), Feedback(prompt_id, ()), place)


def test_responses_are_kept_in_the_order_in_which_they_were_taken(
    tmp_path: Path, tiny_settings: Callable[..., Settings], run: Any
) -> None:

    with Record(tiny_settings(run={"dir": run}, tracking={"console": "off"}), resume=False) as record:
        some = Keeping(record, remote=False)

        async def scenario() -> None:
            await some.keep(1, [judged("b", 1, LocalRef([])), judged("a", 0, LocalRef([]))])
            await some.keep(2, [judged("c", 2, LocalRef([]))])
            assert steps(run) == [1], "one step is written before the next begins to be"
            await some.finish()

        asyncio.run(scenario())
        assert [(one.place, one.prompt_id) for one in read_prompts(run, 1)] == [(1, "b"), (0, "a")]
        record.rewind(1)
        assert steps(run) == [1]


@pytest.mark.parametrize("broken", ["disk", "lost"])
def test_what_cannot_be_kept_is_warned_about_once_and_stops_nothing(
    broken: str,
    tiny_settings: Callable[..., Settings],
    run: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    from ray.exceptions import ObjectLostError

    def lost(references: Any) -> Any:
        raise ObjectLostError("ab" * 28, None, "")

    if broken == "lost":
        monkeypatch.setattr(keeping, "fetch", lost)
    with Record(tiny_settings(run={"dir": run}, tracking={"console": "off"}), resume=False) as record:
        (Path(run) / "responses").write_text("a file where the folder should be")
        some = Keeping(record, remote=True)

        async def scenario() -> None:
            for step in (1, 2, 3):
                await some.keep(step, [judged("a", 0, LocalRef([]))])
            await some.finish()

        with caplog.at_level(logging.WARNING):
            asyncio.run(scenario())
    assert len([one for one in caplog.records if "cannot be replayed" in one.message]) == 1
    assert steps(run) == []
