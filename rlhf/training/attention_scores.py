"""What a layer of a model demands of attention, for all its forms: those for a CPU (`attention`) and a GPU (`gpu_attention`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scores:
    """What a layer does with the products of its queries and keys.

    Attributes:
        scale: they are multiplied with it.
        causal: whether a query sees no later key; in an encoder it sees all of its text.
        window: a query sees only keys fewer than this many tokens back; None: all.
        softcap: scores s become softcap * tanh(s / softcap); None: they stay.
    """

    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
