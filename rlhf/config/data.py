"""`data`: the prompts, and pairs of responses to them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from rlhf.config.base import MAX_TOKENS, PathText, Section

HUB = "hf:"
"""Before the name of a data set of the package `datasets`, or of a folder that holds one."""

OWN_ARGUMENTS = frozenset(
    "conversation tokenize add_generation_prompt continue_final_message padding truncation max_length return_tensors return_dict "
    "return_assistant_tokens_mask tokenizer_kwargs messages".split()
)
"""Arguments of transformers' `apply_chat_template` that say what comes out; they are not the user's to set."""


def _of_the_template(arguments: dict[str, Any]) -> dict[str, Any]:
    taken = sorted(OWN_ARGUMENTS & arguments.keys())
    if taken:
        raise ValueError(f"{', '.join(taken)} cannot be set: the system decides what comes out of the template")
    return arguments


TemplateArguments = Annotated[dict[str, Any], AfterValidator(_of_the_template)]
TEMPLATE_ARGUMENTS = (
    "Further arguments of the chat template, such as {enable_thinking: false}. In it, `chat_template` names the one to use of several "
    "templates."
)


class DataSettings(Section):
    prompts: PathText = Field(
        description="Training prompts: a file of JSON lines, a file that ends in `.parquet`, or `hf:NAME[:SPLIT]`, a data set of the "
        "package `datasets`. Each row has a `prompt` (text) or `messages` (chat) field."
        " `chosen` and `rejected`, both or neither, are a pair of responses (text, or a chat that ends with the "
        "assistant's turn). All other fields become the payload that reward functions see.",
    )
    eval_prompts: PathText | None = Field(
        None,
        description="Held-out prompts in the same format. None: no evaluation.",
    )
    max_prompt_tokens: int = Field(
        512,
        ge=1,
        le=MAX_TOKENS,
        description="Prompts longer than this many tokens, after the chat template, are handled as `too_long` says.",
    )
    too_long: Literal["error", "drop"] = Field(
        "error",
        description="What to do with a prompt over `max_prompt_tokens`, or with a pair that is learned from and has a "
        "response over `rollout.max_tokens`: stop before any model is loaded, or leave the line out.",
    )
    chat_template: bool = Field(
        True,
        description="Render prompts through the tokenizer's chat template. False: the text is tokenised as it is.",
    )
    system_prompt: str | None = Field(
        None,
        description="System message put before every prompt, of which none may have one of its own. None: what the chat template does by "
        "default.",
    )
    template_arguments: TemplateArguments = Field({}, description=TEMPLATE_ARGUMENTS)
    shuffle: bool = Field(
        True,
        description="Draw the prompts in an order given by `run.seed`, a new one each epoch. False: file order.",
    )

    def files(self) -> dict[str, str]:
        """The files that are read, by field."""
        named = {"prompts": self.prompts, "eval_prompts": self.eval_prompts}
        return {name: path for name, path in named.items() if path is not None}
