"""Placement as a pure answer: never more on a node than it has, everybody placed or words why not, and nothing overlooked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.cluster import (
    CannotPlace,
    Node,
    Placement,
    ResourceRequest,
    place,
    resource_request,
    shared_engines,
    shared_rewards,
    takes_turns,
)
from rlhf.config import Settings


def nodes_of(*gpus: int, cpus: int = 16, resources: Sequence[frozenset[str]] = ()) -> list[Node]:
    offered = itertools.chain(resources, itertools.repeat(frozenset()))
    return [Node(f"id{i}", f"10.0.0.{i + 1}", g, cpus, r) for i, (g, r) in enumerate(zip(gpus, offered, strict=False))]


def where(placement: Placement) -> dict[str, str]:
    return {name: seat.node.address for name, seat in placement.seats.items()}


def test_roles_have_nodes_of_their_own() -> None:
    placed = place(ResourceRequest(gpu=True, ranks=8, engines=2, servers=1, devices=4), nodes_of(8, 8))
    assert set(where(placed).values()) == {"10.0.0.1", "10.0.0.2"}
    assert {where(placed)[f"policy-{rank}"] for rank in range(8)} == {"10.0.0.1"}
    assert [placed.seats[f"rollout-{i}"].gpus for i in range(2)] == [4, 4]


def test_cores_are_shared_by_all_who_compute_at_the_same_time() -> None:
    request = ResourceRequest(gpu=True, ranks=2, engines=1, servers=2, overlap=True)
    placed = place(request, nodes_of(3))
    assert {name: len(placed.neighbours(name)) for name in placed.seats} == {
        "policy-0": 3, "policy-1": 3, "rollout-0": 3, "reward-0": 2, "reward-1": 2,
    }  # fmt: skip


def test_cores_are_shared_with_the_same_role_on_the_same_node() -> None:
    placed = place(ResourceRequest(gpu=True, ranks=4, engines=2, servers=2, policy_nodes=2), nodes_of(3, 4))
    counts = {name: len(placed.neighbours(name)) for name in placed.seats}
    assert [counts[f"policy-{rank}"] for rank in range(4)] == [2] * 4, "not 4: the other two are elsewhere"
    assert counts["rollout-0"] == counts["rollout-1"] == 1
    assert sum(1 / count for count in counts.values()) == pytest.approx(
        len({(n[:6], s.node) for n, s in placed.seats.items()})
    )


def test_ranks_are_numbered_node_by_node() -> None:
    placed = where(place(ResourceRequest(gpu=True, ranks=6, engines=1, servers=1, policy_nodes=3), nodes_of(4, 4, 4)))
    assert [placed[f"policy-{rank}"][-1] for rank in range(6)] == ["1", "1", "2", "2", "3", "3"]


def test_ten_comes_after_nine() -> None:
    nodes = [Node("a", "10.0.0.10", 1, 4), Node("b", "10.0.0.9", 1, 4)]
    assert where(place(ResourceRequest(gpu=True, ranks=1, engines=1, servers=0), nodes))["policy-0"] == "10.0.0.9"


def test_the_policy_leaves_the_large_node_to_a_large_engine() -> None:
    placed = where(place(ResourceRequest(gpu=True, ranks=4, engines=1, servers=1, devices=8), nodes_of(8, 4)))
    assert placed["rollout-0"] == "10.0.0.1"
    assert placed["policy-0"] == placed["policy-3"] == "10.0.0.2"


def test_engines_that_share_sit_on_ranks_of_their_node() -> None:
    placed = place(ResourceRequest(gpu=True, ranks=8, engines=4, shared=4, servers=0, devices=2), nodes_of(4, 4))
    assert [placed.seats[f"rollout-{i}"].shares for i in range(4)] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert all(placed.seats[f"rollout-{i}"].gpus == 0 for i in range(4))
    assert where(placed)["rollout-2"] == where(placed)["policy-4"] == "10.0.0.2"


def test_reward_servers_sit_on_ranks_of_their_node() -> None:
    asked = ResourceRequest(
        gpu=True, ranks=4, engines=2, shared=2, servers=3, devices=2, policy_nodes=2, shared_servers=True
    )
    placed = place(asked, nodes_of(2, 2))
    assert [placed.seats[f"reward-{i}"].shares for i in range(3)] == [(0,), (1,), (2,)]
    for i in range(3):
        assert placed.seats[f"reward-{i}"].gpus == 0
        assert where(placed)[f"reward-{i}"] == where(placed)[f"policy-{i}"]
    assert "reward-2 (on the GPU of policy-2)" in placed.lines()[1]
    apart = ResourceRequest(**(vars(asked) | {"needs": {"policy": "a", "reward": "b"}}))
    with pytest.raises(CannotPlace, match="no node may hold both"):
        place(apart, nodes_of(2, 2, 2, resources=(frozenset("a"), frozenset("a"), frozenset("b"))))


def test_mixed_engines_share_first_and_own_after() -> None:
    placed = place(ResourceRequest(gpu=True, ranks=2, engines=3, shared=1, servers=2, server_gpus=0.5), nodes_of(4, 1))
    assert placed.seats["rollout-0"].shares == (0,)
    assert [(placed.seats[f"rollout-{i}"].shares, placed.seats[f"rollout-{i}"].gpus) for i in (1, 2)] == [((), 1)] * 2
    assert where(placed)["reward-0"] == where(placed)["reward-1"] == "10.0.0.2"


def test_an_engine_spans_nodes_only_if_asked_and_only_if_it_must() -> None:
    alone = ResourceRequest(gpu=True, ranks=1, engines=1, servers=0, devices=6)
    with pytest.raises(CannotPlace, match="an engine wants 6 GPUs in one node, the nodes have 4 \\+ 4"):
        place(alone, nodes_of(4, 4))
    spanning = ResourceRequest(gpu=True, ranks=1, engines=1, servers=0, devices=6, straddle=True)
    seat = place(spanning, nodes_of(4, 4)).seats["rollout-0"]
    assert [node.address for node in seat.workers] == ["10.0.0.1"] * 3 + ["10.0.0.2"] * 3
    assert seat.node == seat.workers[0]
    assert place(spanning, nodes_of(4, 6)).seats["rollout-0"].workers == ()


def test_a_role_stays_on_nodes_that_offer_its_resource() -> None:
    asked = ResourceRequest(gpu=False, ranks=2, engines=1, servers=1, policy_nodes=2, needs={"rollout": "big"})
    placed = where(place(asked, nodes_of(0, 0, cpus=4, resources=(frozenset(), frozenset({"big"})))))
    assert placed["rollout-0"] == "10.0.0.2"
    assert placed["policy-0"] == "10.0.0.1"


@pytest.mark.parametrize(
    ("asked", "nodes", "words"),
    [
        (
            ResourceRequest(gpu=True, ranks=1, engines=1, servers=1, devices=8),
            nodes_of(4, 4),
            [
                "`rollout.tensor_parallel_size`: an engine wants 8 GPUs in one node, the nodes have 4 + 4",
                "straddle_nodes",
            ],
        ),
        (
            ResourceRequest(gpu=True, ranks=6, engines=1, shared=1, servers=1, devices=6),
            nodes_of(4, 4),
            ["wants 6 policy ranks in one node", "4 + 4", "disaggregated"],
        ),
        (
            ResourceRequest(gpu=True, ranks=8, engines=4, servers=2, server_gpus=0.5),
            nodes_of(4, 4),
            ["wants 13 GPUs, the nodes have 8", "8 for the policy", "4 for engines", "2 x 0.5 for reward servers"],
        ),
        (
            ResourceRequest(gpu=True, ranks=4, engines=1, servers=0, policy_nodes=4),
            nodes_of(4, 4),
            ["`cluster.policy_nodes`"],
        ),
        (
            ResourceRequest(gpu=False, ranks=4, engines=4, servers=1),
            nodes_of(0, cpus=8),
            ["9 actors", "8", "--num-cpus"],
        ),
        (
            ResourceRequest(gpu=False, ranks=1, engines=1, servers=1, needs={"reward": "judge"}),
            nodes_of(0, resources=(frozenset({"other"}),)),
            ["`cluster.node_resources`: no node offers the resource `judge`, which reward asks for", "CPUs, other"],
        ),
        (
            ResourceRequest(gpu=True, ranks=2, engines=2, servers=0, devices=3, policy_nodes=2),
            nodes_of(5, 3),
            ["together", "evenly on 2 nodes", "2 engines of 3"],
        ),
        (ResourceRequest(gpu=True, ranks=1, engines=1, servers=0), [], ["no nodes"]),
    ],
)
def test_a_refusal_says_what_is_wanted_what_there_is_and_what_helps(
    asked: ResourceRequest, nodes: list[Node], words: list[str]
) -> None:
    with pytest.raises(CannotPlace) as refused:
        place(asked, nodes)
    for word in words:
        assert word in str(refused.value)
    for node in nodes:
        assert node.address in str(refused.value)


# Small questions, so that every possible answer can be tried.
@st.composite
def questions(draw: st.DrawFn) -> ResourceRequest:
    gpu, engines = draw(st.booleans()), draw(st.integers(1, 3))
    sharing = gpu and draw(st.booleans())
    return ResourceRequest(
        gpu=gpu,
        ranks=draw(st.integers(1, 4)),
        engines=engines,
        servers=draw(st.integers(0, 2)),
        policy_nodes=draw(st.none() | st.integers(1, 3)),
        shared=draw(st.integers(0, engines)) if gpu else 0,
        devices=draw(st.integers(1, 3)) if gpu else 1,
        server_gpus=0.0 if sharing or not gpu else draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        shared_servers=sharing,
        needs=draw(
            st.dictionaries(st.sampled_from(["policy", "rollout", "reward"]), st.sampled_from("ab"), max_size=2)
        ),
    )


NODES = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 6), st.frozensets(st.sampled_from("ab"))), min_size=1, max_size=3
).map(lambda rows: [Node(f"id{i}", f"10.0.0.{i}", *row) for i, row in enumerate(rows)])


def spread(count: int, nodes: int) -> Iterator[tuple[int, ...]]:
    """All ways to divide so many like actors among the nodes."""
    if nodes == 1:
        yield (count,)
        return
    for first in range(count + 1):
        yield from ((first, *rest) for rest in spread(count - first, nodes - 1))


def fits(w: ResourceRequest, node: Node, ranks: int, shared: int, own: int, servers: int) -> bool:
    allowed = [(ranks, "policy"), (shared + own, "rollout"), (servers, "reward")]
    if any(count and role in w.needs and w.needs[role] not in node.resources for count, role in allowed):
        return False
    if ranks + shared + own + servers > node.cpus or shared * w.devices > ranks:
        return False
    if w.shared_servers and servers > ranks:
        return False
    judging = math.ceil(servers * w.server_gpus)  # the fractions tried divide 1
    return not w.gpu or ranks + own * w.devices + judging <= node.gpus


def possible(w: ResourceRequest, nodes: Sequence[Node]) -> bool:
    """By trying every way."""
    n = len(nodes)
    for ranks in spread(w.ranks, n):
        used = [count for count in ranks if count]
        if w.policy_nodes is not None and (len(used) != w.policy_nodes or max(used) - min(used) > 1):
            continue
        for shared, own, servers in itertools.product(
            spread(w.shared, n), spread(w.engines - w.shared, n), spread(w.servers, n)
        ):
            if all(fits(w, *row) for row in zip(nodes, ranks, shared, own, servers, strict=True)):
                return True
    return False


@settings(max_examples=300)
@given(asked=questions(), nodes=NODES)
def test_what_is_possible_is_found_and_what_is_found_is_possible(asked: ResourceRequest, nodes: list[Node]) -> None:
    if asked.policy_nodes is not None and asked.policy_nodes > asked.ranks:
        return  # refused when the configuration loads
    try:
        placed = place(asked, nodes)
    except CannotPlace as refused:
        assert not possible(asked, nodes)
        assert len(str(refused)) > 40
        return
    assert placed == place(asked, list(reversed(nodes))), (
        "the same question, the same answer, however the nodes are listed"
    )
    names = [f"policy-{i}" for i in range(asked.ranks)] + [f"rollout-{i}" for i in range(asked.engines)]
    assert list(placed.seats) == names + [f"reward-{i}" for i in range(asked.servers)]
    for role, count in (("rollout", asked.shared * asked.devices), ("reward", asked.servers * asked.shared_servers)):
        used = [rank for name, seat in placed.seats.items() if name.startswith(role) for rank in seat.shares]
        assert len(used) == len(set(used)) == count, "each on the GPU of another rank"
    for seat in placed.seats.values():
        assert all(placed.seats[f"policy-{rank}"].node == seat.node for rank in seat.shares)
    for node in nodes:
        here = [name for name, seat in placed.seats.items() if seat.node == node]
        count = {role: sum(name.startswith(role) for name in here) for role in ("policy", "rollout", "reward")}
        shared = sum(bool(placed.seats[name].shares) for name in here if name.startswith("rollout"))
        assert fits(asked, node, count["policy"], shared, count["rollout"] - shared, count["reward"])
    ranks = [placed.seats[f"policy-{i}"].node for i in range(asked.ranks)]
    if asked.policy_nodes is not None:
        assert len(set(ranks)) == asked.policy_nodes


@settings(max_examples=100)
@given(asked=questions(), nodes=NODES)
def test_engines_that_span_nodes_need_no_more_than_the_sum(asked: ResourceRequest, nodes: list[Node]) -> None:
    spanning = ResourceRequest(
        **(vars(asked) | {"gpu": True, "shared": 0, "straddle": True, "needs": {}, "policy_nodes": None})
    )
    try:
        placed = place(spanning, nodes)
    except CannotPlace:
        return
    used = [
        node for s in placed.seats.values() for node in (s.workers or [s.node] * (int(s.gpus) if s.gpus >= 1 else 0))
    ]
    assert all(used.count(node) <= node.gpus for node in nodes)
    for seat in placed.seats.values():
        assert not seat.workers or len(seat.workers) == spanning.devices


def make(**sections: dict) -> Settings:
    base = {"data": {"prompts": "p"}, "policy": {"model": "m"}, "reward": {"path": "m:f", "kind": "function"}}
    return Settings(**{name: base.get(name, {}) | sections.get(name, {}) for name in base | sections})


def test_the_request_follows_the_settings() -> None:
    asked = resource_request(
        make(
            policy={"ranks": 4},
            rollout={"engines": 3, "tensor_parallel_size": 2},
            reward={"servers": 2, "gpus": 0.5},
            cluster={"device": "cuda", "placement": "mixed", "colocated_engines": 1, "node_resources": {"reward": "r"}},
        )
    )
    expected = ResourceRequest(True, 4, 3, 2, shared=1, devices=2, server_gpus=0.5, needs={"reward": "r"})
    assert asked == expected


def test_without_the_policy_engines_share_with_nobody() -> None:
    both = make(rollout={"engines": 2}, policy={"ranks": 2}, cluster={"device": "cuda", "placement": "colocated"})
    assert resource_request(both).shared == 2
    assert (resource_request(both, policy=False).ranks, resource_request(both, policy=False).shared) == (0, 0)


MODEL = {"kind": "model", "path": "folder"}


@pytest.mark.parametrize(
    ("cluster", "reward", "debug", "sharing"),
    [
        ({"device": "cuda", "placement": "colocated"}, MODEL, False, True),
        ({"device": "cuda", "placement": "colocated"}, MODEL | {"kind": "pairwise_model"}, False, True),
        ({"device": "cuda", "placement": "colocated"}, MODEL | {"gpus": 1.0}, False, False),
        ({"device": "cuda", "placement": "colocated"}, {}, False, False),
        ({"device": "cuda", "placement": "colocated"}, MODEL | {"kind": "llm_judge"}, False, False),
        ({"device": "cuda"}, MODEL, False, False),
        ({"device": "cuda"}, MODEL | {"gpus": 1.0}, True, True),
        ({"device": "cpu"}, MODEL, True, False),
    ],
)
def test_which_reward_models_share_the_policys_gpus(cluster: dict, reward: dict, debug: bool, sharing: bool) -> None:
    settings = make(cluster=cluster, reward=reward)
    assert shared_rewards(settings, debug) == sharing
    if not debug:
        assert resource_request(settings).shared_servers == sharing
    assert not resource_request(settings, policy=False).shared_servers


@pytest.mark.parametrize(
    ("cluster", "debug", "sharing"),
    [
        ({"device": "cuda"}, False, set()),
        ({"device": "cuda"}, True, {0, 1, 2}),
        ({"device": "cuda", "placement": "colocated"}, False, {0, 1, 2}),
        ({"device": "cuda", "placement": "mixed", "colocated_engines": 2}, False, {0, 1}),
        ({"device": "cpu"}, True, set()),
        ({"device": "cpu", "placement": "colocated"}, False, set()),
    ],
)
def test_who_sleeps_while_the_policy_works(cluster: dict, debug: bool, sharing: set[int]) -> None:
    settings = make(rollout={"engines": 3}, policy={"ranks": 3}, cluster=cluster)
    assert shared_engines(settings, debug) == sharing
    assert takes_turns(settings, debug) == bool(sharing)
