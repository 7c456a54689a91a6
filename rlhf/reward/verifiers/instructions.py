"""`instructions`: which of the prompt's verifiable constraints does the response meet? IFEval's kinds, see `constraints`.

A line of IFEval's own data file can be used as it is: `instruction_id_list` and `kwargs` are its fields.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, ValidationError, model_validator

from rlhf.reward.verifiers.constraints import CHECKS, met, parameters_of
from rlhf.reward.verifiers.verifier import Payload, Verifier


class InstructionsFields(Payload):
    instruction_id_list: list[str] = Field(
        min_length=1, description="IFEval's names of the constraints, such as `punctuation:no_comma`."
    )
    kwargs: list[dict[str, Any]] = Field(
        description="The parameters of each, in the same order; an empty object for none. A parameter that is null does not count."
    )
    strict: bool = Field(
        False, description="False: the share of the constraints that are met. True: 1 if all are met, else 0."
    )
    loose: bool = Field(
        False,
        description="True: a constraint is met if it is met without the first line, the last, both, or all asterisks. It is "
        "how IFEval counts in its loose accuracy.",
    )

    @model_validator(mode="after")
    def _constraints_are_known(self) -> InstructionsFields:
        if len(self.kwargs) != len(self.instruction_id_list):
            raise ValueError(
                f"field `kwargs`: has {len(self.kwargs)} entries, and `instruction_id_list` {len(self.instruction_id_list)}"
            )
        for position, name in enumerate(self.instruction_id_list):
            if name not in CHECKS:
                raise ValueError(
                    f"field `instruction_id_list`: there is no constraint `{name}`. There are {', '.join(CHECKS)}"
                )
            try:
                parameters_of(name).model_validate(given(self.kwargs[position]))
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(str(part) for part in first["loc"])
                raise ValueError(f"field `kwargs.{position}.{place}`: {first['msg']} (for {name})") from None
        return self

    def constraints(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and parameters of each."""
        return zip(self.instruction_id_list, map(given, self.kwargs), strict=True)


class InstructionsVerifier(Verifier[InstructionsFields]):
    """The share of the constraints that the response meets, or 1 for all and 0 otherwise."""

    fields = InstructionsFields

    def score(self, prompt: str, response: str, fields: InstructionsFields) -> float:
        variants = loosened(response) if fields.loose else [response]
        results = [any(met(name, text, kwargs) for text in variants) for name, kwargs in fields.constraints()]
        return float(all(results)) if fields.strict else sum(results) / len(results)


def given(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not null: one of IFEval's files has every parameter in every line."""
    return {name: value for name, value in parameters.items() if value is not None}


def loosened(response: str) -> list[str]:
    """The response as it is, and without what models like to add: a first line, a last line, emphasis."""
    lines = response.split("\n")
    cuts = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cuts, *(cut.replace("*", "") for cut in cuts)]
