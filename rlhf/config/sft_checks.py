"""Rules between the fields of `rlhf sft`; the findings read like those of `checks.py`.

The sections come from `rlhf train`, so some fields speak of roles that a supervised run does not have. Setting one is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from rlhf.config.data import source_problems
from rlhf.config.loader import ConfigError, load_as
from rlhf.config.lora_checks import adapter_problems
from rlhf.config.method_checks import changed
from rlhf.config.policy_checks import policy_problems
from rlhf.config.sft import SftSettings

NO_SUCH_ROLE = {
    "run": ("invariants", "max_logprob_gap"),
    "checkpoint": (),
    "tracking": ("samples_per_step",),
    "cluster": ("placement", "colocated_engines", "publish_deadline_s"),
}
"""Section -> fields that are about sampled responses, engines or a reference."""


def load_sft(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> SftSettings:
    """Read the configuration of a supervised run. Arguments and errors as those of `rlhf.config.load`."""
    return load_as(SftSettings, sft_problems, path, overrides, "sft")


def sft_problems(settings: SftSettings) -> list[str]:
    """All findings; empty for a plan that can run."""
    rules = (_roles, _tokens, _evaluation, _data)
    return [
        *(problem for rule in rules for problem in rule(settings)),
        *policy_problems(settings.policy, settings.cluster.device),
        *adapter_problems(settings.policy),
    ]


def _roles(settings: SftSettings) -> Iterator[str]:
    for section, fields in NO_SUCH_ROLE.items():
        for field in fields:
            if changed(getattr(settings, section), field):
                yield f"`{section}.{field}` is unused by `rlhf sft`, which has no engines and no reference. Remove it"
    if changed(settings.policy.lora, "publish"):
        yield "`policy.lora.publish` is unused by `rlhf sft`, which has no engines. Remove it"
    cluster = settings.cluster
    others = sorted(set(cluster.node_resources) - {"policy"})
    if others:
        yield (
            f"`cluster.node_resources`: `rlhf sft` has the role policy only, not {' and '.join(others)}. Remove what is not for it"
        )
    if cluster.address is None and ((cluster.policy_nodes or 1) > 1 or cluster.node_resources):
        field = "node_resources" if cluster.node_resources else "policy_nodes"
        yield (
            f"`cluster.{field}`: without `cluster.address` the run starts a cluster of this machine alone. Set `cluster.address` "
            "(`auto` for the cluster that this host belongs to), or remove it"
        )
    if cluster.policy_nodes is not None and cluster.policy_nodes > settings.policy.ranks:
        yield (
            f"`cluster.policy_nodes`: {settings.policy.ranks} rank(s) (`policy.ranks`) cannot be spread over {cluster.policy_nodes} "
            "nodes. Lower `cluster.policy_nodes`, or raise `policy.ranks`"
        )


def _tokens(settings: SftSettings) -> Iterator[str]:
    budget, longest = settings.policy.micro_batch_tokens, settings.data.max_tokens
    if budget < longest:
        yield (
            f"`policy.micro_batch_tokens`: a budget of {budget} tokens does not hold the longest example, of {longest} tokens "
            f"(`data.max_tokens`). Raise `policy.micro_batch_tokens` to {longest} or more, or lower `data.max_tokens`"
        )


def _evaluation(settings: SftSettings) -> Iterator[str]:
    if settings.training.eval_every > 0 and settings.data.eval_examples is None:
        yield (
            f"`training.eval_every`: a held-out loss every {settings.training.eval_every} steps needs held-out examples. Set "
            "`data.eval_examples`, or `training.eval_every: 0`"
        )


def _data(settings: SftSettings) -> Iterator[str]:
    data = settings.data
    if data.system_prompt is not None and not data.chat_template:
        yield (
            "`data.system_prompt` is a message of a chat, but `data.chat_template` is false. Remove it, or set "
            "`data.chat_template: true`"
        )
    yield from source_problems("data.examples", data.examples, weighted=True)
    yield from source_problems("data.eval_examples", data.eval_examples, weighted=False)
    if data.prompt_field == data.response_field:
        yield (
            f"`data.response_field`: prompt and response cannot both be the field `{data.prompt_field}`. Name another field in one "
            "of the two"
        )


def check_warm_up(settings: SftSettings, updates: int) -> None:
    """Raises ConfigError if the warm-up does not end within the run's optimizer steps, which only the data can tell."""
    warmup = settings.policy.warmup_steps
    if warmup > updates:
        raise ConfigError(
            f"`policy.warmup_steps`: a warm-up of {warmup} optimizer steps never ends, because the examples make {updates} of them "
            f"(`training.epochs`, `training.batch_size`). Lower `policy.warmup_steps` to {updates} or less"
        )
