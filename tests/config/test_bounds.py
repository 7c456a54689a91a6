"""Every number in the configuration has bounds: what overflows or takes a thousand years is refused where it is written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from rlhf.config import ConfigError, Settings, load
from rlhf.config.method_checks import method_warnings
from rlhf.config.reward_training import RewardTrainingSettings
from rlhf.config.sft import SftSettings

LOWER, UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")


def numbers(schema: dict[str, Any], place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every number that a JSON schema takes, with its place."""
    if schema.get("type") in ("integer", "number") and not {"const", "enum"} & schema.keys():
        yield place, schema
    for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("prefixItems", ())):
        yield from numbers(part, place)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from numbers(schema[key], f"{place}[]")
    for name, part in schema.get("properties", {}).items():
        yield from numbers(part, f"{place}.{name}")


TREES = (Settings, SftSettings, RewardTrainingSettings)
SECTIONS = {name: part for tree in TREES for name, part in tree.model_json_schema()["$defs"].items()}
NUMBERS = {place: schema for name, part in SECTIONS.items() for place, schema in numbers(part, name)}


def test_every_number_has_a_lower_and_an_upper_bound() -> None:
    assert len(NUMBERS) > 150
    unbounded = [
        place
        for place, schema in NUMBERS.items()
        if not any(key in schema for key in LOWER) or not any(key in schema for key in UPPER)
    ]
    assert not unbounded
    bounds = [schema[key] for schema in NUMBERS.values() for key in (*LOWER, *UPPER) if key in schema]
    assert all(math.isfinite(bound) and abs(bound) <= 2**32 for bound in bounds)


@pytest.mark.parametrize("value", ["1e308", "1e400", "-1e400", ".inf", ".nan", "-1", "9" * 500, "9" * 5000, "[]", "''"])
@pytest.mark.parametrize(
    "field",
    [
        "rollout.cpu_kv_cache_gb",
        "loop.steps",
        "run.seed",
        "policy.learning_rate",
        "reward.deadline_s",
        "reward.servers",
        "algorithm.beta",
    ],
)
def test_a_number_out_of_bounds_names_its_field(valid: str, field: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(valid, [f"{field}={value}"])
    message = str(caught.value)
    assert field in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    "override",
    [
        "reward.servers=1000000",
        "policy.ranks=1000000",
        "rollout.engines=1000000",
        "reward.deadline_s=1e-9",
        "algorithm.beta=1e-300",
    ],
)
def test_absurd_sizes_and_deadlines(valid: str, override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        load(valid, [override])


@pytest.mark.parametrize("address", ["nonsense", "host:port", "http://head:8265", "head:123456", "''"])
def test_what_is_no_address(valid: str, address: str) -> None:
    with pytest.raises(ConfigError, match="`cluster.address` must be `auto`, HOST:PORT or ray://HOST:PORT"):
        load(valid, [f"cluster.address={address}"])


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "ray://head.of-this:10001", "'[::1]:6379'"])
def test_what_is_an_address(valid: str, address: str) -> None:
    assert load(valid, [f"cluster.address={address}"]).cluster.address == address.strip("'")


SECRET = "correct-horse"


@pytest.mark.parametrize("kind", ["remote", "llm_judge"])
@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{SECRET}@host:8000",
        f"http://{SECRET}@host:8000",
        f"http://host:8000/?token={SECRET}",
        f"http://host:8000/#{SECRET}",
        f"ftp://user:{SECRET}@host",
        f"user:{SECRET}@host",
        "http://",
        "http://:8000",
        "http://host:99999",
        "http://host:0",
        "http://host:port",
        "http://[::1",
        "http://ho st",
        "http://höst",
        "http:///path",
    ],
)
def test_what_is_no_address_of_a_service(valid: str, kind: str, url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(
            valid,
            [f"reward.kind={kind}", "reward.path=" + ("null" if kind == "remote" else "name"), f"reward.url='{url}'"],
        )
    message = str(caught.value)
    assert "`reward.url`" in message and "http://host:8000" in message
    assert SECRET not in message


def test_an_evaluation_that_never_comes_is_said(valid: str) -> None:
    held_out = ("data.eval_prompts=held_out.jsonl", "loop.steps=8")
    assert not list(method_warnings(load(valid, [*held_out, "loop.eval_every=8"])))
    (warning,) = method_warnings(load(valid, [*held_out, "loop.eval_every=9"]))
    assert warning.startswith("`loop.eval_every`: 9 is more than the run's steps")
