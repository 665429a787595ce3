"""Images per second of decoding alone, of the model alone and of the whole pipeline, in one run.

    python -m benchmarks.precompute [--images 1280] [KEY=VALUE ...]

All use the same images. The bound on one machine's cores is 1 / (1/decode + 1/model), each measured
with all cores. The pipeline's steady rate is that of the middle half of its shards, so neither the
start-up nor images decoded ahead count; the start-up is printed separately. Overrides are the
recipe's, for example precompute.shard_size=128.

The second table says where the cores' time goes in that middle half, per image. Beside it stands
what decoding and the model alone use. What decoding tasks use beyond it is Ray's work with their
blocks and the writing of shards.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks.environment import describe, write_photographs
from benchmarks.processor_time import seconds_by
from fae.pipelines.config.recipe import Recipe, load_recipe
from fae.pipelines.data.reading import load_crops
from fae.pipelines.data.records import ImageRecord
from fae.pipelines.data.sources import list_images
from fae.pipelines.latents.encoder import LatentEncoder
from fae.pipelines.latents.precompute_job import precompute
from fae.pipelines.networks.loading import backbone_fingerprints, backbone_of
from fae.pipelines.networks.untrained import build_autoencoder
from fae.pipelines.runtime.session import start_ray
from fae_core import checkpoint

MODEL_IMAGES = 192


def decode(work: tuple[list[ImageRecord], Recipe]) -> np.ndarray:
    """The crops of some records; runs in a process of its own."""
    records, recipe = work
    return load_crops(records, recipe.image_size, recipe.data)[0]


def decode_only(recipe: Recipe) -> tuple[float, float, np.ndarray]:
    """(images per second on all cores, processor seconds of one, some crops for `model_only`)."""
    records = list_images(recipe.data)
    size = recipe.precompute.shard_size
    parts = [(records[i : i + size], recipe) for i in range(0, len(records), size)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(decode, parts[: os.cpu_count()]))  # processes start and import here
        before, started = seconds_by(str).total(), time.perf_counter()
        # Only counts come back: sending pixels between processes is a cost of the pipeline, not of
        # decoding.
        count = sum(pool.map(count_decoded, parts))
        seconds, used = time.perf_counter() - started, seconds_by(str).total() - before
    return count / seconds, used / count, decode((records[:MODEL_IMAGES], recipe))


def count_decoded(work: tuple[list[ImageRecord], Recipe]) -> int:
    """How many crops `decode` makes."""
    return len(decode(work))


def model_only(recipe: Recipe, crops: np.ndarray) -> tuple[float, float]:
    """Images per second of a plain loop over crops in memory, with all cores' threads.

    And the processor seconds of an image.
    """
    torch.set_num_threads(recipe.precompute.threads_per_actor or os.cpu_count() or 1)
    encoder = LatentEncoder.of(recipe)
    size = recipe.precompute.batch_size
    encoder.encode(crops[:size], size)
    started, before = time.perf_counter(), time.process_time()
    encoder.encode(crops, size)
    seconds, used = time.perf_counter() - started, time.process_time() - before
    return len(crops) / seconds, used / len(crops)


class ProcessorTime:
    """Where the processor time goes while the middle half of a store's shards is written.

    Every process is read twice only, because reading all takes milliseconds.
    """

    def __init__(self, folder: Path, num_shards: int) -> None:
        self._folder = folder
        self._marks = [num_shards // 4, 3 * num_shards // 4]
        self._read: list[tuple[float, int, Counter[str]]] = []
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        for mark in self._marks:
            while (done := len(list(self._folder.glob("shards/**/*.parquet")))) < mark:
                time.sleep(0.2)
            self._read.append((time.perf_counter(), done, seconds_by(kind_of_worker)))

    def per_image(self, shard_size: int) -> dict[str, float]:
        """Processor seconds of an image by kind of process, and what the cores had left."""
        (began, first, before), (ended, last, after) = self._read
        used = {kind: max(0.0, after[kind] - before[kind]) for kind in after}
        used["idle, or another program's"] = (ended - began) * (os.cpu_count() or 1) - sum(
            used.values()
        )
        images = (last - first) * shard_size
        return {kind: seconds / images for kind, seconds in used.items()}


def kind_of_worker(title: str) -> str:
    """Of Ray's workers those that encode, and all others: they decode and write."""
    return "encoding actors" if "MapWorker" in title else "tasks that decode and write"


def save_untrained(recipe: Recipe, path: Path) -> None:
    """Write an autoencoder of the recipe's sizes with random weights, as fast as a trained one."""
    backbone = backbone_of(recipe)
    model = build_autoencoder(recipe.autoencoder, backbone.spec)
    checkpoint.save(path, model, backbone_fingerprints(recipe, backbone))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1280)
    parser.add_argument("--recipe", default="photos-dinov2s")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        places = [
            f"data.path={work / 'images'}",
            f"autoencoder.checkpoint={work / 'autoencoder.safetensors'}",
            f"output={work / 'store'}",
        ]
        recipe = load_recipe(arguments.recipe, [*places, *arguments.overrides])
        write_photographs(work / "images", arguments.images)
        save_untrained(recipe, work / "autoencoder.safetensors")
        decode_rate, decode_time, crops = decode_only(recipe)
        before, model_time = model_only(recipe, crops)
        start_ray()
        watch = ProcessorTime(work / "store", arguments.images // recipe.precompute.shard_size)
        started = time.perf_counter()
        manifest = precompute(recipe)
        seconds = time.perf_counter() - started
        import ray

        ray.shutdown()
        after, model_time_after = model_only(recipe, crops)
    model_rate = max(before, after)
    bound = 1 / (1 / decode_rate + 1 / model_rate)
    steady = manifest["run"]["steady_images_per_second"]
    startup = seconds - arguments.images / steady
    print(f"\n{describe()}")
    options = recipe.precompute
    print(
        f"{arguments.images} images, {recipe.backbone.name}, {options.precision}, "
        f"shards of {options.shard_size}, batches of {options.batch_size}\n"
    )
    print("| what | images/s | of the bound |\n|---|---|---|")
    print(f"| decode and crop alone, all cores | {decode_rate:.1f} | |")
    print(
        f"| model alone, all cores (before, after: {before:.2f}, {after:.2f}) "
        f"| {model_rate:.2f} | |"
    )
    print(f"| bound: both, one after the other | {bound:.2f} | 1 |")
    print(f"| pipeline, steady | {steady:.2f} | {steady / bound:.3f} |")
    whole = arguments.images / seconds
    print(f"| pipeline, with {startup:.1f} s of start-up | {whole:.2f} | {whole / bound:.3f} |")
    alone = {
        "encoding actors": (model_time + model_time_after) / 2,
        "tasks that decode and write": decode_time,
    }
    print("\n| processes | core-ms an image | alone |\n|---|---|---|")
    found = watch.per_image(options.shard_size)
    for kind, spent in sorted(found.items(), key=lambda pair: -pair[1]):
        of_alone = f"{1000 * alone[kind]:.2f}" if kind in alone else ""
        print(f"| {kind} | {1000 * spent:.2f} | {of_alone} |")


if __name__ == "__main__":
    # Run under the module's own name, so that processes find `decode`.
    from benchmarks.precompute import main as _main

    _main()
