"""The shipped cluster files against Ray's own schema and KubeRay's custom resource definitions."""

from __future__ import annotations

import functools
import gzip
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from fae.cli import job_commands
from fae.cluster.command import Command
from fae.cluster.kuberay import ray_job
from fae.pipelines.runtime import ray_private
from tests.tiny import ROOT

FILES = sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))
HEAD_POD = ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec")
CRDS = Path(__file__).parent / "kuberay_crds"


def strict(schema: Any) -> Any:
    """A CRD's schema as Kubernetes applies it with field validation.

    Unknown fields fail, and int-or-string is both.
    """
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("type", None)
        made.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    open_ended = "additionalProperties" in made or made.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(made.get("properties"), dict) and not open_ended and made.get("type") == "object":
        made["additionalProperties"] = False
    return made


@functools.cache
def validator(kind: str, version: str) -> jsonschema.Draft202012Validator:
    text = gzip.decompress((CRDS / f"ray.io_{kind.lower()}s.yaml.gz").read_bytes())
    definition = yaml.load(text, Loader=yaml.CSafeLoader)
    found = next(v for v in definition["spec"]["versions"] if v["name"] == version)
    schema = strict(found["schema"]["openAPIV3Schema"])
    # The CRD leaves an object's metadata to Kubernetes.
    schema["properties"]["metadata"] = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 47, "pattern": "^[a-z0-9-]+$"}},
        "additionalProperties": False,
        "required": ["name"],
    }
    return jsonschema.Draft202012Validator(schema)


def check(resource: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError."""
    validator(resource["kind"], resource["apiVersion"].partition("/")[2]).validate(resource)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_kubernetes_file_is_what_kuberay_accepts(path):
    check(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (("spec",), {"entrypont": "python"}),
        (("spec", "rayClusterSpec"), {"authOption": {"mode": "token"}}),
        (("spec", "rayClusterSpec", "authOptions"), {"mode": "tokens"}),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0), {"minReplica": 1}),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0), {"maxReplicas": "8"}),
        ((*HEAD_POD, "containers", 0), {"imgae": "x"}),
        ((*HEAD_POD, "securityContext"), {"runAsNonroot": True}),
        ((*HEAD_POD, "volumes", 0, "emptyDir"), {"sizelimit": "1Gi"}),
    ],
)  # fmt: skip
def test_a_typo_in_a_kubernetes_file_would_be_found(place, wrong):
    job = yaml.safe_load((ROOT / "cluster/kuberay/rayjob-precompute.yaml").read_text())
    part = job
    for step in place:
        part = part[step]
    part.update(wrong)
    with pytest.raises(jsonschema.ValidationError):
        check(job)


@pytest.mark.parametrize("name", ["precompute", "train generator", "tune", "run", "doctor"])
def test_what_submit_writes_for_kuberay_is_accepted_too(name, monkeypatch):
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    words = [*name.split(), "photos-dinov2s", "storage=s3://b/runs", "run=x", "output=s3://b/x"]
    check(yaml.safe_load(ray_job(Command.parse(words, job_commands()))[0]))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_pod_is_without_root_has_room_in_shm_and_its_secrets_from_a_secret(path):
    text = path.read_text()
    resource = yaml.safe_load(text)
    spec = resource["spec"].get("rayClusterSpec", resource["spec"])
    assert spec["authOptions"] == {"mode": "token"} and spec["enableInTreeAutoscaling"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert container["envFrom"] == [{"secretRef": {"name": "fae-settings"}}]
        (shm,) = (v["emptyDir"] for v in pod["volumes"] if v["name"] == "shm")
        store = int(group["rayStartParams"]["object-store-memory"])
        assert shm["medium"] == "Memory" and store < gibibytes(shm["sizeLimit"])
        assert (
            gibibytes(shm["sizeLimit"]) < gibibytes(container["resources"]["limits"]["memory"]) / 2
        )
    assert not re.search(r"AWS_SECRET|PASSWORD|AKIA", text)


def gibibytes(text: str) -> int:
    assert text.endswith("Gi")
    return int(text[:-2]) * 2**30


def test_the_entrypoints_of_the_files_are_commands_with_valid_recipes():
    from fae.pipelines.config.recipe import load_recipe

    jobs = [yaml.safe_load(p.read_text()) for p in FILES if p.name.startswith("rayjob")]
    assert len(jobs) == 3
    for job in jobs:
        python, minus_m, module, *words = job["spec"]["entrypoint"].split()
        assert (python, minus_m, module) == ("python", "-m", "fae")
        command = Command.parse(words, job_commands())
        load_recipe(command.recipe, command.arguments)


def test_gpu_nodes_and_cpu_nodes_have_the_labels_that_recipes_ask_for():
    cluster = yaml.safe_load((ROOT / "cluster/kuberay/raycluster.yaml").read_text())["spec"]
    labels = {group["groupName"]: group["labels"] for group in cluster["workerGroupSpecs"]}
    aws = yaml.safe_load((ROOT / "cluster/aws.yaml").read_text())["available_node_types"]
    for kind in ("cpu", "gpu"):
        assert labels[kind] == aws[kind]["labels"] == {"fae-nodes": kind}


def aws() -> tuple[dict[str, Any], dict[str, Any]]:
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    return yaml.safe_load((ROOT / "cluster/aws.yaml").read_text()), schema


def test_the_ray_up_file_is_what_ray_accepts():
    config, schema = aws()
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    assert "RAY_AUTH_MODE=token" in str(config["head_start_ray_commands"])


def test_the_head_may_start_the_workers_and_they_may_only_use_the_bucket():
    types = aws()[0]["available_node_types"]
    names = {
        kind: each["node_config"]["IamInstanceProfile"]["Name"] for kind, each in types.items()
    }
    assert names == {"head": "fae-head", "cpu": "fae-workers", "gpu": "fae-workers"}
    page = (ROOT / "docs/cluster.md").read_text()
    found = re.search(r"```json\n(.*?)```", page, re.DOTALL)
    assert found
    ec2, pass_role, bucket = json.loads(found[1])["Statement"]
    # What ray/autoscaler/_private/aws/node_provider.py calls on the head.
    calls = {"DescribeInstances", "RunInstances", "TerminateInstances", "CreateTags"}
    assert set(ec2["Action"]) == {f"ec2:{name}" for name in calls}
    assert pass_role["Action"] == "iam:PassRole" and "fae-workers" in pass_role["Resource"]
    assert all(action.startswith("s3:") for action in bucket["Action"])


def test_ray_chooses_no_machine_image_by_itself():
    config, _ = aws()
    ray_private.fill_in_machine_images(config)
    types = config["available_node_types"].values()
    assert {each["node_config"]["ImageId"] for each in types} == {"AMI"}


def test_the_image_has_what_the_autoscaler_on_the_head_runs():
    assert "openssh-client rsync" in (ROOT / "cluster/Dockerfile").read_text()


def test_a_typo_in_the_ray_up_file_would_be_found():
    config, schema = aws()
    config["available_node_types"]["cpu"]["min_worker"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config, schema)
