"""What staleness means for each method, and the rules of `loop.staleness`, `loop.stream` and `rollout.in_flight`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from rlhf.config import ConfigError, Settings
from rlhf.config.ahead_checks import DATASET_PAIRS, OWN, ahead_of, ahead_warnings
from rlhf.config.algorithm import METHODS
from rlhf.config.method_checks import method_warnings
from rlhf.config.methods.shared import Ahead
from rlhf.loop.collecting import streams

LoadWith = Callable[..., Settings]
PAGES = Path(__file__).parents[2] / "docs" / "algorithms"
KINDS = set(get_args(get_type_hints(Ahead)["kind"]))
NORMALISE = "reward.transforms=[{name: normalise}]"
GPUS = ["cluster.device=cuda", "cluster.placement=colocated"]

# (overrides that are wrong, what the message must say, overrides that put it right)
CASES = [
    (["algorithm.name=nash_md", "loop.staleness=1"], ["score function", "`loop.staleness: 0`"], ["loop.staleness=0"]),
    (["algorithm.name=nash_ema", "loop.staleness=1"], ["ipo_md"], ["algorithm.name=ipo_md"]),
    (
        ["algorithm.name=iterative_dpo", "algorithm.pairs=dataset", "loop.staleness=2"],
        ["nothing is sampled", "`algorithm.pairs: sampled`"],
        ["algorithm.pairs=sampled"],
    ),
    (
        ["algorithm.name=grpo", "algorithm.correction=none", "loop.staleness=3"],
        ["`algorithm.correction`", "`loop.staleness: 3`", "tis"],
        ["algorithm.correction=tis"],
    ),
    (
        ["algorithm.name=ppo", "algorithm.correction=none", "loop.staleness=1"],
        ["gradient would be that of neither"],
        ["loop.staleness=0"],
    ),
    ([*GPUS, "loop.staleness=1"], ["`loop.staleness`", "colocated"], ["cluster.placement=disaggregated"]),
    ([*GPUS, "loop.stream=always"], ["`loop.stream`", "`loop.stream: auto`"], ["loop.stream=auto"]),
    (
        [
            "cluster.device=cuda", "cluster.placement=mixed", "cluster.colocated_engines=1", "rollout.engines=2",
            "loop.staleness=1",
        ],
        ["`cluster.placement: mixed`"],
        ["loop.staleness=0"],
    ),
    ([NORMALISE, "loop.stream=always"], ["`normalise`", "at once"], ["loop.stream=auto"]),
    (["rollout.in_flight=wait"], ["`rollout.in_flight`", "there are none"], ["loop.staleness=1"]),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "words", "remedy"), CASES, ids=[case[0][-1] + "-" + case[2][0] for case in CASES])
def test_check(load_with: LoadWith, wrong: list[str], words: list[str], remedy: list[str]) -> None:
    roomy = "policy.micro_batch_tokens=9999"
    with pytest.raises(ConfigError) as caught:
        load_with(roomy, *wrong)
    assert "problems" not in str(caught.value), "one mistake, one message"
    for word in words:
        assert word in str(caught.value)
    load_with(roomy, *wrong, *remedy)


def test_what_goes_together(load_with: LoadWith) -> None:
    """`stream: auto` gives way to `normalise`; replaced prompts, several updates and epochs are as they are in the synchronous loop."""
    assert not streams(load_with("loop.staleness=2", NORMALISE)) and streams(load_with("loop.staleness=2"))
    load_with("loop.staleness=2", "rollout.in_flight=wait", "loop.refill=2", "loop.stream=never")
    load_with(
        "algorithm.name=grpo", "policy.micro_batch_tokens=9999", "loop.staleness=2", "loop.updates_per_step=2",
        "loop.epochs_per_step=2",
    )  # fmt: skip
    assert streams(load_with("loop.stream=always"))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_refused_warned_of_or_corrected(load_with: LoadWith, name: str) -> None:
    ahead = METHODS[name].ahead  # type: ignore[attr-defined]
    assert ahead.kind in KINDS and ahead.why.endswith(".")
    base = [f"algorithm.name={name}", "policy.micro_batch_tokens=9999"]
    synchronous = load_with(*base)
    assert ahead_of(synchronous.algorithm) == ahead
    assert not list(ahead_warnings(synchronous))
    if ahead.kind == "refused":
        with pytest.raises(ConfigError, match=r"`loop\.staleness`"):
            load_with(*base, "loop.staleness=1")
        return
    settings = load_with(*base, "loop.staleness=2")
    said = [warning for warning in method_warnings(settings) if warning.startswith("`loop.staleness`")]
    assert len(said) == (ahead.kind == "approximate")
    assert all(ahead.why in warning and "2 weight version(s)" in warning for warning in said)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm.name=rloo", "algorithm.correction=sequence_mask"], "weighs nothing"),
        (["algorithm.name=grpo"], "`algorithm.kl_placement: reward`"),
        (["algorithm.name=rloo", "loop.steps=2"], "all of its prompts may be sampled"),
    ],
)
def test_what_costs_a_corrected_method_something_is_said(load_with: LoadWith, overrides: list[str], words: str) -> None:
    (warning,) = method_warnings(load_with("policy.micro_batch_tokens=9999", "loop.staleness=2", *overrides))
    assert words in warning


def test_an_own_algorithm_may_run_ahead(load_with: LoadWith) -> None:
    settings = load_with("algorithm.name=my.module:mine", "loop.staleness=2")
    assert ahead_of(settings.algorithm) == OWN
    assert not list(method_warnings(settings))
    assert OWN.why in (PAGES / "own.md").read_text()


def table() -> dict[str, tuple[str, str, str]]:
    """Method -> link, kind and reason, as the table of docs/algorithms/index.md has them."""
    text = (PAGES / "index.md").read_text().partition("**Sampling ahead.**")[2]
    rows = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    return {
        name: (link, kind, why)
        for names, kind, why in rows
        for shown, link in re.findall(r"\[(.*?)\]\((.*?)\)", names)
        for name in re.findall(r"`(\w+)`", shown)
    }


def test_the_table_says_what_the_declarations_say() -> None:
    rows = table()
    assert set(rows) == set(METHODS)
    for name, (_, kind, why) in rows.items():
        assert (kind, why) == METHODS[name].ahead, name  # type: ignore[attr-defined]
    assert DATASET_PAIRS.why in (PAGES / "iterative_dpo.md").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_every_methods_page_says_why(name: str) -> None:
    link, kind, _ = table()[name]
    paragraph = (PAGES / link).read_text().partition("**Sampling ahead.**")[2].partition("\n\n")[0]
    assert kind in paragraph.lower()
    assert "loop.staleness" in paragraph
