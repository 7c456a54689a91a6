"""`data`: the prompts, and pairs of responses to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from rlhf.config.base import MAX_TOKENS, PathText, Section

HUB = "hf:"
"""Before the name of a data set of the package `datasets`, or of a folder that holds one."""


def hub_parts(path: str) -> tuple[str, str, str]:
    """Name or folder, configuration and split of `hf:NAME[@CONFIG][:SPLIT]`; empty where not given."""
    name, _, split = path.removeprefix(HUB).partition(":")
    name, _, config = name.partition("@")
    return name, config, split


OWN_ARGUMENTS = frozenset(
    "conversation tokenize add_generation_prompt continue_final_message padding truncation max_length return_tensors return_dict "
    "return_assistant_tokens_mask tokenizer_kwargs messages".split()
)
"""Arguments of transformers' `apply_chat_template` that say what comes out; they are not the user's to set."""


def of_the_template(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments. Raises ValueError if one is not the user's to set."""
    taken = sorted(OWN_ARGUMENTS & arguments.keys())
    if taken:
        raise ValueError(f"{', '.join(taken)} cannot be set: the system decides what comes out of the template")
    return arguments


TemplateArguments = Annotated[dict[str, Any], AfterValidator(of_the_template)]
TEMPLATE_ARGUMENTS = (
    "Further arguments of the chat template, such as {enable_thinking: false}. In it, `chat_template` names the one to use of several "
    "templates."
)


def _columns(columns: dict[str, Any]) -> dict[str, Any]:
    for name, column in columns.items():
        if column is not None and (not isinstance(column, str) or not column.strip()):
            raise ValueError(
                f"reads `{name}` from {column!r}. Give the name of a column as text, or null to leave `{name}` out"
            )
    return columns


Columns = Annotated[dict[str, Any], AfterValidator(_columns)]
"""Our name -> the name of a column, or None."""
COLUMNS = (
    "Names for the columns of the data: {prompt: question} reads the column `question` as `prompt`, {answer: reward_model.ground_truth} a "
    "field inside one, and {messages: null} leaves the column `messages` out."
)


class DataSource(Section):
    """One of several sources of rows. A text stands for its path."""

    path: PathText = Field(
        description="A file or a data set, as the field that holds the list takes it.",
    )
    weight: float | None = Field(
        None,
        ge=1e-6,
        le=1e6,
        description="Its share of all draws, relative to the weights of the other sources: all have one, or none. A source is gone through "
        "pass by pass, a small one with a large weight more often than others. None: every row of all sources once in each pass.",
    )
    columns: Columns | None = Field(
        None,
        description="In place of `data.columns`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_its_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


Sources = Annotated[
    Annotated[PathText, Tag("text")] | Annotated[list[DataSource], Field(min_length=1), Tag("a list")],
    Discriminator(lambda value: "a list" if isinstance(value, list | dict) else "text"),
]
"""One source of rows, or a mixture."""
SOURCE = (
    "a file of JSON lines, a JSON array, a file that ends in `.parquet`, or `hf:NAME[@CONFIG][:SPLIT]`, a data set of the package "
    "`datasets`; or a list of such sources with `path`, and perhaps `weight` and `columns`"
)


def listed(sources: str | Sequence[DataSource], columns: Columns) -> list[DataSource]:
    """All sources, each with its columns.

    Args:
        columns: of those that have none of their own.
    """
    every = (
        [DataSource.model_construct(path=sources, weight=None, columns=None)] if isinstance(sources, str) else sources
    )
    return [
        source if source.columns is not None else source.model_copy(update={"columns": columns}) for source in every
    ]


def in_words(sources: str | Sequence[DataSource]) -> str:
    """The paths, for messages."""
    return sources if isinstance(sources, str) else ", ".join(source.path for source in sources)


def named_files(field: str, sources: str | Sequence[DataSource] | None) -> dict[str, str]:
    """The files of a field, by field, or by field and place in its list."""
    if sources is None or isinstance(sources, str):
        return {} if sources is None else {field: sources}
    return {f"{field}[{place}]": source.path for place, source in enumerate(sources)}


def source_problems(field: str, sources: str | Sequence[DataSource] | None, weighted: bool) -> Iterator[str]:
    """What is wrong with a list of sources.

    Args:
        weighted: they are drawn from. False: all is read once.
    """
    weights = [] if sources is None or isinstance(sources, str) else [source.weight for source in sources]
    without = [place for place, weight in enumerate(weights) if weight is None]
    if len(without) == len(weights):
        return
    if not weighted:
        yield f"`{field}`: held-out rows are all read, each once, so a weight says nothing. Remove `weight`"
    elif without:
        yield (
            f"`{field}[{without[0]}].weight` is missing, but other sources have weights. Give one to each source, or to none: then every "
            "row comes once in each pass"
        )


class DataSettings(Section):
    prompts: Sources = Field(
        description=f"Training prompts: {SOURCE}. A row has a `prompt` (a text, or a chat that ends with the user's turn), `messages` "
        "(such a chat), or two conversations as `chosen` and `rejected` that begin with the same prompt."
        " `chosen` and `rejected`, both or neither, are a pair of responses (text, or a chat that ends with the "
        "assistant's turn). All other fields become the payload that reward functions see.",
    )
    eval_prompts: Sources | None = Field(
        None,
        description="Held-out prompts in the same format, without weights: those of several sources are mixed by size, so that the first "
        "`loop.eval_limit` hold of each. None: no evaluation.",
    )
    columns: Columns = Field({}, description=COLUMNS)
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
        return named_files("prompts", self.prompts) | named_files("eval_prompts", self.eval_prompts)
