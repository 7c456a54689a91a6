"""What a run may change when it goes on, and what it may not: each by its field, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rlhf.config import Settings, show
from rlhf.config.loader import UserError
from rlhf.config.sft import SftSettings
from rlhf.data.conversations import read_examples
from rlhf.data.model_identity import model_digest
from rlhf.loop.run import Training
from rlhf.loop.sft import FineTuning
from rlhf.preflight.plan import describe
from rlhf.preflight.sft import describe_sft
from rlhf.training.checkpoints import Checkpoints
from rlhf.training.resume import RUN, remembered, sft_contents

STEP = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which a run has begun."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(4)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text('{"run_id": "1", "resumed": []}')
    return tmp_path


@pytest.fixture
def settings(folder: Path, tiny_settings: Callable[..., Settings]) -> Callable[..., Settings]:
    """The run's settings, with changes: `settings(loop={"steps": 3})`."""

    def make(**sections: dict[str, Any]) -> Settings:
        base: dict[str, dict[str, Any]] = {
            "run": {"dir": str(folder / "run")},
            "data": {"prompts": str(folder / "prompts.jsonl")},
            "reward": {"kind": "function", "path": "rlhf.reward.functions:share_of_letter_a"},
            "loop": {"steps": 10, "prompts_per_step": 2},
        }
        for section, values in sections.items():
            base[section] = base.get(section, {}) | values
        return tiny_settings(**base)

    return make


def rewrite(checkpoint: Path, state: dict[str, Any]) -> None:
    """As an earlier version wrote it: without checksums."""
    (checkpoint / "SHA256SUMS").unlink(missing_ok=True)
    (checkpoint / "state.json").write_text(json.dumps(state))


def save(settings: Settings, step: int = STEP, **more: Any) -> Path:
    """A complete checkpoint of these settings; returns its folder."""
    training = Training(settings, debug=False, resume=True)
    tag = training.checkpoints.tag(step)
    (training.checkpoints.folder / tag).mkdir(parents=True)
    training.checkpoints.complete(tag, training.state.state() | {"step": step} | more)
    return training.checkpoints.folder / tag


def other_model(tiny_model: Path, folder: Path) -> str:
    """The same architecture with one other number."""
    shutil.copytree(tiny_model, folder / "other")
    weights = load_file(tiny_model / "model.safetensors")
    weights["model.embed_tokens.weight"][0, 0] += 1
    save_file(weights, folder / "other" / "model.safetensors", {"format": "pt"})
    return str(folder / "other")


def refusal(settings: Settings) -> str:
    """What a resumed run says; its dry run must say the same."""
    said = []
    for attempt in (lambda: Training(settings, debug=False, resume=True), lambda: describe(settings, resume=True)):
        with pytest.raises(UserError) as caught:
            attempt()
        said.append(str(caught.value))
    assert said[0] == said[1]
    return said[0]


@pytest.mark.parametrize(
    "text", ["", '{"run_id": "1", "resu', "[]", "{}", '{"run_id": "1", "resumed": 3}', "[" * 100_000]
)
def test_a_torn_manifest_is_named_before_anything_starts(
    settings: Callable[..., Settings], folder: Path, text: str
) -> None:
    save(settings())
    (folder / "run" / "manifest.json").write_text(text)
    said = refusal(settings())
    assert "manifest.json: the file is damaged" in said and "another run.dir" in said


def test_a_folder_that_holds_a_run_is_refused_before_anything_starts(settings: Callable[..., Settings]) -> None:
    with pytest.raises(UserError, match="this folder already holds a run.*--resume"):
        Training(settings(), debug=False, resume=False)


def test_an_unchanged_run_goes_on(settings: Callable[..., Settings]) -> None:
    save(settings())
    training = Training(settings(), debug=False, resume=True)
    assert (training.start.step, training.start.tag, training.start.changes) == (STEP, "step-000006", ())
    assert "goes on after step 6, from checkpoint step-000006" in describe(settings(), resume=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"algorithm": {"name": "grpo"}}, "algorithm.name: was 'online_dpo', is 'grpo'"),
        ({"policy": {"ranks": 2}}, "policy.ranks: was 1, is 2"),
        ({"policy": {"zero_stage": 3}}, "policy.zero_stage: was 1, is 3"),
        ({"policy": {"dtype": "bf16"}}, "policy.dtype: was 'fp32', is 'bf16'"),
        ({"policy": {"lora": {"rank": 8}}}, "policy.lora.rank: was 0, is 8"),
        ({"run": {"seed": 3}}, "run.seed: was 0, is 3"),
        ({"data": {"shuffle": False}}, "data.shuffle: was True, is False"),
        ({"algorithm": {"reference": "ema"}}, "algorithm.reference: was 'fixed', is 'ema'"),
        ({"data": {"system_prompt": "Be kind."}}, "data.prompts: these are other prompts"),
        ({"data": {"chat_template": False}}, "data.prompts (as tokens): the prompts become other tokens"),
    ],
    ids=lambda value: (
        "-".join(f"{s}.{f}" for s, fields in value.items() for f in fields) if isinstance(value, dict) else ""
    ),
)
def test_what_cannot_change_is_refused_by_field(settings: Callable[..., Settings], changes: dict, says: str) -> None:
    save(settings())
    changed = {
        section: (settings().model_dump()[section] if section == "run" else {}) | values
        for section, values in changes.items()
    }
    said = refusal(settings(**changed))
    assert said.count("\n  ") == 1 and says in said
    assert "step-000006" in said and "another run.dir" in said


def test_another_model_is_refused_and_the_same_one_elsewhere_is_not(
    settings: Callable[..., Settings], tiny_model: Path, folder: Path
) -> None:
    save(settings())
    other = other_model(tiny_model, folder)
    said = refusal(settings(policy={"model": other}))
    assert f"policy.model: was '{tiny_model}', is '{other}'; the model's configuration or weights are not" in said
    shutil.copytree(tiny_model, folder / "moved")
    start = Training(settings(policy={"model": str(folder / "moved")}), debug=False, resume=True).start
    assert start.changes == (f"policy.model '{tiny_model}' -> '{folder / 'moved'}'",)


def test_other_changes_are_allowed_and_said(
    settings: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    save(settings())
    changed = settings(policy={"learning_rate": 1e-5}, loop={"steps": 20}, tracking={"console": "off"})
    start = Training(changed, debug=False, resume=True).start
    assert start.changes == ("policy.learning_rate 1e-06 -> 1e-05", "loop.steps 10 -> 20")
    assert "policy.learning_rate 1e-06 -> 1e-05" in caplog.text


def test_a_type_that_is_left_open_is_the_runs_own(settings: Callable[..., Settings], folder: Path) -> None:
    rates = {"bf16": 1e-4, "fp32": 1e-5}
    decided = settings(policy={"dtype": "bf16", "learning_rate": rates["bf16"]})
    save(decided)
    (folder / "run" / "config.yaml").write_text(show(decided))
    asked = settings(policy={"dtype": "auto", "learning_rate": rates})
    assert Training(asked, debug=False, resume=True).start.changes == ()
    assert "computes in bf16 (as before the run was resumed)" in describe(asked, resume=True)


def test_a_run_cannot_end_before_its_checkpoint(settings: Callable[..., Settings]) -> None:
    save(settings())
    assert "ends after step 3 (loop.steps), but its last complete checkpoint is step-000006" in refusal(
        settings(loop={"steps": 3})
    )
    assert Training(settings(loop={"steps": STEP}), debug=False, resume=True).start.step == STEP


def test_without_a_checkpoint_nothing_recorded_is_deleted(settings: Callable[..., Settings], folder: Path) -> None:
    (folder / "run" / "evaluations.jsonl").write_text('{"step": 0}\n')
    assert Training(settings(), debug=False, resume=True).start is None
    assert "begins anew" in describe(settings(), resume=True)
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert "no complete checkpoint, but 2 recorded steps" in refusal(settings())
    assert (folder / "run" / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    (folder / "run" / "manifest.json").unlink()
    assert "--resume found no run in this folder" in refusal(settings())


def test_a_damaged_checkpoint_is_refused_before_models_load(settings: Callable[..., Settings]) -> None:
    checkpoint = save(settings())
    (checkpoint / "state.json").write_text("{")
    assert "state.json: the file is damaged" in refusal(settings())


def test_a_checkpoint_of_an_earlier_version_goes_on_and_says_what_it_cannot_check(
    settings: Callable[..., Settings],
) -> None:
    training = Training(settings(), debug=False, resume=True)
    checkpoint = save(settings())
    state = json.loads((checkpoint / "state.json").read_text())
    earlier = {name: state[name] for name in ("step", "ledger", "policy", "shaping")}
    earlier |= {"seed": 0, "data": training.contents["data.prompts"]}
    rewrite(checkpoint, earlier)
    start = Training(settings(), debug=False, resume=True).start
    assert start.step == STEP and start.unchecked[0] == "the checksums of its files"
    assert {"policy.model", "policy.ranks", "algorithm.name"} <= set(start.unchecked)
    assert "run.seed: was 0, is 1" in refusal(settings(run={"dir": settings().run.dir, "seed": 1}))
    rewrite(checkpoint, earlier | {"data": "0123"})
    assert "data.prompts: these are other prompts" in refusal(settings())


def test_an_extrapolation_does_not_go_on_from_weights_that_an_earlier_version_rounded(
    settings: Callable[..., Settings],
) -> None:
    extrapolated = settings(algorithm={"reference": "extrapolated"})
    checkpoint = save(extrapolated)
    assert Training(extrapolated, debug=False, resume=True).start.step == STEP
    state = json.loads((checkpoint / "state.json").read_text())
    del state[RUN], state["checksums"]
    rewrite(checkpoint, state)
    assert "does not hold the last iterate's fp32 weights" in refusal(extrapolated)


def test_supervised_runs_are_held_to_the_same(folder: Path, tiny_model: Path) -> None:
    (folder / "examples.jsonl").write_text('{"prompt": "q", "response": "a"}\n')
    base = {"run": {"dir": str(folder / "run")}, "data": {"examples": str(folder / "examples.jsonl"), "max_tokens": 64}}

    def make(**policy: Any) -> SftSettings:
        return SftSettings(**base, policy={"model": str(tiny_model), "dtype": "fp32"} | policy)

    examples, _ = read_examples(str(tiny_model), make().data)
    checkpoints = Checkpoints(make().run.dir, keep=1)
    (checkpoints.folder / checkpoints.tag(1)).mkdir(parents=True)
    checkpoints.complete(
        "step-000001", {"step": 1, "identity": {}, RUN: remembered(make(), sft_contents(str(tiny_model), examples))}
    )
    assert FineTuning(make(), debug=True, resume=True).start.step == 1
    assert "goes on after step 1" in describe_sft(make(), resume=True)
    for attempt in (lambda one: FineTuning(one, debug=True, resume=True), lambda one: describe_sft(one, resume=True)):
        with pytest.raises(UserError, match=r"(?s)policy\.model: was .*policy\.zero_stage: was 1, is 2"):
            attempt(make(model=other_model(tiny_model, folder), zero_stage=2))
        shutil.rmtree(folder / "other")


def test_a_digest_is_the_contents_alone(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "copy")
    assert model_digest(str(tmp_path / "copy")) == model_digest(str(tiny_model))
    config = json.loads((tiny_model / "config.json").read_text()) | {"transformers_version": "4.0.0"}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    assert model_digest(str(tmp_path / "copy")) == model_digest(str(tiny_model))
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    assert model_digest(str(tmp_path / "copy")) != model_digest(str(tiny_model))
    assert model_digest(other_model(tiny_model, tmp_path)) != model_digest(str(tiny_model))
    assert model_digest(str(tmp_path)) is None and model_digest("no-such/model") is None
