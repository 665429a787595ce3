"""`fae sample`: images from a trained generator, a Ray Data job that is resumable like precompute.

indices -> latents and pictures (actor pool) -> one Parquet shard each (index, label, PNG). Image i depends on (seed, i, its
class) alone: its noise is addressed by its index, so any number of actors, restarts or other images beside it give the
same picture; exactly, where shard_size and batch_size stay as they are, and to rounding where batches differ. At the end
the pictures are written as the field's evaluators read them: PNG folders by class, and arr_0 in one NPZ.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np

from ..config import Recipe, RecipeError, with_absolute_paths
from ..runtime import Progress
from ..runtime.session import start_ray
from ..storage import paths
from .image_sampler import ImageSampler
from .sample_store import FORMAT, claim, commit, missing_shards, write_shard


def sample(recipe: Recipe, show_progress: bool = True) -> dict[str, Any]:
    """LatentSampler what is missing, write the formats, commit; returns the manifest.

    Raises RecipeError, CheckpointError, StoreMismatch (same output, another generator, decoder or setting).
    """
    if recipe.output is None:
        raise RecipeError("sample needs output=… (a folder or s3:// prefix).")
    started, written = time.monotonic(), recipe.to_yaml()
    recipe = with_absolute_paths(recipe)
    assert recipe.output is not None
    parts = sample_parts(recipe)
    claim(recipe.output, parts)
    paths.write_bytes(paths.join(recipe.output, "recipe.yaml"), written.encode())
    num_shards = -(-recipe.sample.num_images // recipe.sample.shard_size)
    todo = missing_shards(recipe.output, num_shards)
    rates: dict[str, float] = {}
    if todo:
        start_ray()
        progress = Progress(len(todo), recipe.sample.num_images, show_progress)
        for row in build_dataset(recipe, todo).iter_rows():
            progress.add(int(row["rows"]), 0, float(row["drawn_at"]))
        rates = progress.close()
    run = {"seconds": time.monotonic() - started, "shards_drawn": len(todo), **rates}
    return commit(recipe, parts, num_shards, run)


def sample_parts(recipe: Recipe) -> dict[str, Any]:
    """What decides the pictures: networks by content, sampler, seed, number, classes, and how they are batched."""
    settings = recipe.sample.model_dump(mode="json")
    for key in ("formats", "compile", "num_actors", "gpus_per_actor", "cpus_per_actor"):
        del settings[key]
    return {"format": FORMAT, "seed": recipe.seed, **ImageSampler(recipe).fingerprints, **settings}


def build_dataset(recipe: Recipe, todo: list[int]) -> Any:
    """The Ray data set whose rows are finished shards. Nothing runs until it is read."""
    import ray.data

    options = recipe.sample
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    dataset = ray.data.from_items([{"shard": i} for i in todo], override_num_blocks=len(todo))
    return dataset.map_batches(
        DrawShards,
        fn_constructor_args=(recipe,),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=options.num_actors),
        num_cpus=options.cpus_per_actor,
        num_gpus=options.gpus_per_actor,
    ).map(partial(write_shard, recipe=recipe), num_cpus=0.1)


class DrawShards:
    """The actor: one accelerator (or the CPU) each, networks loaded once."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.sampler = ImageSampler(recipe, "cuda" if recipe.sample.gpus_per_actor > 0 else "cpu")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        options, shard = self.recipe.sample, int(batch["shard"][0])
        first = shard * options.shard_size
        indices = list(range(first, min(first + options.shard_size, options.num_images)))
        labels = self.sampler.labels(indices)
        return {
            "shard": batch["shard"],
            "images": [self.sampler(indices, labels)],
            "indices": [np.array(indices)],
            "labels": [np.array(labels)],
            "drawn_at": [time.time()],
        }
