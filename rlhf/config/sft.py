"""Settings of `rlhf sft`: supervised fine-tuning. What it shares with `rlhf train` are the same sections."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.config.base import MAX_TOKENS, Section
from rlhf.config.checkpoint import CheckpointSettings
from rlhf.config.cluster import ClusterSettings
from rlhf.config.data import COLUMNS, SOURCE, TEMPLATE_ARGUMENTS, Columns, Sources, TemplateArguments, named_files
from rlhf.config.policy import Dtype, PolicySettings, Rate
from rlhf.config.run import RunSettings
from rlhf.config.tracking import TrackingSettings


class SftDataSettings(Section):
    examples: Sources = Field(
        description=f"Training examples: {SOURCE}. Each row has `messages` (a chat that ends with the assistant's turn; every turn of the "
        "assistant is learned), or a prompt and a response, each a text or turns. Other fields are not read.",
    )
    eval_examples: Sources | None = Field(
        None,
        description="Held-out examples in the same format, without weights. None: no held-out loss.",
    )
    columns: Columns = Field({}, description=COLUMNS)
    prompt_field: str = Field(
        "prompt",
        min_length=1,
        description="Name of the field that holds the prompt, a text or a chat.",
    )
    response_field: str = Field(
        "response",
        min_length=1,
        description="Name of the field that holds the response to the prompt, a text or the assistant's turn.",
    )
    max_tokens: int = Field(
        1024,
        ge=2,
        le=MAX_TOKENS,
        description="Examples longer than this many tokens, prompt and response after the chat template, are handled as "
        "`too_long` says.",
    )
    too_long: Literal["error", "drop"] = Field(
        "error",
        description="What to do with an example over `max_tokens`: stop before any model is loaded, or leave it out and say how "
        "many were.",
    )
    chat_template: bool = Field(
        True,
        description="Render examples through the tokenizer's chat template. False: prompt and response are tokenised as they are.",
    )
    system_prompt: str | None = Field(
        None,
        description="System message put before every example, of which none may have one of its own. None: what the chat template does "
        "by default.",
    )
    template_arguments: TemplateArguments = Field({}, description=TEMPLATE_ARGUMENTS)

    def files(self) -> dict[str, str]:
        """The files that are read, by field."""
        return named_files("examples", self.examples) | named_files("eval_examples", self.eval_examples)


class SftPolicySettings(PolicySettings):
    learning_rate: Rate | dict[Dtype, Rate] = Field(
        1e-5,
        description="Peak learning rate of AdamW. 0 is allowed and must leave the model unchanged. `{bf16: 4e-5, fp32: 2e-5}` gives one "
        "for each `dtype`.",
    )


class TrainingSettings(Section):
    epochs: int = Field(
        1, ge=1, le=10**6, description="Passes over the examples, each in another order given by `run.seed`."
    )
    batch_size: int = Field(
        32,
        ge=1,
        le=10**6,
        description="Examples per optimizer step, over all ranks. The loss is the mean over their learned tokens.",
    )
    eval_every: int = Field(
        0,
        ge=0,
        le=10**9,
        description="Measure the held-out loss every so many optimizer steps, besides before the first and after the last; 0: "
        "only then.",
    )


class SftSettings(Section):
    """Everything a supervised run depends on. Required: `data.examples`, `policy.model`."""

    run: RunSettings = RunSettings()
    data: SftDataSettings
    policy: SftPolicySettings
    training: TrainingSettings = TrainingSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()
    cluster: ClusterSettings = ClusterSettings()


def one_rank(settings: SftSettings) -> SftSettings:
    """The same settings for debug mode: one rank, in this process."""
    return settings.model_copy(update={"policy": settings.policy.model_copy(update={"ranks": 1})})
