"""`algorithm`: which method, and its choices. Each built-in method has fields and defaults of its own.

A method's class lists exactly the fields that change something for it, so a field that belongs to another method is an
unknown key. Defaults are the paper's where it names one; docs/algorithms/ says where they come from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, Union, get_args

from pydantic import Discriminator, Field, Tag

from rlhf.config.base import Section
from rlhf.config.methods.contrast import IpoMd, IterativeDpo, OnlineDpo, OnlineIpo, Raft, Rdpo, Selm, Simpo, Slic, Xpo
from rlhf.config.methods.gradient import (
    Cispo,
    DrGrpo,
    Grpo,
    NashEma,
    NashMd,
    Ppo,
    ReinforcePlusPlus,
    ReinforcePlusPlusBaseline,
    Rloo,
)

OWN = "module:function"
"""The tag of a user's own algorithm among the built-in names."""


class OwnAlgorithm(Section):
    """Your own: a function from these settings to an `Algorithm` (docs/algorithms/own.md)."""

    name: str = Field(pattern=r"^[\w.]+:[\w.]+$", description="Its import path, `module:function`.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Whatever it wants to know: a mapping of your own."
    )


METHODS: dict[str, type[Section]] = {
    get_args(cls.model_fields["name"].annotation)[0]: cls
    for cls in (
        OnlineDpo,
        Rdpo,
        IterativeDpo,
        OnlineIpo,
        IpoMd,
        Selm,
        Xpo,
        Slic,
        Simpo,
        Raft,
        Ppo,
        ReinforcePlusPlus,
        ReinforcePlusPlusBaseline,
        Rloo,
        Grpo,
        DrGrpo,
        Cispo,
        NashMd,
        NashEma,
    )
}
"""Name -> settings of each built-in method."""


def tag(value: Any) -> str | None:
    """Which method's fields a value (a mapping, or settings) is to have; None for an unknown name."""
    name = value.get("name", "online_dpo") if isinstance(value, dict) else getattr(value, "name", None)
    if not isinstance(name, str):
        return None
    return OWN if ":" in name else name if name in METHODS else None


if TYPE_CHECKING:
    AlgorithmSettings: TypeAlias = Any  # which class it is, is known where a method is known
else:
    AlgorithmSettings = Annotated[
        Union[tuple(Annotated[cls, Tag(name)] for name, cls in (METHODS | {OWN: OwnAlgorithm}).items())],  # noqa: UP007 - computed
        Discriminator(tag),
    ]
