"""Reads the folder of a training run, a latent store, samples, scores, or of several of these.

Nothing is written for this: a run's log and checkpoints, a store's plan and shards and the times at
which they were written say it all. The folder may be local or on S3, and the job on any machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, get_args

import pyarrow.parquet as pq
from omegaconf import OmegaConf

from ..config.sections import StageName
from ..latents.plan import PLAN, TEXT_FORMAT, open_plan
from ..runtime.progress import duration
from ..storage import StoreError, paths
from ..training import checkpoint_files, metrics_log
from .account import (
    BEGUN,
    FINISHED,
    Status,
    StatusError,
    live_state,
    recent_rate,
    silence,
    time_left,
)

NETWORKS = {
    "autoencoder": "autoencoder",
    "pixel_decoder": "pixel decoder",
    "generator": "generator",
}
Files = dict[str, paths.FileInfo]
"""The files directly in a folder by name."""


def status_of(uri: str) -> Status:
    """What the folder `uri` says of its job. Raises StatusError where it is no job's.

    A folder that holds folders of jobs, as `fae run` fills one, has each as a part.
    """
    found = _job(uri)
    if found is not None:
        return found
    parts = [part for name in paths.list_folders(uri) if (part := _job(paths.join(uri, name)))]
    if not parts:
        raise StatusError(
            f"{uri} holds no job: no run (recipe.yaml), no latent store (plan.parquet), no samples "
            "(plan.json), no scores (scores.json), and no folder with one of these."
        )
    order = {name: number for number, name in enumerate(get_args(StageName))}
    parts.sort(key=lambda part: order.get(_stage_name(part.uri), -1))
    done = sum(part.state == FINISHED for part in parts)
    silent = [part.silent_seconds for part in parts if part.silent_seconds is not None]
    states = [part.state for part in parts if part.state != FINISHED]
    return Status(
        "chain" if any(_stage_name(part.uri) in order for part in parts) else "jobs",
        uri,
        states[0] if states else FINISHED,
        unit="jobs",
        done=done,
        total=len(parts),
        silent_seconds=min(silent, default=None),
        errors=sum(part.errors for part in parts),
        parts=parts,
        notes=["Stages that have not begun have no folder yet, so they are not counted."],
    )


def _job(uri: str) -> Status | None:
    """The status of the one job whose folder is `uri`, None where it is none."""
    files: Files = {
        file.uri.rpartition("/")[2]: file for file in paths.list_files(uri, recursive=False)
    }
    readers: list[tuple[str, Callable[[str, Files], Status]]] = [
        ("plan.json", _samples),
        ("scores.json", _ended("scores")),
        ("probe.json", _ended("probe")),
        (PLAN, _planned),
        ("recipe.yaml", _run),
        ("stage.json", _ended("stage")),
    ]
    for name, read in readers:
        if name in files:
            return read(uri, files)
    return None


def _stage_name(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2].rpartition("-")[0]


def _planned(uri: str, files: Files) -> Status:
    """A latent store, or a run on images: both have a plan.parquet."""
    try:
        plan = open_plan(uri)
    except StoreError:
        return _run(uri, files)
    shards = list(paths.list_files(paths.join(uri, "shards")))
    errors = sum(
        pq.read_metadata(paths.open_input(file.uri)).num_rows
        for file in paths.list_files(paths.join(uri, "errors"))
        if not file.uri.endswith(paths.TEMPORARY_SUFFIX)
    )
    notes = [f"{plan.num_images:,} images planned, {plan.shard_size:,} a shard"]
    if "manifest.json" in files:
        seconds = _json(files["manifest.json"].uri)["run"]["seconds"]
        notes.append(f"its last run took {duration(seconds)}")
    kind = "token states" if plan.format == TEXT_FORMAT else "latent store"
    return _of_shards(kind, uri, files, shards, plan.num_shards, errors, notes)


def _samples(uri: str, files: Files) -> Status:
    parts = _json(files["plan.json"].uri)
    size, images = parts.get("shard_size"), parts.get("num_images")
    total = -(-images // size) if size and images else None
    shards = list(paths.list_files(paths.join(uri, "shards")))
    notes = [f"{images:,} images, {size:,} a shard"] if total else []
    return _of_shards("samples", uri, files, shards, total, 0, notes)


def _of_shards(
    kind: str,
    uri: str,
    files: Files,
    shards: Sequence[paths.FileInfo],
    total: int | None,
    errors: int,
    notes: list[str],
) -> Status:
    shards = [file for file in shards if not file.uri.endswith(paths.TEMPORARY_SUFFIX)]
    times = [file.modified for file in shards if file.modified is not None]
    finished = "manifest.json" in files
    rate, usual = (None, None) if finished else recent_rate(times)
    begun = [file.modified for file in files.values() if file.modified is not None]
    silent = silence(times or begun)
    if not shards:
        notes = [*notes, "no shard yet"]
    elif not finished and total is not None and len(shards) >= total:
        notes = [*notes, "all shards are there; manifest.json, which is written last, is not"]
    elif not finished and rate is None:
        notes = [*notes, "no rate yet: it takes two shards of different times"]
    return Status(
        kind,
        uri,
        FINISHED if finished else live_state(silent, usual) if shards else BEGUN,
        unit="shards",
        done=len(shards),
        total=total,
        rate=rate,
        seconds_left=None if finished else time_left(len(shards), total, rate),
        silent_seconds=silent,
        errors=errors,
        notes=notes,
    )


def _run(uri: str, files: Files) -> Status:
    """A training run, by its log, its checkpoints and its result."""
    network = _network(files)
    training: Any = {}
    if "recipe.yaml" in files and network is not None:
        recipe = OmegaConf.create(paths.read_bytes(files["recipe.yaml"].uri).decode())
        training = OmegaConf.select(recipe, f"{network}.training") or {}
    total, batch, log_every = (training.get(n) for n in ("steps", "batch_size", "log_every"))
    series = metrics_log.read_metrics_log(uri) if "history.jsonl" in files else {}
    checkpoints = list(paths.list_files(paths.join(uri, checkpoint_files.CHECKPOINTS)))
    saved = [s for file in checkpoints if (s := checkpoint_files.step_of(file.uri)) is not None]
    logged = [steps[-1][0] for steps in series.values() if steps]
    finished = "result.json" in files
    done = max([*saved, *logged, 0])
    if finished and total is not None:
        done = total
    speeds = series.get("train/images_per_second", [])
    rate = speeds[-1][1] / batch if speeds and batch else None
    times = [f.modified for f in (*files.values(), *checkpoints) if f.modified is not None]
    silent = silence(times)
    between = max(metrics_log.PUBLISH_SECONDS, (log_every or 0) / rate) if rate else None
    notes = []
    if not series:
        notes.append("no log yet: it is written with the first logged step")
    elif not finished:
        notes.append("speed without validations and checkpoints; it counts the last logged steps")
    if saved and not finished:
        notes.append(f"it would resume at step {max(saved):,}")
    named = f"training of the {NETWORKS[network]}" if network else "training"
    return Status(
        named,
        uri,
        FINISHED if finished else live_state(silent, between) if logged or saved else BEGUN,
        unit="steps",
        done=done,
        total=total,
        rate=rate,
        seconds_left=None if finished else time_left(done, total, rate),
        silent_seconds=silent,
        errors=_bad_images(files),
        losses={name: steps for name, steps in series.items() if _is_loss(name)},
        notes=notes,
    )


def _network(files: Files) -> str | None:
    """Which network a run trains, by the files that only its trainer writes."""
    for network in NETWORKS:
        if f"{network}.safetensors" in files:
            return network
    if "linear_baseline.safetensors" in files:
        return "autoencoder"
    if "feature_stats.json" in files:
        return "pixel_decoder"
    return None if PLAN in files else "generator"


def _is_loss(name: str) -> bool:
    kind, _, term = name.partition("/")
    return kind == "validation" or term.endswith("loss")


def _bad_images(files: Files) -> int:
    """How many the workers have found, each image once: every epoch deals them out anew."""
    logs = [file for name, file in files.items() if name.startswith("bad_images-")]
    lines = [line for file in logs for line in paths.read_bytes(file.uri).splitlines()]
    return len({json.loads(line)["key"] for line in lines})


def _ended(kind: str) -> Callable[[str, Files], Status]:
    """A job whose one file of results is written at its end."""

    def read(uri: str, files: Files) -> Status:
        times = [file.modified for file in files.values() if file.modified is not None]
        return Status(kind, uri, FINISHED, silent_seconds=silence(times))

    return read


def _json(uri: str) -> dict[str, Any]:
    return dict(json.loads(paths.read_bytes(uri)))
