"""Which of this shell's variables travel with a job: an allow-list, and never a secret.

The head node stores what a job is given (`runtime_env`, entrypoint, metadata), and its dashboard
and `ray job list` show it. Credentials therefore come to the nodes from their role or their
Kubernetes Secret, not from here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit, urlunsplit

from .errors import SubmitError

# Nothing of RAY_*: it would overwrite the cluster's own addresses and token, and Ray refuses a job
# whose driver sets a variable that the job sets too.
ALLOWED = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
    "AWS_NO_SIGN_REQUEST",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "FAE_S3_ADDRESSING",
    "FAE_S3_PATIENCE",
    "MLFLOW_TRACKING_URI",
)
SECRET_NAME = re.compile(
    r"SECRET|TOKEN|PASSW|CREDENTIAL|PRIVATE|AUTH|COOKIE|SIGNATURE|(^|_)KEY(_|$)|KEY_ID$|APIKEY",
    re.I,
)
USERINFO = re.compile(r"://[^/\s@]+@")
WHERE_SECRETS_GO = (
    "A job's environment is stored on the head node and shown in its dashboard. Give the nodes "
    "their own: an instance role (aws.yaml), or envFrom a Kubernetes Secret "
    "(cluster/kuberay/*.yaml)."
)


def job_environment(
    names: Sequence[str], shell: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Variables for the job, and remarks on what was changed or left out.

    They are those of ALLOWED that `shell` has, and `names`. Raises SubmitError for a name that
    looks like a secret's, a name that the shell has not, and a value that holds a password.
    """
    made: dict[str, str] = {}
    remarks: list[str] = []
    for name in [name for name in ALLOWED if shell.get(name)]:
        value, without = shell[name], without_userinfo(shell[name])
        if value != without:
            remarks.append(
                f"{name} is sent without the user and password in it; the nodes need them from "
                "their Secret (MLflow: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)."
            )
        if name == "MLFLOW_TRACKING_URI" and not without.startswith(("http://", "https://")):
            remarks.append(f"{name} is not sent: it is a file of this machine, not a server.")
            continue
        made[name] = without
    for name in names:
        if "=" in name:
            raise SubmitError(
                f"--env {name.partition('=')[0]}=…: give the name alone, its value comes from this "
                "shell."
            )
        if SECRET_NAME.search(name):
            raise SubmitError(f"--env {name}: that looks like a secret. {WHERE_SECRETS_GO}")
        if name not in shell:
            raise SubmitError(f"--env {name}: this shell has no such variable.")
        refuse_password(f"--env {name}", shell[name])
        made[name] = shell[name]
    return made, remarks


def without_userinfo(url: str) -> str:
    """`url` without `user:password@`; itself where there is none."""
    if not USERINFO.search(url):
        return url
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def refuse_password(what: str, value: str) -> None:
    """Raises SubmitError, without the value, if it is an address with `user:password@` in it."""
    if USERINFO.search(value):
        raise SubmitError(
            f"{what}: the address holds a user or a password. {WHERE_SECRETS_GO} For MLflow these "
            "are MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
        )
