"""The plan of a run in words, for `rlhf train ... --dry-run`: what will run where, how large, and with what memory.

Reads configuration, tokenizer and prompts (through `inputs`); loads no weights and starts nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf.algorithms import Algorithm, PolicyGradient, Source, catalogue
from rlhf.algorithms.anchors import Ema, Extrapolated, Fixed, Previous, UpdateRule
from rlhf.cluster.devices import shared_rewards, uses_gpu
from rlhf.cluster.precision import Choice
from rlhf.config import Settings
from rlhf.config.algorithm import METHODS
from rlhf.config.checks import largest_assignment, optimizer_steps
from rlhf.config.data import DataSource, in_words
from rlhf.config.method_checks import used_responses
from rlhf.data.loading_time import with_startup_deadline
from rlhf.data.order import Share
from rlhf.preflight.gpu_fit import GpuFit
from rlhf.preflight.inputs import Inputs
from rlhf.preflight.machine import check_memory, size_in_words
from rlhf.preflight.memory import GIB, engine_memory, policy_memory
from rlhf.preflight.ready import ready
from rlhf.training.resume import Start, run_contents, starting_point
from rlhf.transfer.choice import backend_of
from rlhf.types import Prompt


def describe(settings: Settings, debug: bool = False, resume: bool = False) -> str:
    """The plan, after everything that can be validated without weights has been.

    Args:
        debug: plan for `--debug`: all roles in one process.
        resume: plan for `--resume`: the run in `run.dir` goes on.

    Raises:
        UserError: the run cannot work as configured.
    """
    found = ready(settings, debug, resume)
    found.gpu_fit.require()
    settings, inputs, algorithm = found.settings, found.inputs, found.algorithm
    device = "cuda" if uses_gpu(settings.cluster) else "cpu"
    parts = {
        "Run": _run(settings, _going_on(found.asked, inputs) if resume else []),
        "Inputs": _inputs(settings, inputs),
        "Algorithm": _algorithm(settings, inputs, algorithm),
        "Roles": _roles(settings, inputs, device, debug, found.choice),
        "Batches": _batches(settings, inputs, algorithm),
        "Tokens": _tokens(settings, inputs, algorithm),
        "Memory (estimates)": _memory(settings, inputs, algorithm, device, found.gpu_fit),
        "Checked": [*inputs.verdicts, *found.seen],
    }
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in parts.items())


def _going_on(settings: Settings, inputs: Inputs) -> list[str]:
    """Where a resumed run goes on, a line each. Raises UserError if it cannot."""
    contents = run_contents(inputs.model_path, inputs.prompts)
    return start_lines(starting_point(settings, contents, settings.loop.steps))


def start_lines(start: Start | None) -> list[str]:
    """The same in words."""
    return ["begins anew: nothing is recorded yet"] if start is None else list(start.words())


def _run(settings: Settings, going_on: Sequence[str]) -> Iterator[str]:
    checkpoint, tracking = settings.checkpoint, settings.tracking
    folder = os.path.abspath(settings.run.dir)
    yield f"folder {folder}; seed {settings.run.seed}"
    yield from going_on
    every = f"every {checkpoint.every} steps, the last {checkpoint.keep} kept" if checkpoint.every else "never"
    yield f"checkpoints: {every}; export of the final policy: {'yes' if checkpoint.export else 'no'}"
    project = "" if tracking.wandb == "off" else f", project {tracking.project}"
    yield f"wandb: {tracking.wandb}{project}; console: {tracking.console}"


def _inputs(settings: Settings, inputs: Inputs) -> Iterator[str]:
    millions = inputs.shape.parameters / 1e6
    yield f"policy and reference: {settings.policy.model}, {inputs.model_type}, {millions:,.1f} M parameters"
    yield f"prompts: {_count(inputs.prompts)} from {in_words(settings.data.prompts)}"
    drawn = settings.loop.steps * settings.loop.prompts_per_step
    yield from mixture_lines(settings.data.prompts, inputs.prompts.shares, drawn)
    if inputs.eval_prompts:
        used = min(len(inputs.eval_prompts), settings.loop.eval_limit)
        every = f"every {settings.loop.eval_every} steps, and " if settings.loop.eval_every else ""
        yield f"held-out prompts: {_count(inputs.eval_prompts)}; {used} are used {every}before and after the run"
    else:
        yield "held-out prompts: none, so nothing is evaluated"
    yield f"reward: {inputs.reward}"


def mixture_lines(sources: str | Sequence[DataSource], shares: Sequence[Share], drawn: int) -> Iterator[str]:
    """How often a run goes through each source of a mixture; nothing for what is none.

    Args:
        drawn: draws of the whole run.
    """
    total = sum(share.weight for share in shares)
    of = () if isinstance(sources, str) or not shares else sources
    for source, share in zip(of, shares, strict=True):
        part = share.weight / total
        yield (
            f"  {part:.1%} of the draws from {source.path}: {share.size:,} rows, gone through "
            f"{part * drawn / share.size:.2g} times in the run"
        )


def _count(prompts: Sequence[Prompt]) -> str:
    return f"{len(prompts):,} prompts of up to {max(len(prompt.token_ids) for prompt in prompts)} tokens"


def _algorithm(settings: Settings, inputs: Inputs, algorithm: Algorithm) -> Iterator[str]:
    choices, steps = catalogue.describe(algorithm), settings.loop.steps
    method = METHODS.get(algorithm.name)
    if method is None:
        yield f"{algorithm.name}, an algorithm of your own"
    else:
        yield f"{algorithm.name}: {(method.__doc__ or '').partition(':')[0]} ({(method.model_fields['name'].description or '')[:-1]})"
    written = [_source(source, "reference" if algorithm.partner is None else "partner") for source in algorithm.sources]
    written += ["the data set's chosen and rejected"] * algorithm.dataset_pairs
    yield f"responses to each prompt: {', '.join(written)}"
    judge = inputs.reward if algorithm.judged else "none: the data set says which response is the better one"
    yield f"judged by {judge}; learned from: {choices.builder}"
    objective = algorithm.objective
    if isinstance(objective, PolicyGradient):
        yield f"policy gradient: {choices.estimator}"
        if objective.critic is not None:
            start = objective.critic.model or "the policy's body with a fresh head"
            alone = objective.critic.warmup_steps
            yield f"critic: starts from {start}" + (
                f"; in the first {_n(alone, 'step')} only it learns" if alone else ""
            )
    else:
        yield f"loss: {choices.link}; score of a response: {choices.score}"
    if choices.anchor != "none":
        yield f"reference: {_rule(algorithm.reference, steps)}"
    if algorithm.mixes:
        second = "the reference" if algorithm.partner is None else f"a partner: {_rule(algorithm.partner, steps)}"
        yield f"each engine holds a second model beside the policy, {second}"


def _source(source: Source, partner: str) -> str:
    """Who writes how many, in words."""
    share = source.mixture
    writer = {0.0: "policy", 1.0: partner}.get(share, f"mixture policy^{1 - share:g} {partner}^{share:g}")
    return f"{source.n} by the {writer}{', greedily' if source.greedy else ''}"


def _rule(rule: UpdateRule, steps: int) -> str:
    """An update rule in words."""
    if isinstance(rule, Fixed):
        return "the starting policy, unchanged"
    if isinstance(rule, Ema):
        return f"an average of the policy, of which {rule.decay:g} stays in each step"
    rounds = f"{_n(-(-steps // rule.every), 'round')} of {_n(rule.every, 'step')}"
    if isinstance(rule, Extrapolated):
        return f"the policy at the start of the round, moved on by {rule.alpha:g} of its last change; {rounds}"
    assert isinstance(rule, Previous)
    return f"the policy at the start of the round; {rounds}"


def _roles(settings: Settings, inputs: Inputs, device: str, debug: bool, choice: Choice) -> Iterator[str]:
    rollout, policy, reward = settings.rollout, settings.policy, settings.reward
    where = "Ray actor" if not debug else "object in this process"
    shards = f" over {rollout.tensor_parallel_size} devices" if rollout.tensor_parallel_size > 1 else ""
    yield f"rollout: {rollout.engines} x vLLM engine{shards}, each a {where}, on {device}"
    kind = f"{policy.dtype}, ZeRO {policy.zero_stage}"
    yield f"policy: {policy.ranks} x DeepSpeed rank ({kind}), each a {where}, on {device}"
    shared = ", on the GPU of a policy rank in turns with it" if shared_rewards(settings, debug) else ""
    yield f"reward: {reward.servers} x server, each a {where}{shared}: {inputs.reward}"
    yield dtype_line(choice, settings.policy.learning_rate, settings.cluster.address)
    if debug:
        yield "debug mode: the roles take turns on one device, by the same code path"
        return
    transfer = backend_of(settings, local=False, gpu=device == "cuda")
    yield f"new weights reach the engines by {transfer} after every step, and each engine attests them"
    cluster = "a Ray cluster started for this run" if settings.cluster.address is None else settings.cluster.address
    actors = rollout.engines + policy.ranks + reward.servers
    yield f"cluster: {cluster}; {actors} actors; this machine has {os.cpu_count()} cores"
    deadline = with_startup_deadline(settings).cluster.startup_deadline_s
    yield f"an actor that has not loaded its model after {deadline:,.0f} s ends the run (`cluster.startup_deadline_s`)"


def dtype_line(choice: Choice, rate: float | Mapping[Any, float], address: str | None) -> str:
    """The type that the run computes in and why, with its learning rate."""
    assert not isinstance(rate, Mapping), "chosen with the type"
    elsewhere = "" if address is None else "; with `auto` the nodes of the cluster are asked when the run starts"
    return f"computes in {choice.dtype} ({choice.why}), learning rate {rate:g}{elsewhere}"


def _batches(settings: Settings, inputs: Inputs, algorithm: Algorithm) -> Iterator[str]:
    loop, k = settings.loop, algorithm.responses_per_prompt
    ranks, prompts = settings.policy.ranks, settings.loop.prompts_per_step
    yield f"a step: {prompts} prompts x {k} responses = {prompts * k:,} responses, {_items(settings, algorithm)}"
    share = prompts / (loop.updates_per_step * ranks)
    yield (
        f"an optimizer step: {prompts} prompts / ({_n(loop.updates_per_step, 'update')} x {_n(ranks, 'rank')}) = about "
        f"{share:.3g} prompts per rank"
    )
    yield (
        f"the run: {_n(loop.steps, 'step')} x {_n(loop.updates_per_step, 'update')} x "
        f"{_n(loop.epochs_per_step, 'epoch')} = {_n(optimizer_steps(settings), 'optimizer step')}"
    )
    drawn = loop.steps * prompts
    further = f", and at most {loop.refill * drawn:,} in place of those that teach nothing (`loop.refill`)"
    yield f"prompts drawn: {drawn:,} = {drawn / len(inputs.prompts):.2f} times the file{further if loop.refill else ''}"


def _items(settings: Settings, algorithm: Algorithm) -> str:
    """How many training items a step can give."""
    prompts, used = settings.loop.prompts_per_step, used_responses(settings.algorithm)
    if algorithm.name not in METHODS:
        return "of which your algorithm makes its items"
    if isinstance(algorithm.objective, PolicyGradient):
        return f"of which at most {prompts * used:,} are learned from"
    every_two = getattr(settings.algorithm, "pairing", None) == "all"
    return f"at most {prompts * (used * (used - 1) // 2 if every_two else 1):,} pairs"


def _tokens(settings: Settings, inputs: Inputs, algorithm: Algorithm) -> Iterator[str]:
    prompts, response = settings.loop.prompts_per_step, settings.rollout.max_tokens
    sampled = prompts * (1 + settings.loop.refill) * sum(source.n for source in algorithm.sources) * response
    yield f"sampled in a step: at most {sampled:,} response tokens, {sampled // settings.rollout.engines:,} per engine"
    if algorithm.name not in METHODS:
        return
    longest, used = max(len(prompt.token_ids) for prompt in inputs.prompts), used_responses(settings.algorithm)
    most, limit = longest + used * response, largest_assignment(settings)
    yield f"one prompt brings at most {longest} + {used} x {response} = {most} tokens to learn from; at the limits {limit}"
    yield f"learned from in a step: at most {prompts} x {most} = {prompts * most:,} tokens"
    fit = settings.policy.micro_batch_tokens // most
    share = -(-prompts // (settings.loop.updates_per_step * settings.policy.ranks))
    yield (
        f"a micro-batch of {settings.policy.micro_batch_tokens:,} tokens holds {fit} such prompts, so an optimizer step "
        f"is at most {_n(-(-share // fit), 'micro-batch', 'es')} on each rank"
    )


def _memory(settings: Settings, inputs: Inputs, algorithm: Algorithm, device: str, fit: GpuFit) -> Iterator[str]:
    gpu, evaluates = device == "cuda", settings.data.eval_prompts is not None
    need = policy_memory(inputs.shape, settings.policy, algorithm, evaluates, largest_assignment(settings), gpu)
    words = ", ".join(f"{name} {size_in_words(size)}" for name, size in need.parts().items())
    yield f"each policy rank: {size_in_words(need.device)} ({words})"
    if need.host:
        yield f"kept in host memory by each policy rank: {size_in_words(need.host)}"
    if gpu:
        reader = "the first policy rank" if settings.policy.zero_stage == 3 else "each policy rank"
        yield f"in host memory of {reader} while models are loaded: {size_in_words(need.loading_host)}"
    engine = engine_memory(inputs.shape, settings.rollout, settings.policy, algorithm.mixes, gpu)
    shown = f"weights {size_in_words(engine.weights)}" + (" for two models" if algorithm.mixes else "")
    if gpu:
        fraction = settings.rollout.gpu_memory_utilization
        token = f"{engine.cached_token / 2**10:,.0f} KiB per token"
        yield f"each engine worker: {fraction:.0%} of its GPU: {shown}, the rest key-value cache ({token})"
        yield from fit.lines()
        return
    cache = settings.rollout.cpu_kv_cache_gb * GIB
    yield (
        f"each engine: {size_in_words(engine.weights + cache)} ({shown}, key-value cache {size_in_words(cache)}: room for "
        f"{engine.room(cache):,} tokens)"
    )
    yield check_memory(settings, inputs.shape, algorithm)


def _n(count: int, noun: str, plural: str = "s") -> str:
    return f"{count:,} {noun}{'' if count == 1 else plural}"
