"""Which rows and pairs a model can read: what is too long is left out and counted, as a judge could not read it either."""

from __future__ import annotations

import numpy as np

from rlhf.config.reward_training_flags import both
from rlhf.reward.errors import RewardError
from rlhf.reward.models import RewardModel
from rlhf.reward.reading import Tokens
from rlhf.reward.training.dataset import Pairs, PreferenceData, both_orders
from rlhf.types import Failed

LIMIT = both("model.max_tokens")


def readable_rows(model: RewardModel, data: PreferenceData, part: str) -> tuple[PreferenceData, dict[str, int]]:
    """The rows that the model can read as a judge would; how many texts it cannot, and how many prompts lose their beginning.

    Args:
        part: of the data, for messages: "training".

    Raises:
        RewardError: it can read none.
    """
    read = model.encode(data.examples)
    out = np.array([isinstance(one, Failed) for one in read], dtype=bool)
    cut = sum(isinstance(one, Tokens) and one.cut > 0 for one in read)
    limit = model.description.max_tokens
    if out.any():
        print(f"{out.sum()} of {len(read)} {part} texts do not fit into {limit} tokens: left out", flush=True)
    if cut:
        print(
            f"{cut} of {len(read)} {part} texts: the prompt loses its beginning to fit into {limit} tokens", flush=True
        )
    kept = data.rows(np.setdiff1d(data.row, data.row[out]))
    if not kept.n_rows:
        why = next(one.reason for one in read if isinstance(one, Failed))
        raise RewardError(f"none of the {data.n_rows} {part} rows can be read: {why}. Raise {LIMIT}.")
    return kept, {"texts_too_long": int(out.sum()), "prompts_cut": int(cut)}


def readable_pairs(
    model: RewardModel, data: PreferenceData, margin: float, limit: int, rng: np.random.Generator, part: str
) -> Pairs:
    """Pairs of a part of the rows that the model can be asked about.

    Args:
        margin: ratings further apart make a pair.
        limit: most pairs.

    Raises:
        RewardError: there are none.
    """
    pairs = data.drawn_pairs(margin, limit, rng)
    if not len(pairs.index):
        raise RewardError(
            f"{both('data.margin')}: no two ratings of the {data.n_rows} {part} rows are more than {margin} apart. Lower it."
        )
    if model.description.task != "cross_encoder":  # which reads both responses at once
        return pairs
    read = model.encode([both_orders(data, *pair)[0] for pair in pairs.index])
    fitting = pairs.only(np.array([not isinstance(one, Failed) for one in read], dtype=bool))
    if not len(fitting.index):
        raise RewardError(
            f"none of the {len(pairs.index)} {part} pairs fits into the {model.description.max_tokens} tokens that the model reads "
            f"({LIMIT}, or its own): a cross-encoder reads both responses, and must not lose one. Raise it, or choose another "
            f"{both('objective.name')}."
        )
    return fitting
