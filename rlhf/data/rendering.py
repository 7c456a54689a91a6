"""The one place where a conversation becomes text and tokens: chat templates, special tokens, and the token that ends a turn.

A template is code that comes with a model. Whatever it raises is reported with the conversation's place and a remedy, and before it
is used it is tried on two conversations (`Renderer.check`). Knows nothing of files, nor of what the tokens are for.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.config.data import DataSettings
from rlhf.data.errors import DataError
from rlhf.data.template_trial import MEMORY, bounded
from rlhf.data.turns import SYSTEM_ROLES

QUESTION, OTHER_QUESTION, ANSWER = "What is two plus two?", "Name a river.", "It is four."
Messages = Sequence[Mapping[str, Any]]


def render(
    tokenizer: Any, messages: Messages, where: str, arguments: Mapping[str, Any] | None = None, *, prompt: bool = False
) -> str:
    """A conversation through the tokenizer's chat template.

    Args:
        where: the conversation's place, for messages.
        arguments: further arguments of the template, such as `enable_thinking`.
        prompt: end where the assistant begins to write.

    Raises:
        DataError: the template raised, whatever it was.
    """
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt, **(arguments or {})
        )
    except Exception as error:  # a template is code of the model's author, and raises what it likes
        raise DataError(
            f"{where}: the chat template of {_name(tokenizer)} refuses this conversation: {_words(error)}. "
            f"{_remedy(tokenizer, messages)}"
        ) from error


def encode(tokenizer: Any, text: str, *, rendered: bool) -> list[int]:
    """Token ids of a text that a model is given, or that continues one.

    A beginning-of-sequence token never comes twice, also where the text has one of its own; and no end is put behind what is to be
    continued, as some tokenizers do.

    Args:
        rendered: the text has its special tokens already, so none are added.
    """
    ids = list(tokenizer(text, add_special_tokens=not rendered).input_ids)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if not rendered and ids and ids[-1] == eos:
        own = list(tokenizer(text, add_special_tokens=False).input_ids)
        ids = ids[:-1] if ids[-len(own) - 1 : -1] == own else ids
    while bos is not None and ids[:2] == [bos, bos]:
        del ids[0]
    return ids


def stop_tokens(path: str, tokenizer: Any) -> frozenset[int]:
    """Where vLLM ends a response by itself: the tokenizer's end-of-sequence token, and those of the generation configuration.

    Args:
        path: folder or hub name of the model.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        named = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # vLLM then takes the model's own configuration, and so do we
        try:
            named = GenerationConfig.from_model_config(AutoConfig.from_pretrained(path)).eos_token_id
        except (OSError, ValueError):  # a tokenizer alone
            named = None
    ids = [named] if isinstance(named, int) else list(named or ())
    return frozenset(token for token in [tokenizer.eos_token_id, *ids] if token is not None)


def control_tokens(tokenizer: Any, text: str) -> list[str]:
    """Special tokens that are written out in a text, such as `<|im_end|>`. The tokenizer takes them for control tokens."""
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special and str(token) in text]


@dataclass(frozen=True)
class Renderer:
    """Conversations as the tokens of one model.

    Attributes:
        tokenizer: a transformers tokenizer with a chat template.
        chat_template: use it; False: texts are tokenised as they are.
        system_prompt: put before every conversation.
        arguments: of the template, beside the conversation.
    """

    tokenizer: Any
    chat_template: bool = True
    system_prompt: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Try the template on two conversations.

        Raises:
            DataError: there is none, or it raises, does not end, needs too much memory, or gives the same text for both.
        """
        if not self.chat_template:
            return
        if self.tokenizer.chat_template is None:
            raise DataError(
                f"policy.model: the tokenizer of {_name(self.tokenizer)} has no chat template. Set data.chat_template=false, or use a "
                "chat model."
            )
        conversations = [("policy.model", [_user(question)]) for question in (QUESTION, OTHER_QUESTION)]
        if self.system_prompt:
            conversations.append(("data.system_prompt", self.conversation("", [_user(QUESTION)])))
        _try(self.tokenizer, "policy.model", conversations, self.arguments, prompt=True)

    def conversation(self, where: str, messages: Messages) -> list[dict[str, Any]]:
        """A row's turns after the system message of the settings.

        Raises:
            DataError: the row has a system message of its own.
        """
        if not self.system_prompt:
            return [dict(message) for message in messages]
        if any(message["role"] in SYSTEM_ROLES for message in messages):
            raise DataError(f"{where}: has a system message of its own, and data.system_prompt is set. Remove one.")
        return [{"role": "system", "content": self.system_prompt}, *(dict(message) for message in messages)]

    def text(self, where: str, messages: Messages, *, prompt: bool) -> str:
        """See `render`."""
        return render(self.tokenizer, messages, where, self.arguments, prompt=prompt)

    def prompt(self, where: str, messages: Messages) -> list[int]:
        """Token ids of a whole conversation (see `conversation`), up to where the policy begins to write.

        Raises:
            DataError: the template refuses it, or it has several turns and there is no template.
        """
        if self.chat_template:
            return encode(self.tokenizer, self.text(where, messages, prompt=True), rendered=True)
        if len(messages) > 1:
            raise DataError(f"{where}: a chat of several messages needs data.chat_template=true")
        return encode(self.tokenizer, messages[0]["content"], rendered=False)

    def response(self, where: str, messages: Messages, text: str) -> list[int]:
        """Token ids of a given response to a conversation, as the policy would have sampled it: with the token that ends its turn.

        Raises:
            DataError: the template refuses it, the text holds that token, or no token is known.
        """
        body = text
        if self.chat_template:
            before = self.text(where, messages, prompt=True)
            whole = self.text(where, [*messages, {"role": "assistant", "content": text}], prompt=False)
            # A template may write earlier turns otherwise (without their thoughts). Then the text stands for itself.
            body = whole[len(before) :] if whole.startswith(before) else text
        return self.ended(where, encode(self.tokenizer, body, rendered=True), text)[0]

    def ended(self, where: str, ids: list[int], text: str) -> tuple[list[int], list[int]]:
        """A response with the token that ends its turn, and what the template has written after that.

        Args:
            ids: of the response and what follows it.
            text: the response alone.

        Raises:
            DataError: the response holds that token itself, or no token is known.
        """
        end = self.end
        if end is None:
            raise DataError(
                "policy.model: its tokenizer has no end-of-sequence token, with which responses would end. Set eos_token in "
                "tokenizer_config.json."
            )
        if end in encode(self.tokenizer, text, rendered=True):
            raise DataError(
                f"{where}: the response holds the end-of-sequence token {self.tokenizer.convert_ids_to_tokens(end)!r} in its text, where "
                "a model would stop. Remove it there; it is added at the end."
            )
        if end not in ids:
            return [*ids, end], []
        place = ids.index(end)
        return ids[: place + 1], ids[place + 1 :]

    @functools.cached_property
    def end(self) -> int | None:
        """The token with which the policy ends its turn.

        The first control token after an answer in the template (Gemma's `<end_of_turn>`, though its end-of-sequence token is `<eos>`);
        where nothing follows an answer, what begins the next turn, if the generation configuration stops there; else the
        tokenizer's end-of-sequence token. The engines stop at it.
        """
        tokenizer, eos = self.tokenizer, self.tokenizer.eos_token_id
        if not self.chat_template or tokenizer.chat_template is None:
            return eos
        asked = [_user(QUESTION), {"role": "assistant", "content": ANSWER}]
        control = {eos, *tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        after = self._after_answer(asked)
        found = next((token for token in after if token in control), None)
        if found is None and tokenizer.name_or_path:
            stops = stop_tokens(tokenizer.name_or_path, tokenizer)
            after = self._after_answer([*asked, _user(OTHER_QUESTION)])
            found = next((token for token in after[:1] if token in stops), None)
        return eos if found is None else found

    def _after_answer(self, messages: Messages) -> list[int]:
        try:
            whole = self.text("policy.model", messages, prompt=False)
        except DataError:  # a template for one turn only
            return []
        before, _, after = whole.rpartition(ANSWER)
        return encode(self.tokenizer, after, rendered=True) if before else []


def check_template(tokenizer: Any, where: str) -> None:
    """Try the chat template of a judge's tokenizer, if it has one, on two conversations that end with an answer.

    Args:
        where: who names the model, for messages.

    Raises:
        DataError: it raises, does not end, needs too much memory, or gives the same text for both.
    """
    if tokenizer.chat_template is not None:
        asked = [[_user(question), {"role": "assistant", "content": ANSWER}] for question in (QUESTION, OTHER_QUESTION)]
        _try(tokenizer, where, [(where, messages) for messages in asked], {}, prompt=False)


def _try(
    tokenizer: Any,
    where: str,
    conversations: Sequence[tuple[str, Messages]],
    arguments: Mapping[str, Any],
    *,
    prompt: bool,
) -> None:
    """Render conversations, each with its place for messages, within bounds; the first two must give different texts."""
    asked = [tokenizer.chat_template, tokenizer.special_tokens_map, conversations, dict(arguments), prompt]
    trial_of = json.dumps(asked, sort_keys=True, default=str)
    if trial_of in _WENT_WELL:
        return
    what, remedy = f"{where}: the chat template of {_name(tokenizer)}", "Correct the template, or use another model."

    def trial() -> list[str]:
        return [render(tokenizer, messages, place, arguments, prompt=prompt) for place, messages in conversations]

    one, other, *_ = bounded(trial, what, remedy)
    if one == other:
        raise DataError(
            f"{what} gives the same text for different conversations, so the model would not see what is said. Correct the template, or "
            "set data.chat_template=false if it is the policy's."
        )
    _WENT_WELL.add(trial_of)


_WENT_WELL: set[str] = set()
"""Trials of this process, each of which takes a fork: a run's prompts, held-out prompts and model ask for the same one."""


def renderer(tokenizer: Any, settings: DataSettings) -> Renderer:
    """As the settings of a run's data say."""
    return Renderer(tokenizer, settings.chat_template, settings.system_prompt, settings.template_arguments)


def engine_stops(path: str, tokenizer: Any, settings: DataSettings) -> frozenset[int]:
    """All tokens at which the engines end a response of the model at `path`."""
    end = renderer(tokenizer, settings).end
    return stop_tokens(path, tokenizer) | ({end} if end is not None else set())


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _name(tokenizer: Any) -> str:
    return tokenizer.name_or_path or "the tokenizer"


def _words(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"it needs more than {MEMORY >> 20} MiB of memory for a short one"
    line = getattr(error, "lineno", None)  # of a syntax error
    return f"{str(error).rstrip('.') or type(error).__name__}{f' (line {line} of the template)' if line else ''}"


def _remedy(tokenizer: Any, messages: Messages) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict) and "default" not in template:
        return f"Choose one of its templates ({', '.join(template)}) with data.template_arguments: {{chat_template: NAME}}."
    general = "use a model that was tuned for such conversations, correct its template, or set data.chat_template=false"
    if len(messages) == 1 and messages[0]["role"] == "user":
        return f"{general[0].upper()}{general[1:]}."
    if any(message["role"] in SYSTEM_ROLES for message in messages):
        return f"Remove the system message (or data.system_prompt) if the template knows none; else {general}."
    return f"Change the turns (most templates want user and assistant in turn), {general}."
