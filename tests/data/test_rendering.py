"""Rendering: what each kind of template and tokenizer makes of a conversation, and how it is refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, GenerationConfig

from rlhf.commands.evaluate import held_out_prompts
from rlhf.config import Settings
from rlhf.config.data import DataSettings
from rlhf.config.sft import SftDataSettings
from rlhf.data import rendering, template_trial
from rlhf.data.conversations import read_conversations
from rlhf.data.errors import DataError
from rlhf.data.prompts import load_prompts
from rlhf.data.rendering import Renderer, encode, engine_stops, renderer
from rlhf.data.tiny import tiny_tokenizer
from rlhf.preflight.inputs import read_inputs

BOS, TURN = "<|unused_300|>", "<|unused_301|>"
"""Special tokens of the tiny tokenizer; its end-of-sequence token is `<|end|>`."""
PLAIN = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GEMMA = (  # no system turn, roles in turn, a turn does not end with the end-of-sequence token, contents trimmed
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    f"<|{{{{ m['role'] }}}}|>{{{{ m['content'] | trim }}}}{TURN}\n{{% endfor %}}{{% if add_generation_prompt %}}<|assistant|>{{% endif %}}"
)
TOOLS = "{% for m in messages %}{% if 'tool_calls' in m %}{{ m.tool_calls | length }}{% endif %}{{ m['content'] }}<|end|>{% endfor %}"
THINKING = PLAIN.replace(
    "<|assistant|>{% endif %}", "<|assistant|>{% if enable_thinking is false %}[none]{% endif %}{% endif %}"
)
NO_END = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
LOSES_THOUGHTS = PLAIN.replace("{{ m['content'] }}", "{{ m['content'].split('::')[-1] }}").replace(
    "<|assistant|>{% endif %}", "<|assistant|>[think]{% endif %}"
)


def tokenizer_with(template: Any, bos: bool = False) -> Any:
    """The tiny tokenizer with this template; with `bos`, one that puts a beginning-of-sequence token before every text."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    if bos:
        tokenizer.bos_token = BOS
        number = tokenizer.convert_tokens_to_ids(BOS)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, number)]
        )
    return tokenizer


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def load(
    tmp_path: Path, tokenizer: Any, *rows: dict[str, Any], pair_tokens: int | None = None, **data: Any
) -> list[Any]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(str(path), tokenizer, DataSettings(prompts=str(path), **data), pair_tokens)


# The beginning and the end


@pytest.mark.parametrize("text", ["hello", f"{BOS}hello", f"{BOS}<|user|>hello<|end|>"])
def test_a_prompt_begins_with_one_bos_and_is_not_ended(tmp_path: Path, text: str) -> None:
    """Also where the text is rendered already, and where the tokenizer puts an end behind everything."""
    tokenizer = tokenizer_with(PLAIN, bos=True)
    (prompt,) = load(tmp_path, tokenizer, {"prompt": text}, chat_template=False)
    assert tokenizer.decode(prompt.token_ids) == BOS + text.removeprefix(BOS)
    both = [(BOS, tokenizer.bos_token_id), ("<|end|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A <|end|>", special_tokens=both
    )
    assert encode(tokenizer, text, rendered=False) == list(prompt.token_ids)


def test_a_template_that_writes_bos_gives_one(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(GEMMA, bos=True)
    (prompt,) = load(tmp_path, tokenizer, {"prompt": "hello"})
    assert tokenizer.decode(prompt.token_ids) == f"{BOS}<|user|>hello{TURN}\n<|assistant|>"
    tokenizer.chat_template = "{{ bos_token }}" + GEMMA
    (doubled,) = load(tmp_path, tokenizer, {"prompt": "hello"})
    assert doubled.token_ids == prompt.token_ids


def test_a_response_ends_with_what_the_template_writes_at_the_end_of_a_turn(tmp_path: Path) -> None:
    """And not with the end-of-sequence token, which the policy never writes there; for pairs, examples and the engine alike."""
    tokenizer = tokenizer_with(GEMMA, bos=True)
    row = {"prompt": "q", "chosen": "yes ", "rejected": "no"}
    (prompt,) = load(tmp_path, tokenizer, row, pair_tokens=9)
    assert [tokenizer.decode(response) for response in prompt.pair] == [f"yes{TURN}", f"no{TURN}"]
    turn = tokenizer.convert_tokens_to_ids(TURN)
    settings = DataSettings(prompts="unused")
    assert renderer(tokenizer, settings).end == turn
    assert renderer(tokenizer, DataSettings(prompts="unused", chat_template=False)).end == tokenizer.eos_token_id
    examples = tmp_path / "examples.jsonl"
    examples.write_text(json.dumps({"messages": [user("q"), assistant("one"), user("r"), assistant("two")]}) + "\n")
    read = read_conversations(str(examples), "data.examples", tokenizer, SftDataSettings(examples=str(examples)))
    (made,) = read.conversations
    assert tokenizer.decode(made.token_ids[made.learned]) == f"one{TURN}two{TURN}"
    GenerationConfig(eos_token_id=[257, 300]).save_pretrained(tmp_path)
    assert engine_stops(str(tmp_path), tokenizer, settings) == {257, 300, turn}


def test_without_an_end_in_the_template_the_next_turns_first_token_counts_if_generation_stops_there(
    tmp_path: Path,
) -> None:
    """GLM writes `<|user|>` when it has answered; its template writes nothing after an answer."""
    tokenizer = tokenizer_with(NO_END)
    tokenizer.save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[257]).save_pretrained(tmp_path)
    assert Renderer(AutoTokenizer.from_pretrained(tmp_path)).end == 257
    next_turn = tokenizer.convert_tokens_to_ids("<|user|>")
    GenerationConfig(eos_token_id=[257, next_turn]).save_pretrained(tmp_path)
    assert Renderer(AutoTokenizer.from_pretrained(tmp_path)).end == next_turn


def test_a_response_to_a_template_that_changes_answers_is_the_text_itself(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(LOSES_THOUGHTS)
    (prompt,) = load(tmp_path, tokenizer, {"prompt": "q", "chosen": "a::b", "rejected": "c"}, pair_tokens=9)
    assert [tokenizer.decode(response) for response in prompt.pair] == ["a::b<|end|>", "c<|end|>"]


def test_a_response_that_holds_its_end_is_refused(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "a<|end|>b", "rejected": "c"}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the response holds the end-of-sequence token '<\|end\|>'"):
        load(tmp_path, tokenizer_with(PLAIN), row, pair_tokens=9)


# Templates that refuse


@pytest.mark.parametrize(
    ("template", "rows", "data", "says"),
    [
        (
            GEMMA,
            [{"messages": [{"role": "system", "content": "s"}, user("q")]}],
            {},
            r"rows\.jsonl:2: .*System role.*Remove the system",
        ),
        (
            GEMMA,
            [],
            {"system_prompt": "s"},
            r"^data\.system_prompt: .*System role not supported.*Remove the system message",
        ),
        (GEMMA, [{"messages": [user("q"), user("r")]}], {}, r"rows\.jsonl:2: .*alternate.*Change the turns"),
        (
            "{% for m in messages %}{{ m.content }{% endfor %}",
            [],
            {},
            r"^policy\.model: .*\(line 1 of the template\).*chat_template=false",
        ),
        ("{{ messages[0].content + 1 }}", [], {}, r"^policy\.model: .*concatenate str"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", [], {}, r"^policy\.model: .*recursion"),
        (
            "{% for i in range(9999) %}{% for j in range(9999) %}{% set k = j %}{% endfor %}{% endfor %}",
            [],
            {},
            r"^policy\.model: .*it does not end",
        ),
        ("<|user|>hello<|assistant|>", [], {}, r"^policy\.model: .*same text for different conversations"),
        (
            {"rag": PLAIN, "tool_use": PLAIN},
            [],
            {},
            r"^policy\.model: .*Choose one .*\(rag, tool_use\) with data\.template_arguments",
        ),
        (None, [], {}, r"^policy\.model: .*has no chat template. Set data\.chat_template=false"),
    ],
    ids=["system", "system-prompt", "alternate", "syntax", "type", "recursion", "endless", "deaf", "named", "none"],
)
def test_what_a_template_does_is_said_with_place_and_remedy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    template: Any,
    rows: list[dict[str, Any]],
    data: dict[str, Any],
    says: str,
) -> None:
    monkeypatch.setattr(template_trial, "CPU_SECONDS", 1)  # the endless one takes all of them
    with pytest.raises(DataError, match=says):
        load(tmp_path, tokenizer_with(template), {"prompt": "fine"}, *rows, **data)


def test_a_template_that_went_well_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, bounded = [], rendering.bounded
    monkeypatch.setattr(rendering, "bounded", lambda *args: tried.append(1) or bounded(*args))
    row, own = {"prompt": "q"}, f"{PLAIN}{{# {tmp_path} #}}"
    for _ in range(2):
        load(tmp_path, tokenizer_with(own), row)
    assert len(tried) == 1
    load(tmp_path, tokenizer_with(own), row, system_prompt="s")
    load(tmp_path, tokenizer_with(own), row, template_arguments={"x": 1})
    load(tmp_path, tokenizer_with(own + " "), row)
    load(tmp_path, tokenizer_with(own, bos=True), row)
    assert len(tried) == 5
    for _ in range(2):
        with pytest.raises(DataError, match="same text for different conversations"):
            load(tmp_path, tokenizer_with("<|user|>"), row)
    assert len(tried) == 7


def test_examples_are_refused_in_the_same_way(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "q", "response": "a"}) + "\n")
    with pytest.raises(DataError, match=r"^data\.system_prompt: .*System role not supported"):
        settings = SftDataSettings(examples=str(path), system_prompt="s")
        read_conversations(str(path), "data.examples", tokenizer_with(GEMMA), settings)


def test_template_arguments_reach_every_rendering(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(THINKING)
    (as_is,) = load(tmp_path, tokenizer, {"prompt": "q"})
    (silent,) = load(tmp_path, tokenizer, {"prompt": "q"}, template_arguments={"enable_thinking": False})
    assert tokenizer.decode(silent.token_ids) == tokenizer.decode(as_is.token_ids) + "[none]"
    assert silent.id != as_is.id
    (named,) = load(
        tmp_path, tokenizer_with({"rag": PLAIN}), {"prompt": "q"}, template_arguments={"chat_template": "rag"}
    )
    assert tokenizer.decode(named.token_ids) == "<|user|>q<|end|><|assistant|>"
    with pytest.raises(ValueError, match="tokenize cannot be set"):
        DataSettings(prompts="x", template_arguments={"tokenize": True})


def test_nulls_inside_turns_count_as_not_given(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(TOOLS)
    given, null = (
        load(tmp_path, tokenizer, {"messages": [user("q") | more, assistant("a"), user("r")]})
        for more in ({}, {"tool_calls": None, "name": None})
    )
    assert given == null


# Turns


def test_two_system_turns_are_refused(tmp_path: Path) -> None:
    row = {"messages": [{"role": "system", "content": "Be brief."}, user("q")]}
    (own,) = load(tmp_path, tokenizer_with(PLAIN), row)
    assert own.conversation[0][:2] == ("system", "Be brief.")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: has a system message of its own, and data\.system_prompt"):
        load(tmp_path, tokenizer_with(PLAIN), row, system_prompt="Be kind.")


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "human", "content": "q"}, user("r")], r"messages\[0\] has the role 'human'.*Rename it to `user`"),
        ([{"role": "wizard", "content": "q"}, user("r")], r"messages\[0\] has the role 'wizard'; known are"),
        ([user("q"), assistant(" "), user("r")], r"messages\[1\], a turn of the assistant, is empty"),
        ([{"role": "system", "content": ""}, user("r")], r"messages\[0\], a turn of the system, is empty"),
        ([user("  ")], r"messages\[0\], a turn of the user, is empty"),
    ],
)
def test_turns_that_no_model_has_seen_are_refused(tmp_path: Path, messages: list[dict], says: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: {says}"):
        load(tmp_path, tokenizer_with(PLAIN), {"messages": messages})


@pytest.mark.parametrize("system", [None, "s"])
def test_both_conversations_of_a_pair_must_be_the_prompts(tmp_path: Path, system: str | None) -> None:
    own = [{"role": "system", "content": "s"}]
    tokenizer = tokenizer_with(PLAIN)

    def read(chosen: list[dict], rejected: list[dict]) -> None:
        load(tmp_path, tokenizer, {"prompt": "q", "chosen": chosen, "rejected": rejected}, system_prompt=system)

    read([user("q"), assistant("a")], [user("q"), assistant("b")])
    with pytest.raises(DataError, match="`rejected` answers another conversation"):
        read([user("q"), assistant("a")], [user("other"), assistant("b")])
    with pytest.raises(DataError, match="`chosen` answers another conversation"):
        read([{"role": "system", "content": "t"}, user("q"), assistant("a")], [user("q"), assistant("b")])
    if system:
        read([*own, user("q"), assistant("a")], [user("q"), assistant("b")])
    else:
        with pytest.raises(DataError, match="`chosen` answers another conversation"):
            read([*own, user("q"), assistant("a")], [user("q"), assistant("b")])


# Several models


def test_each_model_of_an_evaluation_reads_the_prompts_through_its_own_tokenizer(
    tiny_model: Path, tmp_path: Path
) -> None:
    for name, tokenizer in (("ours", tokenizer_with(PLAIN)), ("theirs", tokenizer_with(GEMMA, bos=True))):
        shutil.copytree(tiny_model, tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"prompt": "q" * n}) + "\n" for n in (1, 60, 2, 57)))
    data = {"prompts": "unused", "eval_prompts": str(held_out), "max_prompt_tokens": 62, "too_long": "drop"}
    settings = Settings(data=data, policy={"model": "unused"}, reward={"kind": "function", "path": "a:b"})
    models = {"--policy": str(tmp_path / "ours"), "--baseline": str(tmp_path / "theirs")}
    ours, theirs = held_out_prompts(settings, models)
    assert [one.id for one in ours.prompts] == [one.id for one in theirs.prompts]
    assert [one.text for one in ours.prompts] == ["q", "qq", "q" * 57], "what one has no room for is asked of neither"
    assert ours.tokenizer.decode(ours.prompts[0].token_ids) == "<|user|>q<|end|><|assistant|>"
    assert theirs.tokenizer.decode(theirs.prompts[0].token_ids) == f"{BOS}<|user|>q{TURN}\n<|assistant|>"
    with pytest.raises(DataError, match="--baseline: there is no model"):
        held_out_prompts(settings, models | {"--baseline": str(tmp_path)})


def test_control_tokens_in_a_prompts_text_are_counted(
    tmp_path: Path, tiny_settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in ("q", "end <|end|> here", "what is <|user|>?"))
    )
    reward = {"kind": "function", "path": "rlhf.reward.functions:share_of_letter_a"}
    settings = tiny_settings(data={"prompts": str(path)}, loop={"prompts_per_step": 2}, reward=reward)
    with caplog.at_level(logging.WARNING, "rlhf"):
        read_inputs(settings)
    assert "2 of 3 prompts have control tokens written out in their text (<|end|>, <|user|>)" in caplog.text


def test_control_tokens_in_a_pair_that_is_learned_from_are_counted(
    tmp_path: Path, tiny_settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": f"q{n}", "chosen": chosen, "rejected": "no"} for n, chosen in enumerate(("yes", "what is <|user|>?"))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = {"kind": "function", "path": "rlhf.reward.functions:share_of_letter_a"}
    algorithm = {"name": "iterative_dpo", "pairs": "dataset"}
    data = {"prompts": str(path), "eval_prompts": None}
    settings = tiny_settings(data=data, loop={"prompts_per_step": 2}, reward=reward, algorithm=algorithm)
    with caplog.at_level(logging.WARNING, "rlhf"):
        read_inputs(settings)
    assert "1 of 2 prompts have control tokens written out in their text (<|user|>)" in caplog.text
