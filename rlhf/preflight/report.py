"""`rlhf plan`: what a run needs, whether it fits and how to lay it out, in words and as JSON.

Needs the model's configuration alone: no weights, no prompts, no GPU, and for the models in `training.shapes.KNOWN` no network.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.algorithms import Algorithm, make
from rlhf.cluster.devices import loads_reward_model
from rlhf.cluster.placement import CannotPlace
from rlhf.cluster.precision import Choice, choose_here, settled
from rlhf.config import Settings, UserError, load, yamls
from rlhf.config.checks import largest_assignment, optimizer_steps
from rlhf.data.errors import in_a_line
from rlhf.data.loading_time import weights
from rlhf.data.model_folder import FolderError, find_model, read_config
from rlhf.preflight.estimate import (
    ASLEEP,
    CONTEXT,
    ENGINE_WORKING,
    FRAGMENTATION,
    JUDGE_WORKING,
    Cluster,
    Estimate,
    estimate,
    work_of,
)
from rlhf.preflight.memory import BYTES, PolicyMemory, policy_memory
from rlhf.preflight.propose import CannotFit, Proposal, propose, seats
from rlhf.preflight.speed import ASSUMED
from rlhf.training.shapes import KNOWN, ModelShape, known_name, known_shape, model_shape

TYPICAL: dict[str, dict[str, Any]] = {
    "data": {"prompts": "prompts.jsonl", "max_prompt_tokens": 512},
    "reward": {"kind": "function", "path": "rlhf.reward.functions:exact_match"},
    "policy": {"dtype": "bf16", "micro_batch_tokens": 8192, "zero_stage": 3, "gradient_checkpointing": True},
    "rollout": {"max_tokens": 1024, "max_num_seqs": 256},
    "loop": {"prompts_per_step": 256},
    "cluster": {"device": "cuda"},
}
"""What `rlhf plan --model` assumes of a run that has no configuration yet."""


@dataclass(frozen=True)
class Plan:
    """All that the report says.

    Attributes:
        dtype_why: why the type in the settings is the one.
        configured: the settings as they are on the cluster; None without a cluster, or if there is no configuration.
        stages: per ZeRO stage, what a rank needs without and with gradient checkpointing.
        proposals: the quicker first; empty without a cluster or if nothing fits.
        refusal: why nothing fits.
    """

    model: str
    settings: Settings
    dtype_why: str
    shape: ModelShape
    cluster: Cluster | None
    configured: Estimate | None
    stages: dict[int, tuple[PolicyMemory, PolicyMemory]]
    proposals: list[Proposal]
    refusal: str


def typical(model: str, overrides: Sequence[str]) -> Settings:
    """Settings for a model without a configuration: `TYPICAL` and the overrides."""
    raw = TYPICAL | {"policy": TYPICAL["policy"] | {"model": model}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "typical.yaml"
        path.write_text(yamls.dump(raw))
        try:
            return load(path, overrides)
        except UserError as error:
            raise UserError(str(error).replace(str(path), "`rlhf plan --model`")) from None


def shape_of(model: str) -> ModelShape:
    """The shape of a model: one of `KNOWN`, a folder with a config.json, an asset, or a hub name.

    Raises:
        UserError: nothing of this name can be read.
    """
    known = known_name(model)
    if known is not None and not os.path.exists(model):
        return known_shape(known)
    from rlhf.training.trainable import MALFORMED

    instead = f"Or give the name of one of {', '.join(KNOWN)}"
    try:
        path = find_model(model, "`policy.model`", weights=False)
        return model_shape(read_config(path, "`policy.model`"))
    except FolderError as error:
        raise UserError(f"{error}. {instead}") from None
    except MALFORMED as error:
        raise UserError(
            f"`policy.model`: {path} has no readable configuration of a causal language model: {in_a_line(error)}. {instead}"
        ) from None


def judge_bytes(settings: Settings) -> float:
    """Of the weights that a reward server loads; 0 for what is not there to be looked at."""
    if not loads_reward_model(settings):
        return 0.0
    return sum(weights(source.model).nbytes for _, source in settings.reward.sources() if source.model is not None)


def make_plan(settings: Settings, cluster: Cluster | None, configured: bool) -> Plan:
    """Everything about one run.

    Args:
        cluster: None: memory only.
        configured: whether the layout in the settings is meant, so that it is estimated too.
    """
    choice = _dtype(settings, cluster)
    settings = settled(settings, choice)
    algorithm, shape = make(settings), shape_of(settings.policy.model)
    proposals: list[Proposal] = []
    refusal = ""
    if cluster is not None:
        try:
            proposals = propose(settings, shape, algorithm, cluster, judge_bytes(settings))
        except CannotFit as error:
            refusal = str(error)
    shown = proposals[0].settings if proposals else settings
    return Plan(
        model=settings.policy.model,
        settings=settings,
        dtype_why=choice.why,
        shape=shape,
        cluster=cluster,
        configured=_configured(settings, shape, algorithm, cluster) if cluster and configured else None,
        stages=_stages(shown, shape, algorithm),
        proposals=proposals,
        refusal=refusal,
    )


def _dtype(settings: Settings, cluster: Cluster | None) -> Choice:
    """Of the GPUs that are planned for; without any, of this machine."""
    if settings.policy.dtype == "auto" and cluster is not None:
        return Choice("bf16", f"as {cluster.gpu.name} has it")
    return choose_here(settings)


def _configured(settings: Settings, shape: ModelShape, algorithm: Algorithm, cluster: Cluster) -> Estimate:
    """The layout as it stands, on GPUs, wherever this is asked; that it has no place is one more problem."""
    on_gpus = settings.model_copy(update={"cluster": settings.cluster.model_copy(update={"device": "cuda"})})
    made = estimate(on_gpus, shape, algorithm, cluster, judge_bytes(settings))
    try:
        seats(on_gpus, cluster)
    except CannotPlace as error:
        return replace(made, problems=(*made.problems, str(error)))
    return made


def _stages(
    settings: Settings, shape: ModelShape, algorithm: Algorithm
) -> dict[int, tuple[PolicyMemory, PolicyMemory]]:
    """What a rank needs at each ZeRO stage, without and with gradient checkpointing, nothing offloaded."""
    found = {}
    for stage in range(4):
        both = []
        for checkpointing in (False, True):
            update: dict[str, Any] = {"zero_stage": stage, "gradient_checkpointing": checkpointing}
            update |= {"offload_optimizer": "none", "offload_parameters": "none"}
            policy = settings.policy.model_copy(update=update)
            evaluates = settings.data.eval_prompts is not None
            both.append(policy_memory(shape, policy, algorithm, evaluates, largest_assignment(settings)))
        found[stage] = (both[0], both[1])
    return found


def text(plan: Plan) -> str:
    """The plan in words."""
    parts: dict[str, Iterator[str]] = {"Model": _model(plan), "A step, at the limits of its lengths": _step(plan)}
    if plan.configured is not None and plan.cluster is not None:
        parts[f"As configured, on {_cluster(plan.cluster)}"] = _layout(plan.settings, plan.configured)
    ranks = (plan.proposals[0].settings if plan.proposals else plan.settings).policy.ranks
    parts[f"A policy rank of {ranks}, in GB, by ZeRO stage (ckpt: with gradient checkpointing)"] = _table(plan)
    for number, proposal in enumerate(plan.proposals):
        words = "Proposed" if number == 0 else "Also possible"
        parts[f"{words}: {proposal.settings.cluster.placement}, on {_cluster(plan.cluster)}"] = _proposal(proposal)
    if plan.refusal:
        parts["Proposed"] = iter([plan.refusal])
    if plan.cluster is None:
        parts["No cluster given"] = iter(
            ["name one for times and a layout: --nodes 1 --gpus-per-node 8 --gpu h100-80gb"]
        )
    parts["Assumed (not on a data sheet)"] = _assumed()
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in parts.items())


def _model(plan: Plan) -> Iterator[str]:
    shape, size = plan.shape, BYTES[plan.settings.policy.dtype]
    yield (
        f"{plan.model}: {shape.parameters / 1e9:,.2f} billion parameters, {_gb(shape.parameters * size)} GB in "
        f"{plan.settings.policy.dtype} ({plan.dtype_why}); {shape.layers} layers of width {shape.hidden:,}"
    )
    yield f"a token takes {shape.cached * size / 1024:,.4g} KiB of key-value cache"
    lora = plan.settings.policy.lora
    if lora.rank:
        base = "in 4 bits" if lora.quantize_base == "4bit" else "frozen"
        yield f"adapters of rank {lora.rank} are trained; the base is {base} and is the reference too"


def _step(plan: Plan) -> Iterator[str]:
    settings = plan.settings
    work, loop = work_of(settings, make(settings)), settings.loop
    yield (
        f"{work.prompts} prompts of {work.prompt} tokens x {work.sampled} responses of {work.response} = "
        f"{work.sampled_tokens:,} tokens written"
    )
    yield (
        f"learned from: {work.prompts} x ({work.prompt} + {work.learned} x {work.response}) = {work.learned_tokens:,} tokens, "
        f"{loop.epochs_per_step} time(s), in {loop.updates_per_step} optimizer step(s)"
    )
    yield f"the run: {loop.steps} steps, {optimizer_steps(settings):,} optimizer steps"


def _layout(settings: Settings, made: Estimate) -> Iterator[str]:
    parts = ", ".join(f"{name} {_gb(size)}" for name, size in made.policy.parts().items())
    yield f"a policy rank: {_gb(made.policy.device)} GB ({parts}); with what it shares its GPU with {_gb(made.learning)}"
    if made.policy.host:
        yield f"in host memory per rank: {_gb(made.policy.host)} GB"
    yield _loading(settings, made)
    yield (
        f"an engine's GPU: weights {_gb(made.engine.weights)} GB, cache for {made.cache:,} tokens = {made.sequences:,} sequences of "
        f"full length; at most {_gb(made.generating)} GB in use"
    )
    if made.judge:
        yield f"a reward server on a rank's GPU: weights {_gb(made.judge)} GB, in host memory while the policy learns"
    time = made.time
    turns = f" + {time.turns:,.1f} taking turns" if time.turns else ""
    both = f"{time.generate:,.0f} generating {'beside' if time.ahead else '+'} {time.learn:,.0f} learning"
    yield f"about {time.total:,.0f} s a step: {both} + {time.publish:,.1f} publishing{turns}"
    work = work_of(settings, make(settings))
    yield f"about {work.sampled_tokens / time.total:,.0f} response tokens a second in all"
    if made.problems:
        yield from (f"does not fit: {problem}" for problem in made.problems)
    else:
        yield "fits"


def _loading(settings: Settings, made: Estimate) -> str:
    """What loading takes, of the device and of hosts."""
    host = made.policy.loading_host
    if settings.policy.zero_stage == 3:
        where = "on the first rank's host, which reads for all"
    else:
        where = f"per rank, {_gb(host * settings.policy.ranks)} over all {settings.policy.ranks}"
    return (
        f"while models are loaded: {_gb(made.loading)} GB of a rank's GPU; in host memory {_gb(host)} GB {where}; "
        f"an export takes {_gb(made.policy.exporting)} GB on the first rank's host"
    )


def _table(plan: Plan) -> Iterator[str]:
    names = list(dict.fromkeys(name for both in plan.stages.values() for name in both[0].parts()))
    yield "  ".join(["ZeRO", *(f"{name:>11}" for name in names), f"{'total':>9}", f"{'ckpt':>9}"])
    memory = None if plan.cluster is None else plan.cluster.gpu.memory
    for stage, (plain, checkpointed) in plan.stages.items():
        cells = (f"{_gb(plain.parts().get(name, 0)):>11}" for name in names)
        totals = [f"{_gb(one.device):>8}{_mark(one, memory)}" for one in (plain, checkpointed)]
        yield "  ".join([f"{stage:>4}", *cells, *totals])
    if memory is not None:
        yield f"* fits {_gb(memory)} GB with {FRAGMENTATION:.0%} and {_gb(CONTEXT)} GB set aside, if no engine shares the GPU"


def _mark(need: PolicyMemory, memory: float | None) -> str:
    return "*" if memory is not None and need.device * (1 + FRAGMENTATION) + CONTEXT <= memory else " "


def _proposal(proposal: Proposal) -> Iterator[str]:
    yield " ".join(proposal.overrides)
    yield from _layout(proposal.settings, proposal.estimate)
    yield from proposal.seats


def _assumed() -> Iterator[str]:
    yield (
        f"learning reaches {ASSUMED.learn:.0%} of the arithmetic, reading prompts {ASSUMED.prefill:.0%}, decoding {ASSUMED.decode:.0%} "
        f"of the memory's bandwidth, links {ASSUMED.link:.0%} of theirs"
    )
    yield (
        f"a decoding step takes {ASSUMED.decode_overhead_s * 1e3:g} ms besides, an all-reduce inside an engine {ASSUMED.hop_s * 1e6:g} us; "
        f"a host updates {ASSUMED.host_update / 1e9:g} billion offloaded parameters a second and rank; nodes are linked as in the maker's "
        "own server"
    )
    yield (
        f"each process takes {_gb(CONTEXT)} GB of its GPU for CUDA and NCCL; torch holds {FRAGMENTATION:.0%} more than its tensors; vLLM "
        f"works in {_gb(ENGINE_WORKING)} GB, a reward model that shares a GPU in {_gb(JUDGE_WORKING)}; a sleeping "
        f"engine keeps {_gb(ASLEEP)} GB"
    )


def _cluster(cluster: Cluster | None) -> str:
    assert cluster is not None, "layouts are proposed for one"
    gpu = cluster.gpu
    return f"{cluster.nodes} x {cluster.gpus_per_node} {gpu.name} ({gpu.memory / 1e9:g} GB, {gpu.link_name})"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f}" if size >= 1e8 else f"{size / 1e9:,.2g}"


def as_json(plan: Plan) -> str:
    """The plan's numbers: bytes, seconds and tokens."""
    return json.dumps(
        {
            "model": plan.model,
            "shape": asdict(plan.shape),
            "cluster": None if plan.cluster is None else asdict(plan.cluster),
            "configured": None if plan.configured is None else _numbers(plan.configured),
            "stages": {
                str(stage): {"plain": _memory(plain), "gradient_checkpointing": _memory(checkpointed)}
                for stage, (plain, checkpointed) in plan.stages.items()
            },
            "proposals": [
                {"overrides": list(one.overrides), "seats": list(one.seats)} | _numbers(one.estimate)
                for one in plan.proposals
            ],
            "refusal": plan.refusal,
        },
        indent=2,
    )


def _numbers(made: Estimate) -> dict[str, Any]:
    return asdict(made) | {"policy": _memory(made.policy), "time": asdict(made.time) | {"total": made.time.total}}


def _memory(need: PolicyMemory) -> dict[str, float]:
    return asdict(need) | {"device": need.device}
