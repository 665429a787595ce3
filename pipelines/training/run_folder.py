"""The folder of a training run, STORAGE/RUN: its recipe, its images and its result.

recipe.yaml is written once and claims the name. Runs on images have plan.parquet, the source as it
was first listed. checkpoints/ follow, and at the end the network as safetensors and result.json,
whose presence means that the run has finished. The chain and the sweeps read results here.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import OmegaConf
from torch import nn

from fae_core import checkpoint
from fae_core.precision import settled_precision

from ..config import Recipe, RecipeError
from ..config.facts import deciding_values
from ..config.sections import TrainingSection
from ..data import plan_source
from ..data.account import Account
from ..data.records import ImageRecord, records_of, split_records
from ..runtime.lanes import this_node
from ..storage import differences, paths, refuse_other_work
from .run_log import say

NETWORKS = "fingerprints.json"
"""The file with the hashes of what a run trains with."""
ACCOUNT = "fae.account"
"""Key of plan.parquet's metadata with the account of the source, as JSON."""


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


def claim_networks(run_uri: str, fingerprints: Mapping[str, str]) -> None:
    """Write what the run trains with into a new run's folder, or compare it; every worker does.

    Raises RecipeError where the run began with others: a file has changed, or it is another one on
    this worker's node, which has joined later.
    """
    differing = write_or_compare(paths.join(run_uri, NETWORKS), fingerprints)
    if not differing:
        return
    refuse_other_work(
        f"{this_node()}the run {run_uri} began with other weights or data",
        differing,
        "Either files changed, or this node has others at the same paths. With the files that "
        "the run began with, the same command resumes it.",
        RecipeError,
    )


def write_or_compare(uri: str, values: Mapping[str, str]) -> list[str]:
    """Write `values` where nothing is at `uri`; else how they differ from what is there."""
    try:
        paths.write_once(uri, json.dumps(dict(values), indent=1).encode())
    except FileExistsError:
        return differences(json.loads(paths.read_bytes(uri)), values, show=str)
    return []


def settle_precision(recipe: Recipe, network: str, run_uri: str) -> Recipe:
    """The recipe with the precision of the run's training of `network`, where it says `auto`.

    It is what the run began with, and of a new run what suits its device.
    """
    uri = paths.join(run_uri, "recipe.yaml")
    key = f"{network}.training.precision"
    before = None
    if paths.exists(uri):
        before = OmegaConf.select(OmegaConf.create(paths.read_bytes(uri).decode()), key)
    made = recipe.model_copy(deep=True)
    training: TrainingSection = getattr(made, network).training
    asked = training.precision
    training.precision = settled_precision(asked, training.use_gpu, before)
    if asked == "auto":
        say(f"{key}=auto: {training.precision}")
    return made


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
    class_names: Sequence[str] = (),
) -> None:
    """Write the network as NETWORK.safetensors, then result.json."""
    with paths.writing(network_uri(run_uri, network)) as path:
        checkpoint.save(path, module, fingerprints, class_names)
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


def begin_on_images(recipe: Recipe, run_uri: str, sections: Sequence[str]) -> None:
    """Claim the folder for a run on the images of data.path, and write plan.parquet once.

    A resumed run trains on the images that were there when it began. Images that cannot train, and
    what the source cannot be read for, are refused before the folder is claimed. Raises SourceError
    and, where the folder is another recipe's, RecipeError.
    """
    if paths.exists(paths.join(run_uri, "recipe.yaml")):
        claim_run(recipe, run_uri, sections)
    plan_uri = paths.join(run_uri, "plan.parquet")
    if result(run_uri) is not None or paths.exists(plan_uri):
        return
    source = plan_source(recipe.data)
    split_records(records_of(source.table), recipe.data.validation_fraction)
    say("\n".join(source.account.lines()))
    claim_run(recipe, run_uri, sections)
    buffer = io.BytesIO()
    metadata = {ACCOUNT: json.dumps(source.account.to_dict())}
    table = source.table.select(["key", "uri"]).replace_schema_metadata(metadata)
    pq.write_table(table, buffer)
    paths.write_bytes(plan_uri, buffer.getvalue())


def read_account(run_uri: str) -> Account | None:
    """The account of the images of the run, None where its plan has none."""
    data = paths.read_bytes(paths.join(run_uri, "plan.parquet"))
    metadata = pq.read_schema(io.BytesIO(data)).metadata or {}
    text = metadata.get(ACCOUNT.encode())
    return Account.from_dict(json.loads(text)) if text else None


def read_plan(run_uri: str) -> list[ImageRecord]:
    """The run's images in key order."""
    table = pq.read_table(io.BytesIO(paths.read_bytes(paths.join(run_uri, "plan.parquet"))))
    keys, uris = (table[name].cast(pa.string()).to_pylist() for name in ("key", "uri"))
    return [ImageRecord(key, uri) for key, uri in zip(keys, uris, strict=True)]
