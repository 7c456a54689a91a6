"""Rules between `cluster.placement`, the fields that belong to it, and the others. Part of `checks`."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.config.method_checks import changed
from rlhf.config.settings import Settings


def placement_problems(settings: Settings) -> Iterator[str]:
    """Findings on who shares GPUs with whom, and on which nodes."""
    yield from _sharing(settings)
    yield from _transfer(settings)
    yield from _nodes(settings)
    yield from _spanning(settings)


def _sharing(settings: Settings) -> Iterator[str]:
    cluster, rollout, policy = settings.cluster, settings.rollout, settings.policy
    if cluster.device == "cpu" and cluster.placement != "disaggregated":
        yield (
            f"`cluster.placement`: {cluster.placement} shares GPUs, but `cluster.device` is cpu, where all roles share the cores "
            "anyway. Remove it, or set `cluster.device` to cuda or auto"
        )
    if cluster.placement != "mixed" and cluster.colocated_engines is not None:
        yield (
            "`cluster.colocated_engines` is how many engines share the policy's GPUs when some do not, but `cluster.placement` is "
            f"{cluster.placement}. Remove it, or set `cluster.placement: mixed`"
        )
    if cluster.placement == "mixed" and not 0 < (cluster.colocated_engines or 0) < rollout.engines:
        yield (
            f"`cluster.colocated_engines`: with `cluster.placement: mixed` some of the {rollout.engines} engine(s) "
            "(`rollout.engines`) share the policy's GPUs and some do not, so it must be at least 1 and fewer than all. Set "
            "`cluster.colocated_engines`, or choose `cluster.placement` colocated (all share) or disaggregated (none does)"
        )
    if cluster.device == "cpu" and changed(rollout, "sleep_level"):
        yield "`rollout.sleep_level` is unused with `cluster.device: cpu`, where engines keep their memory. Remove it"
    shared = {"colocated": rollout.engines, "mixed": cluster.colocated_engines or 0, "disaggregated": 0}[
        cluster.placement
    ]
    if shared * rollout.tensor_parallel_size > policy.ranks:
        yield (
            f"`cluster.placement`: {shared} engine(s) that share the policy's GPUs, of {rollout.tensor_parallel_size} each "
            f"(`rollout.tensor_parallel_size`), need {shared} x {rollout.tensor_parallel_size} = "
            f"{shared * rollout.tensor_parallel_size} policy ranks, and `policy.ranks` is {policy.ranks}. Lower `rollout.engines`, "
            "`cluster.colocated_engines` or `rollout.tensor_parallel_size`, or raise `policy.ranks`"
        )


def _transfer(settings: Settings) -> Iterator[str]:
    cluster, rollout = settings.cluster, settings.rollout
    if rollout.transfer == "nccl" and cluster.placement != "disaggregated":
        yield (
            f"`rollout.transfer`: nccl refuses two ranks on one GPU, and with `cluster.placement: {cluster.placement}` an engine "
            "shares one with the policy. Set `rollout.transfer` to auto or gloo, or `cluster.placement: disaggregated`"
        )
    if rollout.transfer == "ipc" and cluster.device != "cpu" and cluster.placement != "colocated":
        yield (
            "`rollout.transfer`: ipc hands weights over inside each GPU that a policy rank and an engine share, but "
            f"`cluster.placement` is {cluster.placement}. Set `cluster.placement: colocated`, or `rollout.transfer` to auto"
        )


def _nodes(settings: Settings) -> Iterator[str]:
    cluster, policy = settings.cluster, settings.policy
    if cluster.policy_nodes is not None and cluster.policy_nodes > policy.ranks:
        yield (
            f"`cluster.policy_nodes`: {policy.ranks} rank(s) (`policy.ranks`) cannot be spread over {cluster.policy_nodes} nodes. "
            "Lower `cluster.policy_nodes`, or raise `policy.ranks`"
        )
    if cluster.address is not None:
        return
    if (cluster.policy_nodes or 1) > 1:
        yield (
            f"`cluster.policy_nodes`: {cluster.policy_nodes} nodes are wanted, but without `cluster.address` the run starts a cluster "
            "of this machine alone. Set `cluster.address` (`auto` for the cluster that this host belongs to), or remove it"
        )
    if cluster.node_resources:
        yield (
            "`cluster.node_resources`: without `cluster.address` the run starts a cluster of this machine alone, which offers no "
            "custom resources. Set `cluster.address` (`auto` for the cluster that this host belongs to), or remove it"
        )


def _spanning(settings: Settings) -> Iterator[str]:
    cluster, rollout, reward = settings.cluster, settings.rollout, settings.reward
    if rollout.straddle_nodes:
        if rollout.tensor_parallel_size == 1:
            yield (
                "`rollout.straddle_nodes`: an engine of one device (`rollout.tensor_parallel_size`) lies in one node. Remove it, or "
                "raise `rollout.tensor_parallel_size`"
            )
        if cluster.device == "cpu":
            yield (
                "`rollout.straddle_nodes`: vLLM's Ray executor runs engines on GPUs only, and `cluster.device` is cpu. Remove it"
            )
        if cluster.placement == "colocated":
            yield (
                "`rollout.straddle_nodes`: an engine that shares GPUs with the policy lies in one node, and with "
                "`cluster.placement: colocated` all do. Remove it, or choose another `cluster.placement`"
            )
        if cluster.address is None:
            yield (
                "`rollout.straddle_nodes`: without `cluster.address` the run starts a cluster of this machine alone. Set "
                "`cluster.address` (`auto` for the cluster that this host belongs to), or remove it"
            )
    if reward.gpus > 1 and reward.gpus != int(reward.gpus):
        yield (
            f"`reward.gpus`: Ray gives out fractions of one GPU, or whole GPUs, not {reward.gpus:g}. Set it below 1, or to a whole "
            "number"
        )
