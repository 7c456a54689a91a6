"""The checks of ensembles and transforms: each fires on its mistake, names the field, and its remedy works."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rlhf.config import ConfigError, Settings

A = "{name: a, kind: function, path: 'm:f'}"
B = "{name: b, kind: function, path: 'm:g'}"
SEVERAL = ["reward.kind=several", "reward.path=null", f"reward.members=[{A}, {B}]"]
RANKED = "transforms: [{name: calibrate}]"
NAMED = "reward.reference_scores=scores.jsonl"


def with_members(*members: str) -> list[str]:
    return [*SEVERAL[:2], f"reward.members=[{', '.join(members)}]"]


# (overrides that are wrong, what the message must say, overrides that put it right)
CASES = [
    ([f"reward.members=[{A}, {B}]"], ["`reward.members`", "`reward.kind` is function"], SEVERAL),
    (["reward.combine=worst"], ["`reward.combine`"], ["reward.combine=mean"]),
    (
        ["reward.transforms=[{name: overlong, buffer: 256}]"],
        ["`reward.transforms[0].buffer`", "256", "`rollout.max_tokens`"],
        ["reward.transforms=[{name: overlong, buffer: 64}]"],
    ),
    (["reward.common_set=c.jsonl"], ["`reward.common_set`"], [*SEVERAL, "reward.common_set=c.jsonl"]),
    (["reward.uncertainty_penalty=0.5"], ["`reward.uncertainty_penalty`"], ["reward.uncertainty_penalty=0.1"]),
    (with_members(A), ["`reward.members`", "there are 1"], SEVERAL),
    (
        with_members(A.replace("}", ", weight: 0.0}"), B.replace("}", ", weight: 0.0}")),
        ["`reward.members`", "0 of them with such a weight"],
        with_members(A, B.replace("}", ", weight: 0.0}")),
    ),
    (
        [*with_members(A, B.replace("}", ", weight: 0.0}")), "reward.combine=uncertainty", "reward.common_set=c.jsonl"],
        ["`reward.members`", "two of them", "1 of them with such a weight"],
        ["reward.combine=worst"],
    ),
    (
        with_members(A, B.replace("}", ", weight: 0.0, transforms: [{name: clip, low: 0}]}")),
        ["`reward.members[1].transforms`", "logged as they are"],
        with_members(A, B.replace("}", ", weight: 0.0}")),
    ),
    (with_members(A, A), ["2 members have the name `a`"], SEVERAL),
    (with_members(A.replace("a,", "mean,"), B), ["reward/mean is logged already"], SEVERAL),
    (
        with_members(A.replace("function", "pairwise_function"), B),
        ["`reward.members[0].kind`", "does not"],
        with_members(A, B),
    ),
    (
        with_members(A, B.replace("}", ", weight: 2.0}")),
        ["`reward.members[1].weight`", "`reward.combine: sum`"],
        ["reward.combine=sum"],
    ),
    (
        [*SEVERAL, "reward.uncertainty_penalty=0.5"],
        ["`reward.uncertainty_penalty`", "`reward.combine` is mean"],
        ["reward.combine=uncertainty", "reward.common_set=c.jsonl"],
    ),
    ([*SEVERAL, "reward.combine=worst"], ["`reward.common_set`", "calibrate"], ["reward.common_set=c.jsonl"]),
    (
        [*SEVERAL, "reward.combine=uncertainty", NAMED],
        ["`reward.common_set`", "`reward.reference_scores`"],
        with_members(A.replace("}", f", {RANKED}}}"), B.replace("}", f", {RANKED}}}")),
    ),
    (
        ["reward.kind=pairwise_function", "reward.transforms=[{name: clip, low: 0}]"],
        ["`reward.transforms`", "probabilities"],
        ["reward.kind=function"],
    ),
    (
        ["algorithm.name=iterative_dpo", "algorithm.pairs=dataset", "reward.transforms=[{name: normalise}]"],
        ["`reward.transforms`", "the data set says"],
        ["reward.transforms=[]"],
    ),
    (["reward.transforms=[{name: clip}]"], ["`reward.transforms[0]`"], ["reward.transforms=[{name: clip, high: 1}]"]),
    (
        ["reward.transforms=[{name: normalise}, {name: clip, low: 1, high: 1}]"],
        ["`reward.transforms[1].low`", "not below"],
        ["reward.transforms=[{name: clip, low: 0, high: 1}]"],
    ),
    (
        ["reward.transforms=[{name: calibrate, strength: 5}]", NAMED],
        ["`reward.transforms[0].strength`", "identity"],
        ["reward.transforms=[{name: calibrate, phi: best_of_n, strength: 5}]"],
    ),
    (
        ["reward.transforms=[{name: normalise}, {name: calibrate}]", NAMED],
        ["`reward.transforms[1]`", "Put `normalise` after it"],
        ["reward.transforms=[{name: calibrate}, {name: normalise}]"],
    ),
    (
        ["reward.transforms=[{name: log_sigmoid}, {name: calibrate}]", NAMED],
        ["Keep one of them"],
        ["reward.transforms=[{name: log_sigmoid}]"],
    ),
    (["reward.transforms=[{name: calibrate}]"], ["`reward.reference_scores`", "rlhf reward calibrate"], [NAMED]),
    ([NAMED], ["`reward.reference_scores`", "there are none"], ["reward.transforms=[{name: log_sigmoid}]"]),
    (
        [*with_members(A.replace("}", f", {RANKED}}}"), B), NAMED, "reward.transforms=[{name: log_sigmoid}]"],
        ["`reward.members[0].transforms`", "not both"],
        ["reward.transforms=[]"],
    ),
    (
        [*with_members(A.replace("}", f", {RANKED}}}"), B), NAMED, "reward.canaries=c.jsonl"],
        ["`reward.canaries`"],
        ["reward.canaries=null"],
    ),
]


@pytest.mark.parametrize(("wrong", "words", "remedy"), CASES, ids=[" ".join(case[0])[-60:] for case in CASES])
def test_check(load_with: Callable[..., Settings], wrong: list[str], words: list[str], remedy: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_with(*wrong)
    for word in words:
        assert word in str(caught.value)
    load_with(*wrong, *remedy)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "reward.transforms=[{name: clipp}]",
            r"`reward\.transforms\[0\]\.name` must be one of clip, .*not the text 'clipp'",
        ),
        ("reward.transforms=[{low: 1}]", r"`reward\.transforms\[0\]\.name` must be one of .*not nothing"),
        ("reward.transforms=[{name: clip, lowe: 1}]", r"`reward\.transforms\[0\]\.lowe` is not a known field"),
        ("reward.transforms=[{name: length_penalty}]", r"`reward\.transforms\[0\]\.per_token` is missing"),
        (
            "reward.transforms=[{name: missing_eos, penalty: 0}]",
            r"`reward\.transforms\[0\]\.penalty` must be greater than 0, not the number 0",
        ),
        ("reward.transforms=[clip]", r"`reward\.transforms\[0\]` must be a section"),
        ("reward.members=[{name: Big, path: x}]", r"`reward\.members\[0\]\.name` must be lower-case letters"),
        (
            "reward.members=[{name: a, transforms: [{name: normalise}]}]",
            r"`reward\.members\[0\]\.transforms\[0\]\.name` must be one of",
        ),
    ],
)
def test_a_mistake_in_a_list_is_named_by_its_place(
    load_with: Callable[..., Settings], override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_with(override)


def test_settings_with_lists_can_be_shown_and_loaded_again(load_with: Callable[..., Settings], tmp_path) -> None:
    from rlhf.config import load, show

    settings = load_with(*SEVERAL, "reward.transforms=[{name: clip, low: -1}, {name: normalise}]")
    path = tmp_path / "shown.yaml"
    path.write_text(show(settings))
    assert load(path) == settings
