"""Settings of `rlhf reward train`: a reward or preference model, fitted to human preferences."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlhf.config.base import MAX_TOKENS, PathText, Section
from rlhf.config.cluster import ClusterSettings
from rlhf.config.data import COLUMNS, Columns

Weight = Annotated[float, Field(ge=-1e6, le=1e6)]


class OutputSettings(Section):
    dir: PathText = Field(
        description="Folder to write: the model in Hugging Face format, its report, and how it was trained. An older reward model there is "
        "replaced once the new one is complete; until then, metrics and checkpoints lie beside it in `DIR.training`.",
    )
    seed: int = Field(
        0, ge=0, le=2**32 - 1, description="Seed of the division into parts, of the drawn pairs and of training."
    )


class PreferenceDataSettings(Section):
    train: PathText = Field(
        description="Preference data: JSON lines, a JSON array, a file that ends in `.parquet`, or `hf:NAME[@CONFIG][:SPLIT]`. "
        "Each row has `text` and `rating` (or `ratings`: names and numbers), or `chosen` and `rejected`, or `responses`, best first; and "
        "perhaps `prompt`.",
    )
    test: PathText | None = Field(
        None,
        description="Held-out rows in the same format, which measure the model. Null: a fifth of the training rows is held out.",
    )
    columns: Columns = Field({}, description=COLUMNS)
    margin: float = Field(
        0.5, ge=0, le=1e9, description="Two texts whose ratings are further apart than this make a pair."
    )
    validation: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Fraction of the training rows that is not learned from, and chooses the regularisation and the temperature.",
    )

    def files(self) -> dict[str, str]:
        """The files that are read, by field."""
        return {"train": self.train} | ({} if self.test is None else {"test": self.test})


class BaseModelSettings(Section):
    path: PathText = Field(
        description="Folder or hub name (`OWNER/NAME`, or `OWNER/NAME@REVISION`) of what is trained: an encoder, a causal language model "
        "or a sequence classifier in Hugging Face format.",
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        le=MAX_TOKENS,
        description="Longest text that is read. Of a longer one the prompt loses its beginning; a longer response is left out. Null: what "
        "the model can read.",
    )
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Of `method: full`: precision of weights and activations. bf16 keeps fp32 master weights in the optimizer.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Of `method: full`: recompute activations in the backward pass: slower, far less memory.",
    )


class ObjectiveSettings(Section):
    name: Literal["auto", "squared", "bradley-terry", "ordinal", "gpm", "cross-encoder", "more"] = Field(
        "auto",
        description="Loss of `method: full`. auto: `squared` for ratings, `more` for several ratings, `bradley-terry` for pairs and for a "
        "base that is a classifier already.",
    )
    centring: float | None = Field(
        None,
        ge=0,
        le=1e6,
        description="Of `bradley-terry`: adds `centring` (r_chosen + r_rejected)^2, such as 0.01, which keeps rewards about 0 (TRL's "
        "`center_rewards_coefficient`). Null: nothing.",
    )
    dimensions: int | None = Field(
        None, ge=2, le=65_536, description="Of `gpm`: of the embedding, an even number. Null: 6."
    )
    gate: bool = Field(
        False, description="Of `gpm`: the prompt weighs the planes of the embedding; for pairs with a `prompt`."
    )
    comparisons: int | None = Field(
        None,
        ge=1,
        le=2**31 - 1,
        description="Of `cross-encoder`: most pairs that are drawn to learn from. Null: two for each row.",
    )
    weights: dict[str, Weight] | None = Field(
        None,
        description="Of `more`: the factor of each rating in the reward, such as {helpful: 0.7, brief: 0.3}. Null: their mean.",
    )


class FitSettings(Section):
    method: Literal["ridge", "logistic", "full"] = Field(
        "ridge",
        description="What is trained. `ridge` (ratings) and `logistic` (pairs, or ratings more than `data.margin` apart): a linear head on "
        "a frozen encoder. `full`: all weights, with an `objective`; the fields below are about it.",
    )
    epochs: int = Field(1, ge=1, le=10**6, description="Passes over the rows.")
    batch_size: int = Field(32, ge=1, le=10**6, description="Texts per optimizer step, over all ranks.")
    learning_rate: float = Field(
        2e-4,
        gt=0,
        le=100,
        description="Peak learning rate of AdamW, from which it falls to 0. A large model wants 1e-5.",
    )
    head_learning_rate: float = Field(
        1e-3,
        gt=0,
        le=100,
        description="The same of a new head, which starts from noise and must move faster than the rest.",
    )
    warmup_steps: int = Field(
        20,
        ge=0,
        le=10**9,
        description="Optimizer steps over which the learning rate rises from 0, at most all there are.",
    )
    weight_decay: float = Field(0.01, ge=0, le=10, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(1.0, ge=1e-9, le=1e9, description="Global gradient norm is clipped to this.")
    micro_batch_tokens: int = Field(
        8192,
        ge=1,
        le=2**30,
        description="Token budget of one forward and backward on one rank. Memory grows with it; results do not depend on it.",
    )
    eval_every: int = Field(
        0,
        ge=0,
        le=10**9,
        description="Measure the loss on the validation rows every so many optimizer steps, besides before the first and after the last; "
        "0: not at all.",
    )
    ranks: int = Field(
        1, ge=1, le=16384, description="DeepSpeed ranks, one per device. One runs in this process, more are Ray actors."
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0,
        description="ZeRO stage, what the ranks share out: 0 nothing, 1 optimizer states, 2 also gradients, 3 also weights.",
    )


class TrainingCheckpointSettings(Section):
    every: int = Field(
        0,
        ge=0,
        le=10**9,
        description="Write a DeepSpeed checkpoint every so many optimizer steps of `method: full`, of which the last one is kept; 0: "
        "none. `--resume` continues from it.",
    )


class RewardTrainingSettings(Section):
    """Everything a reward model's training depends on. Required: `run.dir`, `data.train`, `model.path`."""

    run: OutputSettings
    data: PreferenceDataSettings
    model: BaseModelSettings
    training: FitSettings = FitSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    checkpoint: TrainingCheckpointSettings = TrainingCheckpointSettings()
    cluster: ClusterSettings = ClusterSettings()
