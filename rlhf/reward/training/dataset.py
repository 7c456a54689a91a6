"""What a reward model learns from: texts, and ratings or pairs of them.

Owns how rows are divided into parts, which texts stay together, and what an objective is told of a batch (`Labels`). Knows nothing of
files (`reader`) and of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from rlhf.reward.reading import Comparison, Example, Input, PromptOnly, Text
from rlhf.reward.training.objectives import Labels

MANY = 10_000
"""Of more rated texts than this, the pairs for measuring are drawn, not listed."""


@dataclass(frozen=True)
class Pairs:
    """Preferences that were given as such.

    Attributes:
        index: [n_pairs, 2] indices of examples, the preferred one first.
        margins: [n_pairs] by how much the reward of the first should be higher.
        probabilities: [n_pairs] that the first is better.
    """

    index: np.ndarray
    margins: np.ndarray
    probabilities: np.ndarray

    def only(self, chosen: np.ndarray) -> Pairs:
        """These pairs only: indices, or a mask."""
        return Pairs(self.index[chosen], self.margins[chosen], self.probabilities[chosen])


@dataclass(frozen=True)
class PreferenceData:
    """Preference data: texts with ratings, or pairs of texts. Either `ratings` or `comparisons` is there.

    Attributes:
        examples: all texts.
        row: [n_examples] which row each is from, rising from 0; the texts of a row stay together.
        input: "conversation" if the rows have prompts, else "response".
        ratings: float64 [n_examples, n_names], NaN where a text has no such rating.
        names: of the ratings.
        weights: of the ratings in `overall`.
        comparisons: the pairs.
        group: texts of rated data that make a unit: 1, or more for an objective that compares them.
        apart: ratings of a unit further apart than this make a pair.
        seed: of the grouping.
    """

    examples: list[Text]
    row: np.ndarray
    input: Input
    ratings: np.ndarray | None = None
    names: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    comparisons: Pairs | None = None
    group: int = 1
    apart: float = 0.0
    seed: int = 0

    @property
    def n_rows(self) -> int:
        return int(self.row[-1]) + 1 if len(self.row) else 0

    @property
    def n_prompts(self) -> int:
        """Different prompts; 0 for rows without."""
        return len({example.prompt for example in self.examples} - {()})

    @property
    def rated(self) -> np.ndarray:
        """The ratings of data that has some."""
        assert self.ratings is not None
        return self.ratings

    @property
    def compared(self) -> Pairs:
        """The pairs of data that has some."""
        assert self.comparisons is not None
        return self.comparisons

    @cached_property
    def overall(self) -> np.ndarray:
        """[n_examples], the weighted sum of each text's ratings; NaN where one is missing: no pair is made of that text."""
        return self.rated @ np.array(self.weights)

    def rows(self, chosen: np.ndarray) -> PreferenceData:
        """These rows only, in their order here."""
        kept = np.flatnonzero(np.isin(self.row, chosen))
        place = np.full(len(self.examples), -1)
        place[kept] = np.arange(len(kept))
        comparisons = self.comparisons
        if comparisons is not None:
            mask = place[comparisons.index[:, 0]] >= 0
            comparisons = Pairs(
                place[comparisons.index[mask]], comparisons.margins[mask], comparisons.probabilities[mask]
            )
        return replace(
            self,
            examples=[self.examples[i] for i in kept],
            row=np.unique(self.row[kept], return_inverse=True)[1],
            ratings=None if self.ratings is None else self.ratings[kept],
            comparisons=comparisons,
        )

    def divide(self, fraction: float, rng: np.random.Generator) -> tuple[PreferenceData, PreferenceData]:
        """The rest, and about `fraction` of the rows, at least one each. Rows with the same prompt stay together, unless all have it."""
        first = [self.examples[i] for i in np.unique(self.row, return_index=True)[1]]
        whole_prompts = self.n_prompts > 1
        keys: list[Any] = [example.prompt if whole_prompts else str(i) for i, example in enumerate(first)]
        names = sorted(set(keys))
        count = min(max(1, round(fraction * len(names))), len(names) - 1)
        taken = {names[i] for i in rng.permutation(len(names))[:count]}
        mask = np.array([key in taken for key in keys])
        return self.rows(np.flatnonzero(~mask)), self.rows(np.flatnonzero(mask))

    def pairs(self, margin: float, limit: int, rng: np.random.Generator) -> np.ndarray:
        """[n_pairs, 2] indices of examples, winner first; at most `limit`. From ratings: more than `margin` apart."""
        return self.drawn_pairs(margin, limit, rng).index

    def drawn_pairs(self, margin: float, limit: int, rng: np.random.Generator) -> Pairs:
        """The same with margins and probabilities."""
        found = self.comparisons
        if found is None:
            index = _rated_pairs(self.overall, margin, limit, rng)
            found = Pairs(index, np.zeros(len(index)), np.ones(len(index)))
        if len(found.index) <= limit:
            return found
        return found.only(rng.choice(len(found.index), limit, replace=False))

    def grouped(self, group: int, apart: float, seed: int) -> PreferenceData:
        """For an objective on pairs: rated texts in units of `group`, drawn anew in each epoch. Others stay as they are."""
        return self if self.ratings is None else replace(self, group=group, apart=apart, seed=seed)

    def as_comparisons(self, pairs: Pairs) -> PreferenceData:
        """For a model that reads both responses: each of these pairs in both orders, and a row of its own."""
        examples: list[Text] = [text for pair in pairs.index for text in both_orders(self, *pair)]
        comparisons = replace(pairs, index=np.arange(len(examples)).reshape(-1, 2))
        return PreferenceData(examples, np.repeat(np.arange(len(pairs.index)), 2), self.input, comparisons=comparisons)

    def with_prompts(self) -> PreferenceData:
        """For a model that also reads the prompt alone: it becomes the last text of each row of pairs."""
        ends = np.flatnonzero(np.diff(self.row, append=self.row[-1] + 1)) + 1
        # Before text i stand as many added prompts as there are rows before its own, which is its row's number.
        shifted = self.compared.index + self.row[self.compared.index]
        examples: list[Text] = []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            examples += [*self.examples[start:end], PromptOnly(self.examples[start].prompt)]
        return replace(
            self,
            examples=examples,
            row=np.sort(np.concatenate([self.row, np.arange(self.n_rows)])),
            comparisons=replace(self.compared, index=shifted),
        )

    def units(self, epoch: int = 0) -> list[np.ndarray]:
        """Indices of the examples that must stay together in one micro-batch, [n_texts] each; every example is in one unit.

        Rated texts that are compared come together anew in each epoch.
        """
        if self.ratings is None:
            return np.split(np.arange(len(self.row)), np.flatnonzero(np.diff(self.row)) + 1)
        order = np.arange(len(self.examples))
        if self.group > 1:
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        return [order[i : i + self.group] for i in range(0, len(order), self.group)]

    def labels(self, units: Sequence[np.ndarray]) -> Labels:
        """What is known of a batch made of these units, one after the other."""
        batch = np.concatenate(units)
        position = dict(zip(batch.tolist(), range(len(batch)), strict=True))
        ratings = np.empty((len(batch), 0)) if self.ratings is None else self.ratings[batch]
        prompts: list[int] = []
        if self.ratings is None:
            numbers = np.concatenate([self._pairs_of_rows[self.row[unit[0]]] for unit in units])
            pairs = [(position[a], position[b]) for a, b in self.compared.index[numbers].tolist()]
            margins, probabilities = self.compared.margins[numbers], self.compared.probabilities[numbers]
            if self.examples and isinstance(self.examples[-1], PromptOnly):
                last = {self.row[unit[0]]: position[int(unit[-1])] for unit in units}
                prompts = [last[self.row[i]] for i in self.compared.index[numbers, 0]]
        else:
            pairs = self._pairs_in(units)
            margins, probabilities = np.zeros(len(pairs)), np.ones(len(pairs))
        return Labels(
            ratings=torch.as_tensor(ratings, dtype=torch.float32),
            pairs=torch.as_tensor(pairs, dtype=torch.long).reshape(-1, 2),
            margins=torch.as_tensor(margins, dtype=torch.float32),
            probabilities=torch.as_tensor(probabilities, dtype=torch.float32),
            prompts=torch.as_tensor(prompts, dtype=torch.long),
        )

    @cached_property
    def _pairs_of_rows(self) -> list[np.ndarray]:
        """For each row, the numbers of its pairs."""
        rows = self.row[self.compared.index[:, 0]]
        order = np.argsort(rows, kind="stable")
        return np.split(order, np.searchsorted(rows[order], np.arange(1, self.n_rows)))

    def _pairs_in(self, units: Sequence[np.ndarray]) -> list[tuple[int, int]]:
        """Positions (winner, loser) of the texts of each unit whose ratings are far enough apart."""
        if self.group == 1:
            return []
        pairs: list[tuple[int, int]] = []
        start = 0
        for unit in units:
            rating = self.overall[unit]
            winner, loser = np.nonzero(rating[:, None] - rating[None, :] > self.apart)
            pairs += zip((start + winner).tolist(), (start + loser).tolist(), strict=True)
            start += len(unit)
        return pairs


def both_orders(data: PreferenceData, first: int, second: int) -> tuple[Comparison, Comparison]:
    """What a cross-encoder reads of two examples."""
    a, b = data.examples[first], data.examples[second]
    assert isinstance(a, Example) and isinstance(b, Example)
    return Comparison(a.prompt, a.response, b.response), Comparison(a.prompt, b.response, a.response)


def _rated_pairs(ratings: np.ndarray, margin: float, limit: int, rng: np.random.Generator) -> np.ndarray:
    if len(ratings) <= MANY:
        winner, loser = np.nonzero(ratings[:, None] - ratings[None, :] > margin)
        return np.stack([winner, loser], axis=1)
    drawn = rng.integers(0, len(ratings), (4 * limit, 2))
    return drawn[ratings[drawn[:, 0]] - ratings[drawn[:, 1]] > margin]
