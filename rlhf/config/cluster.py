"""`cluster`: the Ray cluster and the timeouts of all remote waits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlhf.config.base import MAX_S, MIN_S, Section

Seconds = Annotated[float, Field(ge=MIN_S, le=MAX_S)]
Role = Literal["policy", "rollout", "reward"]


class ClusterSettings(Section):
    address: str | None = Field(
        None,
        pattern=r"^(auto|local|(ray://)?[\w.:\-\[\]]+:[0-9]{1,5})$",
        description="Address of a running Ray cluster (`auto` finds the one on this host). None: start one on this "
        "machine for this run.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="Where models run. auto: CUDA if a GPU is visible.",
    )
    placement: Literal["disaggregated", "colocated", "mixed"] = Field(
        "disaggregated",
        description="Whose GPUs the engines use. disaggregated: their own; colocated: those of policy ranks, in turns with them (and so do "
        "reward models, unless `reward.gpus` gives them their own); "
        "mixed: `colocated_engines` of them share with the policy, the others have their own. On CPUs all roles share the cores.",
    )
    colocated_engines: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="How many engines share the policy's GPUs. For `placement: mixed` only.",
    )
    policy_nodes: int | None = Field(
        None,
        ge=1,
        le=16384,
        description="Nodes over which the policy's ranks are spread evenly. None: as few as possible.",
    )
    node_resources: dict[Role, str] = Field(
        {},
        description="Role (policy, rollout, reward) -> the custom resource of Ray that a node must offer to be used for it, as in "
        "`ray start --resources '{\"big_gpu\": 1}'`. It is not used up. Roles without an entry run on any node.",
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="CPU threads of each actor that computes. None: the cores of its node, since the roles of a synchronous loop take "
        "turns, divided by the actors of the same role there; with `loop.staleness` above 0 by its ranks and engines together.",
    )
    placement_deadline_s: float = Field(
        60.0,
        ge=MIN_S,
        le=MAX_S,
        description="Longest wait for CPUs and GPUs that the cluster has but others still hold, in seconds.",
    )
    startup_deadline_s: Seconds | Literal["auto"] = Field(
        "auto",
        description="Longest wait for an actor to start and load its model, in seconds. auto: 600, and 10 for each GB of weight files of "
        "the largest model that a role loads, and as much again for what must be fetched from a hub first: 2,010 s at 70B.",
    )
    learn_deadline_s: float = Field(
        3600.0, ge=MIN_S, le=MAX_S, description="Longest wait for one learning step, in seconds."
    )
    publish_deadline_s: float = Field(
        600.0, ge=MIN_S, le=MAX_S, description="Longest wait for a weight transfer, in seconds."
    )

    @property
    def startup_s(self) -> float:
        """`startup_deadline_s` in seconds; `rlhf.data.loading_time` has put a number for `auto`."""
        assert self.startup_deadline_s != "auto", "with_startup_deadline comes before any actor"
        return self.startup_deadline_s
