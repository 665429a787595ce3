"""Precompute beside two common ways to write it, over the same images with the same model.

    python -m benchmarks.peers [--images 640] [KEY=VALUE ...]

1. A plain loop like LightningDiT's extract_features.py: a DataLoader whose workers decode and crop,
   the model in the main process, a safetensors file for every so many images.
2. Ray Data's documented batch inference: read_images -> map -> map_batches(class,
   ActorPoolStrategy) -> write_parquet.
3. `fae precompute`, which the table calls "ours".

All three use the same crop (ADM's, by Pillow), LatentEncoder, precision and batch size, and each
runs in a process of its own. In each the model has the threads of all cores, and decoding what the
model leaves. The first two are written here; they do not verify, resume or count what they write.
The steady rate is that of the middle half of the batches or shards. Ratios are to the bare model
loop over crops in memory, the better of a run before the three and one after.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from benchmarks.environment import describe, write_photographs
from benchmarks.precompute import decode_only, model_only, save_untrained
from fae.pipelines.config.recipe import Recipe, load_recipe
from fae.pipelines.data.crops import adm_center_crop
from fae.pipelines.latents.encoder import LatentEncoder
from fae.pipelines.latents.precompute_job import precompute
from fae.pipelines.runtime.progress import Progress
from fae.pipelines.runtime.session import start_ray


class Photographs(Dataset[tuple[str, np.ndarray]]):
    """(name, crop uint8 [size, size, 3]) of each file of a folder, for the DataLoader."""

    def __init__(self, folder: str, size: int) -> None:
        self.paths = sorted(Path(folder).iterdir())
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, np.ndarray]:
        path = self.paths[index]
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            return path.name, adm_center_crop(image.convert("RGB"), self.size)


def loop(recipe: Recipe) -> tuple[int, float]:
    """The DataLoader's loop: images written, and its steady rate in images per second."""
    assert recipe.data.path and recipe.output
    torch.set_num_threads(os.cpu_count() or 1)
    options, output = recipe.precompute, Path(recipe.output)
    output.mkdir()
    encoder = LatentEncoder.of(recipe)
    photographs = Photographs(recipe.data.path, recipe.image_size)
    loader = DataLoader(photographs, options.batch_size, num_workers=os.cpu_count() or 1)
    progress = Progress(len(loader), len(photographs), enabled=False)
    parts: list[np.ndarray] = []
    for names, crops in loader:
        parts.append(encoder.encode(crops.numpy(), options.batch_size)["mean"])
        progress.add(len(names), 0, time.time())
        if sum(map(len, parts)) >= options.shard_size or progress.images == len(photographs):
            file = output / f"latents_{progress.images:08d}.safetensors"
            save_file({"latents": torch.from_numpy(np.concatenate(parts)).contiguous()}, file)
            parts = []
    return progress.images, progress.close()["steady_images_per_second"]


def crop_row(row: dict[str, Any], size: int) -> dict[str, Any]:
    """Ray Data's map function: {image, path} with the crop in place of the image."""
    return {"path": row["path"], "image": adm_center_crop(Image.fromarray(row["image"]), size)}


class EncodeBatch:
    """Ray Data's callable class: {path, image} -> {path, mean, encoded_at}."""

    def __init__(self, recipe: Recipe) -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        self.encoder = LatentEncoder.of(recipe)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        mean = self.encoder.encode(batch["image"], len(batch["image"]))["mean"]
        return {"path": batch["path"], "mean": mean, "encoded_at": np.full(len(mean), time.time())}


def ray_data(recipe: Recipe) -> tuple[int, float]:
    """Ray Data's batch inference: images written, and its steady rate in images per second."""
    assert recipe.data.path and recipe.output
    start_ray()
    import pyarrow.parquet as pq
    import ray.data

    options = recipe.precompute
    ray.data.DataContext.get_current().enable_progress_bars = False
    # Tasks ask for half a core and writing for less. With the default of one core, reading and
    # writing would not run at the same time beside an actor on two cores.
    images = ray.data.read_images(recipe.data.path, mode="RGB", include_paths=True, num_cpus=0.5)
    images.map(crop_row, fn_kwargs={"size": recipe.image_size}, num_cpus=0.5).map_batches(
        EncodeBatch,
        fn_constructor_args=(recipe,),
        batch_size=options.batch_size,
        compute=ray.data.ActorPoolStrategy(size=options.num_actors),
        num_cpus=options.cpus_per_actor,
    ).write_parquet(
        recipe.output,
        min_rows_per_file=options.shard_size,
        ray_remote_args={"num_cpus": 0.1},
    )
    files = sorted(Path(recipe.output).glob("*.parquet"))
    ends = np.concatenate([pq.read_table(file)["encoded_at"].to_numpy() for file in files])
    times, counts = np.unique(ends, return_counts=True)
    progress = Progress(len(times), len(ends), enabled=False)
    for moment, count in zip(times, counts, strict=True):
        progress.add(int(count), 0, float(moment))
    return progress.images, progress.close()["steady_images_per_second"]


def ours(recipe: Recipe) -> tuple[int, float]:
    """`fae precompute`: images written, and its steady rate in images per second."""
    start_ray()
    manifest = precompute(recipe, show_progress=False)
    return manifest["stored"], manifest["run"]["steady_images_per_second"]


WAYS = {"DataLoader loop": loop, "Ray Data": ray_data, "ours": ours}


def measure(name: str, recipe: Recipe, results: Any) -> None:
    """Run one way in this process; puts images written, steady rate and seconds into `results`."""
    started = time.perf_counter()
    written, steady = WAYS[name](recipe)
    results.put((written, steady, time.perf_counter() - started))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--recipe", default="photos-dinov2s")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        places = [
            f"data.path={work / 'images'}",
            f"autoencoder.checkpoint={work / 'autoencoder.safetensors'}",
        ]
        recipe = load_recipe(arguments.recipe, [*places, *arguments.overrides])
        write_photographs(work / "images", arguments.images)
        save_untrained(recipe, work / "autoencoder.safetensors")
        decode_rate, crops = decode_only(recipe)
        before = model_only(recipe, crops)
        for number, name in enumerate(WAYS):
            results = context.Queue()
            made = recipe.model_copy(update={"output": str(work / f"store-{number}")})
            process = context.Process(target=measure, args=(name, made, results))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{name} ended with {process.exitcode}.")
            written, steady, seconds = results.get()
            if written != arguments.images:
                raise SystemExit(f"{name} wrote {written} of {arguments.images} images.")
            rows.append((name, steady, arguments.images / seconds))
        after = model_only(recipe, crops)
    bare = max(before, after)
    options = recipe.precompute
    print(f"\n{describe()}")
    print(
        f"{arguments.images} images, {recipe.backbone.name}, {options.precision}, "
        f"batches of {options.batch_size}, files of {options.shard_size}\n"
    )
    print(
        "| what | steady images/s | of the bare model loop | with start-up "
        "| of the bare model loop |"
    )
    print("|---|---|---|---|---|")
    print(f"| bare model loop (before, after: {before:.2f}, {after:.2f}) | {bare:.2f} | 1 | | |")
    bound = 1 / (1 / decode_rate + 1 / bare)
    print(
        f"| bound: decode ({decode_rate:.0f}/s), then model | {bound:.2f} | {bound / bare:.3f} "
        "| | |"
    )
    for name, steady, whole in rows:
        print(f"| {name} | {steady:.2f} | {steady / bare:.3f} | {whole:.2f} | {whole / bare:.3f} |")


if __name__ == "__main__":
    # Run under the module's own name, so that processes and Ray find its functions.
    from benchmarks.peers import main as _main

    _main()
