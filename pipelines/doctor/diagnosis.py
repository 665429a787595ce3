"""`fae doctor`: checks whether this cluster, bucket and tracking server are usable for a recipe.

Each finding says what is wrong and how to fix it. `fae submit doctor` runs the same checks inside
a cluster, where the answers count.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from urllib.parse import urlsplit, urlunsplit

from fae_core.errors import UserError

from ..config import Recipe, load_recipe
from ..config.facts import path_values
from ..config.sections import TrackingSection
from ..runtime import ray_private
from ..runtime.places import unseen
from ..runtime.session import start_ray
from ..training.tracking import resolve_uri
from .bucket import check_bucket
from .cluster import check_fit
from .finding import Finding
from .nodes import check_nodes, look_at_nodes

OF_ONE_HOST = (
    "evaluate.output",
    "probe.output",
    "generator.cache",
    "data.feature_cache",
    "tracking.uri",
)
"""Places that the driver alone uses, or of which each host has its own, or that are checked apart.
"""


def doctor(
    words: Sequence[str],
    address: str | None = None,
    fix: bool = False,
    abort_uploads: bool = False,
) -> bool:
    """Print one line for each finding; returns whether there was no problem.

    `words` are [RECIPE [key=value …]] and s3:// prefixes. The recipe's own s3:// `output` and
    `storage` are checked too. With a bucket and without a recipe, Ray is not contacted unless
    `address` is given. Raises UserError for words that are neither.
    """
    buckets = [word for word in words if word.startswith("s3://")]
    rest = [word for word in words if not word.startswith("s3://")]
    if rest and "=" in rest[0]:
        raise UserError(
            f"{rest[0]}: settings need a recipe before them: fae doctor RECIPE {rest[0]}"
        )
    recipe = load_recipe(rest[0], rest[1:]) if rest else None
    for place in (recipe.output, recipe.storage) if recipe else ():
        if place and place.startswith("s3://") and place not in buckets:
            buckets.append(place)
    problems = 0
    if recipe or address or not buckets:
        problems += _print(check_cluster(recipe, address))
    if recipe or os.environ.get("MLFLOW_TRACKING_URI"):
        problems += _print(check_tracking(recipe.tracking if recipe else TrackingSection()))
    for bucket in buckets:
        problems += _print(check_bucket(bucket, fix, abort_uploads))
    print(f"{problems} problem{'s' if problems != 1 else ''}" if problems else "no problems")
    return problems == 0


def check_cluster(recipe: Recipe | None, address: str | None = None) -> Iterator[Finding]:
    """Connect to Ray and check its nodes. Raises UserError if no Ray answers at `address`."""
    if address and address.startswith(("http://", "https://")):
        raise UserError(
            f"--address {address} is a job server, which does not show nodes. Run the checks "
            f"inside the cluster: fae submit doctor RECIPE … --address {address}"
        )
    if address:
        os.environ["RAY_ADDRESS"] = address
    where = os.environ.get("RAY_ADDRESS")
    try:
        start_ray()
    except (ConnectionError, RuntimeError, ValueError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"No Ray at {where or 'this machine'}: {line[:300]}. From outside a cluster use "
            "fae submit doctor; with token authentication set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN."
        ) from None
    if not where:
        yield Finding("ok", "ray", "RAY_ADDRESS is not set: a local cluster on this machine")
    nodes, findings = look_at_nodes()
    yield from findings
    yield from check_nodes(nodes)
    if recipe:
        yield from check_fit(recipe, nodes, ray_private.most_after_scaling())
        yield from check_places(recipe)


def check_places(recipe: Recipe) -> Iterator[Finding]:
    """Whether each node finds the recipe's local places as this process does."""
    defaults = path_values(Recipe())
    given = {
        key: value
        for key, value in path_values(recipe).items()
        if value != defaults.get(key) and key not in OF_ONE_HOST
    }
    found = unseen(given)
    for key, path, node, problem in found:
        message = f"{key}={path} {problem} on {node}. Give s3://… or a folder that all nodes share."
        yield Finding("problem", "places", message)
    if given and not found:
        yield Finding("ok", "places", f"{', '.join(given)}: the same on all nodes")


def check_tracking(tracking: TrackingSection) -> Iterator[Finding]:
    """Whether MLflow answers at the address that a run would use."""
    if not tracking.enabled:
        yield Finding("ok", "tracking", "off (tracking.enabled=false)")
        return
    uri = resolve_uri(tracking)
    parts = urlsplit(uri)
    shown = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    if parts.scheme not in ("http", "https"):
        yield Finding(
            "ok",
            "tracking",
            f"{shown} is a file on this machine. A cluster needs a server: "
            "MLFLOW_TRACKING_URI=http://…",
        )
        return
    os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    from mlflow.tracking import MlflowClient

    try:
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except Exception as error:  # MLflow's clients raise errors of many kinds.
        yield Finding(
            "problem",
            "tracking",
            f"{shown} does not answer ({type(error).__name__}). Training would run without "
            "metrics. Check MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and _PASSWORD, or set "
            "tracking.enabled=false.",
        )
        return
    yield Finding("ok", "tracking", f"MLflow answers at {shown}")


def _print(findings: Iterable[Finding]) -> int:
    """Print the findings as they come; returns the number of problems."""
    problems = 0
    for finding in findings:
        print(finding, flush=True)
        problems += finding.level == "problem"
    return problems
