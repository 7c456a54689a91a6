"""`rlhf doctor`: is this cluster sound, and can this run work on it? All checks, in the order in which they are reported.

Owns the order and the report; each check is in `checks_*`. A failure does not end the examination: what can be looked at is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhf.cluster.precision import choose_here, settled
from rlhf.config import Settings, UserError
from rlhf.config.cluster import ClusterSettings
from rlhf.data.assets import resolve
from rlhf.data.prompts import load_tokenizer
from rlhf.data.rendering import engine_stops
from rlhf.preflight.checks_cluster import (
    DEADLINE_S,
    Probe,
    Team,
    Unreachable,
    broken_collective,
    check_collective,
    check_ports,
    check_ray,
    check_readable,
    team,
)
from rlhf.preflight.checks_host import (
    HOST_CHECKS,
    HostFacts,
    check_alike,
    check_disk,
    check_precision,
    check_versions,
    look,
    requirements,
    worst,
)
from rlhf.preflight.checks_reward import Pair, check_reward
from rlhf.preflight.checks_step import Train, check_step
from rlhf.preflight.checks_text import check_template
from rlhf.preflight.finding import Finding
from rlhf.preflight.inputs import read_inputs
from rlhf.preflight.machine import kept_on_disk


@dataclass(frozen=True)
class Wanted:
    """What the user asked for.

    Attributes:
        pair: two responses of the user's own; None: built-in ones, with the payload of the first prompt.
        train: runs the trial step; None: leave it out.
    """

    pair: Pair | None = None
    train: Train | None = None


def examine(settings: Settings | None, wanted: Wanted) -> Iterator[Finding]:
    """All findings, one after the other as they are made.

    Args:
        settings: of the run; None: look at the environment only.
    """
    cluster = ClusterSettings() if settings is None else settings.cluster
    yield from check_surroundings(cluster, [] if settings is None else _paths(settings))
    if settings is None:
        return
    settings = settled(settings, choose_here(settings))
    try:
        inputs = read_inputs(settings)
        tokenizer = load_tokenizer(inputs.model_path)
    except UserError as error:
        yield Finding(
            "inputs", "failed", str(error), "put right what the message names; `rlhf train --dry-run` reads the same"
        )
        return
    yield Finding(
        "inputs",
        "ok",
        f"{inputs.shape.parameters / 1e6:,.1f} M parameters, {len(inputs.prompts):,} prompts, {inputs.reward}",
    )
    yield check_disk(settings.run.dir, kept_on_disk(settings, inputs.shape, settings.loop.steps))
    yield check_template(tokenizer, engine_stops(inputs.model_path, tokenizer, settings.data), settings.data)
    yield check_reward(settings, tokenizer, wanted.pair or Pair(payload=inputs.prompts[0].payload))
    if wanted.train is None:
        yield Finding("worst-case step", "skipped", "left out as asked")
    else:
        yield check_step(settings, tokenizer, wanted.train)


def check_surroundings(cluster: ClusterSettings, paths: Sequence[str]) -> Iterator[Finding]:
    """The hosts and what connects them."""
    from ray.exceptions import RayError

    try:
        with team(cluster) as found:
            try:
                facts = found.ask(Probe.facts)()
            except (RayError, TimeoutError) as error:
                yield check_ray(found, cluster.address)
                yield from _hosts([look()])
                yield _silent(found, error)
                return
            yield check_ray(found, cluster.address)
            yield from _hosts(facts)
            if found.nodes > 1:
                yield check_alike(facts)
            yield from _together(found, facts, paths)
    except Unreachable as error:
        yield from _hosts([look()])
        yield error.finding


def _hosts(facts: Sequence[HostFacts]) -> Iterator[Finding]:
    """Each check on every host, one finding for the worst."""
    needed = requirements()
    yield worst(check_versions(one, needed) for one in facts)
    for check in HOST_CHECKS:
        yield worst(check(one) for one in facts)
    yield check_precision(facts)


def _together(found: Team, facts: Sequence[HostFacts], paths: Sequence[str]) -> Iterator[Finding]:
    """What needs all nodes."""
    from ray.exceptions import RayError

    places = found.ask(Probe.listen)()
    unreached = [failure for failures in found.ask(Probe.unreached)(places) for failure in failures]
    yield check_ports(unreached, len(places))
    backend, world = "nccl" if found.gpus else "gloo", len(found.probes)
    meeting = found.ask(Probe.rendezvous)()[0]
    try:
        measured = found.ask_each(Probe.collective, [(backend, rank, world, meeting) for rank in range(world)])
        yield check_collective(backend, found.nodes, measured)
    except (RayError, TimeoutError) as error:
        yield broken_collective(backend, error)
    if paths:
        answers = found.ask(Probe.unreadable)(paths)
        yield check_readable({one.host: missing for one, missing in zip(facts, answers, strict=True)}, len(paths))


def _silent(found: Team, error: Exception) -> Finding:
    """Some node did not answer at all."""
    last = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return Finding(
        "nodes",
        "failed",
        f"not every one of {found.nodes} node(s) answered within {DEADLINE_S:g} s: {last}",
        "install this package on every node; where GPUs are listed but taken, end what holds them (`ray status`, `nvidia-smi`)",
    )


def _paths(settings: Settings) -> list[str]:
    """Files and folders that other nodes must read; hub names and assets are fetched by each node itself."""
    named = [settings.policy.model, getattr(settings.algorithm, "critic_model", None)]
    named += [source.model for _, source in settings.reward.sources()]
    return [path for path in named if path and not path.startswith("asset:") and os.path.exists(resolve(path))]


def fit(findings: Sequence[Finding]) -> bool:
    """Whether nothing failed."""
    return all(finding.state != "failed" for finding in findings)


def line(finding: Finding) -> str:
    """One finding for the terminal."""
    text = f"{finding.state:<8} {finding.name}: {finding.seen}"
    return f"{text}\n         -> {finding.remedy}" if finding.remedy else text


def as_json(findings: Sequence[Finding]) -> str:
    """All findings, and whether the cluster is fit."""
    report: dict[str, Any] = {"fit": fit(findings), "findings": [asdict(finding) for finding in findings]}
    return json.dumps(report, indent=2, ensure_ascii=False)
