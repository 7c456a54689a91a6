"""Pairwise preference models: a cross-encoder, which reads two responses, and a general preference model (GPM), which embeds each.

Owns which texts are read for a set of comparisons, and how the model's outputs become probabilities. Does not know that both orders are
asked (`pairwise`), nor of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from rlhf.reward.folders import check_compares, open_folder
from rlhf.reward.models import RewardModel, load
from rlhf.reward.modules import skew_symmetric_score, split_embedding
from rlhf.reward.pairwise import pair_probabilities
from rlhf.reward.reading import Comparison, Conversation, Example, PromptOnly, Text, Tokens

Responses = tuple[str, str]
"""Two responses; the question is whether the first is better."""


@dataclass(frozen=True)
class Reading:
    """What a model reads for some comparisons.

    Attributes:
        ids: token ids of the texts.
        answers: from the model's outputs for these (each a row [width], or a failure in its place), the probability that the first
            response is better, or a failure, for each comparison. NaN where the model broke down.
    """

    ids: list[list[int]]
    answers: Callable[[Sequence[Any]], list[Any]]


class PairwiseModel(Protocol):
    model: RewardModel

    def read(self, prompt: Conversation, comparisons: Sequence[Responses]) -> Reading:
        """What to read for these comparisons of responses to one prompt."""
        ...

    def outputs(self, ids: Sequence[list[int]]) -> np.ndarray:
        """The model's outputs for texts, float64 [n, width]."""
        ...

    def fingerprint(self) -> str:
        """A hash of all weights, 16 hexadecimal digits."""
        ...


class CrossEncoder:
    """A sequence classifier that reads both responses. sigmoid(logit / temperature) is the probability that A is better than B."""

    def __init__(self, model: RewardModel):
        self.model = model

    def read(self, prompt: Conversation, comparisons: Sequence[Responses]) -> Reading:
        if self.model.description.input == "response":
            prompt = ()  # as in training
        read = self.model.encode([Comparison(prompt, *pair) for pair in comparisons])

        def answers(rows: Sequence[Any]) -> list[Any]:
            found = iter(rows)
            return [self._probability(next(found)) if isinstance(one, Tokens) else one for one in read]

        return Reading([one.ids for one in read if isinstance(one, Tokens)], answers)

    def _probability(self, row: Any) -> Any:
        return pair_probabilities(row[0], self.model.description.temperature) if isinstance(row, np.ndarray) else row

    def outputs(self, ids: Sequence[list[int]]) -> np.ndarray:
        return self.model.outputs(ids)

    def fingerprint(self) -> str:
        return self.model.fingerprint()


class GeneralPreferenceModel:
    """An embedding of each response, compared by `skew_symmetric_score`: K responses are read K times, not K (K - 1) times."""

    def __init__(self, model: RewardModel):
        self.model = model

    def read(self, prompt: Conversation, comparisons: Sequence[Responses]) -> Reading:
        texts: dict[Text, int] = {}
        for pair in comparisons:
            for response in pair:
                texts.setdefault(Example(prompt, response), len(texts))
        if self.gated:
            texts[PromptOnly(prompt)] = len(texts)

        read = self.model.encode(list(texts))

        def answers(rows: Sequence[Any]) -> list[Any]:
            found = iter(rows)
            whole = [next(found) if isinstance(one, Tokens) else one for one in read]
            places = [tuple(texts[Example(prompt, response)] for response in pair) for pair in comparisons]
            return [self._answer(whole, *pair) for pair in places]

        return Reading([one.ids for one in read if isinstance(one, Tokens)], answers)

    @property
    def gated(self) -> bool:
        """Whether a prompt's own text weighs the parts of the embedding."""
        return self.model.module.head.out_features > self.model.description.dimensions

    def _answer(self, rows: Sequence[Any], a: int, b: int) -> Any:
        needed = [rows[a], rows[b], *([rows[-1]] if self.gated else [])]
        failed = [row for row in needed if not isinstance(row, np.ndarray)]
        if failed:
            return failed[0]
        score = self.scores(np.stack(needed), np.array([[0, 1]]), np.array([2]) if self.gated else None)[0]
        return pair_probabilities(score, self.model.description.temperature)

    def scores(self, outputs: np.ndarray, pairs: np.ndarray, prompts: np.ndarray | None = None) -> np.ndarray:
        """s(first beats second), [n_pairs], between -1 and 1 (with a gate, times at most k).

        Args:
            outputs: of the model, [n_texts, width].
            pairs: rows of it, [n_pairs, 2].
            prompts: rows of it, [n_pairs]; only with a gate.
        """
        embeddings, gates = split_embedding(torch.from_numpy(outputs), self.model.description.dimensions)
        gate = None if gates is None else gates[prompts]
        return skew_symmetric_score(embeddings[pairs[:, 0]], embeddings[pairs[:, 1]], gate).numpy()

    def outputs(self, ids: Sequence[list[int]]) -> np.ndarray:
        return self.model.outputs(ids)

    def fingerprint(self) -> str:
        return self.model.fingerprint()


def load_pairwise_model(path: str, device: str = "cpu") -> PairwiseModel:
    """The pairwise model in a folder, frozen: what `rlhf reward train` wrote, or a cross-encoder from elsewhere.

    Raises:
        RewardError: no model there, or one that scores single responses.
    """
    folder = open_folder(path)
    check_compares(folder)
    model = load(folder, device)
    return GeneralPreferenceModel(model) if model.description.task == "gpm" else CrossEncoder(model)
