"""Every declaration: settings reach it, it can travel to another process, and the catalogue says what it chose."""

from __future__ import annotations

import pickle
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf.algorithms import Algorithm, AlgorithmError, Contrast, Preference, Source, catalogue, make
from rlhf.algorithms.anchors import Ema, Extrapolated, Fixed, Previous
from rlhf.algorithms.contrast import preference_loss
from rlhf.config import Settings
from rlhf.config.algorithm import METHODS
from rlhf.types import Assignment
from tests.algorithms.tabular import REFERENCE, World, answered, declared, packed, scored_by, settings_of

OWN = "tests.algorithms.own_algorithm"


@pytest.mark.parametrize("name", METHODS)
def test_each_declaration_can_travel(name: str) -> None:
    """The policy's ranks get the whole declaration."""
    algorithm = declared(name)
    assert algorithm.name == name
    copy = pickle.loads(pickle.dumps(algorithm))
    assert (copy.sources, copy.objective, copy.reference) == (
        algorithm.sources,
        algorithm.objective,
        algorithm.reference,
    )


def test_settings_of_dpo_reach_the_declaration() -> None:
    algorithm = declared("online_dpo", samples_per_prompt=4, beta=0.3, logp_reduce="mean")
    assert algorithm.sources == (Source("policy", 4),)
    assert algorithm.objective == Preference((Contrast("logistic", scale=0.3, reduce="mean"),))
    robust = declared("online_dpo", loss="robust", label_smoothing=0.1)
    assert robust.objective == Preference((Contrast("robust", scale=0.1, flip_rate=0.1),))
    assert target(robust) == 1.0, "the robust loss corrects for flips itself"
    assert target(declared("online_dpo", label_smoothing=0.1)) == pytest.approx(0.9)


def target(algorithm) -> float:
    return algorithm.build(answered([[1], [2]]), scored_by([0, 1, 0], [1, 2]), random.Random(0))[0].target


@pytest.mark.parametrize("name", ["online_dpo", "iterative_dpo", "online_ipo", "ipo_md", "selm", "xpo"])
def test_the_references_rule_is_the_settings(name: str) -> None:
    assert declared(name, reference="fixed").reference == Fixed()
    assert declared(name, reference="previous", reference_every=3).reference == Previous(3)
    assert declared(name, reference="ema", reference_decay=0.9).reference == Ema(0.9)
    apo = declared(name, reference="extrapolated", reference_every=2, reference_alpha=0.5)
    assert apo.reference == Extrapolated(2, 0.5)


def test_ipo() -> None:
    algorithm = declared("online_ipo", tau=0.5, logp_reduce="mean")
    assert algorithm.objective == Preference((Contrast("square", scale=0.5, reduce="mean"),))
    mixing = declared("ipo_md", mixture=0.25, samples_per_prompt=3)
    assert mixing.sources == (Source("mixture", 3, mixture=0.25),)
    assert mixing.mixes


def test_selms_terms_and_sources() -> None:
    algorithm = declared("selm", alpha=0.1, beta=0.5)
    assert algorithm.objective.terms[1] == Contrast("linear", scale=0.05)
    assert declared("selm", alpha=0.1, beta=0.5, bonus_scale="alpha").objective.terms[1].scale == 0.1
    assert algorithm.dataset_pairs and algorithm.responses_per_prompt == 3
    fresh = declared("selm", ranked_with="samples", fresh_samples=4, generation="sampled")
    assert fresh.sources == (Source("y_gen", 1), Source("policy", 4))
    assert not fresh.dataset_pairs


@pytest.mark.parametrize(
    ("reference", "fields", "mixes"),
    [
        ("previous", {}, False),
        ("extrapolated", {}, False),
        ("previous", {"reference_every": 2}, True),
        ("fixed", {}, True),
        ("ema", {}, True),
    ],
)
def test_selms_y_gen_is_the_references(reference: str, fields: dict[str, int], mixes: bool) -> None:
    """Only where the policy that samples is the reference of the step may the policy write it."""
    algorithm = declared("selm", reference=reference, **fields)
    assert algorithm.sources == (Source("y_gen", 1, mixture=float(mixes), greedy=True),)
    assert algorithm.mixes == mixes


def test_the_opponents() -> None:
    md, ema = declared("nash_md", mixture=0.25, tau=0.1), declared("nash_ema", opponent_decay=0.9)
    assert md.sources == (Source("policy", 1), Source("opponent", 1, mixture=0.25))
    assert md.partner is None and md.objective.kl_coef == 0.1
    assert ema.sources == (Source("policy", 1), Source("opponent", 1, mixture=1.0))
    assert (ema.partner, ema.reference) == (Ema(0.9), Fixed())


def test_slic_has_no_anchor() -> None:
    terms = declared("slic", delta=2.0, likelihood_weight=0.3).objective.terms
    assert terms == (Contrast("hinge", margin=2.0, anchored=False), Contrast("linear", scale=-0.3, anchored=False))
    assert len(declared("slic", likelihood_weight=0.0).objective.terms) == 1


def test_raft_has_an_anchor_only_for_its_pull() -> None:
    bare, held = declared("raft"), declared("raft", kl_weight=0.3, samples_per_prompt=3)
    assert bare.objective.terms == (Contrast("linear", scale=-1.0, anchored=False),)
    assert held.objective.terms == (*bare.objective.terms, Contrast("square"))
    assert (catalogue.describe(bare).anchor, catalogue.describe(held).anchor) == ("none", "fixed")
    items = held.build(answered([[1], [2], [3]]), scored_by([0, 1, 5, 5], [1, 2, 3]), random.Random(0))
    assert [(item.members, item.term, item.weight) for item in items] == [
        ((1,), 0, 1.0),
        *(((i,), 1, pytest.approx(0.05)) for i in range(3)),
    ]


# The catalogue


def test_the_catalogue_lists_every_method_and_agrees_with_its_declaration() -> None:
    rows = {row.name: row for row in catalogue.rows()}
    assert list(rows) == list(METHODS)
    for name, row in rows.items():
        direct = isinstance(declared(name).objective, Preference)
        assert (row.link != catalogue.NONE) == (row.estimator == catalogue.NONE) == direct
        assert row.sources and row.builder
    assert rows["ipo_md"].sources == "2 mixture by policy^0.875 reference^0.125"
    assert rows["selm"].sources == "1 y_gen by policy (greedy), data set's pair"
    assert rows["selm"].link == "logistic(0.01) + 1e-05 x (log pi - log ref)"
    assert rows["slic"].anchor == rows["simpo"].anchor == "none"
    assert (rows["simpo"].link, rows["rdpo"].link) == ("logistic(2, margin 1)", "logistic(0.1, 0.01 per token)")
    assert rows["cispo"].estimator == "less mean, over std, clipped weights, tis"
    assert catalogue.describe(declared("online_dpo", loss="hinge")).link == "hinge(0.1, margin 1)"
    assert rows["nash_ema"].anchor == "fixed; partner: ema(0.999)"


def test_the_catalogue_follows_the_declaration_and_not_the_name() -> None:
    row = catalogue.describe(declared("iterative_dpo", pairs="dataset", reference="extrapolated", beta=0.7))
    assert (row.sources, row.feedback, row.builder) == ("data set's pair", "data set's order", "dataset_pair")
    assert (row.anchor, row.link) == ("extrapolated(0.3)", "logistic(0.7)")


# One's own, by import path


def test_an_own_algorithm_reaches_simpos_known_value() -> None:
    """LP = -10 over 5 tokens against -12 over 8, beta 2, gamma 1."""
    rollout = answered([[1] * 5, [2] * 8])
    algorithm = make(settings_of(f"{OWN}:simpo"))
    experience = packed([Assignment(rollout, algorithm.build(rollout, scored_by([0, 1, 0], [1, 2]), random.Random(0)))])
    logprobs = torch.where(experience.response == 0, -10 / 5, -12 / 8).double()
    assert preference_loss(algorithm.objective, experience, logprobs, logprobs).item() == pytest.approx(
        2.126928, abs=1e-6
    )


def test_an_own_algorithms_options_and_what_it_learns() -> None:
    """With labels smoothed at .1 SimPO rests where beta (difference of log pi) - gamma = log(.9 / .1)."""
    options = {"beta": 0.5, "gamma": 0.4, "smoothing": 0.1, "samples": 2}
    algorithm = make(settings_of(f"{OWN}:simpo", options=options))
    learned = World(algorithm, [1.0, 0.0]).learn(1000, 20.0, start=torch.tensor([0.4, 0.6]).double().log())
    assert 0.5 * (learned[0] - learned[1]).item() - 0.4 == pytest.approx(2.1972246, abs=1e-3)


def test_an_own_builder_learns() -> None:
    algorithm = make(settings_of(f"{OWN}:one_against_many", options={"beta": 0.5}))
    learned = World(algorithm, [1.0, 0.2, -0.5]).learn(300, 4.0)
    assert learned.exp()[0].item() > 0.95 > REFERENCE.exp()[0].item()


def test_an_own_algorithm_lies_where_the_command_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside_the_yaml.py").write_text((Path(__file__).parent / "own_algorithm.py").read_text())
    monkeypatch.chdir(tmp_path)
    assert make(settings_of("beside_the_yaml:simpo")).name == "simpo"


def test_the_page_on_own_algorithms_shows_this_code() -> None:
    page = (Path(__file__).parents[2] / "docs/algorithms/own.md").read_text()
    (shown,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert shown == (Path(__file__).parent / "own_algorithm.py").read_text()


def without_responses(settings: Settings) -> Algorithm:
    """A user's algorithm that nothing comes out of."""
    return replace(make(settings_of("online_dpo")), sources=())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module:make", "cannot import"),
        ("rlhf.algorithms:nothing", "has no function `nothing`"),
        ("rlhf.types:Score", "not an Algorithm"),
        ("tests.algorithms.test_declarations:without_responses", "has no responses to learn from"),
    ],
)
def test_a_name_that_leads_nowhere(name: str, says: str) -> None:
    with pytest.raises(AlgorithmError, match=says):
        make(settings_of(name))
