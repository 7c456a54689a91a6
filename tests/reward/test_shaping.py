"""The chain of a run's transforms, what it remembers, and the file of reference scores it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.config.reward import RewardSettings
from rlhf.reward.errors import RewardError
from rlhf.reward.reference_scores import (
    Origin,
    Reference,
    header,
    judge_of,
    read_reference_scores,
    sampling_of,
    unreferenced,
)
from rlhf.reward.shaping import Shaping
from rlhf.types import CompletionInfo, Failed, Feedback, Outcome, Prompt, Rollout, Score, Span

NORMALISE = {"name": "normalise"}
CALIBRATE = {"name": "calibrate"}


def chain(*transforms: dict[str, Any]) -> list[Any]:
    return RewardSettings.model_validate({"transforms": list(transforms)}).transforms


def answered(prompt: str, *responses: tuple[int, bool]) -> Rollout:
    """A rollout of responses given by their length and whether they were cut."""
    infos = tuple(
        CompletionInfo((Span(0, n, 0),), str(i), 0.0, "length" if cut else "stop")
        for i, (n, cut) in enumerate(responses)
    )
    return Rollout(Prompt(prompt, (1,), prompt), infos, None)


def said(prompt: str, *values: float | Outcome) -> Feedback:
    return Feedback(prompt, tuple(Score(float(one)) if isinstance(one, int | float) else one for one in values))


def values(feedbacks: list[Feedback]) -> list[float]:
    return [one.value for feedback in feedbacks for one in feedback.outcomes if isinstance(one, Score)]


STEP = [answered("p", (4, False), (10, True)), answered("q", (2, False), (2, False))]
VERDICT = [said("p", 5.0, 7.0), said("q", 1.0, Failed("broken"))]


def test_transforms_act_in_their_order() -> None:
    length, clip = {"name": "length_penalty", "per_token": 1.0}, {"name": "clip", "low": 0.0}
    eos = {"name": "missing_eos", "penalty": 2.0}
    assert values(Shaping(chain(length, clip)).shape(STEP, VERDICT)) == [1.0, 0.0, 0.0]
    assert values(Shaping(chain(clip, length)).shape(STEP, VERDICT)) == [1.0, -3.0, -1.0]
    assert values(Shaping(chain(eos)).shape(STEP, VERDICT)) == [5.0, 5.0, 1.0]


def test_what_has_no_score_keeps_its_outcome_and_its_place() -> None:
    shaped = Shaping(chain({"name": "clip", "high": 2.0})).shape(STEP, VERDICT)
    assert [one.prompt_id for one in shaped] == ["p", "q"]
    assert shaped[1].outcomes == (Score(1.0), Failed("broken"))


def test_without_transforms_nothing_changes_and_nothing_is_logged() -> None:
    shaping = Shaping([])
    assert shaping.shape(STEP, VERDICT) == VERDICT
    assert shaping.metrics(VERDICT) == {}


def test_what_was_learned_from_is_logged() -> None:
    shaping = Shaping(chain({"name": "clip", "high": 2.0}))
    shaped = shaping.shape(STEP, VERDICT)
    assert shaping.metrics(shaped) == pytest.approx(
        {"reward/shaped_mean": 5 / 3, "reward/shaped_std": np.std([2, 2, 1])}
    )
    assert shaping.metrics([said("p", Failed("x"))]) == {}


def test_normalise_counts_the_step_itself_and_all_before() -> None:
    shaping = Shaping(chain(NORMALISE))
    first, second = [3.0, 5.0, 10.0], [0.0, 4.0, 4.0]
    seen = []
    for step in (first, second):
        seen += step
        shaped = values(shaping.shape(STEP, [said("p", *step[:2]), said("q", step[2], Failed("x"))]))
        assert shaped == pytest.approx((np.array(step) - np.mean(seen)) / np.std(seen))


def test_normalise_sees_the_scores_as_the_transforms_before_left_them() -> None:
    shaped = Shaping(chain({"name": "clip", "high": 3.0}, NORMALISE)).shape(STEP, VERDICT)
    clipped = np.array([3.0, 3.0, 1.0])
    assert values(shaped) == pytest.approx((clipped - clipped.mean()) / clipped.std())


def test_a_resumed_chain_shapes_as_the_uninterrupted_one() -> None:
    """Exactly, through JSON: a run that is resumed learns from the same numbers."""
    twice = chain(NORMALISE, {"name": "clip", "low": -0.5}, NORMALISE)
    whole, begun, resumed = Shaping(twice), Shaping(twice), Shaping(twice)
    for shaping in (whole, begun):
        shaping.shape(STEP, VERDICT)
    resumed.restore(json.loads(json.dumps(begun.state())))
    later = [said("p", 0.1, 0.7), said("q", -3.3, 1e3)]
    assert resumed.shape(STEP, later) == whole.shape(STEP, later)
    with pytest.raises(RewardError, match=r"remembers 2 `normalise`, but there are 1"):
        Shaping(chain(NORMALISE)).restore(begun.state())


# The reference's scores


@pytest.fixture
def settings(tiny_settings, tmp_path: Path):
    return tiny_settings(
        reward={
            "kind": "function",
            "path": "m:f",
            "transforms": [CALIBRATE],
            "reference_scores": str(tmp_path / "r.jsonl"),
        }
    )


def write(settings: Any, *references: Reference, model: str | None = None) -> None:
    reward = settings.reward
    origin = Origin(model or settings.policy.model, sampling_of(settings), judge_of(unreferenced(reward), None))
    Path(reward.reference_scores).write_text(header(origin) + "".join(one.line() for one in references))


def reference(prompt: str, *scores: float) -> Reference:
    return Reference(
        prompt, {"reward": list(scores)}, [10 * (i + 1) for i in range(len(scores))], [False] * len(scores)
    )


PROMPTS = [Prompt("p", (1,), "p"), Prompt("q", (1,), "q")]


def test_scores_are_ranked_among_their_own_prompts_reference_scores(settings) -> None:
    write(settings, reference("p", 4.0, 6.0), reference("q", 1.0, 0.0, 2.0, 3.0))
    shaping = Shaping.start(settings, PROMPTS, [])
    shaping.require_judge(settings.reward, None)
    assert values(shaping.shape(STEP, VERDICT)) == [0.5, 1.0, (1 + 0.5) / 4]


def test_the_references_pay_for_their_length_too(settings) -> None:
    penalty = {"name": "length_penalty", "per_token": 1.0}
    both = settings.model_copy(
        update={"reward": settings.reward.model_copy(update={"transforms": chain(penalty, CALIBRATE)})}
    )
    write(settings, reference("p", 12.0, 13.0), reference("q", 0.0))  # 2 and -7 after their 10 and 20 tokens; -10
    assert values(Shaping.start(both, PROMPTS, []).shape(STEP, VERDICT)) == [0.5, 0.5, 1.0]  # of 1, -3 and -1


def test_what_does_not_fit_the_run_is_refused(settings) -> None:
    write(settings, reference("p", 1.0))
    with pytest.raises(RewardError, match=r"1 of 2 prompts are not in .*the first: q.*rlhf reward calibrate"):
        Shaping.start(settings, PROMPTS, [])
    Shaping.start(settings, PROMPTS[:1], PROMPTS)  # held-out prompts are not shaped
    write(settings, reference("p", 1.0), model="another")
    with pytest.raises(RewardError, match=r"made with `policy.model` another"):
        Shaping.start(settings, PROMPTS[:1], [])
    write(settings, reference("p", 1.0))
    hotter = settings.model_copy(update={"rollout": settings.rollout.model_copy(update={"temperature": 0.5})})
    with pytest.raises(RewardError, match=r"made with `rollout` .*'temperature': 1.0"):
        Shaping.start(hotter, PROMPTS[:1], [])


def test_another_judge_is_refused(settings) -> None:
    write(settings, reference("p", 1.0))
    shaping = Shaping.start(settings, PROMPTS[:1], [])
    with pytest.raises(RewardError, match=r"scored by .*'m:f'.*, but the judge is .*'m:g'"):
        shaping.require_judge(settings.reward.model_copy(update={"path": "m:g"}), None)
    with pytest.raises(RewardError, match="but the judge is .*abc"):
        shaping.require_judge(settings.reward, "abc")


def test_held_out_prompts_need_reference_scores_where_members_read_them(settings) -> None:
    members = [{"name": name, "path": "m:f", "kind": "function", "transforms": [CALIBRATE]} for name in ("a", "b")]
    reward = {"kind": "several", "members": members, "reference_scores": settings.reward.reference_scores}
    ensemble = settings.model_copy(update={"reward": RewardSettings.model_validate(reward)})
    write(settings, reference("p", 1.0))
    with pytest.raises(RewardError, match="1 of 3 prompts are not in"):
        Shaping.start(ensemble, PROMPTS[:1], PROMPTS)


@pytest.mark.parametrize(
    "content", ["", "nothing", "{}", '{"model": "m", "sampling": {}, "judge": {}}\n{"prompt": "p"}']
)
def test_a_file_that_is_something_else_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    with pytest.raises(RewardError, match=r"r\.jsonl is not what `rlhf reward calibrate` writes"):
        read_reference_scores(str(path))
    with pytest.raises(RewardError, match="there is no file"):
        read_reference_scores(str(tmp_path / "other"))
