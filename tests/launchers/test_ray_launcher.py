"""The files for Ray's cluster launcher against Ray's own validation, and against what the rest of the project expects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError

FOLDER = Path(__file__).parents[2] / "launchers" / "ray"
NAMES = sorted(path.name for path in FOLDER.glob("*.yaml"))


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


def validated(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as `ray up` would use it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", NAMES)
def test_ray_accepts_it(name: str) -> None:
    assert validated(read(name))["cluster_name"] == "rlhf"


@pytest.mark.parametrize("name", NAMES)
def test_a_typo_is_refused(name: str) -> None:
    config = read(name)
    config["setup_command"] = config.pop("setup_commands")
    with pytest.raises(ValidationError):
        validated(config)


@pytest.mark.parametrize("name", NAMES)
def test_every_ray_command_has_the_environment_and_the_token(name: str) -> None:
    config = read(name)
    assert "RAY_AUTH_MODE=token" in config["setup_commands"][-1]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        assert command.startswith(". ~/.rlhf_environment && ")


def test_aws_nodes_offer_the_roles_resources() -> None:
    types = validated(read("aws.yaml"))["available_node_types"]
    assert types["policy"]["resources"]["policy_node"] == types["rollout"]["resources"]["rollout_node"] == 1
    assert sum(kind["min_workers"] for name, kind in types.items() if name != "head") == 2
