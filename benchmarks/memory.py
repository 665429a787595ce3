"""Does precompute's memory grow with the number of images, and does `--dry-run` say it? Peaks at two sizes, and the estimate.

    python -m benchmarks.memory [--images 1000 4000] [KEY=VALUE ...]

Each size runs in a process of its own with a Ray of its own. Memory is the unique memory (USS) of the driver, and the
sum of it over the driver and all of its descendants, at the highest of four samples a second; the object store is
Ray's own figure. The backbone is a small random ViT, so that minutes suffice: the images take the same way.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.environment import describe, write_photographs
from benchmarks.precompute import save_untrained
from pipelines.config import load_recipe
from pipelines.memory_estimate import precompute_memory, total
from pipelines.precompute import precompute
from pipelines.ray_session import start_ray

SMALL = (
    "backbone.name=vit_tiny_patch16_224",
    "backbone.weights=random",
    "backbone.image_size=112",
    "autoencoder.encoder.num_heads=3",
    "autoencoder.encoder.head_dim=32",
    "autoencoder.decoder.num_heads=3",
    "autoencoder.decoder.depth=1",
)
MEBI = 1 << 20


class Watch:
    """Peaks over this process's tree and Ray's object store, sampled by a thread."""

    def __init__(self) -> None:
        self.peak: dict[str, float] = {"driver": 0.0, "all processes": 0.0, "object store": 0.0}
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
                "driver": sizes.get(me.pid, 0) / MEBI,
                "all processes": sum(sizes.values()) / MEBI,
                "object store": (total - free) / MEBI,
            }
            for name, value in found.items():
                self.peak[name] = max(self.peak[name], value)


def measure(folder: str, images: int, overrides: list[str], results: Any) -> None:
    """One run over the first `images` photographs; puts peaks and estimates [MiB] and the rate into `results`."""
    work = Path(folder)
    places = [
        f"data.path={work / 'images'}",
        f"data.limit={images}",
        f"autoencoder.checkpoint={work / 'autoencoder.safetensors'}",
        f"output={work / f'store-{images}'}",
    ]
    recipe = load_recipe("photos-dinov2s", [*SMALL, *places, *overrides])
    estimated = {p.name: total([p]) / MEBI for p in precompute_memory(recipe)}
    start_ray()
    started = time.perf_counter()
    with Watch() as watch:
        manifest = precompute(recipe, show_progress=False)
    seconds = time.perf_counter() - started
    assert manifest["stored"] == images
    estimate = {
        "object store": estimated["object store"],
        "driver": estimated["driver"],
        "all processes": sum(estimated.values()) - estimated["object store"],
    }
    results.put(
        {"images": images, "estimate": estimate, **watch.peak, "images/s": images / seconds}
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 4000])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder) / "images", max(arguments.images))
        recipe = load_recipe("photos-dinov2s", [*SMALL, *arguments.overrides])
        save_untrained(recipe, Path(folder) / "autoencoder.safetensors")
        for images in arguments.images:
            results = context.Queue()
            process = context.Process(
                target=measure, args=(folder, images, arguments.overrides, results)
            )
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"The run over {images} images ended with {process.exitcode}.")
            rows.append(results.get())
            print(json.dumps(rows[-1]), flush=True)
    print(f"\n{describe()}\n")
    names = ("object store", "driver", "all processes")
    print(
        "| images | " + " | ".join(f"{name}, estimated [MiB]" for name in names) + " | images/s |"
    )
    print("|---|---|---|---|---|")
    for row in rows:
        cells = [f"{row[name]:.0f}, {row['estimate'][name]:.0f}" for name in names]
        print(f"| {row['images']} | {' | '.join(cells)} | {row['images/s']:.1f} |")


if __name__ == "__main__":
    # Under its own name, so that the measured processes find `measure`.
    from benchmarks.memory import main as _main

    _main()
