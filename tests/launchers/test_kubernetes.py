"""The Kubernetes manifests against KubeRay's own schemas and Kubernetes', strictly: a field that neither knows is refused."""

from __future__ import annotations

import copy
import functools
import gzip
import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from rlhf.config import load

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "launchers" / "kubernetes"
KUBERNETES = "1.31"


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((MANIFESTS / name).read_text())


@functools.cache
def schema(name: str) -> jsonschema.Draft202012Validator:
    """KubeRay's, strict. Kubernetes' own `metadata` is open in it; here it needs a name."""
    packed = Path(__file__).parent / "schemas" / f"{name}.json.gz"
    made = strict(json.loads(gzip.decompress(packed.read_bytes())))
    made["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return jsonschema.Draft202012Validator(made)


def strict(node: Any) -> Any:
    """The same schema, which also refuses fields it does not name; an API server would drop them in silence."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: strict(value) for key, value in node.items()}
    if isinstance(node.get("properties"), dict) and node.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made


def check(custom: dict[str, Any], name: str) -> None:
    """Raises jsonschema.ValidationError."""
    schema(name).validate(custom)


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]


def check_pod(template: dict[str, Any]) -> None:
    """Raises kubernetes_validate.ValidationError."""
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}} | template
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_the_manifests_are_valid() -> None:
    cluster, job = manifest("cluster.yaml"), manifest("job.yaml")
    check(cluster, "rayclusters")
    check(job, "rayjobs")
    for template in pods(cluster["spec"]):
        check_pod(template)
    kubernetes_validate.validate(manifest("storage.yaml"), KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("workerGroupSpec",), []),
        (("rayVersion",), 2.6),
        (("authOptions", "mode"), "tokens"),
        (("headGroupSpec", "rayStartParam"), {}),
        (("workerGroupSpecs", 0, "minReplicas"), "one"),
        (("workerGroupSpecs", 0, "template", "spec", "containers", 0, "volumeMount"), []),
    ],
)
def test_a_mistake_is_refused(path: tuple[Any, ...], value: Any) -> None:
    for name, file in (("rayclusters", "cluster.yaml"), ("rayjobs", "job.yaml")):
        broken = copy.deepcopy(manifest(file))
        place = broken["spec"] if name == "rayclusters" else broken["spec"]["rayClusterSpec"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            check(broken, name)


def test_a_mistake_in_kubernetes_own_objects_is_refused() -> None:
    claim = manifest("storage.yaml")
    claim["spec"]["accessMode"] = claim["spec"].pop("accessModes")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(claim, KUBERNETES, strict=True)
    template = pods(manifest("cluster.yaml")["spec"])[0]
    template["spec"]["volumes"][0]["persistentVolumeClaim"]["claim"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        check_pod(template)


def test_the_two_manifests_are_one_cluster() -> None:
    assert manifest("job.yaml")["spec"]["rayClusterSpec"] == manifest("cluster.yaml")["spec"]


def test_the_command_is_one_that_rlhf_understands() -> None:
    """Its overrides load, and it asks for the resources that the groups offer."""
    spec = manifest("job.yaml")["spec"]
    words = shlex.split(spec["entrypoint"].partition("$(")[0])
    assert words[:2] == ["rlhf", "train"]
    settings = load(ROOT / "configs" / "8b" / "online_dpo.yaml", words[3:])
    groups = spec["rayClusterSpec"]["workerGroupSpecs"]
    offered = {name for group in groups for name in json.loads(json.loads(group["rayStartParams"]["resources"]))}
    assert set(settings.cluster.node_resources.values()) == offered
    assert f"{settings.run.dir}/manifest.json" in spec["entrypoint"], "a second attempt looks where the first one wrote"
    assert spec["submissionMode"] == "HTTPMode", "in the default mode another pod's shell would look"


def test_the_wandb_key_is_only_referred_to() -> None:
    head, *workers = pods(manifest("cluster.yaml")["spec"])
    (key,) = [entry for entry in head["spec"]["containers"][0]["env"] if entry["name"] == "WANDB_API_KEY"]
    assert set(key) == {"name", "valueFrom"} and "secretKeyRef" in key["valueFrom"]
    assert not any("WANDB" in entry["name"] for pod in workers for entry in pod["spec"]["containers"][0]["env"])
