"""The folder of a reward or preference model, opened without its weights: what it is, how it reads, and whether all of it is there.

Owns the folder format that `rlhf reward train` writes: the model in Hugging Face format, `reward_head.safetensors` if it is an
encoder (weight and bias of the head, with the normalisation of its features folded in) and `reward_model.json` (how it reads
text, and what its outputs mean). The dry run opens folders by the same code as the servers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from rlhf.config.reward import SourceSettings
from rlhf.data.architecture import architecture_of, check_folder
from rlhf.data.errors import in_a_line
from rlhf.data.model_folder import read_config, read_object, read_tokenizer
from rlhf.data.rendering import check_template
from rlhf.data.weight_files import read_header
from rlhf.reward.errors import RewardError
from rlhf.reward.modules import Pooling
from rlhf.reward.reading import Conversation, Example, Input, Reader
from rlhf.types import Failed

Task = Literal["reward", "objectives", "gpm", "cross_encoder"]

DESCRIPTION = "reward_model.json"
HEAD = "reward_head.safetensors"
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
"""Fields of a configuration that say how many tokens a model reads."""
NO_LIMIT = 2**30


@dataclass(frozen=True)
class Description:
    """What `reward_model.json` says.

    Attributes:
        kind: "encoder_with_head", or "classifier" (transformers sequence classification).
        input: what it was trained to read; None for a classifier from elsewhere.
        max_tokens: a longer text loses the beginning of its prompt; a longer response cannot be judged.
        layers: hidden states that are pooled and concatenated, 0 being the embeddings; empty for a classifier.
        pooling: mean over the tokens, or the last token.
        temperature: P(a beats b) = sigmoid((r_a - r_b) / temperature); of a GPM sigmoid(s_ab / temperature), of a cross-encoder
            sigmoid(logit / temperature).
        task: what the outputs are: a reward; a reward for each objective; a GPM's embedding (and gate); a cross-encoder's logit
            that response A is better than B.
        objectives: their names.
        weights: the reward is the objectives' sum with these.
        thresholds: of ordinal ratings: P(level > k) = sigmoid(reward - thresholds[k]).
        levels: the ordinal ratings.
        dimensions: of a GPM's embedding; further outputs are the gate's.
    """

    kind: Literal["encoder_with_head", "classifier"]
    input: Input | None
    max_tokens: int
    layers: tuple[int, ...] = ()
    pooling: Pooling = "mean"
    temperature: float = 1.0
    task: Task = "reward"
    objectives: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    thresholds: tuple[float, ...] = ()
    levels: tuple[float, ...] = ()
    dimensions: int = 0

    @property
    def compares(self) -> bool:
        """It says which of two responses is better; otherwise it gives each a reward."""
        return self.task in ("gpm", "cross_encoder")


@dataclass(frozen=True)
class Folder:
    """A model before its weights are loaded.

    Attributes:
        where: what the folder was given for, at the head of messages: "`reward.path`".
        model: transformers' class for it.
    """

    path: Path
    where: str
    config: Any
    tokenizer: Any
    description: Description
    model: Any

    @property
    def log_odds(self) -> bool:
        """Whether a classifier's output is the log-odds of its second label."""
        return self.description.task not in ("objectives", "gpm") and self.config.num_labels == 2


def open_folder(path: str, where: str = "`reward.path`") -> Folder:
    """Open what is there, and compare the weight files' headers with the architecture.

    Raises:
        RewardError: no model there, or one that gives no reward, or has code of its own.
        WeightsError: tensors are missing, of another shape, or not part of the model.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    folder = Path(path)
    config, tokenizer = read_base(folder, where)
    if (folder / DESCRIPTION).exists():
        description = _read_description(folder / DESCRIPTION, config, where)
    else:
        description = Description("classifier", None, own_length(config, tokenizer))
    if description.kind == "encoder_with_head":
        model = architecture_of(AutoModel, config)
    else:
        if not is_classifier(config):
            raise RewardError(
                f"{where}: {folder} holds a {'/'.join(config.architectures or ['model without an architecture'])}, which gives no reward "
                "here. Name a sequence classifier of transformers, or train a reward model on top of it with `rlhf reward train`."
            )
        if description.task not in ("objectives", "gpm") and config.num_labels > 2:
            raise RewardError(
                f"{where}: {folder} is a classifier with {config.num_labels} labels; a reward needs one label, or two."
            )
        model = architecture_of(AutoModelForSequenceClassification, config)
    assert model is not None
    check_folder(folder, model, config, where)
    if description.kind == "encoder_with_head":
        if not (folder / HEAD).is_file():
            raise RewardError(
                f"{where}: there is no {HEAD} in {folder}. Copy the whole folder that `rlhf reward train` wrote."
            )
        read_header(folder / HEAD, where)
    return Folder(folder, where, config, tokenizer, description, model)


def check_scores(folder: Folder, what: Input | None = None) -> None:
    """Raises RewardError unless it scores single responses, and was trained to read `what` (None: whatever it was trained on)."""
    description = folder.description
    if description.compares:
        raise RewardError(
            f"{folder.where}: {folder.path} holds a model that compares two responses ({description.task}) and gives no reward. Set "
            "`reward.kind: pairwise_model`, or name another folder."
        )
    if None not in (what, description.input) and description.input != what:
        raise RewardError(
            f"`reward.input` is {what}, but the reward model {folder.path} was trained on the {description.input}. Set `reward.input: "
            f"{description.input}`."
        )


def check_compares(folder: Folder) -> None:
    """Raises RewardError unless it compares two responses: a GPM, or a cross-encoder from here or elsewhere."""
    description = folder.description
    labels = folder.config.num_labels if description.kind == "classifier" else 0
    if not description.compares and (description.input is not None or labels != 1):
        what = f"a classifier with {labels} labels" if labels > 1 else "a reward model, which scores one response"
        raise RewardError(
            f"{folder.where}: {folder.path} holds {what}. A pairwise model is a general preference model or a cross-encoder, a sequence "
            "classifier with one label that reads two responses (docs/reward_models.md). Set `reward.kind: model`, or name another "
            "folder in `reward.path`."
        )


def check_reward_model(source: SourceSettings, path: str, where: str, conversations: Iterable[Conversation]) -> None:
    """What a server would refuse, found out without weights; and whether the model's template takes the prompts.

    Args:
        path: the folder that `source` names.
        where: the field that names it, at the head of messages: "`reward.path`".
        conversations: the prompts.

    Raises:
        UserError: the model cannot judge.
    """
    folder = open_folder(path, where)
    if source.compares:
        check_compares(folder)
    else:
        check_scores(folder, source.input)
    what = folder.description.input or source.input
    reader = Reader(folder.tokenizer, what, NO_LIMIT, folder.config.get_text_config().vocab_size)
    if what == "conversation":
        check_template(folder.tokenizer, where)
    kinds = {tuple(turn.role for turn in conversation): conversation for conversation in conversations}
    for conversation in kinds.values():
        (found,) = reader.read([Example(conversation, "Yes.")])
        if isinstance(found, Failed):
            raise RewardError(
                f"{where}: {found.reason}. Give prompts (or `data.system_prompt`) that it takes, or another reward model."
            )


def read_base(folder: Path, where: str = "`reward.path`") -> tuple[Any, Any]:
    """Configuration and tokenizer of a model folder.

    Raises:
        FolderError: not a folder with a model in Hugging Face format, or one that transformers alone cannot run.
        RewardError: its tokenizer is another model's.
    """
    config, tokenizer = read_config(folder, where), read_tokenizer(folder, where)
    _check_tokens(folder, config, tokenizer, where)
    return config, tokenizer


def _check_tokens(folder: Path, config: Any, tokenizer: Any, where: str) -> None:
    """Raises RewardError for a special token that the embedding has no row for."""
    rows = config.get_text_config().vocab_size
    special = {name: getattr(tokenizer, f"{name}_id") for name in ("bos_token", "eos_token", "pad_token", "cls_token")}
    special["pad_token_id of config.json"] = config.get_text_config().pad_token_id
    for name, token in special.items():
        if token is not None and not -rows <= token < rows:
            raise RewardError(
                f"{where}: the {name} of {folder} is {token}, and the model knows the tokens 0 to {rows - 1}. The tokenizer is of another "
                "model, or was enlarged without it: correct tokenizer and config.json, or name another folder."
            )


def is_classifier(config: Any) -> bool:
    """Whether the folder's model is the sequence classifier of transformers for its type. A missing head would be made up at random."""
    from transformers import AutoModelForSequenceClassification

    known = architecture_of(AutoModelForSequenceClassification, config)
    return known is not None and known.__name__ in (config.architectures or ())


def own_length(config: Any, tokenizer: Any, wanted: int | None = None) -> int:
    """Tokens that a model reads, by its configuration and its tokenizer; `wanted` if that is less."""
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in LENGTHS] + [tokenizer.model_max_length, wanted]
    return int(min([NO_LIMIT, *(number for number in found if number is not None and number > 0)]))


def _read_description(path: Path, config: Any, where: str) -> Description:
    stored = read_object(path, where)
    try:
        found = TypeAdapter(Description).validate_python(stored)
        Description(**stored)  # a field that there is not
        wrong = _objection(found, config)
    except ValidationError as error:
        first = error.errors()[0]
        wrong = f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}"
    except TypeError as error:
        wrong = in_a_line(error)
    if wrong is not None:
        raise RewardError(
            f"{where}: {path} is not what `rlhf reward train` writes: {wrong}. Copy the whole folder again, or train the model again"
        )
    return found


def _objection(found: Description, config: Any) -> str | None:
    """What cannot be of a description whose fields have the right types; None if nothing is wrong."""
    numbers = (found.temperature, *found.weights, *found.thresholds, *found.levels)
    depth = config.get_text_config().num_hidden_layers
    if not all(map(math.isfinite, numbers)):
        return "a number is not finite"
    if found.max_tokens < 1 or found.temperature <= 0:
        return f"`max_tokens: {found.max_tokens}`, `temperature: {found.temperature}`, which must be above 0"
    if found.kind == "encoder_with_head" and not found.layers:
        return "`layers` is empty"
    if any(not 0 <= layer <= depth for layer in found.layers):
        return f"`layers: {list(found.layers)}`, but the encoder has {depth}"
    if len(found.objectives) != len(found.weights) or (found.task == "objectives" and not found.objectives):
        return f"{len(found.objectives)} `objectives` with {len(found.weights)} `weights`"
    if found.levels and len(found.thresholds) != len(found.levels) - 1:
        return f"{len(found.levels)} `levels` with {len(found.thresholds)} `thresholds`"
    if found.task == "gpm" and found.dimensions < 1:
        return f"`dimensions: {found.dimensions}`"
    return None
