"""Rules between a method's fields, and with the other sections. The findings read like those of `checks.py`.

A rule names fields, so it holds for every method that has them; nothing here lists the methods one by one, except where
the mathematics of one asks for it. A user's own algorithm checks its options itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from rlhf.config.ahead_checks import ahead_warnings
from rlhf.config.algorithm import OwnAlgorithm
from rlhf.config.base import Section
from rlhf.config.methods.contrast import IpoMd, OnlineIpo, Raft, Selm
from rlhf.config.methods.gradient import Gradient, NashEma, NashMd, Ppo, ReinforcePlusPlus, correction_bounds
from rlhf.config.settings import Settings


class Unused(NamedTuple):
    """Fields that change nothing while another field, the switch, has one of some values.

    Attributes:
        fields: each with what it is, as the message's predicate.
        remedy: what to set so that they count.
    """

    switch: str
    values: tuple[Any, ...]
    fields: dict[str, str]
    remedy: str


_REFERENCE = {
    "reference": "is what the KL is measured to",
    "reference_every": "is the length of a round, after which the reference changes",
    "reference_decay": "is the share that an average keeps",
    "reference_alpha": "is how far the reference moves on",
}

UNUSED = (
    Unused("labels", ("hard",), {"label_temperature": "shapes soft and sampled labels"}, "`algorithm.labels: soft`"),
    Unused(
        "labels",
        ("soft", "sampled"),
        {"label_smoothing": "is the doubt about a hard label, and the others already hold how uncertain they are"},
        "`algorithm.labels: hard` (`algorithm.label_temperature` makes the other labels softer)",
    ),
    Unused(
        "reference",
        ("fixed", "ema"),
        {"reference_every": _REFERENCE["reference_every"]},
        "`algorithm.reference: previous`",
    ),
    Unused(
        "reference",
        ("fixed", "previous", "extrapolated"),
        {"reference_decay": _REFERENCE["reference_decay"]},
        "`algorithm.reference: ema`",
    ),
    Unused(
        "reference",
        ("fixed", "previous", "ema"),
        {"reference_alpha": _REFERENCE["reference_alpha"]},
        "`algorithm.reference: extrapolated`",
    ),
    Unused(
        "pairs",
        ("dataset",),
        {
            "samples_per_prompt": "is the number of sampled responses",
            "pairing": "chooses among sampled responses",
            "labels": "turns verdicts into targets",
            "label_temperature": "turns rewards into targets",
        },
        "`algorithm.pairs: sampled`",
    ),
    Unused(
        "ranked_with",
        ("dataset",),
        {"fresh_samples": "is the number of responses beside y_gen"},
        "`algorithm.ranked_with: samples`",
    ),
    Unused("alpha", (0,), {"bonus_scale": "scales the bonus"}, "`algorithm.alpha` above 0"),
    Unused(
        "kl_placement",
        ("none",),
        {
            "kl_estimator": "estimates the KL",
            "kl_coef": "weighs the KL",
            "kl_target": "steers the weight of the KL",
            "kl_horizon": "steers the weight of the KL",
            "kl_before_baseline": "places the KL",
            **_REFERENCE,
        },
        "`algorithm.kl_placement` to reward or loss",
    ),
    Unused(
        "kl_placement",
        ("loss",),
        {"kl_before_baseline": "places a KL that is part of the reward"},
        "`algorithm.kl_placement: reward`",
    ),
    Unused(
        "kl_target",
        (None,),
        {"kl_horizon": "is the pace of the adaptive controller"},
        "`algorithm.kl_target` to the KL to hold",
    ),
    Unused(
        "correction",
        ("none",),
        {"correction_low": "bounds the importance weights", "correction_high": "bounds the importance weights"},
        "`algorithm.correction: tis`",
    ),
)


def method_problems(settings: Settings) -> Iterator[str]:
    """All findings about the method's own fields; none for a user's own algorithm."""
    if isinstance(settings.algorithm, OwnAlgorithm):
        return
    for rule in (_unused, _robust, _kl, _correction, _critic, _unclipped, _distribution, _judges, _refill):
        yield from rule(settings)


def method_warnings(settings: Settings) -> Iterator[str]:
    """What may be meant, but costs the method a property that its page promises."""
    algorithm, rollout, loop = settings.algorithm, settings.rollout, settings.loop
    yield from ahead_warnings(settings)
    if loop.eval_every > loop.steps:
        yield (
            f"`loop.eval_every`: {loop.eval_every} is more than the run's steps (`loop.steps` is {loop.steps}), so the held-out prompts "
            f"are answered before and after the run only. Set it to {max(1, loop.steps // 4)}, say, or to 0"
        )
    if isinstance(algorithm, OnlineIpo | IpoMd):
        off = [name for name, on in (("temperature", 1), ("top_p", 1), ("top_k", 0)) if getattr(rollout, name) != on]
        if off:
            yield (
                f"`rollout.{off[0]}`: {algorithm.name} ends at the Nash equilibrium only if its pairs are drawn from the policy itself; at "
                "temperature 0.9 it ends 0.005 from it in probability, at 0.7 0.018 (a game of three actions). Set "
                f"`rollout.{off[0]}: {0 if off[0] == 'top_k' else 1}`"
            )
    if isinstance(algorithm, Raft) and algorithm.kl_weight and rollout.temperature != 1:
        yield (
            "`rollout.temperature`: the pull of `algorithm.kl_weight` has the gradient of the KL only on responses of the policy itself, "
            "drawn at 1. Set `rollout.temperature: 1`"
        )


def used_responses(algorithm: Any) -> int:
    """Most responses of one prompt that are learned from together, and so must share a micro-batch."""
    if isinstance(algorithm, OwnAlgorithm):
        return 2  # a pair; what more it uses gets a micro-batch of its own
    if isinstance(algorithm, NashMd | NashEma):
        return 1  # the opponent's response is not learned from
    if isinstance(algorithm, Gradient):
        return algorithm.samples_per_prompt
    if isinstance(algorithm, Raft):  # the best one; all of them where the KL is measured on them
        return algorithm.samples_per_prompt if algorithm.kl_weight else 1
    if isinstance(algorithm, Selm):  # the pair, and y_gen if it is neither
        return 3 if algorithm.ranked_with == "dataset" else min(3, 1 + algorithm.fresh_samples)
    if getattr(algorithm, "pairing", None) == "all" and getattr(algorithm, "pairs", "sampled") == "sampled":
        return algorithm.samples_per_prompt
    return 2


def changed(section: Section, name: str) -> bool:
    """Whether a field has another value than its default."""
    return getattr(section, name) != type(section).model_fields[name].default


def _unused(settings: Settings) -> Iterator[str]:
    algorithm = settings.algorithm
    for switch, values, fields, remedy in UNUSED:
        state = getattr(algorithm, switch, "")
        if state not in values:
            continue
        for field, what in fields.items():
            if field in type(algorithm).model_fields and changed(algorithm, field):
                shown = "null" if state is None else state
                yield (f"`algorithm.{field}` {what}, but `algorithm.{switch}` is {shown}. Remove it, or set {remedy}")


def _robust(settings: Settings) -> Iterator[str]:
    algorithm = settings.algorithm
    if getattr(algorithm, "loss", "") == "hinge" and algorithm.labels == "soft":
        yield (
            "`algorithm.loss`: hinge knows a winner and a loser, and nothing between, but `algorithm.labels` is soft. Set "
            "`algorithm.labels` to hard or sampled, or `algorithm.loss: logistic`"
        )
    if getattr(algorithm, "loss", "") != "robust":
        return
    if algorithm.labels != "hard":
        yield (
            f"`algorithm.loss`: robust corrects hard labels, but `algorithm.labels` is {algorithm.labels}. Set "
            "`algorithm.labels: hard`, or `algorithm.loss: logistic`"
        )
    elif algorithm.label_smoothing == 0:
        yield (
            "`algorithm.loss`: robust corrects for labels flipped at the rate `algorithm.label_smoothing`, which is "
            "0, so it would equal logistic. Set `algorithm.label_smoothing` above 0 (below 0.5), or "
            "`algorithm.loss: logistic`"
        )


def _kl(settings: Settings) -> Iterator[str]:
    algorithm = settings.algorithm
    if getattr(algorithm, "kl_placement", "none") == "none":
        return
    if algorithm.kl_placement == "loss" and algorithm.kl_estimator == "k1":
        yield (
            "`algorithm.kl_estimator`: k1 as a loss has no gradient in expectation, so nothing would hold the policy "
            "near the reference. Set `algorithm.kl_estimator: k2` (reverse KL) or k3 (forward KL), or "
            "`algorithm.kl_placement: reward`"
        )
    if algorithm.kl_placement == "reward" and algorithm.kl_estimator != "k1":
        yield (
            f"`algorithm.kl_estimator`: {algorithm.kl_estimator} in the reward holds nothing: only with k1 is the expected gradient "
            "that of the KL, with the others it is near 0 and can even push the policy away. Set `algorithm.kl_estimator: k1`, or "
            "`algorithm.kl_placement: loss`"
        )
    if algorithm.kl_target is not None and algorithm.kl_coef == 0:
        yield (
            "`algorithm.kl_target`: the controller multiplies `algorithm.kl_coef`, and 0 stays 0. Set "
            "`algorithm.kl_coef` above 0, or `algorithm.kl_target: null`"
        )


def _correction(settings: Settings) -> Iterator[str]:
    algorithm = settings.algorithm
    if getattr(algorithm, "correction", "none") == "none":
        return
    low, high = correction_bounds(algorithm)
    if low >= high:
        yield (
            f"`algorithm.correction_low`: the lower bound {low:g} is not below `algorithm.correction_high`, {high:g}. Lower the one or "
            "raise the other"
        )


def _critic(settings: Settings) -> Iterator[str]:
    algorithm, steps = settings.algorithm, settings.loop.steps
    if isinstance(algorithm, Ppo) and algorithm.critic_warmup_steps >= steps:
        yield (
            f"`algorithm.critic_warmup_steps`: in the first {algorithm.critic_warmup_steps} steps only the critic "
            f"learns, and the run has {steps} (`loop.steps`), so the policy never would. Lower it, or raise "
            "`loop.steps`"
        )


def _unclipped(settings: Settings) -> Iterator[str]:
    algorithm, loop = settings.algorithm, settings.loop
    if isinstance(algorithm, NashMd | NashEma) and loop.updates_per_step * loop.epochs_per_step > 1:
        field = "updates_per_step" if loop.updates_per_step > 1 else "epochs_per_step"
        yield (
            f"`loop.{field}`: {algorithm.name} has no clipping, so nothing bounds the policy after the first optimizer step on the same "
            "responses. Set `loop.updates_per_step: 1` and `loop.epochs_per_step: 1`, with fewer `loop.prompts_per_step` and more "
            "`loop.steps`"
        )


def _distribution(settings: Settings) -> Iterator[str]:
    """Log-probs that enter a ratio, a gradient or a mixture must be of the whole distribution."""
    algorithm, rollout = settings.algorithm, settings.rollout
    mixes = isinstance(algorithm, IpoMd | NashMd | NashEma)
    if not (mixes or isinstance(algorithm, Gradient)):
        return
    why = "samples from a mixture" if mixes else "follows the gradient of the log-probs it samples with"
    for name, off in (("top_p", 1), ("top_k", 0)):
        if getattr(rollout, name) != off:
            yield (
                f"`rollout.{name}`: {algorithm.name} {why}, which is exact only without truncation. Set "
                f"`rollout.{name}: {off}`"
            )


def _judges(settings: Settings) -> Iterator[str]:
    """What pairwise judges make meaningless or impossible."""
    algorithm, reward = settings.algorithm, settings.reward
    if not reward.compares:
        return
    if "label_temperature" in type(algorithm).model_fields and changed(algorithm, "label_temperature"):
        yield (
            "`algorithm.label_temperature` turns rewards into probabilities, but pairwise judges (`reward.kind: "
            f"{reward.kind}`) give probabilities. Remove it, or choose a `reward.kind` that scores"
        )
    if isinstance(algorithm, Gradient) and algorithm.samples_per_prompt == 1:
        yield (
            f"`algorithm.samples_per_prompt`: a pairwise judge (`reward.kind: {reward.kind}`) compares the responses to "
            "one prompt, and there is one. Set `algorithm.samples_per_prompt` to 2 or more, or choose a `reward.kind` "
            "that scores"
        )


def _refill(settings: Settings) -> Iterator[str]:
    """Where every prompt teaches something, none is to be replaced."""
    algorithm = settings.algorithm
    if not settings.loop.refill:
        return
    if isinstance(algorithm, Ppo | ReinforcePlusPlus | Raft | NashMd | NashEma):
        yield (
            f"`loop.refill` replaces prompts that teach nothing, and with {algorithm.name} every prompt with a reward teaches something. "
            "Set `loop.refill: 0`, or choose a method that compares the responses to a prompt"
        )
    elif isinstance(algorithm, Gradient):
        pull = algorithm.kl_placement != "none" and algorithm.kl_coef > 0
        others = {
            "`algorithm.kl_placement: none`": pull,
            "`algorithm.entropy_coef: 0`": algorithm.entropy_coef > 0,
            "`algorithm.whiten: false`": algorithm.whiten,
        }
        if remedies := [remedy for remedy, counts in others.items() if counts]:
            yield (
                "`loop.refill` replaces groups of equal rewards, which have no gradient only if nothing but their own rewards counts: no "
                f"KL, no entropy bonus, no whitening over all groups. Set {' and '.join(remedies)}, or `loop.refill: 0`"
            )
