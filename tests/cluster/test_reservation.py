"""Seats made real: a Ray cluster of three nodes on this machine, with GPUs that only Ray believes in (`fake_gpus`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.fake_gpus"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_each_role_has_its_own_gpus(answers: dict[str, Any]) -> None:
    first, second, third = answers["nodes"]
    seen = answers["disaggregated"]
    assert [seen[f"policy-{rank}"]["node"] for rank in range(2)] == [seen["policy-0"]["node"]] * 2
    assert [seen[f"policy-{rank}"]["visible"] for rank in range(2)] == ["0", "1"], "neighbours"
    assert seen["rollout-0"]["visible"] == "0,1,2,3"
    assert {seen["policy-0"]["node"], seen["rollout-0"]["node"]} == {first, second}
    for server in ("reward-0", "reward-1"):
        assert (seen[server]["node"], seen[server]["visible"]) == (third, "0"), (
            "two halves of one GPU, where `judge` is"
        )


def test_only_the_nodes_of_a_role_are_asked(answers: dict[str, Any]) -> None:
    assert list(answers["asked"].values()) == [answers["disaggregated"]["rollout-0"]["node"]]


def test_an_engine_sees_the_gpus_of_its_ranks(answers: dict[str, Any]) -> None:
    seen = answers["colocated"]
    ranks = [seen[f"policy-{rank}"] for rank in range(2)]
    assert seen["rollout-0"]["visible"] == ",".join(rank["visible"] for rank in ranks)
    assert seen["rollout-0"]["gpus"] == [], "Ray counts the GPUs for the ranks alone"
    assert {seen["rollout-0"]["node"]} == {rank["node"] for rank in ranks}


def test_mixed_engines_and_a_spread_policy(answers: dict[str, Any]) -> None:
    seen = answers["mixed"]
    assert seen["policy-0"]["node"] != seen["policy-1"]["node"]
    assert [seen["rollout-0"][what] for what in ("node", "visible")] == [
        seen["policy-0"][what] for what in ("node", "visible")
    ]
    own = seen["rollout-1"]
    assert len(own["gpus"]) == 1
    assert (own["node"], own["visible"]) not in [
        (seen[f"policy-{i}"]["node"], seen[f"policy-{i}"]["visible"]) for i in (0, 1)
    ]
    assert seen["reward-0"]["visible"] == "", "a server without a GPU must not find one"


def test_an_engine_that_spans_nodes_has_a_group_of_single_gpus(answers: dict[str, Any]) -> None:
    engine = answers["spanning"]["rollout-0"]
    assert engine["spans"]
    assert engine["group"] == [1.0] * 6, "as vLLM's Ray executor wants it: one worker in each bundle, and nobody else"
    assert engine["gpus"] == [], "the process itself computes nothing"
    assert not answers["disaggregated"]["rollout-0"]["spans"]


def test_what_cannot_be_is_refused_at_once(answers: dict[str, Any]) -> None:
    words = answers["8 in 4 + 4"]
    assert "an engine wants 8 GPUs in one node, the nodes have " in words
    assert sorted(words.partition("have ")[2].partition(".")[0].split(" + ")) == ["2", "4", "4"]


def test_gpus_are_not_passed_over_in_silence(answers: dict[str, Any]) -> None:
    assert "Set `cluster.device` to cuda or cpu" in answers["auto on a host without GPU"]


def test_what_others_hold_is_waited_for_no_longer_than_said(answers: dict[str, Any]) -> None:
    words = answers["held by others"]
    assert "the driver waited 0.5 s (`cluster.placement_deadline_s`)" in words
    assert "free are" in words
    assert "6 GPUs" in words


def test_a_file_that_a_node_cannot_read_is_named(answers: dict[str, Any]) -> None:
    words = answers["unreadable"]
    assert "`policy.model`: /no/model cannot be read on node" in words
    assert "rollout-0" in words


def test_actors_work_in_the_drivers_folder_and_know_their_interface(answers: dict[str, Any]) -> None:
    for name in ("disaggregated", "colocated", "mixed", "spanning"):
        for seen in answers[name].values():
            assert seen["folder"] == str(ROOT)
            assert seen["interface"]
