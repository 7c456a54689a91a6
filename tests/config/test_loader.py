"""Every mistake in a configuration is reported with its file, its place, its field and a remedy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import ConfigError, Settings, UserError, load, show, yamls
from rlhf.config.reference import PAGE, page
from tests.config.conftest import VALID

CONFIGS = sorted(
    p for p in (Path(__file__).parents[2] / "configs").rglob("*.yaml") if p.stem not in ("sft", "reward_model")
)
LoadWith = Callable[..., Settings]


def error_of(path: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


def write(folder: Path, text: str) -> str:
    path = folder / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_and_overrides(load_with: LoadWith) -> None:
    settings = load_with("loop.steps=7", "policy.learning_rate=3e-7", "tracking.wandb=off", "loop.steps=8")
    assert settings.loop.steps == 8
    assert settings.policy.learning_rate == 3e-7
    assert settings.tracking.wandb == "off"
    assert settings.algorithm.beta == 0.1


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-6", "0.000001", "+1e-06"])
def test_every_spelling_of_a_small_number_is_a_number(load_with: LoadWith, text: str) -> None:
    assert load_with(f"policy.learning_rate={text}").policy.learning_rate == pytest.approx(1e-6)


def test_a_value_may_hold_an_equals_sign_and_colons(load_with: LoadWith) -> None:
    assert load_with("run.dir=runs/lr=3").run.dir == "runs/lr=3"
    assert load_with("reward.path=a.b:c").reward.path == "a.b:c"


def test_a_section_with_nothing_under_it_means_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path, VALID + "loop:\n  # steps: 3\n"), ["loop.steps=4"]).loop.steps == 4


def test_a_section_in_a_section(load_with: LoadWith, tmp_path: Path) -> None:
    overrides = ["policy.lora.rank=4", "policy.lora.target_modules=[q_proj, v_proj]"]
    lora = load_with(*overrides).policy.lora
    assert (lora.rank, lora.target_modules, lora.alpha) == (4, ["q_proj", "v_proj"], 16.0)
    nested = VALID.replace("model: some/model", "model: some/model\n  lora:\n    rank: 8\n    # alpha: 1")
    path = write(tmp_path, nested)
    assert load(path).policy.lora.rank == 8
    assert load(path, ["policy.lora.rank=2"]).policy.lora.rank == 2
    assert load(write(tmp_path, nested.replace("    rank: 8\n", ""))).policy.lora.rank == 0
    assert error_of(write(tmp_path, nested.replace("rank:", "rnak:"))).startswith(f"{path}: line 6: `policy.lora.rnak`")


def test_settings_are_frozen(load_with: LoadWith) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_with().loop.steps = 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["is empty", "`data.prompts`", "`policy.model`", "`reward.path`"]),
        ("# nothing\n", ["is empty"]),
        ("- 1\n", ["expected sections", "a list of 1"]),
        ("just text", ["expected sections", "the text 'just text'"]),
        ("a: [1\n", ["not valid YAML", "line 2"]),
        (VALID + "loop:\n  steps: 3\n  steps: 4\n", ["line 10", "`steps`", "line 9", "Remove one"]),
        (VALID + "policy:\n  model: x\n", ["line 8", "`policy`", "line 3"]),
        (VALID + "loop: 3\n", ["line 8", "`loop`", "a section", "the number 3"]),
        (VALID + "pollicy: {}\n", ["line 8", "`pollicy` is not a known section", "`policy`"]),
        (VALID + "zzz: {}\n", ["`zzz`", "Known sections are: run, data"]),
        ("data: {prompts: x}\npolicy: {model: y}\n", ["`reward.path` is missing", "`reward.url`"]),
        (
            VALID.replace("prompts: prompts.jsonl", "shuffle: true"),
            ["line 1", "`data.prompts` is missing", "JSON lines"],
        ),
    ],
)
def test_broken_files(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write(tmp_path, text)
    message = error_of(path)
    assert message.startswith(path)
    for word in words:
        assert word in message


def test_unreadable_files(tmp_path: Path) -> None:
    assert "there is no such file" in error_of(str(tmp_path / "none.yaml"))
    assert "this is a folder" in error_of(str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes(b"run: {dir: caf\xe9}")
    assert "UTF-8" in error_of(str(tmp_path / "latin.yaml"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("loop.stepz=3", ["`loop.stepz` is not a known field", "Did you mean `loop.steps`?"]),
        ("policy.beta=3", ["Did you mean `algorithm.beta`?"]),
        ("algorithm.mixture=0.1", ["`algorithm.mixture` is not a known field of `algorithm.name: online_dpo`"]),
        ("algorithm.name=grop", ["no built-in algorithm `grop`", "Did you mean `grpo`?", "`module:function`"]),
        ("algorithm.name=3", ["no built-in algorithm `3`"]),
        ("algorithm.name=a b:c", ["an import path, `module:name`"]),
        ("steps=3", ["section.key=value"]),
        ("loop.steps", ["section.key=value"]),
        ("a.b.c=1", ["section.key=value"]),
        ("policy.model.x=1", ["section.key=value"]),
        ("policy.lora.rank.x=1", ["section.key=value"]),
        ("policy.lor.rank=8", ["no section `policy.lor`", "Did you mean `policy.lora`?"]),
        ("policy.lora.rnk=8", ["`policy.lora.rnk` is not a known field", "`policy.lora.rank`"]),
        ("policy.lora=8", ["`policy.lora` must be a section", "the number 8"]),
        ("policy.lora.rank=many", ["`policy.lora.rank` must be a whole number"]),
        ("policy.lora.target_modules=8", ["`policy.lora.target_modules` must be one of 'all-linear' or a list"]),
        ("policy.lora.target_modules=[8]", ["`policy.lora.target_modules[0]` must be text"]),
        ("polcy.model=x", ["`polcy` is not a known section", "`policy`"]),
        ("loop.qqqqqqqq=3", ["Known fields are: steps"]),
        ("loop.steps=[1", ["not valid YAML", "in quotes"]),
        ("loop.steps=many", ["`loop.steps` must be a whole number, not the text 'many'"]),
        ("loop.steps=2.5", ["whole number, not the number 2.5"]),
        ("loop.steps=true", ["whole number, not true"]),
        ("loop.steps=0", ["greater than or equal to 1"]),
        ("loop.steps=", ["whole number, not nothing (null)"]),
        ("policy.learning_rate=fast", ["a number or a mapping", "not the text 'fast'"]),
        ("policy.learning_rate={bf16: fast}", ["`policy.learning_rate` must be a number, not the text 'fast'"]),
        ("policy.learning_rate={bf8: 1e-5}", ["one of 'bf16' or 'fp32', not the text 'bf8'"]),
        ("policy.learning_rate=.inf", ["a finite number"]),
        ("policy.learning_rate=.nan", ["a finite number"]),
        ("policy.zero_stage=4", ["one of 0, 1, 2 or 3"]),
        ("policy.dtype=bf", ["'bf16' or 'fp32'", "did you mean `bf16`?"]),
        ("policy.adam_betas=[0.9, 1.5]", ["`policy.adam_betas[1]`", "less than 1"]),
        ("policy.adam_betas=[0.9]", ["position 2"]),
        ("policy.adam_betas=[0.9, 0.9, 0.9]", ["a list of 2 values"]),
        ("policy.adam_betas=0.9", ["a list"]),
        ("tracking.project=12", ["text", "in quotes", "the number 12"]),
        ("data.shuffle=yes", ["true or false"]),
    ],
)
def test_broken_overrides(valid: str, override: str, words: list[str]) -> None:
    message = error_of(valid, override)
    assert f"override `{override}`" in message
    for word in words:
        assert word in message


def test_an_algorithm_must_be_a_section(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, VALID + "algorithm: ppo\n"))
    assert "`algorithm` must be a section" in message and "line 8" in message


def test_the_fields_of_a_method_are_its_own(load_with: LoadWith, valid: str) -> None:
    own = load_with("algorithm.name=my.module:mine", "algorithm.options={beta: 0.3, names: [a, b]}")
    assert own.algorithm.options == {"beta": 0.3, "names": ["a", "b"]}
    assert load_with("algorithm.name=ppo").algorithm.kl_coef == 0.01
    message = error_of(valid, "algorithm.name=ppo", "algorithm.tau=1.0")
    assert "`algorithm.tau` is not a known field of `algorithm.name: ppo`" in message
    message = error_of(valid, "algorithm.name=my.module:mine", "algorithm.beta=0.3")
    assert "Known fields are: name, options" in message
    message = error_of(valid, "algorithm.name=my.module:mine", "algorithm.options=3")
    assert "`algorithm.options` must be a mapping" in message


def test_all_mistakes_are_reported_at_once(valid: str) -> None:
    message = error_of(valid, "loop.steps=0", "policy.modle=x", "rollout.top_p=2")
    assert "3 problems" in message
    assert all(name in message for name in ("loop.steps", "policy.modle", "rollout.top_p"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_show_is_the_inverse_of_load(path: Path, tmp_path: Path) -> None:
    settings = load(path, ["run.dir='1e-6'", "tracking.project='off'", "data.system_prompt='a: b # c'"])
    assert load(write(tmp_path, show(settings))) == settings


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["C"])),
    st.sampled_from(
        ["on", "off", "1e-6", "1_0", "0x1f", "010", "1:30", "2020-01-01", "<<", "=", "~", "null", ".5", "-"]
    ),
)


@given(
    st.dictionaries(st.text(st.characters(exclude_categories=["C"])), st.one_of(scalars, st.lists(scalars)), max_size=4)
)
def test_yaml_round_trip(section: dict) -> None:
    assert yamls.parse(yamls.dump({"section": section})) == {"section": section}


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_override_ends_in_settings_or_a_user_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(VALID, encoding="utf-8")
    for override in (text, f"loop.steps={text}", f"run.dir={text}", f"policy.adam_betas={text}"):
        try:
            load(path, [override])
        except UserError as error:
            assert str(error)


def test_the_reference_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m rlhf.config.reference`"


def test_the_reference_page_says_what_a_field_means_in_each_method() -> None:
    rows = [line for line in page().splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} <= {4, 5, 6}, "no cell holds a bar"
    (beta,) = [row for row in rows if row.startswith("| `beta` |")]
    assert beta.endswith("simpo: Factor on the difference of the mean log-probs. |")


def test_the_configuration_imports_no_heavy_library() -> None:
    code = (
        "import sys, rlhf.cli, rlhf.config, rlhf.types; "
        "print([m for m in ('torch', 'ray', 'vllm', 'deepspeed', 'transformers', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["[]", "{a: b}", "null", "[{name: ppo}]"])
def test_a_method_whose_name_is_no_text(valid: str, name: str) -> None:
    assert "`algorithm.name`: there is no built-in algorithm" in error_of(valid, f"algorithm.name={name}")
