"""Full fine-tuning of a reward model: all weights, AdamW. Squared error on ratings, or Bradley-Terry on pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from rlhf.reward.dataset import PreferenceData
from rlhf.reward.losses import bradley_terry
from rlhf.reward.models import EncoderWithHead, RewardModel

WARMUP_STEPS = 20
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
HEAD_LEARNING_RATE = 1e-3  # a new head starts from noise and must move faster than the encoder
BATCHES_PER_SORT = 20


@dataclass(frozen=True)
class FullSettings:
    """How to fine-tune.

    Attributes:
        objective: "squared" needs ratings; rewards are then in rating units.
        margin: ratings further apart than this make a pair ("bradley-terry" on rated data).
        batch_size: texts per optimizer step.
    """

    objective: Literal["squared", "bradley-terry"]
    margin: float
    epochs: int
    learning_rate: float
    batch_size: int
    seed: int


def fine_tune(model: RewardModel, data: PreferenceData, settings: FullSettings) -> float:
    """Train `model` in place; returns the mean loss of the last tenth of the steps. Repeatable by the seed."""
    module, rng = model.module, np.random.default_rng(settings.seed)
    torch.manual_seed(settings.seed)
    ids = model.encode(data.examples)
    groups = _start(model, data, settings)
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    peaks = [group["lr"] for group in optimizer.param_groups]
    plan = [batch for _ in range(settings.epochs) for batch in _batches(data, ids, settings.batch_size, rng)]
    losses: list[float] = []
    module.train()
    for step, batch in enumerate(plan):
        scale = min((step + 1) / WARMUP_STEPS, 1.0) * (1.0 - step / len(plan))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * scale
        rewards = module(**model.batch([ids[i] for i in batch]))
        loss = _loss(rewards, batch, data, settings)
        if loss is None:
            continue
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % max(1, len(plan) // 5) == 0:
            print(f"step {step + 1} of {len(plan)}, loss {np.mean(losses[-20:]):.3f}", flush=True)
    module.eval()
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def _start(model: RewardModel, data: PreferenceData, settings: FullSettings) -> list[dict]:
    """Parameter groups; a new head starts small, at the mean rating."""
    module = model.module
    if not isinstance(module, EncoderWithHead):
        return [{"params": list(module.parameters()), "lr": settings.learning_rate}]
    torch.nn.init.normal_(module.head.weight, std=(module.head.in_features + 1) ** -0.5)
    squared = settings.objective == "squared"
    torch.nn.init.constant_(module.head.bias, float(data.ratings.mean()) if squared else 0.0)
    return [
        {"params": list(module.encoder.parameters()), "lr": settings.learning_rate},
        {"params": list(module.head.parameters()), "lr": HEAD_LEARNING_RATE},
    ]


def _batches(
    data: PreferenceData, ids: list[list[int]], batch_size: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """One epoch of batches of example indices, of like lengths within a batch, in random order. Pairs stay together."""
    if data.ratings is not None:
        units = np.arange(len(ids))[:, None]
    else:
        units = np.arange(len(ids)).reshape(-1, 2)
    units = units[rng.permutation(len(units))]
    per_batch = max(1, batch_size // units.shape[1])
    batches: list[np.ndarray] = []
    for start in range(0, len(units), per_batch * BATCHES_PER_SORT):
        chunk = units[start : start + per_batch * BATCHES_PER_SORT]
        chunk = chunk[np.argsort([max(len(ids[i]) for i in unit) for unit in chunk], kind="stable")]
        batches += [chunk[i : i + per_batch].ravel() for i in range(0, len(chunk), per_batch)]
    return iter([batches[i] for i in rng.permutation(len(batches))])


def _loss(
    rewards: torch.Tensor, batch: np.ndarray, data: PreferenceData, settings: FullSettings
) -> torch.Tensor | None:
    """The batch's loss; None if it has no pair to learn from."""
    if data.ratings is None:
        return bradley_terry(rewards[0::2], rewards[1::2])
    ratings = torch.as_tensor(data.ratings[batch], dtype=rewards.dtype, device=rewards.device)
    if settings.objective == "squared":
        return (rewards - ratings).square().mean()
    winner, loser = torch.nonzero(ratings[:, None] - ratings[None, :] > settings.margin, as_tuple=True)
    return bradley_terry(rewards[winner], rewards[loser]) if len(winner) else None
