"""Every number in the configuration has bounds: what overflows or takes a thousand years is refused where it is written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from rlhf.config import ConfigError, Settings, load
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


SECTIONS = Settings.model_json_schema()["$defs"] | SftSettings.model_json_schema()["$defs"]
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
