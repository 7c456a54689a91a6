"""Rules about sampling ahead: `loop.staleness`, `loop.stream` and `rollout.in_flight`, and what they mean for the method. Part of `checks`.

What staleness means for a method is declared with its fields (`rlhf.config.methods.shared.Ahead`).
"""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.config.algorithm import METHODS, OwnAlgorithm
from rlhf.config.base import Section
from rlhf.config.methods.contrast import IterativeDpo
from rlhf.config.methods.gradient import Gradient
from rlhf.config.methods.shared import Ahead
from rlhf.config.settings import Settings
from rlhf.config.transforms import remembers

DATASET_PAIRS = Ahead(
    "unaffected", "With `pairs: dataset` nothing is sampled for training, so nothing can be in advance."
)
OWN = Ahead(
    "approximate",
    "A contrast loss is least where its pairs want it, whoever wrote them; a policy gradient needs `correction` in its `PolicyGradient`, "
    "and a run without one starts with a warning. Whatever else your objective presumes of who wrote the responses is yours to judge.",
)


def ahead_of(algorithm: Section) -> Ahead:
    """What `loop.staleness` above 0 means for these settings of a method."""
    if isinstance(algorithm, OwnAlgorithm):
        return OWN
    if isinstance(algorithm, IterativeDpo) and algorithm.pairs == "dataset":
        return DATASET_PAIRS
    return METHODS[algorithm.name].ahead  # type: ignore[attr-defined]


def ahead_problems(settings: Settings) -> Iterator[str]:
    """Plans that cannot work, and fields that would change nothing."""
    for rule in (_method, _correction, _shared_devices, _stream, _in_flight):
        yield from rule(settings)


def ahead_warnings(settings: Settings) -> Iterator[str]:
    """What may be meant, but costs the method a property that its page promises, or has no effect in so short a run."""
    algorithm, loop = settings.algorithm, settings.loop
    if not loop.staleness:
        return
    ahead = ahead_of(algorithm)
    if ahead.kind == "approximate" and not isinstance(algorithm, OwnAlgorithm):
        yield (
            f"`loop.staleness`: {algorithm.name} learns from responses of up to {loop.staleness} weight version(s) before, without a "
            f"correction. {ahead.why} Set `loop.staleness: 0` for responses of the present policy"
        )
    if isinstance(algorithm, Gradient) and algorithm.correction == "sequence_mask":
        yield (
            "`algorithm.correction`: sequence_mask weighs nothing: it leaves out responses whose mean ratio to the older policy is outside "
            "its bounds, and learns from all others as if the present policy had written them. Set `algorithm.correction: tis`"
        )
    if isinstance(algorithm, Gradient) and algorithm.kl_placement == "loss" and algorithm.kl_coef:
        yield (
            "`algorithm.kl_placement`: a KL in the loss is measured on the older policy's tokens and not weighed, so its gradient is that "
            "of the KL only where the policy has come to rest. Set `algorithm.kl_placement: reward`, or `loop.staleness: 0`"
        )
    if loop.staleness >= loop.steps:
        yield (
            f"`loop.staleness`: the run has {loop.steps} step(s) (`loop.steps`), so with {loop.staleness} all of its prompts may be "
            f"sampled by the starting policy. Set it to {max(0, loop.steps // 4)}, say"
        )


def _method(settings: Settings) -> Iterator[str]:
    algorithm, ahead = settings.algorithm, ahead_of(settings.algorithm)
    if not settings.loop.staleness:
        return
    if ahead.kind == "refused":
        yield (
            f"`loop.staleness`: {algorithm.name} cannot learn from responses of older weights. {ahead.why} Set `loop.staleness: 0`, or "
            "`algorithm.name: ipo_md`, which rests at the same equilibrium"
        )
    if ahead.kind == "unaffected":
        yield f"`loop.staleness`: {ahead.why} Set `loop.staleness: 0`, or `algorithm.pairs: sampled`"


def _correction(settings: Settings) -> Iterator[str]:
    algorithm = settings.algorithm
    if settings.loop.staleness and isinstance(algorithm, Gradient) and algorithm.correction == "none":
        yield (
            f"`algorithm.correction`: with `loop.staleness: {settings.loop.staleness}` older weights than those that learn write the "
            "responses, and without importance weights the gradient would be that of neither. Set `algorithm.correction: tis`, or "
            "`loop.staleness: 0`"
        )


def _shared_devices(settings: Settings) -> Iterator[str]:
    loop, placement = settings.loop, settings.cluster.placement
    if placement == "disaggregated":
        return
    for field, wanted, off in (("staleness", loop.staleness > 0, "0"), ("stream", loop.stream == "always", "auto")):
        if wanted:
            yield (
                f"`loop.{field}`: engines would have to sample while the policy learns, but with `cluster.placement: {placement}` those "
                f"that share its GPUs are offloaded meanwhile. Set `loop.{field}: {off}`, or `cluster.placement: disaggregated`"
            )


def _stream(settings: Settings) -> Iterator[str]:
    if settings.loop.stream == "always" and remembers(settings.reward.transforms):
        yield (
            "`loop.stream`: always learns from the first prompts of a step before the last are judged, but the transform `normalise` "
            "(`reward.transforms`) needs all rewards of a step at once. Set `loop.stream: auto`, or remove the transform"
        )


def _in_flight(settings: Settings) -> Iterator[str]:
    if settings.rollout.in_flight != "keep" and not settings.loop.staleness:
        yield (
            "`rollout.in_flight` says what becomes of responses that are being written when new weights come, but with `loop.staleness: 0` "
            "there are none. Remove it, or set `loop.staleness` above 0"
        )
