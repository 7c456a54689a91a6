"""What the fields of `rlhf reward train` demand of each other, as far as that is known before the data are read.

`cluster` comes from `rlhf train`, so some of its fields speak of roles that this training does not have. Setting one is refused. What the
objective demands of the data is checked where the data are read (`rlhf.reward.training.choices`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf.config.loader import Given, UserError, load_as
from rlhf.config.method_checks import changed
from rlhf.config.reward_training import RewardTrainingSettings
from rlhf.config.reward_training_flags import both, flag_of

COMMAND = "reward train"
UNUSED = ("placement", "colocated_engines", "publish_deadline_s")
"""Fields of `cluster` that are about engines."""
OF_FULL = {
    "training": (
        "head_learning_rate",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "micro_batch_tokens",
        "eval_every",
        "ranks",
        "zero_stage",
    ),
    "model": ("dtype", "gradient_checkpointing"),
    "checkpoint": ("every",),
    "cluster": ("address",),
}
"""Section -> fields that only `method: full` reads; `epochs`, `batch_size` and `learning_rate` may stay in a file that is tried with
another method."""


def load_reward_training(
    path: str | os.PathLike[str] | None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, tuple[str, Any]] | None = None,
) -> RewardTrainingSettings:
    """Read the configuration of a reward model's training. Errors as those of `rlhf.config.load`.

    Args:
        path: a YAML file; None: overrides and options say everything.
        flags: field -> option and value (`reward_training_flags.asked`); they win over the overrides.

    Raises:
        UserError: neither a file nor the options that there must be then.
    """
    flags = flags or {}
    if path is None:
        said = {override.partition("=")[0].strip() for override in overrides} | flags.keys()
        missing = [str(flag_of(field)) for field in ("model.path", "data.train", "run.dir") if field not in said]
        if missing:
            raise UserError(
                f"`rlhf {COMMAND}` needs a CONFIG, or the options --model, --train and --output. Give {', '.join(missing)}"
            )
    given = [Given(flag, tuple(field.split(".")), value) for field, (flag, value) in flags.items()]
    return load_as(RewardTrainingSettings, reward_training_problems, path, overrides, COMMAND, given)


def reward_training_problems(settings: RewardTrainingSettings) -> list[str]:
    """All findings; empty for a training that can begin."""
    rules = (_roles, _method, _group, _objective)
    return [problem for rule in rules for problem in rule(settings)]


def _roles(settings: RewardTrainingSettings) -> Iterator[str]:
    cluster = settings.cluster
    for field in UNUSED:
        if changed(cluster, field):
            yield f"`cluster.{field}` is unused by `rlhf {COMMAND}`, which has no engines. Remove it"
    others = sorted(set(cluster.node_resources) - {"policy"})
    if others:
        yield (
            f"`cluster.node_resources`: the ranks of `rlhf {COMMAND}` have the role policy, not {' or '.join(others)}. Remove what is "
            "not for it"
        )
    if cluster.address is None and (cluster.node_resources or (cluster.policy_nodes or 1) > 1):
        field = "node_resources" if cluster.node_resources else "policy_nodes"
        yield (
            f"`cluster.{field}`: without {both('cluster.address')} the training starts a cluster of this machine alone. Set "
            "`cluster.address` (`auto` for the cluster that this host belongs to), or remove it"
        )
    if cluster.policy_nodes is not None and cluster.policy_nodes > settings.training.ranks:
        yield (
            f"`cluster.policy_nodes`: {settings.training.ranks} rank(s) (`training.ranks`) cannot be spread over {cluster.policy_nodes} "
            "nodes. Lower `cluster.policy_nodes`, or raise `training.ranks`"
        )


def _method(settings: RewardTrainingSettings) -> Iterator[str]:
    method = settings.training.method
    if method == "full":
        return
    for section, fields in OF_FULL.items():
        for field in fields:
            if changed(getattr(settings, section), field):
                yield (
                    f"{both(f'{section}.{field}')} is an option of `training.method: full` (--method full), and the method is {method}. "
                    "Leave it out"
                )
    if settings.objective.name != "auto":
        yield (
            f"{both('objective.name')}: {settings.objective.name} is for `training.method: full` (--method full); {method} has its own. "
            "Leave one of them out"
        )


def _group(settings: RewardTrainingSettings) -> Iterator[str]:
    if settings.training.method == "full" and settings.cluster.address is not None and settings.training.ranks == 1:
        yield (
            f"{both('cluster.address')}: a single rank runs in this process, not on a cluster. Leave it out, or raise "
            f"{both('training.ranks')}"
        )


def _objective(settings: RewardTrainingSettings) -> Iterator[str]:
    dimensions = settings.objective.dimensions
    if dimensions is not None and dimensions % 2:
        yield f"{both('objective.dimensions')} must be even, not {dimensions}: a GPM's space is made of planes. Add 1"
