"""Images -> latents: `fae precompute`, a Ray Data job that fills a latent store shard by shard.

list -> plan -> decode and crop (CPU tasks) -> frozen backbone and FAE encoder (actor pool) -> Parquet shard. One row of
the Ray data set is one whole shard, so no stage can split it and each file is written by one call. Also
`python -m pipelines.precompute RECIPE key=value ...`, which is what a cluster's job runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from fae_core.errors import UserError

from ..config import Recipe, RecipeError, with_absolute_paths
from ..data import plan_images
from ..data.crops import CROPS
from ..data.records import batched
from ..networks import backbone_fingerprints
from ..runtime import Progress, fan_out, in_lanes, metrics, smallest_node_cpus
from ..runtime.session import plain_error, start_ray
from ..storage import paths
from .encoder import LatentEncoder
from .manifest import commit, missing_shards
from .plan import Plan, ensure_plan
from .shards import read_errors
from .tasks import decode_shard, plan_of, write_shard

ACTORS_PER_LANE = 64
"""Actors that one Ray data set drives; benchmarks/scale.py measures where its driver would be full."""
SHARDS_OF_A_DATASET = 100_000
"""Each is an object of its own from the start, so a million at once would be minutes and gigabytes of the driver."""
SHOWN_ERRORS = 10


class TooManyErrors(UserError, RuntimeError):
    """More images than `precompute.max_error_rate` allows could not be encoded; the first messages are in the text."""


def precompute(recipe: Recipe, show_progress: bool = True) -> dict[str, Any]:
    """Encode what is missing and commit; returns the manifest.

    Raises RecipeError, SourceError, StoreMismatch (same output, another model, recipe or source) and TooManyErrors.
    """
    if recipe.output is None or recipe.autoencoder.checkpoint is None or recipe.data.path is None:
        raise RecipeError(
            "precompute needs data.path=…, autoencoder.checkpoint=… and output=… (a folder or s3:// prefix each)."
        )
    started, written = time.monotonic(), recipe.to_yaml()
    recipe = with_absolute_paths(recipe)
    assert recipe.output is not None
    records = plan_images(recipe.data)
    parts = fingerprint_parts(recipe)
    plan = ensure_plan(recipe.output, records, recipe.precompute.shard_size, parts)
    del records
    paths.write_bytes(paths.join(recipe.output, "recipe.yaml"), written.encode())
    todo = missing_shards(recipe.output, plan)
    rates = encode_shards(recipe, plan, todo, parts, show_progress) if todo else {}
    each = fan_out if todo else map
    errors = read_errors(recipe.output, each)
    first = list(islice(errors, SHOWN_ERRORS))
    _check_error_rate(recipe, plan, len(first) + sum(1 for _ in errors), first)
    run = {"seconds": time.monotonic() - started, "shards_encoded": len(todo), **rates}
    return commit(recipe.output, plan, run, each)


def fingerprint_parts(recipe: Recipe) -> dict[str, str]:
    """What decides a latent's bits besides its image. Raises CheckpointError if the autoencoder is another backbone's."""
    encoder = LatentEncoder.of(recipe)
    fingerprints = backbone_fingerprints(recipe, encoder.backbone)
    return {
        "backbone": fingerprints["backbone"].partition(":")[0],
        "backbone weights": encoder.backbone.weights_sha256,
        "autoencoder weights": encoder.autoencoder_sha256,
        "image size": str(recipe.image_size),
        "crop": CROPS[recipe.data.decoder],
        "columns": ",".join(recipe.precompute.columns),
        "precision": recipe.precompute.precision,
    }


def build_dataset(
    recipe: Recipe,
    todo: list[int],
    weights: dict[str, str],
    encoder: type | None = None,
    task_events: bool = True,
) -> Any:
    """The Ray data set whose rows are finished shards: what `write_shard` returns. Nothing runs until it is read.

    `encoder` is the actors' class, EncodeShards without it; benchmarks/scale.py has one that sleeps. `task_events`
    are what Ray's dashboard and timeline show of single tasks.
    """
    import ray.data

    options = recipe.precompute
    how = None if task_events else _without_events
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    dataset = ray.data.from_items([{"shard": i} for i in todo], override_num_blocks=len(todo))
    return (
        dataset.map(
            partial(decode_shard, recipe=recipe),
            num_cpus=options.cpus_per_decode,
            label_selector=options.decode_labels or None,
            ray_remote_args_fn=how,
        )
        .map_batches(
            encoder or EncodeShards,
            fn_constructor_args=(recipe, weights),
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=options.num_actors),
            num_cpus=options.cpus_per_actor,
            num_gpus=options.gpus_per_actor,
            ray_remote_args_fn=how,
        )
        .map(partial(write_shard, recipe=recipe), num_cpus=0.1, ray_remote_args_fn=how)
    )


def _without_events() -> dict[str, Any]:
    return {"enable_task_events": False}


def finished_shards(
    recipe: Recipe, todo: list[int], weights: dict[str, str], encoder: type | None = None
) -> Iterator[dict[str, Any]]:
    """What `write_shard` returns, of every shard of `todo` once it is done; needs a Ray.

    One thread of Python drives a Ray data set, and some hundred actors keep it busy. So more than ACTORS_PER_LANE are
    parted into lanes, each with a data set, an equal part of `todo`, and a process to drive it. Then Ray records no
    events of single tasks, which would keep its directory (`gcs_server`) busy next.
    """
    num_actors = recipe.precompute.num_actors
    num_lanes = lanes_for(num_actors)
    if num_lanes == 1:
        return _lane(recipe, todo, weights, encoder, True)
    lanes = []
    for lane in range(num_lanes):
        part = recipe.model_copy(deep=True)
        part.precompute.num_actors = len(range(lane, num_actors, num_lanes))
        lanes.append((part, todo[lane::num_lanes], weights, encoder, False))
    return in_lanes(_lane, lanes)


def lanes_for(num_actors: int) -> int:
    """Number of Ray data sets to part so many actors into.

    Ray Data gives each of several the same whole number of every node's CPUs, so there are no more than the smallest
    node has: a data set without a CPU would stand still.
    """
    wanted = -(-num_actors // ACTORS_PER_LANE)
    if wanted == 1:
        return 1
    return max(1, min(wanted, smallest_node_cpus()))


def _lane(
    recipe: Recipe,
    todo: list[int],
    weights: dict[str, str],
    encoder: type | None,
    task_events: bool,
) -> Iterator[dict[str, Any]]:
    for some in batched(todo, SHARDS_OF_A_DATASET):
        yield from build_dataset(recipe, some, weights, encoder, task_events).iter_rows()


def encode_shards(
    recipe: Recipe, plan: Plan, todo: list[int], weights: dict[str, str], show_progress: bool
) -> dict[str, float]:
    """Run the Ray data set over the shards `todo`; stops early once too many images have failed.

    Returns `images_per_second` from start to end, and of eight shards or more `steady_images_per_second`: between
    the ends of encoding of the shards at a quarter and at three quarters, so neither start-up nor what was decoded
    ahead counts.
    """
    start_ray()
    progress = Progress(len(todo), plan.num_images, show_progress)
    num_errors, first = 0, list[dict[str, str]]()
    try:
        for row in finished_shards(recipe, todo, weights):
            found = json.loads(str(row["errors"]))
            num_errors += len(found)
            first += found[: SHOWN_ERRORS - len(first)]
            progress.add(int(row["rows"]), len(found), float(row["encoded_at"]))
            _check_error_rate(recipe, plan, num_errors, first)
    except Exception as error:
        raise plain_error(error) from None
    return progress.close()


def _check_error_rate(
    recipe: Recipe, plan: Plan, num_errors: int, errors: list[dict[str, str]]
) -> None:
    allowed = recipe.precompute.max_error_rate
    if num_errors <= allowed * plan.num_images:
        return
    first = "\n".join(f"  {e['key']} [{e['stage']}] {e['message']}" for e in errors)
    raise TooManyErrors(
        f"{num_errors} of {plan.num_images} images could not be encoded, more than precompute.max_error_rate="
        f"{allowed:g} allows. Nothing was committed; finished shards stay, and the same command goes on from "
        f"them. Mend the source or raise the rate. The first:\n{first}"
    )


class EncodeShards:
    """The actor: one accelerator (or the CPU) each, model loaded once."""

    def __init__(self, recipe: Recipe, weights: dict[str, str]) -> None:
        self.recipe = recipe
        self.encoder = LatentEncoder.for_actor(recipe, recipe.precompute.gpus_per_actor, weights)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        images, ok = np.asarray(batch["images"][0]), np.asarray(batch["ok"][0], dtype=np.int64)
        errors = json.loads(str(batch["errors"][0]))
        with metrics.stage("encode"):
            columns = self.encoder.encode(images, self.recipe.precompute.batch_size)
        finite = np.ones(len(ok), dtype=bool)
        for values in columns.values():
            finite &= np.isfinite(values).reshape(len(ok), -1).all(axis=1)
        if not finite.all():
            shard = int(batch["shard"][0])
            assert self.recipe.output is not None
            records = plan_of(self.recipe.output).shard(shard)
            errors += [
                {"key": records[i].key, "stage": "encode", "message": "the latent is not finite"}
                for i in ok[~finite]
            ]
        return {
            "shard": batch["shard"],
            "ok": [ok[finite]],
            "errors": [json.dumps(errors, ensure_ascii=False)],
            "encoded_at": [time.time()],
            **{name: [values[finite]] for name, values in columns.items()},
        }
