"""Rules between the fields of `reward`: who judges and how it is reached, the servers, the canaries.

Transforms and ensembles have checks of their own (`shaping_checks`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import urlsplit

from rlhf.config.base import is_host
from rlhf.config.method_checks import changed
from rlhf.config.reward import VERIFIERS, SourceSettings
from rlhf.config.settings import Settings


def reward_problems(settings: Settings) -> Iterator[str]:
    """All findings about `reward`."""
    for place, source in settings.reward.sources():
        yield from _source(place, source)
    if settings.reward.kind == "several":
        yield from _unused(
            settings.reward, "reward", "path", "url", "input", instead="`reward.members` name the judges"
        )
    yield from _servers(settings)
    yield from _canaries(settings)


def _source(place: str, source: SourceSettings) -> Iterator[str]:
    if source.known.by == "members":
        return  # `shaping_checks` refuses an ensemble in an ensemble
    yield from RULES[source.known.by](place, source)
    if "path" not in source.known.reads:
        yield from _unused(source, place, "path", instead="the service knows what it judges with")
    if "url" not in source.known.reads:
        yield from _unused(source, place, "url", instead="it is where a service answers")
    if "judge_prompt" not in source.known.reads:
        yield from _unused(source, place, "judge_prompt", instead="it is what an LLM judge is asked with")
    if "input" not in source.known.reads and changed(source, "input"):
        yield (
            f"`{place}.input` is what a model that scores reads, but `{place}.kind` is {source.kind}, which is given both "
            f"prompt and responses. Remove it, or set `{place}.kind: model`"
        )


def _service(place: str, source: SourceSettings) -> Iterator[str]:
    if source.url is None:
        yield (
            f"`{place}.url` is missing: where the service answers, such as `http://host:8000`. `rlhf reward serve` starts one"
        )
    else:
        yield from _url(place, source.url, "http://host:8000", "RLHF_REWARD_TOKEN")


def _url(place: str, url: str, example: str, secret: str) -> Iterator[str]:
    """What an address must be. It is written into the run folder, so it holds no secret, and a message shows none."""
    remedy = f"Write it as `{example}`"
    if not url.startswith(("http://", "https://")):
        shown = url.rpartition("@")[2]
        yield f"`{place}.url`: `{shown:.80}` does not begin with http:// or https://. {remedy}"
        return
    try:
        parts = urlsplit(url)
        sound = is_host(parts.hostname) and parts.port != 0 and re.fullmatch(r"[\x21-\x7e]+", url) is not None
    except ValueError:  # a port or an IPv6 address that is none
        yield f"`{place}.url` is no address of a service (a port is at most 65535, an IPv6 address stands in brackets). {remedy}"
        return
    if "@" in parts.netloc or parts.query or parts.fragment:
        yield (
            f"`{place}.url` holds a user name, a password, a query or a fragment, and the run folder would keep it. Give the bare address, "
            f"such as `{example}`, and the secret in the environment variable {secret}"
        )
    elif not sound:
        yield f"`{place}.url`: `{url!a:.80}` names nothing that a host can be called, or has letters that no address has. {remedy}"


def _function(place: str, source: SourceSettings) -> Iterator[str]:
    if source.path is None:
        yield f"`{place}.path` is missing: the import path of the function, `module:name`"
    elif not _is_import_path(source.path):
        yield (
            f"`{place}.path`: a function is named by its import path, `module:name`, not `{source.path}`. Correct "
            f"`{place}.path`, or set `{place}.kind: model`"
        )


def _model(place: str, source: SourceSettings) -> Iterator[str]:
    if source.path is None:
        yield (
            f"`{place}.path` is missing: who judges. Give a reward model's folder; or with `{place}.kind: function` an import "
            f"path, `module:name`; or with `{place}.kind: remote` a service's `{place}.url`"
        )
    elif _is_import_path(source.path):
        yield (
            f"`{place}.path`: `{source.path}` looks like the import path of a function, but `{place}.kind` is "
            f"{source.kind}. Set `{place}.kind: function`, or give a model's folder"
        )


def _verifier(place: str, source: SourceSettings) -> Iterator[str]:
    if source.path not in VERIFIERS:
        yield f"`{place}.path`: `{source.path}` is no verifier. Choose one of {', '.join(VERIFIERS)}"


def _llm_judge(place: str, source: SourceSettings) -> Iterator[str]:
    if source.path is None:
        yield (
            f"`{place}.path` is missing: the folder of the language model that judges, or, with `{place}.url`, the name that the "
            "endpoint knows it by"
        )
    if source.url is not None:
        yield from _url(place, source.url, "http://host:8000/v1", "OPENAI_API_KEY")


RULES: Mapping[str, Callable[[str, SourceSettings], Iterator[str]]] = {
    "model": _model,
    "language model": _llm_judge,
    "function": _function,
    "verifier": _verifier,
    "service": _service,
}
"""Who judges -> what its fields must be."""


def _is_import_path(path: str) -> bool:
    return ":" in path and not path.startswith("asset:") and "/" not in path


def _servers(settings: Settings) -> Iterator[str]:
    reward = settings.reward
    kinds = [source.kind for _, source in reward.sources()]
    if settings.cluster.device == "cpu" and changed(reward, "gpus"):
        yield "`reward.gpus` is unused with `cluster.device: cpu`. Remove it"
    loads_model = any(source.model is not None for _, source in reward.sources())
    shares = settings.cluster.placement == "colocated" and "llm_judge" not in kinds
    if settings.cluster.device == "cuda" and loads_model and reward.gpus == 0 and not shares:
        instead = "" if "llm_judge" in kinds else ", or `cluster.placement: colocated` to take turns with the policy"
        yield (
            "`reward.gpus`: with `cluster.device: cuda` a reward model runs on a GPU, and its servers reserve none. Set "
            f"`reward.gpus: 1` (or a fraction, for several servers on one){instead}, or `cluster.device: auto` to judge on CPUs"
        )
    if settings.cluster.device != "cpu" and loads_model and reward.gpus == 0 and shares:
        if reward.servers > settings.policy.ranks:
            yield (
                f"`reward.servers`: with `cluster.placement: colocated` each reward server shares the GPU of another policy rank, so "
                f"{reward.servers} servers need as many ranks, and `policy.ranks` is {settings.policy.ranks}. Lower it, or give the "
                "servers GPUs of their own (`reward.gpus`)"
            )
    if not loads_model:
        yield from _unused(
            reward, "reward", "batch_size", "batch_tokens", "max_wait_ms", instead="it is about the batches of a model"
        )
    elif reward.kind == "llm_judge":
        yield from _unused(reward, "reward", "max_wait_ms", instead="vLLM takes questions into its batch as they come")
    if changed(reward, "cache") and not any(source.known.repeatable for _, source in reward.sources()):
        yield (
            f"`reward.cache`: verdicts are remembered for models and verifiers, whose verdict on the same text is always the "
            f"same, and `reward.kind` is {reward.kind}. Remove it"
        )


def _canaries(settings: Settings) -> Iterator[str]:
    reward = settings.reward
    if reward.canaries is None:
        fields = ("canaries_every", "canaries_wrong", "canaries_tolerance")
        yield from _unused(reward, "reward", *fields, instead="there are no `reward.canaries`")


def _unused(section: SourceSettings, place: str, *fields: str, instead: str) -> Iterator[str]:
    for field in fields:
        if changed(section, field):
            yield f"`{place}.{field}` would change nothing with `{place}.kind: {section.kind}`: {instead}. Remove it"
