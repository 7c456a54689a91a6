"""What a verifier is: the fields that it needs of a prompt's line, and a score for a response.

Knows nothing of processes and deadlines. Each verifier is a module that is imported only where it is used, for each needs
packages of its own.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from rlhf.config.extras import remedy
from rlhf.config.reward import VERIFIERS
from rlhf.reward.errors import RewardError
from rlhf.types import Prompt


class Payload(BaseModel):
    """Fields of a prompt's line. A line may have others, for others."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


Fields = TypeVar("Fields", bound=Payload)


class PayloadError(ValueError):
    """A prompt's line cannot be verified against; the message names the field."""


class Verifier(ABC, Generic[Fields]):
    """Rules for one kind of prompt. The same response gets the same score, whatever came before it.

    Attributes:
        fields: what the prompt's line must have.
        time_limit_s: what one response may take; a response that takes longer is `TimedOut`.
    """

    fields: ClassVar[type[Payload]]
    time_limit_s: ClassVar[float] = 10.0

    def read(self, payload: Mapping[str, Any]) -> Fields:
        """The fields of this prompt's line, checked.

        Raises:
            PayloadError: one is missing, or cannot be used.
        """
        try:
            return cast(Fields, self.fields.model_validate(dict(payload)))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            what = "missing" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ")
            raise PayloadError(f"field `{field}`: {what}" if field else what) from None

    @abstractmethod
    def score(self, prompt: str, response: str, fields: Fields) -> float:
        """The response's score, from 0 (wrong) to 1 (right). What it raises means that the verifier broke.

        Raises:
            PayloadError: the prompt's line is at fault.
        """


_PLACES = {
    "math": ("rlhf.reward.verifiers.mathematics", "MathVerifier"),
    "instructions": ("rlhf.reward.verifiers.instructions", "InstructionsVerifier"),
    "reasoning_gym": ("rlhf.reward.verifiers.reasoning", "ReasoningGymVerifier"),
    "regex": ("rlhf.reward.verifiers.patterns", "RegexVerifier"),
    "code": ("rlhf.reward.verifiers.code", "CodeVerifier"),
}
assert set(_PLACES) == set(VERIFIERS)


def make_verifier(name: str) -> Verifier[Any]:
    """The verifier of this name.

    Raises:
        RewardError: it needs a package that is not installed.
    """
    module, cls = _PLACES[name]
    try:
        return getattr(importlib.import_module(module), cls)()
    except ModuleNotFoundError as error:
        raise RewardError(
            f"the verifier `{name}` needs the package that holds `{error.name}`, which is not installed here. "
            f"{remedy('verifiers')} Do so on every machine with a reward server."
        ) from None


def check_prompts(name: str, prompts: Sequence[Prompt], file: str) -> None:
    """Make sure that every prompt has what the verifier needs.

    Args:
        file: where the prompts come from, for the message.

    Raises:
        RewardError: the first that has not.
    """
    verifier = make_verifier(name)
    for prompt in prompts:
        try:
            verifier.read(prompt.payload)
        except PayloadError as error:
            raise RewardError(
                f"{file}: prompt {prompt.id} (`{prompt.text:.60}`): {error}. The verifier `{name}` (`reward.path`) needs it in "
                "each prompt's line; docs/verifiers.md has its fields"
            ) from None
