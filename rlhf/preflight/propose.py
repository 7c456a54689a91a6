"""A layout for a cluster: a pure search over ways to spread the roles, for the one with the shortest step that fits.

What it chooses: the GPUs of policy and engines, ZeRO stage, gradient checkpointing, offload, the micro-batch, devices per engine
and the share of memory that vLLM takes. What it leaves as it is: the method, the batch, lengths, precision and adapters.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.algorithms import Algorithm
from rlhf.cluster.devices import loads_reward_model
from rlhf.cluster.placement import CannotPlace, Placement, place
from rlhf.cluster.resources import Node, resource_request
from rlhf.config import Settings, UserError
from rlhf.config.checks import largest_assignment
from rlhf.preflight.estimate import Cluster, Estimate, estimate
from rlhf.training.shapes import ModelShape

MEANS: tuple[dict[str, Any], ...] = tuple(
    {
        "zero_stage": stage,
        "gradient_checkpointing": checkpointing,
        "offload_optimizer": optimizer,
        "offload_parameters": parameters,
    }
    for checkpointing, optimizer, parameters in (
        (False, "none", "none"),
        (True, "none", "none"),
        (True, "cpu", "none"),
        (True, "cpu", "cpu"),
    )
    for stage in ((1, 2, 3) if parameters == "none" else (3,))
)
"""Ways to save memory on a policy rank, from the cheapest to the dearest."""
WORTH = 0.98
"""A dearer way must bring the step's time below this share of the cheaper one's."""
LARGER = (1, 2, 4)
"""Micro-batches tried, as multiples of the given one: with ZeRO-3 a larger one gathers the weights less often."""
UTILISATION_STEP = 0.05
MOST_UTILISATION = 0.9
MOST_DEVICES = 16
"""Per engine: beyond it pipelines do better than tensor parallelism, and vLLM is not asked for them here."""


class CannotFit(UserError):
    """No layout fits the cluster; the message says what would be needed."""


@dataclass(frozen=True)
class Proposal:
    """A layout that fits.

    Attributes:
        settings: the given ones with the layout's fields.
        overrides: those fields, as `section.key=value`.
        seats: what runs where, how many of each role on which nodes.
    """

    settings: Settings
    overrides: tuple[str, ...]
    estimate: Estimate
    seats: tuple[str, ...]


def propose(
    settings: Settings, shape: ModelShape, algorithm: Algorithm, cluster: Cluster, judge: float = 0.0
) -> list[Proposal]:
    """The best disaggregated and the best colocated layout, as far as each fits, the quicker one first.

    Args:
        judge: bytes of a reward server's models.

    Raises:
        CannotFit: neither fits.
    """
    best: list[Proposal] = []
    nearest: list[Estimate] = []
    for placement in _placements(settings):
        layouts = _layouts(settings, shape, algorithm, cluster, placement, nearest, judge)
        quickest_first = sorted(layouts, key=lambda found: found[1].time.total)
        placed = (_placed(settings, layout, made, cluster) for layout, made in quickest_first)
        best += itertools.islice(filter(None, placed), 1)
    if not best:
        raise CannotFit(_nothing_fits(settings, cluster, nearest))
    return sorted(best, key=lambda proposal: proposal.estimate.time.total)


Placed = Literal["disaggregated", "colocated"]


def _placements(settings: Settings) -> tuple[Placed, ...]:
    """Reward models that must run on GPUs and have none of their own have to share. Who samples while the policy learns cannot."""
    if _ahead(settings):
        return ("disaggregated",)
    on_gpus = settings.cluster.device == "cuda" and loads_reward_model(settings)
    return ("colocated",) if on_gpus and settings.reward.gpus == 0 else ("disaggregated", "colocated")


def _ahead(settings: Settings) -> bool:
    return settings.loop.staleness > 0 or settings.loop.stream == "always"


def _layouts(
    settings: Settings,
    shape: ModelShape,
    algorithm: Algorithm,
    cluster: Cluster,
    placement: Placed,
    nearest: list[Estimate],
    judge: float,
) -> Iterator[tuple[Settings, Estimate]]:
    """Layouts that fit, with their estimates. For each number of ranks the policy's best means are found once.

    Args:
        nearest: collects estimates that did not fit.
    """
    base = _on_gpus(settings, placement)
    free = cluster.gpus - math.ceil(settings.reward.servers * settings.reward.gpus)
    for ranks in _rank_counts(settings, cluster, free, placement):
        for devices in _engine_sizes(shape, cluster):
            engines = _engines(cluster, free, ranks, devices, placement)
            engines = min(engines, settings.loop.prompts_per_step)
            if engines == 0:
                continue
            found = None
            for means in _means(settings):
                layout = _with(base, cluster, ranks, engines, devices, means)
                layout = _with_utilisation(layout, shape, algorithm, cluster, judge)
                made = estimate(layout, shape, algorithm, cluster, judge)
                if made.problems:
                    nearest.append(made)
                elif found is None or made.time.total < WORTH * found[1].time.total:
                    found = layout, made
            if found is not None:
                yield found


def _on_gpus(settings: Settings, placement: str) -> Settings:
    cluster = settings.cluster.model_copy(
        update={"device": "cuda", "placement": placement, "colocated_engines": None, "policy_nodes": None}
    )
    return settings.model_copy(update={"cluster": cluster})


def _rank_counts(settings: Settings, cluster: Cluster, free: int, placement: str) -> Iterator[int]:
    """Ranks worth a try: powers of two within a node and whole nodes beyond; colocated, as many as there are GPUs."""
    most = min(free, settings.loop.prompts_per_step // settings.loop.updates_per_step)
    if placement == "colocated":
        if most:
            yield most
        return
    within = range(1, min(cluster.gpus_per_node, most) + 1)
    beyond = range(2 * cluster.gpus_per_node, most + 1, cluster.gpus_per_node)
    yield from (ranks for ranks in (*within, *beyond) if ranks < free)


def _engine_sizes(shape: ModelShape, cluster: Cluster) -> Iterator[int]:
    """Devices per engine: powers of two that divide the heads, within a node, or several whole nodes."""
    devices = 1
    while devices <= min(cluster.gpus, MOST_DEVICES):
        if shape.heads % devices == 0 and (devices <= cluster.gpus_per_node or devices % cluster.gpus_per_node == 0):
            yield devices
        devices *= 2


def _engines(cluster: Cluster, free: int, ranks: int, devices: int, placement: str) -> int:
    """Engines of this size that fit beside the ranks, or on those of one node each; only what is larger than a node straddles."""
    if placement == "colocated":
        whole, rest = divmod(ranks, cluster.gpus_per_node)
        return whole * (cluster.gpus_per_node // devices) + rest // devices
    whole, rest = divmod(free - ranks, cluster.gpus_per_node)
    if devices > cluster.gpus_per_node:
        return (free - ranks) // cluster.gpus_per_node * cluster.gpus_per_node // devices
    return whole * (cluster.gpus_per_node // devices) + rest // devices


def _means(settings: Settings) -> Iterator[dict[str, Any]]:
    """Ways to save memory, each with several micro-batches, which results do not depend on; among them the smallest possible."""
    given, smallest = settings.policy.micro_batch_tokens, largest_assignment(settings)
    sizes = dict.fromkeys([*(given * factor for factor in LARGER), smallest])
    for means in MEANS:
        if settings.policy.lora.quantize_base != "none" and means["zero_stage"] == 3:
            continue  # 4-bit weights are not sharded
        yield from (means | {"micro_batch_tokens": size} for size in sizes)


def _with(
    settings: Settings, cluster: Cluster, ranks: int, engines: int, devices: int, means: dict[str, Any]
) -> Settings:
    policy = settings.policy.model_copy(update=means | {"ranks": ranks})
    layout = {
        "engines": engines,
        "tensor_parallel_size": devices,
        "straddle_nodes": devices > cluster.gpus_per_node,
        "transfer": "auto",
    }
    return settings.model_copy(update={"policy": policy, "rollout": settings.rollout.model_copy(update=layout)})


def _with_utilisation(
    settings: Settings, shape: ModelShape, algorithm: Algorithm, cluster: Cluster, judge: float
) -> Settings:
    """The largest share for vLLM, in steps, that leaves room for what else is on the GPU."""
    made = estimate(settings, shape, algorithm, cluster, judge)
    taken = made.generating - settings.rollout.gpu_memory_utilization * cluster.gpu.memory
    share = math.floor((1 - taken / cluster.gpu.memory) / UTILISATION_STEP + 1e-9) * UTILISATION_STEP
    share = round(min(MOST_UTILISATION, max(UTILISATION_STEP, share)), 2)
    rollout = settings.rollout.model_copy(update={"gpu_memory_utilization": share})
    return settings.model_copy(update={"rollout": rollout})


def seats(settings: Settings, cluster: Cluster) -> Placement:
    """Where the run's own placement puts everything on such a cluster. Its nodes offer whatever custom resources the roles ask for.

    Raises:
        CannotPlace: it has no place for something.
    """
    cpus, digits = 2 * cluster.gpus_per_node + settings.reward.servers, len(str(cluster.nodes))
    offers = frozenset(settings.cluster.node_resources.values())
    names = [f"node {number:0{digits}d}" for number in range(1, cluster.nodes + 1)]
    return place(resource_request(settings), [Node(name, name, cluster.gpus_per_node, cpus, offers) for name in names])


def _placed(given: Settings, layout: Settings, made: Estimate, cluster: Cluster) -> Proposal | None:
    """The layout with its seats; None if the run's own rules (nodes of a role, fractions of GPUs) have no place for it."""
    try:
        placement = seats(layout, cluster)
    except CannotPlace:
        return None
    return Proposal(layout, tuple(_overrides(given, layout)), made, tuple(_nodes(placement)))


def _nodes(placement: Placement) -> Iterator[str]:
    """How many of each role are on a node; equal nodes in one line."""
    roles = {"policy": "policy rank", "rollout": "engine", "reward": "reward server"}
    counts: dict[str, Counter[str]] = {}
    for name, seat in placement.seats.items():
        role = roles[re.split(r"[\[-]", name)[0]]
        for node in dict.fromkeys(seat.workers or (seat.node,)):
            counts.setdefault(node.address, Counter())[f"part of an {role}" if seat.workers else role] += 1
    alike: dict[str, list[str]] = {}
    for address, found in counts.items():
        words = ", ".join(f"{count} {role}{'' if count == 1 else 's'}" for role, count in found.items())
        alike.setdefault(words, []).append(address)
    for words, addresses in alike.items():
        where = addresses[0] if len(addresses) == 1 else f"{addresses[0]} and {len(addresses) - 1} more"
        yield f"{where}: {words}"


CHOSEN = {
    "policy": (
        "ranks",
        "zero_stage",
        "gradient_checkpointing",
        "offload_optimizer",
        "offload_parameters",
        "micro_batch_tokens",
    ),
    "rollout": ("engines", "tensor_parallel_size", "straddle_nodes", "gpu_memory_utilization", "transfer"),
    "cluster": ("device", "placement", "colocated_engines", "policy_nodes"),
}
"""The fields that a proposal sets."""
ALWAYS = ("ranks", "zero_stage", "engines", "tensor_parallel_size", "placement")
"""Those that are shown even where they stay as they are."""


def _overrides(given: Settings, layout: Settings) -> Iterator[str]:
    for section, fields in CHOSEN.items():
        for field in fields:
            value = getattr(getattr(layout, section), field)
            if field in ALWAYS or value != getattr(getattr(given, section), field):
                yield f"{section}.{field}={_spelled(value)}"


def _spelled(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _nothing_fits(settings: Settings, cluster: Cluster, nearest: list[Estimate]) -> str:
    what = f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}"
    if not nearest and _ahead(settings):
        return (
            f"no layout fits {what}: engines that sample while the policy learns need GPUs of their own. Give more GPUs, or set "
            "`loop.staleness: 0` and `loop.stream: auto`"
        )
    if not nearest:
        return f"no layout fits {what}: the reward servers leave no GPU. Give more GPUs, or lower `reward.gpus` or `reward.servers`"
    closest = min(nearest, key=lambda made: max(made.learning, made.generating))
    adapters = "" if settings.policy.lora.rank else ", or train adapters (`policy.lora.rank`)"
    return (
        f"no layout fits {what}. In the nearest one, {'; '.join(closest.problems)}. Give more or larger GPUs, lower the lengths "
        f"(`data.max_prompt_tokens`, `rollout.max_tokens`){adapters}"
    )
