"""Conversations as tokens: the mask against one made token by token, and every bad row named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config.sft import SftDataSettings
from rlhf.data import conversations
from rlhf.data.conversations import Conversation, read_conversations
from rlhf.data.errors import DataError
from rlhf.data.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NO_END = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
FORGETFUL = (
    "{% for m in messages[-2:] %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def data(**fields: Any) -> SftDataSettings:
    return SftDataSettings(examples="examples.jsonl", **fields)


def tokenise_conversation(where: str, row: dict[str, Any], tokenizer: Any, settings: SftDataSettings) -> Conversation:
    rendering = conversations.rendering(tokenizer, settings)
    return conversations.tokenise_conversation(where, row, rendering, settings)


def with_template(template: str | None) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def byte_ids(text: str) -> list[int]:
    """The tiny model's tokens of a text: one for each byte."""
    return [
        TOKENIZER.convert_tokens_to_ids(TOKENIZER.backend_tokenizer.pre_tokenizer.pre_tokenize_str(c)[0][0])
        for c in text
    ]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


letters = st.text("abc xyz?", min_size=1, max_size=8).filter(str.strip)


@given(st.lists(st.tuples(letters, letters), min_size=1, max_size=4), st.none() | letters)
def test_the_assistants_tokens_and_their_ends_are_learned(turns: list[tuple[str, str]], system: str | None) -> None:
    messages = [turn("system", system)] if system else []
    expected_ids, expected_mask = [], []
    for question, answer in turns:
        messages += [turn("user", question), turn("assistant", answer)]
    for message in messages:
        body = byte_ids(message["content"])
        role = TOKENIZER.convert_tokens_to_ids(f"<|{message['role']}|>")
        expected_ids += [role, *body, EOS]
        expected_mask += [False] + [message["role"] == "assistant"] * (len(body) + 1)
    made = tokenise_conversation("x:1", {"messages": messages}, TOKENIZER, data())
    assert made.token_ids.tolist() == expected_ids
    assert made.learned.tolist() == expected_mask


def test_a_prompt_and_a_response_are_a_chat_of_two() -> None:
    one = tokenise_conversation(
        "x:1", {"question": "q", "snippet": "s"}, TOKENIZER, data(prompt_field="question", response_field="snippet")
    )
    other = tokenise_conversation("x:1", {"messages": [turn("user", "q"), turn("assistant", "s")]}, TOKENIZER, data())
    assert np.array_equal(one.token_ids, other.token_ids) and np.array_equal(one.learned, other.learned)


def test_what_the_template_writes_after_the_end_is_context_but_not_learned() -> None:
    tokenizer = with_template(CHATML)
    messages = [turn("user", "q"), turn("assistant", "one"), turn("user", "r"), turn("assistant", "two")]
    made = tokenise_conversation("x:1", {"messages": messages}, tokenizer, data())
    assert tokenizer.decode(made.token_ids[made.learned]) == "one<|end|>two<|end|>"
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(made.token_ids) == whole.removesuffix("\n"), (
        "nothing follows the last token that is sampled"
    )


def test_an_end_is_added_where_the_template_has_none() -> None:
    messages = [turn("user", "q"), turn("assistant", "one"), turn("user", "r"), turn("assistant", "two")]
    tokenizer = with_template(NO_END)
    made = tokenise_conversation("x:1", {"messages": messages}, tokenizer, data())
    assert tokenizer.decode(made.token_ids) == "[user]q[assistant]one[user]r[assistant]two<|end|>"
    assert tokenizer.decode(made.token_ids[made.learned]) == "onetwo<|end|>"


def test_without_a_template_the_texts_are_joined() -> None:
    made = tokenise_conversation("x:1", {"prompt": "ab", "response": "c"}, TOKENIZER, data(chat_template=False))
    assert made.token_ids.tolist() == [*byte_ids("abc"), EOS]
    assert made.learned.tolist() == [False, False, True, True]


def test_a_system_prompt_goes_before_every_example() -> None:
    row = {"prompt": "q", "response": "a"}
    made = tokenise_conversation("x:1", row, TOKENIZER, data(system_prompt="be kind"))
    assert TOKENIZER.decode(made.token_ids).startswith("<|system|>be kind<|end|><|user|>q")


def test_a_template_that_changes_earlier_turns_is_found_out() -> None:
    messages = [turn("user", "q"), turn("assistant", "one"), turn("user", "r"), turn("assistant", "two")]
    with pytest.raises(DataError, match=r"x:1: messages\[1\].*its own prompt.*line of its own"):
        tokenise_conversation("x:1", {"messages": messages}, with_template(FORGETFUL), data())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "q"},
            r"x:7: field `response` must be a text that is not empty \(or turns\); the row has \['prompt'\].*data.response_field",
        ),
        ({"prompt": " ", "response": "a"}, "field `prompt` must be a text"),
        ({"prompt": "q", "response": 3}, "field `response` must be a text"),
        ({"prompt": "q", "messages": []}, "has `prompt` and `messages`"),
        ({"messages": [turn("user", "q")]}, "ends with the assistant's"),
        ({"messages": [turn("assistant", "q")]}, "begins with the user's"),
        ({"messages": "q"}, "must be a list"),
        ({"messages": [turn("user", "q"), turn("assistant", " ")]}, r"messages\[1\].*is empty"),
        ({"messages": [turn("user", "q"), turn("assistant", "a<|end|>b")]}, "holds the end-of-sequence token"),
    ],
)
def test_bad_rows_are_named(row: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenise_conversation("x:7", row, TOKENIZER, data())


def test_other_combinations_are_refused() -> None:
    chat = {"messages": [turn("system", "s"), turn("user", "q"), turn("assistant", "a")]}
    with pytest.raises(DataError, match=r"system message of its own, and data.system_prompt"):
        tokenise_conversation("x:1", chat, TOKENIZER, data(system_prompt="t"))
    with pytest.raises(DataError, match="needs data.chat_template=true"):
        tokenise_conversation("x:1", chat, TOKENIZER, data(chat_template=False))
    with pytest.raises(DataError, match="holds the end-of-sequence token"):
        tokenise_conversation("x:1", {"prompt": "q", "response": "<|end|>"}, TOKENIZER, data(chat_template=False))


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_files_are_read_in_order_and_checked(tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": "q", "response": "a" * n}) for n in (3, 30, 4)]
    path = write(tmp_path / "e.jsonl", rows[0], "", *rows[1:])
    read = read_conversations(path, "data.examples", TOKENIZER, data(max_tokens=10, too_long="drop"))
    assert [int(c.learned.sum()) for c in read.conversations] == [4, 5] and read.dropped == {"too_long": 1}
    assert read.learned_tokens == 9
    with pytest.raises(
        DataError, match=r"e.jsonl:3: the example has 35 tokens, more than data.max_tokens=10.*data.too_long=drop"
    ):
        read_conversations(path, "data.examples", TOKENIZER, data(max_tokens=10))
    with pytest.raises(DataError, match="nothing to learn from: all 3 examples are longer"):
        read_conversations(path, "data.examples", TOKENIZER, data(max_tokens=5, too_long="drop"))
    with pytest.raises(
        DataError, match=r"empty\.jsonl: there is nothing to learn from: the file is empty.*data.eval_examples"
    ):
        read_conversations(write(tmp_path / "empty.jsonl", ""), "data.eval_examples", TOKENIZER, data())
    with pytest.raises(DataError, match=r"no.jsonl: no such file. Set data.examples"):
        read_conversations(str(tmp_path / "no.jsonl"), "data.examples", TOKENIZER, data())
    with pytest.raises(DataError, match=r"bad.jsonl:2: not JSON"):
        read_conversations(write(tmp_path / "bad.jsonl", rows[0], "{"), "data.examples", TOKENIZER, data())
    with pytest.raises(DataError, match=r"list.jsonl, row 1: a number"):
        read_conversations(write(tmp_path / "list.jsonl", "[1]"), "data.examples", TOKENIZER, data())
    with pytest.raises(DataError, match="no chat template"):
        read_conversations(path, "data.examples", with_template(None), data())


def test_a_fingerprint_tells_examples_apart(tmp_path: Path) -> None:
    def fingerprint(response: str, **fields: Any) -> str:
        path = write(tmp_path / "f.jsonl", json.dumps({"prompt": "q", "response": response}))
        return read_conversations(path, "data.examples", TOKENIZER, data(**fields)).fingerprint()

    assert fingerprint("a") == fingerprint("a")
    assert len({fingerprint("a"), fingerprint("b"), fingerprint("a", chat_template=False)}) == 3
