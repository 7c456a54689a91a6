"""Rules between the fields of ensembles (`reward.members`) and transforms of scores. The findings read like those of `checks.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rlhf.config.method_checks import changed
from rlhf.config.reward import RewardSettings
from rlhf.config.settings import Settings
from rlhf.config.transforms import REFERENCED, Calibrate, Clip, Normalise, Overlong, Transform

RESERVED = {
    *("reward", "mean", "std", "invalid", "failed", "timed_out", "shaped_mean", "shaped_std", "disagreement"),
    *("cache_hits", "canary_accuracy", "canary_drift"),
    *("policy", "mixture", "reference", "opponent", "y_gen", "chosen", "rejected"),  # sources of responses
}
"""Names under which other numbers are logged or kept."""


def shaping_problems(settings: Settings) -> Iterator[str]:
    """All findings about members and transforms."""
    reward = settings.reward
    yield from _members(reward)
    if reward.kind == "several":
        yield from _scale(reward)
    if reward.transforms and reward.compares:
        yield (
            f"`reward.transforms` change a score, but `reward.kind` is {reward.kind}, whose verdicts are probabilities. Remove "
            "them (the judge sees for itself that a response is long or breaks off), or choose a `reward.kind` that scores"
        )
    if reward.transforms and getattr(settings.algorithm, "pairs", "sampled") == "dataset":
        yield (
            "`reward.transforms` change what is learned from, but with `algorithm.pairs: dataset` no score is: the data set says "
            "which response is better. Remove them, or set `algorithm.pairs: sampled`"
        )
    for place, chain in _chains(reward):
        yield from _chain(place, chain)
    yield from _overlong(settings)
    yield from _references(reward)


def _chains(reward: RewardSettings) -> list[tuple[str, Sequence[Transform]]]:
    """Each list of transforms, with its place."""
    members = [(f"reward.members[{i}].transforms", member.transforms) for i, member in enumerate(reward.members)]
    return [("reward.transforms", reward.transforms), *members]


def _members(reward: RewardSettings) -> Iterator[str]:
    if reward.kind != "several":
        for field in ("members", "combine", "uncertainty_penalty", "common_set"):
            if changed(reward, field):
                yield (
                    f"`reward.{field}` is about several judges as one, but `reward.kind` is {reward.kind}. Remove it, or set "
                    "`reward.kind: several`"
                )
        return
    counting, least = sum(member.weight != 0 for member in reward.members), 2 if reward.combine == "uncertainty" else 1
    if len(reward.members) < 2 or counting < least:
        yield (
            "`reward.members`: `reward.kind: several` has two judges or more, and "
            f"{'two of them' if least == 2 else 'one'} with a `weight` other than 0; there are {len(reward.members)}, "
            f"{counting} of them with such a weight. List them, each with a `name` and the fields that say who judges (`kind`, `path`, ...)"
        )
    for name, count in Counter(member.name for member in reward.members).items():
        if count > 1:
            yield f"`reward.members`: {count} members have the name `{name}`. Give each a `name` of its own"
        if name in RESERVED:
            yield f"`reward.members`: reward/{name} is logged already. Give the member `{name}` another `name`"
    for i, member in enumerate(reward.members):
        if member.compares or member.kind == "several":
            yield (
                f"`reward.members[{i}].kind`: a member scores one response, and {member.kind} does not. Choose a kind that scores"
            )
        if reward.combine != "sum" and member.weight not in (0, 1):
            yield (
                f"`reward.members[{i}].weight` is a factor in a sum, but `reward.combine` is {reward.combine}. Remove it, or set "
                "`reward.combine: sum`; 0 makes the member an observer"
            )
        if member.weight == 0 and member.transforms:
            yield (
                f"`reward.members[{i}].transforms`: with `weight: 0` the member's scores are logged as they are. Remove the "
                "transforms"
            )


def _scale(reward: RewardSettings) -> Iterator[str]:
    """Members can be compared only on one scale."""
    if reward.combine != "uncertainty" and changed(reward, "uncertainty_penalty"):
        yield (
            "`reward.uncertainty_penalty` weighs the variance over members, but `reward.combine` is "
            f"{reward.combine}. Remove it, or set `reward.combine: uncertainty`"
        )
    counting = [member for member in reward.members if member.weight != 0]
    ranked = all(any(isinstance(one, Calibrate) for one in member.transforms) for member in counting)
    if reward.combine in ("worst", "uncertainty") and reward.common_set is None and not ranked:
        yield (
            f"`reward.common_set`: `reward.combine: {reward.combine}` compares the members' scores, which have scales of their "
            "own. Name a JSONL file of responses that every member scores at the start, or give every member the transform "
            "`calibrate`"
        )


def _overlong(settings: Settings) -> Iterator[str]:
    limit = settings.rollout.max_tokens
    for i, transform in enumerate(settings.reward.transforms):
        if isinstance(transform, Overlong) and transform.buffer >= limit:
            yield (
                f"`reward.transforms[{i}].buffer`: the penalty grows over the last {transform.buffer} tokens, and a response has {limit} "
                "at most (`rollout.max_tokens`), so every length would be punished. Lower it, or raise `rollout.max_tokens`"
            )


def _chain(place: str, chain: Sequence[Transform]) -> Iterator[str]:
    for i, transform in enumerate(chain):
        if isinstance(transform, Clip):
            if transform.low is None and transform.high is None:
                yield f"`{place}[{i}]`: `clip` without `low` and `high` changes nothing. Give one of them, or both"
            elif transform.low is not None and transform.high is not None and transform.low >= transform.high:
                yield f"`{place}[{i}].low`: {transform.low:g} is not below `high`, {transform.high:g}. Lower one or raise the other"
        if isinstance(transform, Calibrate) and transform.phi == "identity" and changed(transform, "strength"):
            yield (
                f"`{place}[{i}].strength` shapes an exponential, but `phi` is identity. Remove it, or set `phi: best_of_n` or "
                "worst_of_n"
            )
    first = next((i for i, transform in enumerate(chain) if isinstance(transform, REFERENCED)), None)
    if first is None:
        return
    if any(isinstance(transform, Normalise) for transform in chain[:first]):
        yield (
            f"`{place}[{first}]`: `{chain[first].name}` compares with the reference's scores, which `normalise` before it would "
            "move from step to step. Put `normalise` after it"
        )
    if sum(isinstance(transform, REFERENCED) for transform in chain) > 1:
        yield f"`{place}`: `log_sigmoid` and `calibrate` both compare with the reference's scores. Keep one of them"


def _references(reward: RewardSettings) -> Iterator[str]:
    places = [place for place, chain in _chains(reward) if any(isinstance(one, REFERENCED) for one in chain)]
    if places and reward.reference_scores is None:
        yield (
            f"`reward.reference_scores`: `{places[0]}` compare with what the reference scores. Make the file with `rlhf reward "
            "calibrate CONFIG --output FILE` and name it here"
        )
    if not places and reward.reference_scores is not None:
        yield (
            "`reward.reference_scores` is read by the transforms `log_sigmoid` and `calibrate`, and there are none. Remove it, or "
            "add one to `reward.transforms`"
        )
    if reward.canaries is not None and any(place != "reward.transforms" for place in places):
        yield (
            "`reward.canaries`: members whose transforms compare with the reference's scores can judge the prompts of "
            "`reward.reference_scores` only. Remove the canaries, or move the transform to `reward.transforms`"
        )
    if "reward.transforms" in places and len(places) > 1:
        yield (
            f"`reward.transforms`: `{places[1]}` compare with the reference's scores already. Let the members do it, or the whole "
            "reward, not both"
        )
