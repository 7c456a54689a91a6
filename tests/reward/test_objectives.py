"""Objectives: known values through the production classes, invariance to how a batch is cut, and what each head learns from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf.reward.modules import split_embedding
from rlhf.reward.reading import Comparison, Example
from rlhf.reward.training.dataset import Pairs, PreferenceData
from rlhf.reward.training.objectives import (
    BradleyTerry,
    CrossEncoder,
    GeneralPreference,
    Labels,
    MultiObjective,
    Ordinal,
    Squared,
)


def labels(pairs=(), ratings=None, margins=None, probabilities=None, prompts=()) -> Labels:
    n = len(pairs)
    return Labels(
        ratings=torch.empty(0, 0) if ratings is None else torch.tensor(ratings, dtype=torch.float32),
        pairs=torch.tensor(pairs, dtype=torch.long).reshape(-1, 2),
        margins=torch.tensor(margins or [0.0] * n),
        probabilities=torch.tensor(probabilities or [1.0] * n),
        prompts=torch.tensor(prompts, dtype=torch.long),
    )


@pytest.mark.parametrize(
    ("centring", "margins", "expected"), [(0, None, 0.313262), (0, [0.5], 0.474077), (0.01, None, 0.323262)]
)
def test_bradley_terry(centring, margins, expected):
    total, count = BradleyTerry(centring).loss(torch.tensor([[0.0], [1.0]]), labels([(1, 0)], margins=margins))
    assert total.item() == pytest.approx(expected, abs=1e-6) and count == 1


def test_squared():
    total, count = Squared().loss(torch.tensor([[1.0], [3.0]]), labels(ratings=[[2.0], [-1.0]]))
    assert (total.item(), count) == (17, 2)


def test_a_gpm_brings_embeddings_to_unit_norm():
    """Quarter turns: the score is the sine of the angle, whatever the lengths; the loss is -log sigmoid(s / .1)."""
    outputs = torch.tensor([[3.0, 0.0], [0.0, 0.2], [5.0, 5.0]])
    total, count = GeneralPreference(2).loss(outputs, labels([(0, 1), (0, 2), (1, 0)]))
    scores = [1.0, math.sqrt(0.5), -1.0]
    assert total.item() == pytest.approx(sum(math.log1p(math.exp(-s / 0.1)) for s in scores), rel=1e-5) and count == 3


def test_a_gate_weighs_the_planes_by_the_prompt():
    """Of two planes that contradict each other, a prompt's row decides which one counts; the weights add up to k."""
    v, w = [1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, -1.0]
    rows = [[*v, 9, 9], [*w, 9, 9], [0, 0, 0, 0, 40, 0], [0, 0, 0, 0, 0, 40]]
    outputs = torch.tensor(rows)
    _, gates = split_embedding(outputs, 4)
    assert gates[2:].sum(1).tolist() == pytest.approx([2, 2])
    objective = GeneralPreference(4, gate=True)
    assert objective.outputs == 6
    first = objective.loss(outputs, labels([(0, 1)], prompts=[2]))[0].item()
    second = objective.loss(outputs, labels([(0, 1)], prompts=[3]))[0].item()
    # |v|^2 = 2, so s = 2 * 1 / 2 in the plane that counts.
    assert first == pytest.approx(math.log1p(math.exp(-10)), rel=1e-4)
    assert second == pytest.approx(10 + math.log1p(math.exp(-10)), rel=1e-5)


def test_a_cross_encoder_learns_from_both_orders():
    """The logits of (a, b) and (b, a) pull apart; a bias for the first place is pushed to 0."""
    outputs = torch.tensor([[0.7], [0.7]], requires_grad=True)
    total, count = CrossEncoder().loss(outputs, labels([(0, 1)], probabilities=[0.8]))

    def surprise(p: float, z: float) -> float:
        return -p * math.log(1 / (1 + math.exp(-z))) - (1 - p) * math.log(1 / (1 + math.exp(z)))

    assert total.item() == pytest.approx((surprise(0.8, 0.7) + surprise(0.2, 0.7)) / 2, rel=1e-5) and count == 1
    total.backward()
    assert outputs.grad.sum() > 0 and outputs.grad[0] < outputs.grad[1]


def test_ordinal_reads_levels():
    """Ratings 1, 2 and 4 are three levels; at z = (1, -1) the middle one has sigmoid(1) - sigmoid(-1)."""
    objective = Ordinal((1.0, 2.0, 4.0))
    total, count = objective.loss(torch.tensor([[1.0, -1.0]]), labels(ratings=[[2.0]]))
    assert math.exp(-total.item()) == pytest.approx(1 / (1 + math.exp(-1)) - 1 / (1 + math.exp(1)), rel=1e-5)
    assert (objective.outputs, count) == (2, 1)


def test_missing_ratings_teach_nothing():
    objective = MultiObjective(2)
    outputs = torch.tensor([[1.0, 5.0], [1.0, 5.0]], requires_grad=True)
    total, count = objective.loss(outputs, labels(ratings=[[0.0, math.nan], [3.0, 4.0]]))
    total.backward()
    assert (total.item(), count) == (1 + 4 + 1, 2)
    assert outputs.grad.tolist() == [[2, 0], [-4, 2]]


def test_more_weighs_objectives_by_their_unit_gradients():
    """Opposed heads of different size share equally, after unit norm; a head between two others gets the floor."""
    objective = MultiObjective(3)
    objective.observe(torch.tensor([[5.0, 0.0], [0.0, 0.1], [1.0, 1.0]]))
    floor = MultiObjective.FLOOR
    assert objective.weights.tolist() == pytest.approx([1.5 * (1 - floor) + floor] * 2 + [floor], abs=1e-3)
    assert objective.weights.sum().item() == pytest.approx(3)


@pytest.mark.parametrize("apart", [1.0, 1e-3, 1e-4, 1e-5])
def test_more_weighs_two_objectives_equally_whatever_their_gradients(apart: float):
    """So rounding cannot sacrifice one of two heads whose gradients are nearly parallel."""
    objective = MultiObjective(2)
    for seed in range(20):
        first, change = torch.randn(2, 16, generator=torch.Generator().manual_seed(seed))
        objective.observe(torch.stack([3 * first, first + apart * change]) * objective.weights[:, None])
        assert objective.weights.tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


def test_more_undoes_its_own_weights_and_remembers_them():
    """A gradient that comes weighted gives the same weights as the unweighted one; so does a restored objective."""
    gradient = torch.tensor([[2.0, 1.0], [0.5, -1.0], [1.0, 0.3]])
    objective, other = MultiObjective(3), MultiObjective(3)
    objective.observe(gradient)
    first = objective.weights
    assert first.tolist() != pytest.approx([1.0] * 3, abs=0.1)
    other.load_state_dict(objective.state_dict())
    for each in (objective, other):
        each.observe(gradient * first[:, None])
        assert each.weights.tolist() == pytest.approx(first.tolist(), rel=1e-5)


def test_the_momentum_is_that_of_the_paper():
    """g = .01 g_old + .99 g: a gradient of the old step counts a hundredth."""
    objective = MultiObjective(2)
    objective.observe(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    weights = objective.weights
    objective.observe(torch.tensor([[0.0, 1.0], [0.0, 1.0]]) * weights[:, None])
    assert objective.state_dict()["gradient"].tolist() == pytest.approx(np.array([[0.01, 0.99], [0.0, 1.0]]), abs=1e-5)


def data_for(name: str) -> tuple[PreferenceData, torch.Tensor]:
    rng = np.random.default_rng(0)
    n = 24
    examples = [Example((), str(i)) for i in range(n)]
    width = {"more": 2, "gpm": 4, "ordinal": 2}.get(name, 1)
    outputs = torch.tensor(rng.normal(size=(n, width)), dtype=torch.float32)
    if name == "ordinal":
        outputs = outputs.sort(1, descending=True).values
    if name in ("squared", "ordinal", "grouped", "more"):
        ratings = rng.integers(0, 3, (n, 2 if name == "more" else 1)).astype(float)
        names = ("a", "b")[: ratings.shape[1]]
        data = PreferenceData(examples, np.arange(n), "response", ratings, names, (1 / len(names),) * len(names))
        return (data.grouped(6, 0.5, 1) if name == "grouped" else data), outputs
    pairs = Pairs(np.arange(n).reshape(-1, 2), rng.random(n // 2), rng.random(n // 2))
    if name == "cross-encoder":
        examples = [Comparison((), str(i), str(j)) for i, j in zip(range(n), range(n), strict=True)]
    return PreferenceData(examples, np.repeat(np.arange(n // 2), 2), "response", comparisons=pairs), outputs


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("squared", Squared()),
        ("grouped", BradleyTerry(0.01)),
        ("bradley-terry", BradleyTerry(0.01)),
        ("gpm", GeneralPreference(4)),
        ("cross-encoder", CrossEncoder()),
        ("ordinal", Ordinal((0.0, 1.0, 2.0))),
        ("more", MultiObjective(2)),
    ],
)
def test_cutting_or_shuffling_a_batch_changes_nothing(name, objective):
    """One batch = many micro-batches = another order of the units, in sum and count."""
    data, outputs = data_for(name)
    units = data.units(epoch=3)

    def loss(batch: list[np.ndarray]) -> tuple[float, float]:
        total, count = objective.loss(outputs[np.concatenate(batch)], data.labels(batch))
        return total.item(), count

    whole = loss(units)
    assert whole[1] > 0
    parts = [loss([unit]) for unit in units]
    assert sum(total for total, _ in parts) == pytest.approx(whole[0], rel=1e-5)
    assert sum(count for _, count in parts) == whole[1]
    assert loss(units[::-1]) == pytest.approx(whole, rel=1e-5)
