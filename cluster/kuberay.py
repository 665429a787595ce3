"""`fae submit --backend kuberay`: the command as a RayJob, made from a template in cluster/kuberay.

The pods run the code of their image, so the command and its settings are all that is filled in.
Credentials stay in the Secret that the template names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from .command import Command
from .environment import job_environment
from .errors import SubmitError

TEMPLATES = Path(__file__).parent / "kuberay"
TEMPLATE_OF = {"tune": "rayjob-tune.yaml", "precompute": "rayjob-precompute.yaml"}


def ray_job(
    command: Command, env: list[str] | None = None, image: str | None = None
) -> tuple[str, list[str]]:
    """The RayJob's YAML, named by the submission id, and remarks. Raises SubmitError, RecipeError.

    A sweep and every trainer have a template of their own; the others use precompute's, whose
    cluster has CPU nodes and GPU nodes.
    """
    if command.recipe_is_file:
        raise SubmitError(
            f"{command.recipe}: the pods have the image's files alone. Put the recipe into "
            "pipelines/config/recipes, build the image (cluster/Dockerfile) and give the recipe's "
            "name."
        )
    recipe = command.load()
    command.refuse_paths_of_this_machine(recipe)
    environment, remarks = job_environment(env or [], os.environ)
    default = "rayjob-train.yaml" if command.name.startswith("train") else "rayjob-precompute.yaml"
    job: dict[str, Any] = yaml.safe_load(
        (TEMPLATES / TEMPLATE_OF.get(command.name, default)).read_text()
    )
    job["metadata"]["name"] = command.submission_id(recipe)
    job["spec"]["entrypoint"] = command.entrypoint
    if environment:
        job["spec"]["runtimeEnvYAML"] = yaml.safe_dump({"env_vars": environment})
    if image:
        for container in _containers(job["spec"]):
            container["image"] = image
    return yaml.dump(job, Dumper=_Plain, sort_keys=False, width=120), remarks


def apply(document: str) -> int:
    """Apply the YAML; kubectl's exit status. Raises SubmitError where there is no kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise SubmitError(
            "--apply: no kubectl on this machine. Write the YAML with --output and apply it "
            "elsewhere."
        )
    return subprocess.run([kubectl, "apply", "-f", "-"], input=document.encode()).returncode


def _containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [group["template"] for group in groups] + [spec["submitterPodTemplate"]]
    return [container for pod in pods for container in pod["spec"]["containers"]]


class _Plain(yaml.SafeDumper):
    """Without anchors: the templates' shared resources are written out."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
