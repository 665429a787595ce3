"""Peaks of memory beside the estimates of `--dry-run`, and whether they grow with the images.

    python -m benchmarks.memory [--images 1000 4000] [--train autoencoder pixel_decoder generator]
                                [--sample dit starflow] [KEY=VALUE ...]

Each job runs in a process of its own with a Ray of its own, a training for a few steps of the
recipe's batch size. Memory is unique memory (USS), the highest of four samples per second: of the
driver, of the largest other process (a training's worker, a sampling's actor), and summed over all
processes. The object store's figure is Ray's own. The backbone is a small random ViT, so the jobs
take minutes; the images pass through the same code as with a large one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.environment import describe, write_photographs
from benchmarks.precompute import save_untrained
from benchmarks.store import write_store
from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.doctor.memory import (
    Process,
    precompute_memory,
    sample_memory,
    total,
    training_memory,
)
from fae.pipelines.latents.precompute_job import precompute
from fae.pipelines.networks.untrained import (
    backbone_spec,
    build_generator,
    build_pixel_decoder,
)
from fae.pipelines.runtime.session import start_ray
from fae.pipelines.sampling.sample_job import sample
from fae.pipelines.training.autoencoder import train_autoencoder
from fae.pipelines.training.generator import train_generator
from fae.pipelines.training.pixel_decoder import train_pixel_decoder
from fae_core import checkpoint

SMALL = (
    "backbone.name=vit_tiny_patch16_224",
    "backbone.weights=random",
    "backbone.image_size=128",
    "autoencoder.encoder.num_heads=3",
    "autoencoder.encoder.head_dim=32",
    "autoencoder.decoder.num_heads=3",
    "autoencoder.decoder.depth=1",
)
TRAINED = (
    "data.validation_fraction=0.05",
    "generator.size=S",
    "pixel_decoder.size=S",
    "pixel_decoder.training.batch_size=4",
    "generator.training.batch_size=16",
    "pixel_decoder.losses.perceptual=backbone",
    "pixel_decoder.losses.discriminator=backbone",
)
MEBI = 1 << 20
STEPS = 6
"""Steps of a training; from the second step on its memory is complete."""


class Watch:
    """Peaks [MiB] of this process and its descendants and of the object store, by a thread."""

    def __init__(self) -> None:
        names = ("driver", "largest other process", "all processes", "object store")
        self.peak = dict.fromkeys(names, 0.0)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()

    def _run(self) -> None:
        import ray

        me = psutil.Process()
        while not self.stopped.wait(0.25):
            sizes = {}
            for process in (me, *me.children(recursive=True)):
                try:
                    sizes[process.pid] = process.memory_full_info().uss
                except psutil.Error:
                    continue
            total, free = (
                f().get("object_store_memory", 0.0)
                for f in (ray.cluster_resources, ray.available_resources)
            )
            found = {
                "driver": sizes.pop(me.pid, 0) / MEBI,
                "largest other process": max(sizes.values(), default=0) / MEBI,
                "all processes": sum(sizes.values()) / MEBI,
                "object store": (total - free) / MEBI,
            }
            found["all processes"] += found["driver"]
            for name, value in found.items():
                self.peak[name] = max(self.peak[name], value)


def measure_precompute(folder: str, images: int, overrides: list[str], results: Any) -> None:
    """Precompute the first `images` photographs; puts a row of the table into `results`."""
    places = [f"data.limit={images}", f"output={folder}/store-{images}"]
    recipe = load_recipe("photos-dinov2s", [*recipe_in(folder, places), *overrides])
    start_ray()
    with Watch() as watch:
        manifest = precompute(recipe, show_progress=False)
    assert manifest["stored"] == images
    # The estimate comes last because it builds the networks in this process.
    results.put(row_of(f"precompute, {images} images", watch, precompute_memory(recipe)))


def measure_training(folder: str, network: str, overrides: list[str], results: Any) -> None:
    """Train for a few steps; `images`, and for a generator `store`, are in the folder."""
    steps = [f"{network}.training.{key}={STEPS}" for key in ("steps", "validate_every")]
    more = [f"{network}.statistics_images=64"] if network != "generator" else []
    places = [f"latents={folder}/store", f"storage={folder}/runs", f"run={network}"]
    values = [*recipe_in(folder, places), *TRAINED, *steps, *more, *overrides]
    recipe = load_recipe("photos-dinov2s", values)
    trainers = {
        "autoencoder": train_autoencoder,
        "pixel_decoder": train_pixel_decoder,
        "generator": train_generator,
    }
    start_ray()
    with Watch() as watch:
        trainers[network](recipe)
    results.put(row_of(f"training: {network}", watch, training_memory(recipe, network)))


def measure_sample(folder: str, kind: str, overrides: list[str], results: Any) -> None:
    """Sample two shards of images by untrained networks of the sizes of TRAINED."""
    recipe = load_recipe("photos-dinov2s", [*recipe_in(folder, []), *TRAINED, *overrides])
    recipe.generator.kind = kind  # type: ignore[assignment]
    spec, owner = backbone_spec(recipe), checkpoint.load(recipe.autoencoder.checkpoint or "")
    latents = (recipe.autoencoder.latent_dim, *spec.grid)
    places = {
        name: f"{folder}/{kind}-{name}.safetensors" for name in ("generator", "pixel_decoder")
    }
    marks = {"latents": "none", "autoencoder": owner.weights_sha256}
    checkpoint.save(places["generator"], build_generator(recipe.generator, latents), marks)
    decoder = build_pixel_decoder(recipe.pixel_decoder, spec, recipe.image_size)
    checkpoint.save(places["pixel_decoder"], decoder, owner.fingerprints)
    recipe.generator.checkpoint = places["generator"]
    recipe.pixel_decoder.checkpoint = places["pixel_decoder"]
    recipe.output = f"{folder}/samples-{kind}"
    sizes = {"num_images": 32, "shard_size": 16, "batch_size": 16, "num_steps": 4}
    recipe.sample = recipe.sample.model_copy(
        update={**sizes, "guidance": "paper", "flow_guidance": 1.0}
    )
    start_ray()
    with Watch() as watch:
        sample(recipe, show_progress=False)
    results.put(row_of(f"sample: {kind}, 16 at once, guided", watch, sample_memory(recipe)))


def recipe_in(folder: str, places: list[str]) -> list[str]:
    made = [
        f"data.path={folder}/images",
        f"autoencoder.checkpoint={folder}/autoencoder.safetensors",
    ]
    return [*SMALL, *made, *places]


def row_of(job: str, watch: Watch, estimated: list[Process]) -> dict[str, Any]:
    """The job's name, and (peak, estimate) [MiB] of each of its figures."""
    single = {process.name: total([replace(process, count=1)]) / MEBI for process in estimated}
    store = single.pop("object store", 0.0)
    others = [size for name, size in single.items() if name not in ("driver", "Ray")]
    guesses = {
        "object store": store,
        "driver": single["driver"],
        "largest other process": max(others),
        "all processes": total(estimated) / MEBI - store,
    }
    return {"job": job, **{name: (watch.peak[name], guess) for name, guess in guesses.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="*", default=[1000, 4000])
    networks = ["autoencoder", "pixel_decoder", "generator"]
    parser.add_argument("--train", nargs="*", choices=networks, default=networks)
    kinds = ["dit", "starflow"]
    parser.add_argument("--sample", nargs="*", choices=kinds, default=kinds)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder) / "images", max(arguments.images, default=256))
        recipe = load_recipe("photos-dinov2s", [*SMALL, *arguments.overrides])
        save_untrained(recipe, Path(folder) / "autoencoder.safetensors")
        shape = (recipe.autoencoder.latent_dim, *backbone_spec(recipe).grid)
        write_store(f"{folder}/store", 1024, shape)
        jobs: list[tuple[Any, Any]] = [(measure_precompute, size) for size in arguments.images]
        jobs += [(measure_training, network) for network in arguments.train]
        jobs += [(measure_sample, kind) for kind in arguments.sample]
        for measure, what in jobs:
            results = context.Queue()
            process = context.Process(
                target=measure, args=(folder, what, arguments.overrides, results)
            )
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{measure.__name__} of {what} ended with {process.exitcode}.")
            rows.append(results.get())
            print(json.dumps(rows[-1]), flush=True)
    print(f"\n{describe()}\n")
    names = ("object store", "driver", "largest other process", "all processes")
    print("| job | " + " | ".join(f"{name}, estimated [MiB]" for name in names) + " |")
    print("|---|" + "---|" * len(names))
    for row in rows:
        cells = [f"{row[name][0]:.0f}, {row[name][1]:.0f}" for name in names]
        print(f"| {row['job']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    # Run under the module's own name, so that the measured processes find its functions.
    from benchmarks.memory import main as _main

    _main()
