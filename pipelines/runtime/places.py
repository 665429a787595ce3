"""Whether the nodes of a cluster see a job's local places, asked before the job's first task.

A local path means another folder on each host, unless the hosts share it. Where they do not, an
output would be scattered over their disks, and an input would be missing, or another one. This
process leaves a file where the job will write, and looks at what the job will read; every node then
says whether it finds the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import uuid
from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from fae_core.errors import UserError

from ..config import Recipe
from ..config.facts import PathValue, path_values
from ..storage import paths
from .lanes import ask_every_node
from .packages import refuse_other_versions
from .session import start_ray

SAMPLES, SAMPLE_BYTES = 64, 64 * 1024
"""A file is compared by its size and so many pieces, evenly spread: networks have gigabytes."""
ENTRIES = 16
"""Of a folder so many entries are compared."""


class PlaceError(UserError, OSError):
    """A local place that is not the same on all nodes; one line names places and nodes."""


class Unseen(NamedTuple):
    """A place that a node does not see as this process does; `problem` says what it sees."""

    key: str
    path: str
    node: str
    problem: str


def check_places(recipe: Recipe, keys: Collection[str]) -> None:
    """Raises PlaceError where a node does not see a local place that one of `keys` names.

    `keys` are those that the job's tasks use. Raises OtherVersions where a node has other packages.
    Nodes that join later are not asked.
    """
    refuse(unseen({key: value for key, value in path_values(recipe).items() if key in keys}))
    if has_other_nodes():
        refuse_other_versions()


def refuse(found: Collection[Unseen]) -> None:
    """Raises PlaceError where anything was `found`."""
    if not found:
        return
    by_place: dict[tuple[str, str, str], list[str]] = {}
    for key, path, node, problem in found:
        by_place.setdefault((key, path, problem), []).append(node)
    text = "; ".join(
        f"{key}={path} {problem} on {_named(nodes)}"
        for (key, path, problem), nodes in by_place.items()
    )
    raise PlaceError(
        f"{text}. A cluster of several nodes needs s3://… or a folder that all of them share."
    )


def unseen(places: Mapping[str, PathValue]) -> list[Unseen]:
    """The local ones of `places` that are not the same on all nodes of the cluster.

    Places on S3 or the Hub are left out, and inputs that this process does not see itself. A node
    that cannot be asked is found with the error that it gave. Without RAY_ADDRESS nothing is asked:
    the Ray of this machine has one node.
    """
    local = {key: (role, path) for key, (role, value) in places.items() if (path := _local(value))}
    if not local or not has_other_nodes():
        return []
    here, found = _this_node(), []
    with contextlib.ExitStack() as stack:
        expected: dict[str, dict[str, Any]] = {}
        for key, (role, path) in local.items():
            if role == "output":
                path = stack.enter_context(_left_file(path))
            if traces := _traces(path):
                expected[key] = traces
        for answer in ask_every_node(_compare, expected, but=here):
            problems = answer.value
            if answer.error is not None:
                reason = (str(answer.error).strip().splitlines() or [""])[0][:200]
                problems = dict.fromkeys(expected, f"cannot be checked ({reason})")
            found += [
                Unseen(key, local[key][1], answer.address, problem)
                for key, problem in problems.items()
            ]
    return found


def has_other_nodes() -> bool:
    """Whether the cluster has nodes beside this process's own; it is connected to for that."""
    if not (os.environ.get("RAY_ADDRESS") or _is_connected()):
        return False
    start_ray()
    import ray

    here = _this_node()
    return any(node["NodeID"] != here for node in ray.nodes() if node["Alive"])


def _this_node() -> str | None:
    import ray

    return None if _is_client() else str(ray.get_runtime_context().get_node_id())


def _compare(expected: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Runs on a node: what it sees otherwise, by key."""
    return {key: problem for key, traces in expected.items() if (problem := _difference(traces))}


def _difference(traces: dict[str, Any]) -> str:
    for path, theirs in traces.items():
        here = _trace(path)
        if here is None:
            return "is not there"
        if here != theirs:
            return "is another file" if len(traces) == 1 else "holds other files"
    return ""


def _traces(path: str) -> dict[str, Any]:
    """What is at `path`, by path: a file, or a folder and some of what is in it; else nothing."""
    if not os.path.isdir(path):
        trace = _trace(path)
        return {} if trace is None else {path: trace}
    with os.scandir(path) as entries:
        inside = [entry.path for entry in islice(entries, ENTRIES)]
    return {one: trace for one in [path, *inside] if (trace := _trace(one))}


def _trace(path: str) -> tuple[str, int, str] | None:
    """The kind of a file or folder, of a file also its size and a digest of pieces of it."""
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):
            return "folder", 0, ""
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            step = max(SAMPLE_BYTES, about.st_size // SAMPLES)
            for start in range(0, about.st_size, step):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    except OSError:
        return None
    return "file", about.st_size, digest.hexdigest()


@contextlib.contextmanager
def _left_file(path: str) -> Iterator[str]:
    """A new file in the folder `path`, or in the one that it will be made in, while it is asked."""
    folder = Path(path)
    while not folder.is_dir():
        folder = folder.parent
    file = folder / f".fae-{uuid.uuid4().hex}"
    try:
        file.write_text(file.name)
    except OSError as error:
        raise PlaceError(f"{path}: cannot be written on this host ({error.strerror}).") from None
    try:
        yield str(file)
    finally:
        file.unlink(missing_ok=True)


def _local(value: str) -> str:
    """The local path of a place: of MLflow's database its folder; empty where it is not local."""
    if value.startswith("sqlite:///"):
        return os.path.dirname(os.path.abspath(value.removeprefix("sqlite:///")))
    if "://" in value and not value.startswith("file://"):
        return ""
    return str(paths.filesystem(value)[1])


def _named(nodes: list[str]) -> str:
    return f"node{'s' * (len(nodes) > 1)} {', '.join(nodes)}"


def _is_connected() -> bool:
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized())


def _is_client() -> bool:
    """Whether this process is outside of the cluster, at a ray:// address."""
    from ray.util.client import ray

    return bool(ray.is_connected())
