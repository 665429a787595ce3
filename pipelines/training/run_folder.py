"""The folder of a training run, STORAGE/RUN: its recipe, its images and its result.

recipe.yaml is written once and claims the name. Runs on images have plan.parquet, the source as it
was first listed. checkpoints/ follow, and at the end the network as safetensors and result.json,
whose presence means that the run has finished. The chain and the sweeps read results here.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import OmegaConf
from torch import nn

from fae_core import checkpoint

from ..config import Recipe, RecipeError
from ..config.facts import deciding_values
from ..config.sections import DataSection
from ..data import plan_source
from ..data.records import ImageRecord
from ..storage import differences, paths, refuse_other_work


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left: the network's address, and the last validation's metrics."""

    checkpoint: str
    metrics: dict[str, float]


def run_folder(recipe: Recipe) -> str:
    """Address of the run's folder. Raises RecipeError where `run` is no name for one."""
    if not recipe.run or "/" in recipe.run or recipe.run.startswith("."):
        raise RecipeError(
            f"run={recipe.run!r}: give the training run a name without slashes, run=NAME. "
            "The same name resumes it."
        )
    return paths.join(recipe.storage, recipe.run)


def claim_run(recipe: Recipe, run_uri: str, sections: Sequence[str]) -> None:
    """Write recipe.yaml into a new run's folder.

    `sections` are the recipe's parts that decide this run's result. Raises RecipeError where the
    folder is another recipe's.
    """
    uri = paths.join(run_uri, "recipe.yaml")
    try:
        paths.write_once(uri, recipe.to_yaml().encode())
        return
    except FileExistsError:
        container = OmegaConf.to_container(OmegaConf.create(paths.read_bytes(uri).decode()))
    assert isinstance(container, dict)
    written = {str(key): value for key, value in container.items()}
    sections = ("image_size", "seed", *sections)
    # A key that was not there yet when the run began had the value that is now its default.
    before = deciding_values(Recipe(), sections) | deciding_values(written, sections)
    refuse_other_work(
        f"The run {run_uri} exists with another recipe",
        differences(before, deciding_values(recipe, sections)),
        "Choose another run=NAME, or give the same values.",
        RecipeError,
    )


def result(run_uri: str) -> dict[str, float] | None:
    """The metrics of a finished run, None where it is not finished."""
    uri = paths.join(run_uri, "result.json")
    return json.loads(paths.read_bytes(uri)) if paths.exists(uri) else None


def finish(
    run_uri: str,
    network: str,
    module: nn.Module,
    fingerprints: Mapping[str, str],
    metrics: Mapping[str, float],
) -> None:
    """Write the network as NETWORK.safetensors, then result.json."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        checkpoint.save(path, module, fingerprints)
        paths.write_bytes(network_uri(run_uri, network), path.read_bytes())
    # Written last: its presence says that the run is finished.
    text = json.dumps(dict(metrics), indent=1)
    paths.write_bytes(paths.join(run_uri, "result.json"), text.encode())


def train_result(run_uri: str, network: str) -> TrainResult:
    """The result of a run of `network` that has finished."""
    metrics = result(run_uri)
    assert metrics is not None
    return TrainResult(network_uri(run_uri, network), metrics)


def network_uri(run_uri: str, network: str) -> str:
    """Address of the network that the run trains."""
    return paths.join(run_uri, f"{network}.safetensors")


def plan(data: DataSection, run_uri: str) -> None:
    """List the source once; a resumed run trains on the images that were there when it began."""
    uri = paths.join(run_uri, "plan.parquet")
    if paths.exists(uri):
        return
    table = plan_source(data).table.select(["key", "uri"])
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    paths.write_bytes(uri, buffer.getvalue())


def read_plan(run_uri: str) -> list[ImageRecord]:
    """The run's images in key order."""
    table = pq.read_table(io.BytesIO(paths.read_bytes(paths.join(run_uri, "plan.parquet"))))
    keys, uris = (table[name].cast(pa.string()).to_pylist() for name in ("key", "uri"))
    return [ImageRecord(key, uri) for key, uri in zip(keys, uris, strict=True)]
