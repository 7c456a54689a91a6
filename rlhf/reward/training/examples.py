"""Preference data as the supervised group's `Examples`: which texts make a micro-batch, and over how much its loss is a sum."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from rlhf.reward.training.dataset import PreferenceData
from rlhf.reward.training.objectives import Labels, Objective
from rlhf.training.supervised import Batch


class Texts(NamedTuple):
    """A micro-batch: token ids of its texts, and what is known of them."""

    ids: list[list[int]]
    labels: Labels


class Preferences:
    """Preference data as `Examples`: a unit are texts that must stay together, a loss is a sum over texts or pairs."""

    def __init__(self, data: PreferenceData, ids: list[list[int]], objective: Objective):
        self._data, self._ids, self._objective = data, ids, objective

    def units(self, epoch: int) -> list[np.ndarray]:
        return self._data.units(epoch)

    def cost(self, unit: np.ndarray) -> int:
        return sum(max(1, len(self._ids[i])) for i in unit)

    def batch(self, units: Sequence[np.ndarray]) -> Batch:
        labels = self._data.labels(units)
        ids = [self._ids[i] for unit in units for i in unit]
        # How many things are summed does not depend on what the model says of them.
        _, count = self._objective.loss(torch.zeros(len(ids), self._objective.outputs), labels)
        return Batch(Texts(ids, labels), count)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell these data, for this objective, from others."""
        digest = hashlib.sha256(type(self._objective).__name__.encode())
        for ids in self._ids:
            digest.update(np.array([len(ids), *ids], dtype=np.int64).tobytes())
        labels = self._data.labels(self._data.units(0))
        for tensor in (labels.ratings, labels.pairs, labels.margins, labels.probabilities):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]
