"""The layouts in which people have prompts, pairs and examples: each is read, or refused with the place and the exact remedy."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.data import DataSettings
from rlhf.config.loader import UserError
from rlhf.config.sft import SftDataSettings
from rlhf.data.conversations import read_conversations
from rlhf.data.errors import DataError
from rlhf.data.prompts import load_prompts, text_prompt
from rlhf.data.tiny import tiny_tokenizer
from rlhf.reward.reading import as_text
from rlhf.reward.training.reader import read_data
from rlhf.types import Prompt, Turn, content_id

TOKENIZER = tiny_tokenizer()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [user("Hi."), assistant("Hello!")]


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """`load(rows, ...)`: the prompts of these rows, their pairs tokenised."""

    def read(*rows: dict[str, Any], **settings: Any) -> list[Prompt]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        pairs = 99 if all("chosen" in row for row in rows) else None
        return load_prompts(str(path), TOKENIZER, DataSettings(prompts=str(path), **settings), pairs)

    return read


@pytest.fixture
def examples(tmp_path: Path) -> Any:
    """`examples(row, ...)`: what the assistant says in this example, and the whole, as text."""

    def read(row: dict[str, Any], **settings: Any) -> tuple[str, str]:
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n")
        data = SftDataSettings(examples=str(path), **settings)
        (one,) = read_conversations(str(path), "data.examples", TOKENIZER, data).conversations
        return TOKENIZER.decode(one.token_ids[one.learned]), TOKENIZER.decode(one.token_ids)

    return read


def answers(prompt: Prompt) -> list[str]:
    return [TOKENIZER.decode(response).removesuffix("<|end|>") for response in prompt.pair]


# Prompts


def test_a_prompt_may_be_turns_as_in_trl(load: Any) -> None:
    turns = [SYSTEM, *EARLIER, user("A film?")]
    as_prompt, as_messages = load({"prompt": turns}), load({"messages": turns})
    assert as_prompt == as_messages and as_prompt[0].text == "A film?" and len(as_prompt[0].conversation) == 4
    (text,), (one_turn,) = load({"prompt": "A film?"}), load({"prompt": [user("A film?")]})
    assert text == one_turn


def test_ids_of_the_plain_layouts_are_as_they_always_were(load: Any) -> None:
    """A run that an earlier version began goes on with the same prompts."""
    prompts = load({"prompt": "a", "k": 1}, {"messages": [user("a"), assistant("b"), user("c")]})
    rows = [([user("a")], {"k": 1}), ([user("a"), assistant("b"), user("c")], {})]
    contents = [{"messages": messages, "payload": payload, "system": None} for messages, payload in rows]
    assert [prompt.id for prompt in prompts] == [content_id(content) for content in contents]
    (pair,) = load({"prompt": "a", "chosen": "b", "rejected": "c"})
    assert pair.id == content_id({"messages": [user("a")], "payload": {}, "system": None, "pair": ("b", "c")})


def test_verl_rows_are_read_and_their_answer_mapped(load: Any) -> None:
    row = {
        "data_source": "gsm8k",
        "prompt": [user("1 + 1?")],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"index": 0, "split": "train"},
    }
    (prompt,) = load(row)
    assert prompt.text == "1 + 1?" and prompt.payload == {k: v for k, v in row.items() if k != "prompt"}
    (mapped,) = load(row, columns={"answer": "reward_model.ground_truth"})
    assert mapped.payload == prompt.payload | {"answer": "2"}


def test_ultrafeedback_rows_are_read(load: Any) -> None:
    asked = user("Name a river.")
    binarized = {
        "prompt": "Name a river.",
        "prompt_id": "0",
        "chosen": [asked, assistant("Ucayali.")],
        "rejected": [asked, assistant("No.")],
        "messages": [asked, assistant("Ucayali.")],
        "score_chosen": 8.0,
    }
    (prompt,) = load(binarized)
    assert prompt.text == "Name a river." and answers(prompt) == ["Ucayali.", "No."]
    with pytest.raises(DataError, match=r"rows\.jsonl:1: has `prompt` and `messages`.*\{messages: null\}"):
        load(binarized | {"prompt": "Another."})
    (without,) = load(binarized, columns={"messages": None})
    assert "messages" not in without.payload and answers(without) == answers(prompt)
    original = {"source": "x", "instruction": "Name a river.", "completions": [{"response": "Ucayali."}]}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*data\.columns=\{prompt: instruction\}"):
        load(original)
    (mapped,) = load(original, columns={"prompt": "instruction"})
    assert mapped.text == "Name a river." and mapped.payload["completions"] == [{"response": "Ucayali."}]


def test_ultrachat_rows_are_a_prompt_with_a_conversation_that_goes_on(load: Any, examples: Any) -> None:
    row = {"prompt": "Hi.", "prompt_id": "0", "messages": [*EARLIER, user("A film?"), assistant("Alien.")]}
    assert load(row)[0].text == "Hi."
    assert examples(row)[0] == "Hello!<|end|>Alien.<|end|>"
    with pytest.raises(DataError, match="has `prompt` and `messages`"):
        examples(row | {"prompt": "Bye."})


def test_a_conversation_that_is_answered_is_no_prompt(load: Any) -> None:
    with pytest.raises(DataError, match=r"Leave out the assistant's last turn.*`rlhf sft` learns from it"):
        load({"messages": EARLIER})


@pytest.mark.parametrize("field", ["conversations", "conversation"])
def test_sharegpt_rows_are_mapped(load: Any, examples: Any, field: str) -> None:
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi."},
        {"from": "gpt", "value": "Yes?"},
    ]
    with pytest.raises(DataError, match=rf"data\.columns=\{{messages: {field}\}}"):
        load({field: turns[:2]})
    assert load({field: turns[:2]}, columns={"messages": field}) == load({"messages": [SYSTEM, user("Hi.")]})
    assert examples({field: turns}, columns={"messages": field})[0] == "Yes?<|end|>"


@pytest.mark.parametrize("field", ["messages", "prompt"])
@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ([SYSTEM, SYSTEM, user("q")], "field `FIELD` has two system messages. Join them"),
        ([SYSTEM, {"role": "developer", "content": "d"}, user("q")], "has two system messages"),
        ([{"role": "user", "content": [{"type": "text", "text": "q"}]}], r"FIELD\[0\] has a list of parts"),
        ([user("q"), {"role": "assistant"}, user("r")], r"FIELD\[1\] needs `role` and `content`"),
        ([{"from": "wizard", "value": "q"}], r"FIELD\[0\] has the role 'wizard'"),
        ([{"from": 3, "value": "q"}], r"FIELD\[0\] needs `role`"),
        (["q"], "field `FIELD` must be a list"),
        ([["q"]], "field `FIELD` must be a list"),
        (user("q"), "field `FIELD` must be a .*list"),
    ],
)
def test_chats_that_are_none_are_named(load: Any, field: str, turns: Any, says: str) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*" + says.replace("FIELD", field)):
        load({field: turns})


def test_a_call_of_a_tool_may_be_without_content(load: Any) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    (prompt,) = load({"messages": [user("q"), call, {"role": "tool", "content": "found"}, user("r")]})
    assert prompt.conversation[1].content == "" and "look" in prompt.conversation[1].more


def test_canaries_and_common_sets_may_have_turns_as_prompt() -> None:
    prompt = text_prompt("x:1", {"prompt": [SYSTEM, user("q")], "good": "g"}, ("good",))
    assert prompt.conversation == (Turn("system", "Be brief."), Turn("user", "q")) and prompt.text == "q"


PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("line", re.findall(r"^\| .+? \| `(\{.+\})` \| .+ \|$", PAGE, re.MULTILINE))
def test_the_rows_of_the_page_are_read(load: Any, line: str) -> None:
    row = json.loads(line)
    columns = {"instruction": {"prompt": "instruction"}, "conversations": {"messages": "conversations"}}
    (prompt,) = load(row, columns=next((columns[name] for name in columns if name in row), {}))
    assert prompt.text in ("A film?", "1 + 1?") and (prompt.pair is not None) == ("chosen" in row)


def test_the_page_has_every_layout() -> None:
    assert len(re.findall(r"^\| .+? \| `\{", PAGE, re.MULTILINE)) == 11


# Pairs


def test_pairs_have_the_prompt_that_both_conversations_begin_with(load: Any) -> None:
    """TRL's implicit prompt."""
    before = [SYSTEM, *EARLIER, user("A film?")]
    implicit = {"chosen": [*before, assistant("Alien.")], "rejected": [*before, assistant("No.")], "score": 3}
    explicit = {"prompt": before, "chosen": [assistant("Alien.")], "rejected": [assistant("No.")], "score": 3}
    texts = {"messages": before, "chosen": "Alien.", "rejected": "No.", "score": 3}
    assert load(implicit) == load(explicit) == load(texts)
    (prompt,) = load(implicit)
    assert answers(prompt) == ["Alien.", "No."] and prompt.payload == {"score": 3}
    other = [*before[:-1], user("A book?")]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: `chosen` and `rejected` differ before their last turn"):
        load(implicit, implicit | {"rejected": [*other, assistant("No.")]})


def test_hh_dialogues_are_read(load: Any) -> None:
    def text(answer: str, asked: str = "A film?") -> str:
        return f"\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: {asked}\n\nAssistant: {answer}"

    (prompt,) = load({"chosen": text("Alien."), "rejected": text("No.")})
    assert [(turn.role, turn.content) for turn in prompt.conversation] == [
        ("user", "Hi."),
        ("assistant", "Hello!"),
        ("user", "A film?"),
    ]
    assert answers(prompt) == ["Alien.", "No."]
    with pytest.raises(DataError, match="differ before their last turn"):
        load({"chosen": text("Alien."), "rejected": text("No.", "A book?")})


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"chosen": "a", "rejected": "b"},
            r"`chosen` must be a conversation, prompt included.*Add the prompt|`chosen` must be",
        ),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "Add the prompt to the row, or the turns before"),
        ({"chosen": [user("q")], "rejected": [user("q")]}, "ends with the assistant's turn"),
        (
            {"chosen": [assistant("x"), assistant("a")], "rejected": [assistant("x"), assistant("b")]},
            "ends with the user's turn",
        ),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "b"}, "`rejected` must be a conversation"),
        ({"chosen": "\n\nHuman: q", "rejected": "\n\nHuman: r"}, "`chosen` must be a conversation"),
    ],
)
def test_pairs_without_a_prompt_say_what_is_missing(load: Any, row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: field .*" + says):
        load(row)


# Examples


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"prompt": "Hi.", "response": "Hello!"}, {}),
        ({"prompt": [user("Hi.")], "response": [assistant("Hello!")]}, {}),
        ({"prompt": [user("Hi.")], "completion": [assistant("Hello!")]}, {"response_field": "completion"}),
        (
            {"instruction": "Hi.", "input": "", "output": "Hello!"},
            {"prompt_field": "instruction", "response_field": "output"},
        ),
        ({"question": "Hi.", "out": {"text": "Hello!"}}, {"columns": {"prompt": "question", "response": "out.text"}}),
        ({"messages": EARLIER}, {}),
        ({"text": "unused", "messages": EARLIER, "prompt": None}, {}),
    ],
)
def test_examples_are_read(examples: Any, row: dict[str, Any], settings: dict[str, Any]) -> None:
    assert examples(row, **settings) == ("Hello!<|end|>", "<|user|>Hi.<|end|><|assistant|>Hello!<|end|>")


@pytest.mark.parametrize(
    ("row", "settings", "says"),
    [
        ({"prompt": "q", "completion": "a"}, {}, "name data.response_field=completion"),
        ({"instruction": "q", "output": "a"}, {"prompt_field": "instruction"}, "name data.response_field=output"),
        (
            {"instruction": "q", "input": "more", "output": "a"},
            {"prompt_field": "instruction", "response_field": "output"},
            "has an `input` beside its `instruction`, which would be left out",
        ),
        (
            {"instruction": "q", "input": "more", "output": "a"},
            {"columns": {"prompt": "instruction", "response": "output"}},
            r"has an `input` beside its `instruction`.*\{input: null\}",
        ),
        ({"prompt": "q", "response": [user("r"), assistant("a")]}, {}, "A whole conversation belongs in `messages`"),
        ({"prompt": "q", "response": [user("r")]}, {}, "list of one turn, the assistant's"),
        ({"prompt": "q", "response": [assistant("")]}, {}, r"response\[0\], a turn of the assistant, is empty"),
        ({"prompt": EARLIER, "response": "a"}, {}, "`prompt` must be a list of .* ends with the user's turn"),
    ],
)
def test_examples_that_are_none_are_named(examples: Any, row: dict, settings: dict, says: str) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*" + says):
        examples(row, **settings)


def test_control_tokens_in_examples_are_counted(examples: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "rlhf"):
        examples({"messages": [user("what is <|user|>?"), assistant("a")]})
    assert "data.examples: turns have control tokens written out in their text (<|user|> in 1)" in caplog.text


# Preferences for reward models


@pytest.fixture
def preferences(tmp_path: Path) -> Any:
    def read(*rows: dict[str, Any], columns: dict[str, str | None] | None = None) -> Any:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_data(str(path), columns)

    return read


def test_reward_training_reads_hh_dialogues_as_conversations(preferences: Any) -> None:
    """Else a model for responses would learn from whole dialogues."""
    before = "\n\nHuman: A film?\n\nAssistant: "
    data = preferences({"chosen": before + "Alien.", "rejected": before + "No."})
    assert data.input == "conversation"
    assert [(text.prompt, text.response) for text in data.examples] == [
        (as_text("A film?"), answer) for answer in ("Alien.", "No.")
    ]
    ranked = preferences({"responses": [before + "Alien.", before + "No."]})
    assert ranked.examples == data.examples
    with pytest.raises(UserError, match="answers another conversation"):
        preferences({"chosen": before + "Alien.", "rejected": "\n\nHuman: A book?\n\nAssistant: No."})


def test_reward_training_maps_columns(preferences: Any) -> None:
    row = {"question": "q", "better": "yes", "worse": "no", "prompt": 7}
    data = preferences(row, columns={"prompt": "question", "chosen": "better", "rejected": "worse", "id": "prompt"})
    assert [text.response for text in data.examples] == ["yes", "no"] and data.examples[0].prompt == as_text("q")
    with pytest.raises(UserError, match="given as `--columns"):
        preferences(row)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": [user("q")], "rating": 1}, "field `text`: ends with the turn of `user`"),
        ({"text": "a", "rating": 1, "prompt": EARLIER}, "field `prompt`: ends with the assistant's turn"),
        (
            {"text": [{"role": "wizard", "content": "q"}, assistant("a")], "rating": 1},
            r"text\[0\] has the role 'wizard'",
        ),
        ({"text": [SYSTEM, SYSTEM, assistant("a")], "rating": 1}, "has two system messages"),
    ],
)
def test_reward_training_names_turns_that_are_none(preferences: Any, row: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:1.*" + says):
        preferences(row)
