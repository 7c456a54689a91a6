"""Rules between fields. Each finding names the fields, says what is wrong and how to put it right.

Two sorts of findings: plans that cannot work (the arithmetic of batches, a wire without a GPU), and choices that
another choice would silently ignore: a value that would change nothing is rejected. What belongs to a switch that is
off (`tracking.project` while wandb is off) may stay in the file, so that one field turns it on again.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.config.ahead_checks import ahead_problems
from rlhf.config.data import source_problems
from rlhf.config.lora_checks import lora_problems
from rlhf.config.method_checks import changed, method_problems, used_responses
from rlhf.config.placement_checks import placement_problems
from rlhf.config.policy_checks import policy_problems
from rlhf.config.reward_checks import reward_problems
from rlhf.config.settings import Settings
from rlhf.config.shaping_checks import shaping_problems


def problems(settings: Settings) -> list[str]:
    """All findings, each a sentence or two; empty for a plan that can run."""
    rules = (
        _batches,
        _tokens,
        _steps,
        _sampling,
        method_problems,
        ahead_problems,
        lora_problems,
        _policy,
        _devices,
        placement_problems,
        reward_problems,
        shaping_problems,
        _sources,
        _evaluation,
    )
    return [problem for rule in rules for problem in rule(settings)]


def optimizer_steps(settings: Settings) -> int:
    """Optimizer steps of the whole run."""
    return settings.loop.steps * settings.loop.updates_per_step * settings.loop.epochs_per_step


def largest_assignment(settings: Settings) -> int:
    """Most tokens that one prompt and its used responses can have: what must fit into a micro-batch."""
    return settings.data.max_prompt_tokens + used_responses(settings.algorithm) * settings.rollout.max_tokens


def _batches(settings: Settings) -> Iterator[str]:
    prompts, ranks, updates = settings.loop.prompts_per_step, settings.policy.ranks, settings.loop.updates_per_step
    if prompts < ranks * updates:
        yield (
            f"`loop.prompts_per_step`: {prompts} prompts per step are divided over {updates} optimizer step(s) "
            f"(`loop.updates_per_step`) on {ranks} rank(s) (`policy.ranks`), which needs at least {updates} x {ranks} "
            f"= {updates * ranks} prompts, because a prompt with its responses is never split. Raise "
            f"`loop.prompts_per_step` to {updates * ranks} or more, or lower `loop.updates_per_step` or `policy.ranks`"
        )


def _tokens(settings: Settings) -> Iterator[str]:
    prompt, response = settings.data.max_prompt_tokens, settings.rollout.max_tokens
    budget, needed, n = (
        settings.policy.micro_batch_tokens,
        largest_assignment(settings),
        used_responses(settings.algorithm),
    )
    if budget < needed:
        yield (
            f"`policy.micro_batch_tokens`: a budget of {budget} tokens does not hold the most that one prompt can bring: a "
            f"prompt of {prompt} tokens (`data.max_prompt_tokens`) and the {n} response(s) that are learned from, of "
            f"{response} each (`rollout.max_tokens`), make {prompt} + {n} x {response} = {needed}. Raise "
            f"`policy.micro_batch_tokens` to {needed} or more, or lower `data.max_prompt_tokens` or `rollout.max_tokens`"
        )


def _steps(settings: Settings) -> Iterator[str]:
    loop, policy, total = settings.loop, settings.policy, optimizer_steps(settings)
    if policy.warmup_steps > total:
        yield (
            f"`policy.warmup_steps`: a warm-up of {policy.warmup_steps} optimizer steps never ends, because the run "
            f"has {loop.steps} steps x {loop.updates_per_step} updates x {loop.epochs_per_step} epochs = {total} "
            f"optimizer steps. Lower `policy.warmup_steps` to {total} or less, or raise `loop.steps`"
        )


def _sampling(settings: Settings) -> Iterator[str]:
    if settings.rollout.temperature == 0:
        yield (
            "`rollout.temperature`: 0 is greedy, so all responses to a prompt would be identical and there would be "
            "nothing to compare. Set `rollout.temperature` above 0, for example"
            " to 1.0"
        )


def _policy(settings: Settings) -> Iterator[str]:
    yield from policy_problems(settings.policy, settings.cluster.device)


def _devices(settings: Settings) -> Iterator[str]:
    rollout, device = settings.rollout, settings.cluster.device
    if device == "cpu":
        if rollout.transfer in ("nccl", "ipc"):
            yield (
                f"`rollout.transfer`: {rollout.transfer} moves weights between GPUs, but `cluster.device` is cpu. Set "
                "`rollout.transfer` to gloo or auto"
            )
        if changed(rollout, "gpu_memory_utilization"):
            yield "`rollout.gpu_memory_utilization` is unused with `cluster.device: cpu`. Set `rollout.cpu_kv_cache_gb`"
    if device == "cuda" and changed(rollout, "cpu_kv_cache_gb"):
        yield "`rollout.cpu_kv_cache_gb` is unused with `cluster.device: cuda`. Set `rollout.gpu_memory_utilization`"


def _sources(settings: Settings) -> Iterator[str]:
    yield from source_problems("data.prompts", settings.data.prompts, weighted=True)
    yield from source_problems("data.eval_prompts", settings.data.eval_prompts, weighted=False)


def _evaluation(settings: Settings) -> Iterator[str]:
    if settings.loop.eval_every > 0 and settings.data.eval_prompts is None:
        yield (
            f"`loop.eval_every`: an evaluation every {settings.loop.eval_every} steps needs held-out prompts. Set "
            "`data.eval_prompts`, or `loop.eval_every: 0`"
        )
