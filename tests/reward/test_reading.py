"""What a reward model reads: whole conversations; of what is too long the prompt's end and all of the response, or a failure in words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.reward.reading import Comparison, Example, Input, PromptOnly, Reader, Tokens, as_text, transcript
from rlhf.types import Failed, Turn
from tests.reward.test_families import PROMPT, make_tokenizer

TOKENIZER = make_tokenizer(bos_token="<bos>", cls_token="<cls>", sep_token="<sep>")
PLAIN = make_tokenizer(bos_token="<bos>", cls_token="<cls>", sep_token="<sep>")
PLAIN.chat_template = None


def reader(limit: int = 10_000, what: Input = "conversation", tokenizer: Any = TOKENIZER, rows: int = 300) -> Reader:
    return Reader(tokenizer, what, limit, rows)


def text_of(read: Any) -> str:
    return TOKENIZER.decode(read.ids)


def test_all_turns_pass_through_the_template() -> None:
    (read,) = reader().read([Example(PROMPT, "Alien.")])
    assert text_of(read) == (
        "<bos><turn>system\nBe kind.<eos><turn>user\nWhich film?<eos><turn>assistant\nA sad one?<eos><turn>user\nNo.<eos>"
        "<turn>assistant\nAlien.<eos>"
    )
    (alone,) = reader().read([PromptOnly(PROMPT)])
    assert text_of(read).startswith(text_of(alone)) and text_of(alone).endswith("No.<eos>")
    (response,) = reader(what="response").read([Example(PROMPT, "Alien.")])
    assert text_of(response) == "<cls>Alien.<sep>"


def test_calls_of_tools_are_read_too() -> None:
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"name": "find", "arguments": {"film": "sad"}}],
        "id": None,
    }
    turns = (*PROMPT[:2], Turn.of(call), Turn("user", "And?"))
    assert turns[2].message() == {name: value for name, value in call.items() if value is not None}
    calling = make_tokenizer(bos_token="<bos>")
    calling.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}[{{ m.tool_calls[0].name }}]{% endif %}{% endfor %}"
    )
    (read,) = reader(tokenizer=calling).read([Example(turns, "Alien.")])
    assert text_of(read) == "Be kind.Which film?[find]And?Alien."
    (plain,) = reader(tokenizer=PLAIN).read([Example(turns, "Alien.")])
    assert 'Assistant:  [{"arguments": {"film": "sad"}, "name": "find"}]\n\nUser: And?' in text_of(plain)


def test_without_a_template_turns_go_under_their_roles() -> None:
    single, several = reader(tokenizer=PLAIN).read([Example(as_text("Which?"), "Alien."), Example(PROMPT, "Alien.")])
    assert text_of(single) == "<cls>Which?\n\nAlien.<sep>", "as models without a template were always asked"
    assert text_of(several) == (
        "<cls>System: Be kind.\n\nUser: Which film?\n\nAssistant: A sad one?\n\nUser: No.\n\nAssistant: Alien.<sep>"
    )
    (both,) = reader().read([Comparison(PROMPT[2:], "Alien.", "Up.")])
    assert text_of(both) == "<cls>Assistant: A sad one?\n\nUser: No.\n\nResponse A:\nAlien.\n\nResponse B:\nUp.<sep>"
    assert transcript(()) == ""


@pytest.mark.parametrize("tokenizer", [TOKENIZER, PLAIN])
@pytest.mark.parametrize("kind", ["example", "comparison", "prompt"])
@settings(max_examples=40)
@given(limit=st.integers(1, 140), response=st.text("a0 é\n", max_size=20))
def test_the_prompt_is_cut_and_no_response(kind: str, tokenizer: Any, limit: int, response: str) -> None:
    """The first token stays, the end stays; what is lost is a part of the prompt."""
    text = {
        "example": Example(PROMPT, response),
        "comparison": Comparison(PROMPT, response, "0"),
        "prompt": PromptOnly(PROMPT),
    }
    (whole,), (read,) = (reader(most, tokenizer=tokenizer).read([text[kind]]) for most in (10_000, limit))
    (prompt,) = reader(tokenizer=tokenizer).read([Example(PROMPT, "")])
    assert isinstance(whole, Tokens) and whole.cut == 0
    if isinstance(read, Failed):
        words = "both responses are" if kind == "comparison" else "the response is"
        assert kind != "prompt" and f"{words} " in read.reason and f"reads {limit}" in read.reason
        assert len(response.encode()) + 40 >= limit, "it fits alone"
    elif len(whole.ids) <= limit:
        assert read == whole
    else:
        assert len(read.ids) == limit and read.cut == len(whole.ids) - limit
        assert read.ids[0] == whole.ids[0] and read.ids[1:] == whole.ids[len(whole.ids) - limit + 1 :]
        assert kind == "prompt" or TOKENIZER.decode(whole.ids[-limit + 1 :]).count(response) > 0


def test_the_longest_response_that_fits_is_judged() -> None:
    """The boundary is exact: the response with what the template adds after it, and the first token."""
    for length, what in ((20, "conversation"), (20, "response")):
        example, ends = Example(PROMPT, "a" * length), {"conversation": 2, "response": 2}[what]
        assert isinstance(reader(length + ends, what).read([example])[0], Tokens)
        assert isinstance(reader(length + ends - 1, what).read([example])[0], Failed)


def test_nothing_is_cut_of_a_text_without_a_prompt() -> None:
    text = Comparison((), "Alien.", "Up.")
    (whole,) = reader().read([text])
    assert isinstance(whole, Tokens)
    assert reader(len(whole.ids)).read([text]) == [whole]
    assert isinstance(reader(len(whole.ids) - 1).read([text])[0], Failed)


def test_one_text_that_cannot_be_read_harms_no_other() -> None:
    refusing = make_tokenizer(bos_token="<bos>")
    refusing.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    refused, read = reader(tokenizer=refusing).read([Example(PROMPT, "a"), Example(PROMPT[1:], "a")])
    assert isinstance(refused, Failed) and isinstance(read, Tokens)
    assert (
        "chat template refuses a conversation of the turns system, user, assistant, user, assistant" in refused.reason
    )
    assert "no system turn" in refused.reason
    beyond, read = reader(rows=259).read([Example(as_text("Hi"), "<pad>"), Example(as_text("Hi"), "a")])
    assert isinstance(beyond, Failed) and isinstance(read, Tokens)
    assert "the token '<pad>' (259), and the model's embedding has 259 rows" in beyond.reason
