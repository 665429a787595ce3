"""`fae sample`: images from a trained generator, a Ray Data job that is resumable like precompute.

indices -> latents and pictures (actor pool) -> one Parquet shard each (index, label, PNG). Image i depends on (seed, i, its
class) alone: its noise is addressed by its index, so any number of actors, restarts or other images beside it give the
same picture; exactly, where shard_size and batch_size stay as they are, and to rounding where batches differ. At the end
the pictures are written as the field's evaluators read them: PNG folders by class, and arr_0 in one NPZ.
"""

from __future__ import annotations

import io
import json
import sys
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from fae_core.figures import picture_grid
from pipelines import storage
from pipelines.command import run_module
from pipelines.config import GuidanceSection, Recipe, RecipeError
from pipelines.drawing import Draw, Painter, image_noise
from pipelines.latent_store import StoreError, StoreMismatch, versions
from pipelines.models import load_checkpoint
from pipelines.progress import Progress
from pipelines.ray_session import for_workers, start_ray

FORMAT = "fae-samples-1"


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
        size = self.recipe.sample.batch_size
        draw = Draw(self.model, self.recipe.sample, self.recipe.seed, self.device)
        parts = []
        for start in range(0, len(indices), size):
            some = indices[start : start + size]
            noise = image_noise(self.recipe.seed, some, self.shape)
            latents = draw(noise, torch.tensor(labels[start : start + size]), some)
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
    _claim(recipe.output, parts)
    storage.write_bytes(storage.join(recipe.output, "recipe.yaml"), written.encode())
    num_shards = -(-recipe.sample.num_images // recipe.sample.shard_size)
    there = {f.uri.rpartition("/")[2] for f in storage.list_files(_join(recipe, "shards"))}
    todo = [index for index in range(num_shards) if _name(index) not in there]
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
    for key in ("formats", "num_actors", "gpus_per_actor", "cpus_per_actor"):
        del settings[key]
    return {"format": FORMAT, "seed": recipe.seed, **Artist(recipe).fingerprints, **settings}


def _claim(uri: str, parts: dict[str, Any]) -> None:
    plan_uri = storage.join(uri, "plan.json")
    try:
        storage.write_once(plan_uri, json.dumps(parts, indent=1).encode())
        return
    except FileExistsError:
        before = json.loads(storage.read_bytes(plan_uri))
    differing = [k for k in sorted(before.keys() | parts.keys()) if before.get(k) != parts.get(k)]
    if differing:
        lines = "\n".join(
            f"  {k}: {before.get(k)!r} there, {parts.get(k)!r} now" for k in differing
        )
        raise StoreMismatch(f"{uri} holds other samples:\n{lines}\nChoose another output=….")


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


def write_shard(row: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Write one shard of pictures, and its PNG files where they are wanted; returns {shard, rows, drawn_at}."""
    images = [encode_png(image) for image in np.asarray(row["images"])]
    indices, labels = np.asarray(row["indices"]), np.asarray(row["labels"])
    if "png" in recipe.sample.formats:
        for index, label, data in zip(indices, labels, images, strict=True):
            name = f"png/{int(label):04d}/{int(index):08d}.png"
            storage.write_bytes(_join(recipe, name), data)
    table = pa.table(
        {
            "index": pa.array(indices, pa.int64()),
            "label": pa.array(labels, pa.int64()),
            "image": images,
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="none", write_page_checksum=True)
    # After the PNG files: a shard that is there has all of its pictures.
    storage.write_bytes(_join(recipe, "shards", _name(int(row["shard"]))), buffer.getvalue())
    return {"shard": int(row["shard"]), "rows": len(images), "drawn_at": row["drawn_at"]}


def encode_png(image: np.ndarray) -> bytes:
    """The PNG of a uint8 image [S, S, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def read_samples(uri: str, num_shards: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(images uint8 [n, S, S, 3], labels int64 [n]) of each shard, in order of the images' indices."""
    for shard in range(num_shards):
        data = storage.read_bytes(storage.join(uri, "shards", _name(shard)))
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        pngs = table["image"].cast(pa.binary()).to_pylist()
        images = [np.asarray(Image.open(io.BytesIO(png))) for png in pngs]
        yield np.stack(images), table["label"].to_numpy()


def commit(
    recipe: Recipe, parts: dict[str, Any], num_shards: int, run: dict[str, Any]
) -> dict[str, Any]:
    """Check that every image is there, write samples.npz where it is wanted, then the manifest; returns it."""
    assert recipe.output is not None
    manifest_uri = _join(recipe, "manifest.json")
    if storage.exists(manifest_uri):
        return dict(json.loads(storage.read_bytes(manifest_uri)))
    entries = {f.uri.rpartition("/")[2]: f for f in storage.list_files(_join(recipe, "shards"))}
    absent = [i for i in range(num_shards) if _name(i) not in entries]
    if absent:
        raise StoreError(f"{recipe.output}: {len(absent)} of {num_shards} shards are missing.")
    if "npz" in recipe.sample.formats:
        write_npz(recipe.output, num_shards, recipe.sample.num_images)
    manifest = {
        **parts,
        "stored": recipe.sample.num_images,
        "shards": [{"name": _name(i), "bytes": entries[_name(i)].size} for i in range(num_shards)],
        "run": {**run, "versions": versions()},
    }
    storage.write_once(manifest_uri, json.dumps(manifest, indent=1).encode())
    return manifest


def write_npz(uri: str, num_shards: int, num_images: int) -> None:
    """samples.npz with arr_0 uint8 [n, S, S, 3], as ADM's evaluator reads it; shard by shard, in bounded memory."""
    shards = read_samples(uri, num_shards)
    first, _ = next(shards)
    shape = (num_images, *first.shape[1:])
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    filesystem, path = storage.filesystem(storage.join(uri, "samples.npz"))
    with (
        filesystem.open_output_stream(path) as stream,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        member.write(first.tobytes())
        for images, _ in shards:
            member.write(images.tobytes())


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


def _join(recipe: Recipe, *parts: str) -> str:
    assert recipe.output is not None
    return storage.join(recipe.output, *parts)


def _name(shard: int) -> str:
    return f"{shard:08d}.parquet"


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
