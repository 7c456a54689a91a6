"""What `rlhf reward train` measures on held-out rows: a model that scores or compares, on pairs of texts.

Owns how a trained model is asked about pairs (as the server would) and the figures of the report. The statistics are in `calibration`.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from rlhf.reward.models import RewardModel
from rlhf.reward.pairwise import pair_probabilities
from rlhf.reward.pairwise_model import GeneralPreferenceModel
from rlhf.reward.reading import Example, PromptOnly
from rlhf.reward.training.calibration import (
    Bin,
    brier,
    expected_calibration_error,
    length_bias,
    rank_correlation,
    reliability_bins,
)
from rlhf.reward.training.dataset import Pairs, PreferenceData, both_orders


def pair_logits(model: RewardModel, data: PreferenceData, pairs: np.ndarray) -> np.ndarray:
    """How much the model prefers the first of each pair before the temperature, [n_pairs, n_orders].

    A reward difference, or a GPM's score: one order. From a cross-encoder two: the logit in the order (first, second), and minus the logit
    in the other.

    Args:
        pairs: indices of examples, [n_pairs, 2].
    """
    task = model.description.task
    if task == "cross_encoder":
        orders = [text for pair in pairs for text in both_orders(data, *pair)]
        return model.run(model.module, orders).reshape(-1, 2) * [1.0, -1.0]
    if task != "gpm":
        return differences(model.score(data.examples), pairs)
    gpm = GeneralPreferenceModel(model)
    used, places = np.unique(pairs, return_inverse=True)
    outputs = model.run(model.module, [data.examples[i] for i in used])
    prompts = None
    if gpm.gated:
        asked = {data.examples[i].prompt: None for i in pairs[:, 0]}
        number = {prompt: len(outputs) + i for i, prompt in enumerate(asked)}
        outputs = np.concatenate([outputs, model.run(model.module, [PromptOnly(prompt) for prompt in asked])])
        prompts = np.array([number[data.examples[i].prompt] for i in pairs[:, 0]])
    return gpm.scores(outputs, places.reshape(-1, 2), prompts)[:, None]


def probabilities_of(logits: np.ndarray, temperature: float) -> np.ndarray:
    """P(first beats second), the mean over the orders, [n_pairs]."""
    return pair_probabilities(logits, temperature).mean(1)


def measure(model: RewardModel, data: PreferenceData, pairs: Pairs) -> tuple[dict[str, Any], list[Bin]]:
    """Figures on held-out pairs, winner first, and the bins of the reliability diagram.

    Pair accuracy counts ties half. For the calibration every second pair is turned round, so that P is not always of the winner. Where
    the data says how likely the winner is the better one, so that no model can always agree with one rater, `agreement` is with a random
    rater's verdict and `agreement_ceiling` that of a model which always takes the winner.
    """
    outputs = rewards = None
    if model.description.compares:
        logits = pair_logits(model, data, pairs.index)
    else:
        outputs = model.run(model.module, data.examples)
        rewards = model.rewards(outputs)
        logits = differences(rewards, pairs.index)
    probabilities = probabilities_of(logits, model.description.temperature)
    right = (probabilities > 0.5) + 0.5 * (probabilities == 0.5)
    won = np.arange(len(right)) % 2 == 0
    turned = np.where(won, probabilities, 1 - probabilities)
    figures = {
        "pairs": len(right),
        "pair_accuracy": float(right.mean()),
        "ece": expected_calibration_error(turned, won),
        "brier": brier(turned, won),
        "length": _length(model, data, pairs.index, right, rewards),
    }
    if (pairs.probabilities < 1).any():
        p = pairs.probabilities
        figures |= {
            "agreement": float((right * p + (1 - right) * (1 - p)).mean()),
            "agreement_ceiling": float(p.mean()),
            "probability_rms_error": float(np.sqrt(np.mean((probabilities - p) ** 2))),
        }
    if rewards is not None and outputs is not None:
        figures |= {"reward_mean": float(rewards.mean()), "reward_std": float(rewards.std())}
        figures |= _pearsons(model, data, outputs, rewards)
    return figures, reliability_bins(turned, won)


def differences(rewards: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Of the rewards of each pair, [n_pairs, 1]."""
    return (rewards[pairs[:, 0]] - rewards[pairs[:, 1]])[:, None]


def _length(
    model: RewardModel, data: PreferenceData, pairs: np.ndarray, right: np.ndarray, rewards: np.ndarray | None
) -> dict[str, Any]:
    """Whether the model likes length itself, in tokens of the responses."""
    # As they were read: comparisons and lone prompts are made for training only.
    examples = cast(list[Example], data.examples)
    responses = [example.response for example in examples]
    lengths = np.array([len(ids) for ids in model.tokenizer(responses, add_special_tokens=False)["input_ids"]])
    figures: dict[str, Any] = length_bias(right, lengths, pairs)
    if rewards is not None:
        figures["rank_correlation"] = rank_correlation(rewards, lengths)
    if data.ratings is not None:
        known = ~np.isnan(data.overall)
        figures["rank_correlation_of_ratings"] = rank_correlation(data.overall[known], lengths[known])
    return figures


def _pearsons(model: RewardModel, data: PreferenceData, outputs: np.ndarray, rewards: np.ndarray) -> dict[str, Any]:
    """Pearson's r of the rewards with the ratings, and of each objective's output with its own."""
    if data.ratings is None:
        return {}
    figures: dict[str, Any] = {"pearson": _pearson(rewards, data.overall)}
    if model.description.task == "objectives":
        columns = {name: data.ratings[:, data.names.index(name)] for name in model.description.objectives}
        figures["objectives"] = {
            name: {"pearson": _pearson(outputs[:, i], column)} for i, (name, column) in enumerate(columns.items())
        }
    return figures


def _pearson(rewards: np.ndarray, ratings: np.ndarray) -> float | None:
    known = ~np.isnan(ratings)
    a, b = rewards[known], ratings[known]
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() > 0 and b.std() > 0 else None
