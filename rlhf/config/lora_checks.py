"""Rules between the fields under `policy.lora`, and with the others. The findings read like those of `checks.py`."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.config.algorithm import AlgorithmSettings, OwnAlgorithm
from rlhf.config.method_checks import changed
from rlhf.config.methods.contrast import IpoMd, Selm, Xpo
from rlhf.config.methods.gradient import NashEma, NashMd
from rlhf.config.policy import PolicySettings
from rlhf.config.settings import Settings

_ADAPTER = "`policy.lora.publish: merged`"


def lora_problems(settings: Settings) -> Iterator[str]:
    """All findings."""
    yield from adapter_problems(settings.policy)
    if settings.policy.lora.rank > 0:
        yield from _reference(settings)
        yield from _adapter(settings)


def adapter_problems(policy: PolicySettings) -> Iterator[str]:
    """Findings on the adapters alone, whatever the policy learns from."""
    if policy.lora.rank == 0:
        yield from _without_rank(policy)
    else:
        yield from _targets(policy)
        yield from _quantized(policy)


def _without_rank(policy: PolicySettings) -> Iterator[str]:
    lora = policy.lora
    fields = [f"`policy.lora.{name}`" for name in type(lora).model_fields if changed(lora, name)]
    if fields:
        yield (
            f"{', '.join(fields)}: nothing is adapted, because `policy.lora.rank` is 0 and all weights are trained. Set "
            "`policy.lora.rank` (16 is usual), or remove the rest"
        )


def _targets(policy: PolicySettings) -> Iterator[str]:
    if not policy.lora.target_modules:
        yield "`policy.lora.target_modules`: the list is empty, so nothing would learn. Name layers, or set all-linear"


def _reference(settings: Settings) -> Iterator[str]:
    """A sum of two products of rank r has rank 2 r, so what averages or extrapolates weights is no adapter any more."""
    algorithm = settings.algorithm
    if isinstance(algorithm, OwnAlgorithm):
        return
    rule = getattr(algorithm, "reference", "fixed")
    if rule in ("ema", "extrapolated"):
        yield (
            f"`algorithm.reference`: {rule} mixes the weights of several iterates, and adapters of rank r do not add up to one of rank "
            "r. Set `algorithm.reference` to fixed or previous, or `policy.lora.rank: 0`"
        )
    if isinstance(algorithm, NashEma):
        yield (
            "`algorithm.name`: nash_ema plays against an average of its own weights, and adapters of rank r do not add up to one of "
            "rank r. Choose nash_md, or `policy.lora.rank: 0`"
        )


def _adapter(settings: Settings) -> Iterator[str]:
    algorithm, rollout, lora = settings.algorithm, settings.rollout, settings.policy.lora
    if lora.publish != "adapter":
        return
    if isinstance(algorithm, IpoMd | NashMd | NashEma | Xpo) or _samples_from_reference(algorithm):
        yield (
            f"`policy.lora.publish`: {algorithm.name} samples from a second model too, and the engines that hold two models take merged "
            f"weights only. Set {_ADAPTER}"
        )
    if rollout.sleep_level == 2:
        yield (
            "`rollout.sleep_level`: 2 drops the engines' weights, and `policy.lora.publish: adapter` never sends the base again. Set "
            f"`rollout.sleep_level: 1`, or {_ADAPTER}"
        )
    if lora.quantize_base != "none":
        yield (
            "`policy.lora.publish`: with `policy.lora.quantize_base` the policy's base is rounded to 4 bits, and the engines' own base is "
            f"not, so an adapter would be put onto another model. Set {_ADAPTER}"
        )


def _samples_from_reference(algorithm: AlgorithmSettings) -> bool:
    """Whether SELM's y_gen is not the policy's own: the reference is another model while it samples."""
    own = isinstance(algorithm, Selm) and algorithm.reference == "previous" and algorithm.reference_every == 1
    return isinstance(algorithm, Selm) and not own


def _quantized(policy: PolicySettings) -> Iterator[str]:
    if policy.lora.quantize_base != "none" and policy.zero_stage == 3:
        yield (
            "`policy.zero_stage`: 3 shards weights, and weights in 4 bits cannot be sharded. Set `policy.zero_stage` to 0, 1 or 2 (the "
            "base is small now), or `policy.lora.quantize_base: none`"
        )
