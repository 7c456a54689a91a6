"""A pairwise preference model: a transformers sequence classifier that reads a prompt and two responses.

Owns the text that the model reads and what its one logit means. Does not know that both orders are asked (`pairwise`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlhf.reward.errors import RewardError
from rlhf.reward.models import Classifier, RewardModel, load_model
from rlhf.types import Failed

TEXT = "{prompt}\n\nResponse A:\n{a}\n\nResponse B:\n{b}"


class PairwiseModel:
    """The classifier with its tokenizer. sigmoid(logit) is the probability that response A is better than B."""

    def __init__(self, model: RewardModel):
        self._model = model

    def encode(self, prompt: str, a: str, b: str) -> list[int] | Failed:
        """Token ids of a comparison. A text that the model cannot read whole is a failure: cut short, it would lose response B."""
        text = TEXT.format(prompt=prompt, a=a, b=b)
        ids = self._model.tokenizer(text)["input_ids"]
        limit = self._model.description.max_tokens
        if len(ids) > limit:
            return Failed(f"prompt and both responses are {len(ids)} tokens, and the pairwise model reads {limit}")
        return ids

    def probabilities(self, ids: Sequence[list[int]]) -> np.ndarray:
        """Probability that A is better in each comparison, float64 [n]; NaN where the model broke down."""
        logits = self._model.run_tokens(self._model.module, ids)
        return 0.5 * (1 + np.tanh(logits / 2))  # the logistic function, without overflow

    def fingerprint(self) -> str:
        """A hash of all weights, 16 hexadecimal digits."""
        return self._model.fingerprint()


def load_pairwise_model(path: str, device: str = "cpu") -> PairwiseModel:
    """The pairwise model in a folder, frozen.

    Raises:
        RewardError: no model there, or one that scores single responses.
    """
    model = load_model(path, device)
    labels = model.module.model.config.num_labels if isinstance(model.module, Classifier) else 0
    if model.description.input is not None or labels != 1:
        what = f"a classifier with {labels} labels" if labels > 1 else "a reward model, which scores one response"
        raise RewardError(
            f"{Path(path)} holds {what}. A pairwise model is a sequence classifier with one label, trained to compare two "
            "responses (docs/reward.md). Set `reward.kind: model`, or name another folder in `reward.path`."
        )
    return PairwiseModel(model)
