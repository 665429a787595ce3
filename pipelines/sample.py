"""`fae sample`: images from a trained generator, a Ray Data job that is resumable like precompute.

indices -> latents and pictures (actor pool) -> one Parquet shard each (index, label, PNG). Image i depends on (seed, i, its
class) alone: its noise is addressed by its index, so any number of actors, restarts or other images beside it give the
same picture; exactly, where shard_size and batch_size stay as they are, and to rounding where batches differ. At the end
the pictures are written as the field's evaluators read them: PNG folders by class, and arr_0 in one NPZ.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fae_core.figures import picture_grid
from fae_core.generators.dit import DiT
from pipelines import storage
from pipelines.command import run_module
from pipelines.config import GuidanceSection, Recipe, RecipeError
from pipelines.drawing import Draw, Painter, image_noise
from pipelines.models import load_checkpoint
from pipelines.progress import Progress
from pipelines.ray_session import for_workers, start_ray
from pipelines.sample_store import FORMAT, claim, commit, missing_shards, write_shard


class Artist:
    """Generator and decoders on one device, and what identifies them."""

    def __init__(self, recipe: Recipe, device: str = "cpu") -> None:
        if not (
            recipe.generator.checkpoint
            and recipe.autoencoder.checkpoint
            and recipe.pixel_decoder.checkpoint
        ):
            raise RecipeError(
                "sample needs generator.checkpoint=…, autoencoder.checkpoint=… and pixel_decoder.checkpoint=… "
                "(three .safetensors that `fae train` wrote)."
            )
        self.recipe = recipe
        self.device = torch.device(device)
        loaded = load_checkpoint(recipe.generator.checkpoint, "dit", "starflow")
        self.painter = Painter.of(recipe, self.device, loaded.fingerprints["autoencoder"])
        self.model = loaded.module.to(self.device)
        self.compiled = recipe.sample.compile and isinstance(self.model, DiT)
        if self.compiled:
            self.model.compile(dynamic=False, fullgraph=True)
        config = self.model.config
        self.shape = (config.latent_dim, *config.grid)
        self.num_classes: int = config.num_classes
        self.fingerprints = {"generator": loaded.weights_sha256, **self.painter.fingerprints}
        wrong = [c for c in recipe.sample.classes or [] if not 0 <= c < self.num_classes]
        if wrong:
            raise RecipeError(
                f"sample.classes: {wrong[0]} is none of the generator's {self.num_classes} classes."
            )

    def labels(self, indices: list[int]) -> list[int]:
        """The class of each image: the recipe's classes in turn."""
        classes = self.recipe.sample.classes or range(self.num_classes)
        return [classes[i % len(classes)] for i in indices]

    @torch.inference_mode()
    def __call__(self, indices: list[int], labels: list[int]) -> np.ndarray:
        """Pictures uint8 [n, S, S, 3] of image `indices`, in batches of the recipe's size."""
        options = self.recipe.sample
        size, full = options.batch_size, min(options.batch_size, options.shard_size)
        draw = Draw(self.model, self.recipe.sample, self.recipe.seed, self.device)
        parts = []
        for start in range(0, len(indices), size):
            some, wanted = indices[start : start + size], labels[start : start + size]
            count = len(some)
            if self.compiled:  # another size would be compiled anew
                some, wanted = (part + part[-1:] * (full - count) for part in (some, wanted))
            noise = image_noise(self.recipe.seed, some, self.shape)
            latents = draw(noise, torch.tensor(wanted), some)[:count]
            parts.append(self.painter(latents).cpu().numpy())
        return np.concatenate(parts)


def sample(recipe: Recipe, show_progress: bool = True) -> dict[str, Any]:
    """Draw what is missing, write the formats, commit; returns the manifest.

    Raises RecipeError, CheckpointError, StoreMismatch (same output, another generator, decoder or setting).
    """
    if recipe.output is None:
        raise RecipeError("sample needs output=… (a folder or s3:// prefix).")
    started, written = time.monotonic(), recipe.to_yaml()
    recipe = for_workers(recipe)
    assert recipe.output is not None
    parts = sample_parts(recipe)
    claim(recipe.output, parts)
    storage.write_bytes(storage.join(recipe.output, "recipe.yaml"), written.encode())
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
    return {"format": FORMAT, "seed": recipe.seed, **Artist(recipe).fingerprints, **settings}


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
        self.artist = Artist(recipe, "cuda" if recipe.sample.gpus_per_actor > 0 else "cpu")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        options, shard = self.recipe.sample, int(batch["shard"][0])
        first = shard * options.shard_size
        indices = list(range(first, min(first + options.shard_size, options.num_images)))
        labels = self.artist.labels(indices)
        return {
            "shard": batch["shard"],
            "images": [self.artist(indices, labels)],
            "indices": [np.array(indices)],
            "labels": [np.array(labels)],
            "drawn_at": [time.time()],
        }


def draw_grid(recipe: Recipe, path: str, columns: int = 8, scales: tuple[float, ...] = ()) -> None:
    """One PNG for a look: a class in each row; with `scales`, a guidance scale in each column from the same noise."""
    artist = Artist(recipe)
    classes = recipe.sample.classes or list(range(min(artist.num_classes, 10)))
    settings: list[tuple[str, Recipe]] = [("", recipe)] * columns
    if scales:
        settings = [(f"scale {scale:g}", _with_scale(recipe, scale)) for scale in scales]
    rows: list[list[np.ndarray | None]] = []
    for row, label in enumerate(classes):
        tiles: list[np.ndarray | None] = []
        if scales:
            for _, changed in settings:
                artist.recipe = changed
                tiles.append(artist([row], [label])[0])
        else:
            first = row * columns
            tiles += list(artist(list(range(first, first + columns)), [label] * columns))
        rows.append(tiles)
    Path(path).write_bytes(picture_grid(rows, [title for title, _ in settings]))


def _with_scale(recipe: Recipe, scale: float) -> Recipe:
    made = recipe.model_copy(deep=True)
    made.sample.guidance = [GuidanceSection(start=1.0, end=0.0, scale=scale)]
    made.sample.flow_guidance = scale
    return made


def main() -> int:
    """`python -m pipelines.sample RECIPE key=value ...`; the exit status."""

    def job(recipe: Recipe) -> dict[str, Any]:
        manifest = sample(recipe)
        return {"stored": manifest["stored"], "output": recipe.output}

    return run_module("pipelines.sample", job)


if __name__ == "__main__":
    # Under its own name, so that Ray ships functions and classes by reference.
    from pipelines.sample import main as _main

    sys.exit(_main())
