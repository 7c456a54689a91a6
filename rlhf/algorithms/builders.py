"""Builders: from judged completions to training items. Pure; the only randomness is the generator passed in.

A builder returns items, or `Dropped` with the reason why nothing is learned from this prompt. What holds for every pair: its responses have
different token ids, both have a verdict, and under hard labels it is not a tie (a tie carries no preference). The loss is divided
by the number of prompts with items, so a prompt's pairs together weigh 1, however many they are.

Items of further terms (a bonus, a likelihood) only ever join a pair. A prompt without one is dropped whole: such an item alone would
count as a prompt in the loss's mean and so dilute the preferences, and with its factor at 0 the method would no longer be plain DPO.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Literal

from rlhf.algorithms.labels import Labels, identical, lead, scored
from rlhf.types import Feedback, Rollout, TrainingItem


@dataclass(frozen=True)
class Dropped:
    """This prompt gives no training item.

    Attributes:
        reason: counted as dropped/REASON. A user's builder may have reasons of its own.
        detail: more of it, for a person.
    """

    reason: str
    detail: str = ""


Items = tuple[TrainingItem, ...]
Pairs = Callable[[Rollout, Feedback, random.Random], "Items | Dropped"]


def pairs_of(pairing: Literal["best_vs_worst", "random", "all"], labels: Labels) -> Pairs:
    """The builder of judged pairs that a configuration's `pairing` names."""
    builders = {"best_vs_worst": best_vs_worst, "random": random_pair, "all": all_pairs}
    return partial(builders[pairing], labels=labels)


def best_vs_worst(rollout: Rollout, feedback: Feedback, rng: random.Random, labels: Labels) -> Items | Dropped:
    """One pair: the highest score against the lowest, the lower index first.

    From pairwise judges a score is a mean probability of beating the others. It ranks the two, and under hard labels it decides the
    winner as well, even if the two compared directly would come out the other way round (preferences may be cyclic); soft and
    sampled labels take the direct comparison's probability. If all scores are equal, hard labels have nothing to say; the others make
    a pair of the first response and one that differs from it, whose target of 1/2 holds the policy where it is.
    """
    scores = scored(feedback)
    if len(scores) < 2:
        return Dropped("too_few_scores")
    best, worst = max(scores, key=lambda s: s[1]), min(scores, key=lambda s: s[1])
    if best[1] == worst[1]:
        if labels.kind == "hard":
            return Dropped("tie")
        worst = next((other for other in scores[1:] if not identical(rollout, best[0], other[0])), scores[1])
    ahead = best[1] - worst[1] if labels.kind == "hard" else lead(feedback, best[0], worst[0])
    return _one(_pair(rollout, feedback, best[0], worst[0], ahead, labels, rng))


def random_pair(rollout: Rollout, feedback: Feedback, rng: random.Random, labels: Labels) -> Items | Dropped:
    """Two of the responses whose comparison has a verdict, drawn at random."""
    judged = _compared(feedback)
    if not judged:
        return Dropped("too_few_scores")
    i, j = rng.choice(judged)
    return _one(_pair(rollout, feedback, i, j, lead(feedback, i, j), labels, rng))


def all_pairs(rollout: Rollout, feedback: Feedback, rng: random.Random, labels: Labels) -> Items | Dropped:
    """Every two responses, the pairs kept sharing the prompt's weight of 1 equally.

    If none is kept, the reason is that of the first pair.
    """
    made = [_pair(rollout, feedback, i, j, lead(feedback, i, j), labels, rng) for i, j in _compared(feedback)]
    kept = [one for one in made if not isinstance(one, Dropped)]
    if not kept:
        return next((one for one in made if isinstance(one, Dropped)), Dropped("too_few_scores"))
    return tuple(TrainingItem(one.members, one.coefficients, one.target, 1.0 / len(kept)) for one in kept)


def source_pair(
    rollout: Rollout, feedback: Feedback, rng: random.Random, labels: Labels, sources: tuple[str, str]
) -> Items | Dropped:
    """One pair: the response of one source against that of another (XPO: policy against reference), whichever is better."""
    i, j = (_written_by(rollout, source) for source in sources)
    return _one(_pair(rollout, feedback, i, j, lead(feedback, i, j), labels, rng))


def dataset_pair(rollout: Rollout, feedback: Feedback, rng: random.Random, smoothing: float) -> Items | Dropped:
    """The data set's chosen against its rejected response; the data set is the judge, so `feedback` is not read.

    Args:
        smoothing: assumed probability that the data set's label is flipped.
    """
    i, j = _written_by(rollout, "chosen"), _written_by(rollout, "rejected")
    if identical(rollout, i, j):
        return Dropped("identical")
    return (TrainingItem((i, j), (1.0, -1.0), 1.0 - smoothing),)


def against_opponent(
    rollout: Rollout, feedback: Feedback, rng: random.Random, labels: Labels, opponent: str
) -> Items | Dropped:
    """One item for the policy gradient: the policy's response, with the reward P(it beats the opponent's) - 1/2.

    The opponent's response is not trained on. A tie is a reward of 0 and stays, as do identical responses (P is 1/2 for them by
    definition): no preference is learned there, but the pull to the reference is, and leaving it out would move the equilibrium.
    """
    i, j = _written_by(rollout, "policy"), _written_by(rollout, opponent)
    if identical(rollout, i, j):
        return (TrainingItem((i,), (1.0,), 0.0),)
    ahead = lead(feedback, i, j)
    if ahead is None:
        return Dropped("too_few_scores")
    return (TrainingItem((i,), (1.0,), labels.win(feedback, ahead, rng) - 0.5),)


def with_bonus(rollout: Rollout, feedback: Feedback, rng: random.Random, pairs: Pairs, source: str) -> Items | Dropped:
    """The items of `pairs`, and one of term 1 on the response of `source`, whether it is chosen, rejected or neither, and whether
    or not it got a verdict itself."""
    items = pairs(rollout, feedback, rng)
    if isinstance(items, Dropped):
        return items
    return (*items, TrainingItem((_written_by(rollout, source),), (1.0,), term=1))


def with_likelihood(rollout: Rollout, feedback: Feedback, rng: random.Random, pairs: Pairs) -> Items | Dropped:
    """The items of `pairs`, and for each one of term 1 on its chosen response, with the pair's weight."""
    items = pairs(rollout, feedback, rng)
    if isinstance(items, Dropped):
        return items
    return (*items, *(TrainingItem(item.members[:1], (1.0,), weight=item.weight, term=1) for item in items))


def best_of(rollout: Rollout, feedback: Feedback, rng: random.Random, kl_weight: float) -> Items | Dropped:
    """One item on the response with the highest score, the first of equals. Draws nothing from `rng`.

    Identical responses and ties stay: whichever is taken, it is a best one. A score alone is compared with nothing and is dropped.

    Args:
        kl_weight: above 0, every response also gets an item of term 1 that pulls it to the reference, together of this weight over 2.
    """
    scores = scored(feedback)
    if len(scores) < 2:
        return Dropped("too_few_scores")
    best = max(scores, key=lambda score: score[1])[0]
    n = len(rollout.infos)
    pull = [TrainingItem((i,), (1.0,), 0.5, kl_weight / (2 * n), term=1) for i in range(n)] if kl_weight else []
    return (TrainingItem((best,), (1.0,)), *pull)


def _compared(feedback: Feedback) -> list[tuple[int, int]]:
    """Every two responses whose comparison has a verdict."""
    return [(i, j) for i, j in combinations(range(len(feedback.outcomes)), 2) if lead(feedback, i, j) is not None]


def _written_by(rollout: Rollout, source: str) -> int:
    """Index of the first response of a source."""
    return next(i for i, info in enumerate(rollout.infos) if info.source == source)


def _one(pair: TrainingItem | Dropped) -> Items | Dropped:
    return pair if isinstance(pair, Dropped) else (pair,)


def _pair(
    rollout: Rollout, feedback: Feedback, i: int, j: int, ahead: float | None, labels: Labels, rng: random.Random
) -> TrainingItem | Dropped:
    """The pair i, j, the winner first; `ahead` is the lead of i over j."""
    if ahead is None:
        return Dropped("too_few_scores")
    if identical(rollout, i, j):
        return Dropped("identical")
    ordered = labels.order(feedback, i, j, ahead, rng)
    if ordered is None:
        return Dropped("tie")
    return TrainingItem(ordered[0], (1.0, -1.0), ordered[1])
