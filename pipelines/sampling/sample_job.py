"""`fae sample`: images from a trained generator, a Ray Data job that resumes as precompute does.

indices -> latents and images (actor pool) -> one Parquet shard each (index, label, PNG, prompt).
Image i depends on (seed, i, its class or prompt) alone: its index addresses its noise. Any number
of actors, restarts or other images beside it give the same image; exactly, where shard_size and
batch_size stay as they are, and to rounding where batches differ. At the end the images are written
as the field's evaluators read them: PNG folders by class, and arr_0 in one NPZ.
"""

from __future__ import annotations

import json
import time
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np

from fae_core.checkpoint import CheckpointError
from fae_core.precision import settled_precision

from ..config import Recipe, with_absolute_paths
from ..config.facts import deciding_values
from ..runtime.actor_pool import RowStages, run_rows
from ..runtime.places import check_places
from ..runtime.progress import Progress
from ..storage import differences, fingerprint_of, paths
from .image_sampler import ImageSampler
from .sample_store import (
    FORMAT,
    claim,
    claimed,
    commit_samples,
    missing_shards,
    write_sample_shard,
)


def sample(recipe: Recipe, show_progress: bool = True) -> dict[str, Any]:
    """Draw what is missing, write the formats, commit; returns the manifest.

    Raises RecipeError, CheckpointError, and StoreMismatch where the output holds the samples of
    another generator, decoder or setting.
    """
    started, written = time.monotonic(), recipe.to_yaml()
    recipe = with_absolute_paths(recipe)
    (output,) = recipe.require("sample", "output")
    networks = (f"{name}.checkpoint" for name in ("generator", "autoencoder", "pixel_decoder"))
    check_places(recipe, ("output", "text.weights", "prompts", "sample.guide", *networks))
    section = recipe.sample
    before = claimed(output).get("precision")
    section.precision = settled_precision(section.precision, section.gpus_per_actor, before)
    sampler = ImageSampler(recipe)
    parts = sample_parts(recipe, sampler)
    claim(output, parts)
    paths.write_bytes(paths.join(output, "recipe.yaml"), written.encode())
    num_shards = -(-recipe.sample.num_images // recipe.sample.shard_size)
    todo = missing_shards(output, num_shards)
    rates: dict[str, float] = {}
    if todo:
        write = partial(write_sample_shard, output=output, formats=recipe.sample.formats)
        stages = RowStages(DrawShards, (recipe, parts), finish=write)
        rows, num_images = [{"shard": index} for index in todo], recipe.sample.num_images
        with (
            Progress(len(todo), num_images, show_progress, num_shards - len(todo)) as progress,
            closing(run_rows(rows, stages, recipe.sample)) as finished,
        ):
            for row in finished:
                progress.add(int(row["rows"]), 0, float(row["drawn_at"]))
            rates = progress.close()
    run = {"seconds": time.monotonic() - started, "shards_drawn": len(todo), **rates}
    return commit_samples(
        output, recipe.sample, parts, num_shards, run, sampler.class_names, sampler.records
    )


def sample_parts(recipe: Recipe, sampler: ImageSampler) -> dict[str, Any]:
    """What decides the images: networks and prompts by content, settings, seed, batching."""
    deciding = deciding_values(recipe, ["sample"], addresses=False)
    settings = {name.removeprefix("sample."): value for name, value in deciding.items()}
    settings["classes"] = sampler.classes or None  # a class by name is the class by number
    if sampler.records:
        settings["prompts_sha256"] = fingerprint_of({"prompts": sampler.records})
    return {"format": FORMAT, "seed": recipe.seed, **sampler.fingerprints, **settings}


class DrawShards:
    """The actor: one accelerator (or the CPU) each; the networks are loaded once."""

    def __init__(self, recipe: Recipe, parts: dict[str, Any]) -> None:
        self.recipe = recipe
        self.sampler = ImageSampler(recipe, "cuda" if recipe.sample.gpus_per_actor > 0 else "cpu")
        if differing := differences(parts, sample_parts(recipe, self.sampler), show=str):
            raise CheckpointError(
                "What decides the images is not what it was when the job began: "
                f"{'; '.join(differing)}. Either files changed, or this node has others at the "
                "same paths."
            )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        options, shard = self.recipe.sample, int(batch["shard"][0])
        first = shard * options.shard_size
        indices = list(range(first, min(first + options.shard_size, options.num_images)))
        labels, known = self.sampler.labels(indices), self.sampler.records
        return {
            "shard": batch["shard"],
            "images": [self.sampler(indices, labels)],
            "indices": [np.array(indices)],
            "labels": [np.array(labels)],
            "prompts": [json.dumps([known[label] for label in labels] if known else [])],
            "num_prompts": [len(known)],
            "drawn_at": [time.time()],
        }
