"""Where would precompute's driver be full? Encoders that sleep, hundreds of them in one Ray, and a store of a million shards.

    python -m benchmarks.scale [--actors 16 64 256] [--seconds 10] [--shards 1000000]

Real: plan, Ray Data and its driver, the tasks that read, decode and write (PNGs of 8 x 8 pixels in one Parquet file, so
that they cost next to nothing), the actors' processes, the commit. Simulated: the encoder sleeps for a shard's service
time instead of computing, its latents are a few numbers, workers are forked (forked_workers.py), and all nodes are this
machine: nothing here is said of a network. For the million shards Ray does not run: the files are empty ones, and what
workers read of their footers is made up; reading footers is measured apart, on real shards.

Efficiency: shards per second in the middle half of the shards, times the service time, over the number of actors. A cost is
processor time a shard there; a process is full where its cost is the time in which the cluster ends a shard. `lane` is
the process that drives a Ray data set (this one, unless there are several), `directory` is Ray's gcs_server.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.environment import describe
from benchmarks.forked_workers import forked_workers
from benchmarks.sleeping import LATENT_SHAPE, SleepingEncoder
from pipelines import latent_store, precompute, storage
from pipelines.config import Recipe, load_recipe
from pipelines.ray_session import start_ray
from pipelines.sources import RECORDS, ImageRecord, plan_images

IMAGES = 4
"""Images of a shard here; what the driver does does not depend on them."""
COSTS = ("driver", "lanes", "directory", "machine")
FOOTERS = 4096
"""Real shards whose footers are read."""


def simulate(
    folder: Path, num_actors: int, seconds: float, rounds: int, workers: Path
) -> dict[str, float]:
    """Precompute `rounds` shards an actor with encoders that sleep; needs a Ray,
    and the file with the process id of its workers' parent.

    Shards per second and, by process, processor seconds a shard; all in the middle half of the shards.
    """
    num_shards = max(rounds * num_actors, 12)
    recipe = sleeping_recipe(folder, num_actors, num_shards)
    assert recipe.output is not None
    parts = {"service seconds": str(seconds)}
    plan = latent_store.ensure_plan(recipe.output, plan_images(recipe.data), IMAGES, parts)
    todo = latent_store.missing_shards(recipe.output, plan)
    started = time.perf_counter()
    ends: list[float] = []
    used: list[dict[str, float]] = []
    for row in precompute.finished_shards(recipe, todo, parts, SleepingEncoder):
        ends.append(float(row["encoded_at"]))
        # A look at every process costs milliseconds: only where the middle half begins and ends.
        if len(ends) in (num_shards // 4, 3 * num_shards // 4):
            used.append({"at": len(ends), **processor_seconds(workers)})
    wall = time.perf_counter() - started
    manifest = latent_store.commit(recipe.output, plan, {})
    assert (manifest["stored"], manifest["errors"]) == (num_shards * IMAGES, 0)
    shutil.rmtree(folder)
    first, last = used
    shards = last["at"] - first["at"]
    ends.sort()
    rate = shards / (ends[int(last["at"]) - 1] - ends[int(first["at"]) - 1])
    costs = {name: (last[name] - first[name]) / shards for name in COSTS}
    return {"actors": num_actors, "rate": rate, "wall": wall, **costs}


def sleeping_recipe(folder: Path, num_actors: int, num_shards: int) -> Recipe:
    """A recipe over a source of `num_shards` shards of tiny PNGs, written into `folder`."""
    folder.mkdir()
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    keys = [f"{index:08d}" for index in range(num_shards * IMAGES)]
    source = pa.table({"image": [png.getvalue()] * len(keys), "key": keys})
    pq.write_table(source, folder / "source.parquet", row_group_size=256)
    changes = [
        f"data.path={folder / 'source.parquet'}",
        "data.key_column=key",
        "image_size=8",
        f"output={folder / 'store'}",
        f"precompute.shard_size={IMAGES}",
        f"precompute.num_actors={num_actors}",
        "precompute.cpus_per_actor=0.001",
    ]
    return load_recipe("photos-dinov2s", changes)


def processor_seconds(workers: Path) -> dict[str, float]:
    """Used so far, by COSTS."""
    me = psutil.Process()
    used = dict.fromkeys(COSTS, 0.0)
    parent = psutil.Process(int(workers.read_text()))
    for process in (me, *me.children(recursive=True), parent, *parent.children(recursive=True)):
        try:
            times, name, title = process.cpu_times(), process.name(), " ".join(process.cmdline())
        except psutil.Error:
            continue
        seconds = times.user + times.system
        used["machine"] += seconds
        if process == me:
            used["driver"] = seconds
        elif name == "gcs_server":
            used["directory"] = seconds
        elif title.startswith("ray::_gathered"):
            used["lanes"] += seconds
    return used


def saturation(
    actors: list[float], costs: list[float], service: float
) -> tuple[float, float, float]:
    """(a, b, number of actors at which a + b x actors seconds a shard fill one core, `service` seconds being a shard's)."""
    per_actor, constant = np.polyfit(actors, costs, 1) if len(actors) > 1 else (0.0, costs[0])
    if per_actor <= 0:  # it does not grow
        constant = float(np.mean(costs))
        return constant, 0.0, service / constant
    root = np.sqrt(constant**2 + 4 * per_actor * service)
    return float(constant), float(per_actor), float((root - constant) / (2 * per_actor))


def million(num_shards: int, results: Any) -> None:
    """Seconds and peak memory [MiB] of the driver's steps around Ray Data, into the queue `results`."""
    with tempfile.TemporaryDirectory() as folder:
        figures = [("nothing yet", 0.0, peak_rss())]
        for name, step in steps_of(folder, num_shards):
            started = time.perf_counter()
            step()
            figures.append((name, time.perf_counter() - started, peak_rss()))
        results.put(figures)


def steps_of(folder: str, num_shards: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each step with its name; what is made for it is made before."""
    keys = pa.array([f"{index:010d}" for index in range(num_shards)], pa.large_string())
    nulls = pa.nulls(num_shards)
    records = pa.table({"key": keys, "uri": keys, "label": nulls, "caption": nulls}).cast(RECORDS)
    yield "plan", lambda: latent_store.ensure_plan(folder, records, 1, {"backbone": "none"})
    plan = latent_store.open_plan(folder)
    yield "open the plan, as every worker does", lambda: latent_store.open_plan(folder)
    yield "read a shard's records", lambda: plan.shard(num_shards // 2)
    described, footers = real_shards(f"{folder}/real")
    yield f"read the footers of {FOOTERS} shards, as workers do", footers
    yield "list what is missing of none", lambda: latent_store.missing_shards(folder, plan)
    for index in range(num_shards):
        path = Path(latent_store.shard_uri(folder, index))
        path.parent.mkdir(exist_ok=True)
        path.touch()
    yield "list what is missing of all", lambda: latent_store.missing_shards(folder, plan)

    def each(_: Any, items: Iterable[Any]) -> Iterator[Any]:
        (entry,), statistics, shapes = described
        for item in items:
            _, _, start, files = item
            numbers = range(start, start + len(files))
            named = [{**entry, "name": f"{i:08d}.parquet", "etag": f"{i:032x}"} for i in numbers]
            yield named, statistics, shapes

    yield "commit, the footers given", lambda: latent_store.commit(folder, plan, {}, each)
    yield "read the manifest", lambda: latent_store.read_manifest(folder)


def real_shards(folder: str) -> tuple[Any, Callable[[], Any]]:
    """(what a worker tells of one real shard, a call that reads the footers of FOOTERS)."""
    values = {"mean": np.ones((1, *LATENT_SHAPE), np.float16)}
    for index in range(FOOTERS):
        data = latent_store.encode_shard(index, [ImageRecord(str(index), "")], values, 0, "")
        path = Path(latent_store.shard_uri(folder, index))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    files = sorted(storage.list_files(f"{folder}/shards"), key=lambda file: file.uri)
    read = latent_store.describe_shards
    return read((folder, "", 0, files[:1])), lambda: read((folder, "", 0, files))


def peak_rss() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def print_million(num_shards: int) -> None:
    """The table of `million`, which runs in a process of its own."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=million, args=(num_shards, results))
    process.start()
    figures = results.get()
    process.join()
    print(f"\n{num_shards} shards\n")
    print("| step | s | µs a shard | peak memory so far [MiB] |\n|---|---|---|---|")
    for name, seconds, memory in figures:
        shards = FOOTERS if "footers of" in name else num_shards
        print(f"| {name} | {seconds:.2f} | {seconds / shards * 1e6:.1f} | {memory:.0f} |")


def print_simulation(
    rows: list[dict[str, float]], seconds: float, gpu_rate: float, size: int
) -> None:
    """The table of `simulate`, the fit, and where each process would be full."""
    print(f"\nshards of {seconds:g} s; one lane has {precompute.ACTORS_PER_LANE} actors at most\n")
    names = " | ".join(f"{name} [ms a shard]" for name in COSTS)
    print(f"| actors | lanes | shards/s | efficiency | {names} | machine busy | all [s] |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    cores = psutil.cpu_count() or 1
    for row in rows:
        costs = " | ".join(f"{1000 * row[name]:.2f}" for name in COSTS)
        efficiency, busy = (
            row["rate"] * seconds / row["actors"],
            row["rate"] * row["machine"] / cores,
        )
        print(f"| {row['actors']} | {lanes_of(row)} | {row['rate']:.2f} | {efficiency:.3f} | {costs} | {busy:.2f} | {row['wall']:.0f} |")  # fmt: skip
    service = size / gpu_rate
    print(
        f"\nA GPU of {gpu_rate:g} images/s and shards of {size}: {service:.2f} s a shard. Full at so many GPUs:\n"
    )
    print("| process | ms a shard | GPUs |\n|---|---|---|")
    single = [row for row in rows if lanes_of(row) == 1]
    several = [row for row in rows if lanes_of(row) > 1]
    fits = [("one lane", single, "driver"), ("each of several lanes", several, "lanes")]
    fits += [("driver of several lanes", several, "driver"), ("directory", rows, "directory")]
    for name, of, cost in fits:
        if of:
            # A lane's cost grows with its own actors.
            share = [row["actors"] / (lanes_of(row) if cost == "lanes" else 1) for row in of]
            constant, growth, gpus = saturation(share, [row[cost] for row in of], service)
            print(f"| {name} | {1000 * constant:.2f} + {1000 * growth:.4f} x actors | {gpus:.0f} |")


def lanes_of(row: dict[str, float]) -> int:
    return -(-int(row["actors"]) // precompute.ACTORS_PER_LANE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--actors", type=int, nargs="*", default=[16, 64, 256])
    parser.add_argument("--seconds", type=float, default=10.0, help="service time of a shard")
    parser.add_argument("--rounds", type=int, default=4, help="shards an actor")
    parser.add_argument(
        "--lane", type=int, help="actors of a lane, instead of the pipeline's number"
    )
    parser.add_argument(
        "--shards", type=int, default=1_000_000, help="0: without the plan and commit of so many"
    )
    parser.add_argument(
        "--gpu-rate",
        type=float,
        default=340.0,
        help="images/s of a GPU in the answer (docs/cluster.md)",
    )
    parser.add_argument(
        "--shard-size", type=int, default=512, help="images of a shard in the answer"
    )
    arguments = parser.parse_args()
    print(describe())
    if arguments.shards:
        print_million(arguments.shards)
    if not arguments.actors:
        return
    precompute.ACTORS_PER_LANE = arguments.lane or precompute.ACTORS_PER_LANE
    rows = []
    with forked_workers() as workers, tempfile.TemporaryDirectory() as folder:
        start_ray(include_dashboard=False)
        for num_actors in arguments.actors:
            place = Path(folder) / str(num_actors)
            rows.append(simulate(place, num_actors, arguments.seconds, arguments.rounds, workers))
            print(json.dumps(rows[-1]), flush=True)
        import ray

        ray.shutdown()
    print_simulation(rows, arguments.seconds, arguments.gpu_rate, arguments.shard_size)


if __name__ == "__main__":
    # Under its own name, so that the measured process finds `million`.
    from benchmarks.scale import main as _main

    _main()
