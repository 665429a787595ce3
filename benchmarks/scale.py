"""The number of actors at which precompute's driver is fully busy, by encoders that sleep.

    python -m benchmarks.scale [--runs 8x1 16x1 64x10 256x10] [--shards 1000000]

A run `64x10` has 64 actors and shards of ten seconds.

What is real: the plan, Ray Data and its driver, the tasks that read, decode and write (PNGs of 8 x
8 pixels in one Parquet file, so they cost almost nothing), the actors' processes, and the commit.
What is simulated: the encoder sleeps for a shard's service time instead of computing, its latents
are a few numbers, workers are forked (forked_workers.py), and all nodes are this machine, so the
figures do not include a network. For the million shards Ray does not run: their files are empty,
and what workers read from their footers is made up; reading footers is measured separately, on real
shards.

Efficiency is the rate of shards in the middle half of the shards, times the service time, divided
by the number of actors. A process is busy for the share of that time in which it uses a processor.
The driver polls many times per second whether or not there is news, so the cost of a shard is found
from runs of different rates: busy = idle + (a + b x actors) x rate, fitted with no term below zero
(from three runs or more). `lane` is the process that drives a Ray data set: the driver itself,
unless there are several lanes. `directory` is Ray's gcs_server, and `dashboard` its dashboard and
the agents of its nodes.

With several lanes Ray records no events of single tasks. `--events` records them, and Ray keeps
them in the directory. In its dashboard instead it keeps them with `--dashboard` and in the
environment RAY_enable_ray_event=1, RAY_enable_ray_task_event_recorder=1,
RAY_enable_task_events_to_dashboard_head=1 and RAY_enable_core_worker_task_event_to_gcs=0. The
number of events that Ray has at the end is printed.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.optimize import nnls

from benchmarks.environment import describe
from benchmarks.forked_workers import forked_workers
from benchmarks.processor_time import seconds_by
from benchmarks.sleeping import LATENT_SHAPE, SleepingEncoder
from fae.pipelines.config.recipe import Recipe, load_recipe
from fae.pipelines.data.records import RECORDS, ImageRecord
from fae.pipelines.data.sources import plan_images
from fae.pipelines.latents import precompute_job
from fae.pipelines.latents.manifest import commit, describe_shards, missing_shards, read_manifest
from fae.pipelines.latents.plan import ensure_plan, open_plan
from fae.pipelines.latents.shards import encode_shard, shard_uri
from fae.pipelines.runtime import actor_pool
from fae.pipelines.runtime.session import start_ray
from fae.pipelines.storage import paths

IMAGES = 4
"""Images of a shard in these runs; the driver's work does not depend on the number."""
PROCESSES = ("driver", "lanes", "directory", "dashboard", "machine")
FOOTERS = 4096
"""Number of real shards whose footers are read."""


def simulate(
    folder: Path, num_actors: int, seconds: float, rounds: int, workers: Path, gpus: float
) -> dict[str, float]:
    """Precompute `rounds` shards for each actor with encoders that sleep for `seconds`.

    Ray must be running, and `workers` is the file with the process id of its workers' parent.
    Returns the rate in shards per second and, by PROCESSES, processor seconds per second, both in
    the middle half of the shards.
    """
    num_shards = max(rounds * num_actors, 12)
    recipe = sleeping_recipe(folder, num_actors, num_shards, gpus)
    assert recipe.output is not None
    parts = {"service seconds": str(seconds)}
    plan = ensure_plan(recipe.output, plan_images(recipe.data), IMAGES, parts)
    todo = missing_shards(recipe.output, plan)
    started = time.perf_counter()
    ends: list[float] = []
    used: list[dict[str, float]] = []
    stages = precompute_job.shard_stages(recipe, plan)
    stages = replace(stages, actor=SleepingEncoder)
    rows = [{"shard": index} for index in todo]
    for row in actor_pool.run_rows(rows, stages, recipe.precompute):
        ends.append(float(row["encoded_at"]))
        # Reading the times of every process takes milliseconds, so it is done only twice: where the
        # middle half begins and where it ends.
        if len(ends) in (num_shards // 4, 3 * num_shards // 4):
            used.append(
                {"at": len(ends), "clock": time.perf_counter(), **processor_seconds(workers)}
            )
    wall = time.perf_counter() - started
    manifest = commit(recipe.output, plan, {})
    assert (manifest["stored"], manifest["errors"]) == (num_shards * IMAGES, 0)
    shutil.rmtree(folder)
    first, last = used
    ends.sort()
    begin, end = int(first["at"]) - 1, int(last["at"]) - 1
    rate = (end - begin) / (ends[end] - ends[begin])
    busy = {n: (last[n] - first[n]) / (last["clock"] - first["clock"]) for n in PROCESSES}
    made = {"actors": num_actors, "num_lanes": actor_pool.lanes_for(num_actors)}
    return {**made, "seconds": seconds, "rate": rate, "wall": wall, **busy}


def sleeping_recipe(folder: Path, num_actors: int, num_shards: int, gpus: float) -> Recipe:
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
        f"precompute.gpus_per_actor={gpus}",
    ]
    return load_recipe("photos-dinov2s", changes)


def processor_seconds(workers: Path) -> dict[str, float]:
    """Processor seconds used so far, by PROCESSES."""
    found = seconds_by(
        lambda title: "lanes" if title.startswith("ray::_gathered") else "workers",
        [psutil.Process(int(workers.read_text()))],
    )
    return {**{name: found[name] for name in PROCESSES}, "machine": found.total()}


def fit(actors: list[float], rates: list[float], busy: list[float]) -> tuple[float, float, float]:
    """(idle, a, b) of busy = idle + (a + b x actors) x rate, none below zero.

    Rates are in shards per second.
    """
    return _explain(busy, np.ones(len(rates)), rates, np.multiply(actors, rates))


def fit_directory(
    actors: list[float], rates: list[float], busy: list[float]
) -> tuple[float, float, float]:
    """(idle, a, b) of busy = idle + a x rate + b x actors, none below zero.

    Every process of Ray reports to the directory, also one that is idle, so there is a term for the
    number of actors alone.
    """
    return _explain(busy, np.ones(len(rates)), rates, actors)


def _explain(busy: Sequence[float], *terms: Any) -> tuple[float, float, float]:
    matrix = np.stack([np.asarray(term, float) for term in terms], axis=1)
    # Terms are scaled to the same size, so the choice between them does not depend on their units.
    scale = matrix.max(0)
    found = nnls(matrix / scale, np.array(busy))[0] / scale
    return float(found[0]), float(found[1]), float(found[2])


def full_at(idle: float, constant: float, growth: float, service: float) -> float:
    """The number of actors at which the process is busy all the time, by the terms of `fit`.

    `service` is the seconds of a shard.
    """
    # 1 = idle + (constant + growth n) n / service
    if not growth:
        return (1 - idle) * service / constant if constant else float("inf")
    root = np.sqrt(constant**2 + 4 * growth * (1 - idle) * service)
    return float((root - constant) / (2 * growth))


def million(num_shards: int, results: Any) -> None:
    """Put (name, seconds, peak memory [MiB]) of the driver's steps into the queue `results`.

    They are the steps before and after Ray Data.
    """
    with tempfile.TemporaryDirectory() as folder:
        figures = [("nothing yet", 0.0, peak_rss())]
        for name, step in steps_of(folder, num_shards):
            started = time.perf_counter()
            step()
            figures.append((name, time.perf_counter() - started, peak_rss()))
        results.put(figures)


def steps_of(folder: str, num_shards: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, step) of each step; what a step needs is prepared before it is yielded."""
    keys = pa.array([f"{index:010d}" for index in range(num_shards)], pa.large_string())
    nulls = pa.nulls(num_shards)
    columns = {**dict.fromkeys(RECORDS.names, nulls), "key": keys, "uri": keys}
    records = pa.table(columns).cast(RECORDS)
    yield "plan", lambda: ensure_plan(folder, records, 1, {"backbone": "none"})
    plan = open_plan(folder)
    yield "open the plan, as every worker does", lambda: open_plan(folder)
    yield "read a shard's records", lambda: plan.shard(num_shards // 2)
    described, footers = real_shards(f"{folder}/real")
    yield f"read the footers of {FOOTERS} shards, as workers do", footers
    yield "list what is missing of none", lambda: missing_shards(folder, plan)
    for index in range(num_shards):
        path = Path(shard_uri(folder, index))
        path.parent.mkdir(exist_ok=True)
        path.touch()
    yield "list what is missing of all", lambda: missing_shards(folder, plan)

    def each(_: Any, items: Iterable[Any]) -> Iterator[Any]:
        (entry,), statistics, shapes = described
        for item in items:
            _, _, start, files = item
            numbers = range(start, start + len(files))
            named = [{**entry, "name": f"{i:08d}.parquet", "etag": f"{i:032x}"} for i in numbers]
            yield named, statistics, shapes

    yield "commit, the footers given", lambda: commit(folder, plan, {}, each)
    yield "read the manifest", lambda: read_manifest(folder)


def real_shards(folder: str) -> tuple[Any, Callable[[], Any]]:
    """(a worker's description of one real shard, a call that reads FOOTERS footers)."""
    values = {"mean": np.ones((1, *LATENT_SHAPE), np.float16)}
    for index in range(FOOTERS):
        data = encode_shard(index, [ImageRecord(str(index), "")], values, 0, "")
        path = Path(shard_uri(folder, index))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    files = sorted(paths.list_files(f"{folder}/shards"), key=lambda file: file.uri)
    read = describe_shards
    return read((folder, "", 0, files[:1])), lambda: read((folder, "", 0, files))


def peak_rss() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def print_million(num_shards: int) -> None:
    """Print the table of `million`, which runs in a process of its own."""
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


def print_simulation(rows: list[dict[str, float]], gpu_rate: float, size: int) -> None:
    """Print the table of `simulate`, the fits, and at how many GPUs each process is fully busy."""
    print(f"\nOne lane has {actor_pool.ACTORS_PER_LANE} actors at most.\n")
    names = " | ".join(f"{name} busy" for name in PROCESSES)
    print(
        f"| actors | a shard [s] | lanes | shards/s | efficiency | {names} (of its cores) "
        "| all [s] |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        shown = {**row, "machine": row["machine"] / (psutil.cpu_count() or 1)}
        busy = " | ".join(f"{shown[name]:.3f}" for name in PROCESSES)
        efficiency = row["rate"] * row["seconds"] / row["actors"]
        print(
            f"| {row['actors']} | {row['seconds']:g} | {lanes_of(row)} | {row['rate']:.2f} "
            f"| {efficiency:.3f} | {busy} | {row['wall']:.0f} |"
        )
    service = size / gpu_rate
    print(f"\nA GPU of {gpu_rate:g} images/s and shards of {size}: {service:.2f} s a shard.\n")
    print("| process | busy | full at so many GPUs |\n|---|---|---|")
    single = [row for row in rows if lanes_of(row) == 1]
    several = [row for row in rows if lanes_of(row) > 1]
    fits = [("one lane", single, "driver"), ("each of several lanes", several, "lanes")]
    fits += [("driver of several lanes", several, "driver")]
    fits += [("directory, one lane", single, "directory")]
    fits += [("directory, several lanes", several, "directory")]
    for name, of, process in fits:
        if len(of) < 3:
            continue
        # The actors and the rate are divided among the lanes.
        share = [lanes_of(row) if process == "lanes" else 1 for row in of]
        actors, rates, used = (
            [row[key] / lanes for row, lanes in zip(of, share, strict=True)]
            for key in ("actors", "rate", process)
        )
        if process == "directory":
            idle, constant, growth = fit_directory(actors, rates, used)
            gpus = (1 - idle) / (growth + constant / service)
            formula = (
                f"{1000 * constant:.2f} ms a shard + {1000 * growth:.3f} ms a second and actor"
            )
        else:
            idle, constant, growth = fit(actors, rates, used)
            gpus = full_at(idle, constant, growth, service)
            formula = f"({1000 * constant:.2f} + {1000 * growth:.4f} x actors) ms a shard"
        print(f"| {name} ({len(of)} runs) | {idle:.3f} + {formula} | {gpus:.0f} |")


def run_of(text: str) -> tuple[int, float]:
    """`64x10`: actors, and seconds of a shard."""
    actors, _, seconds = text.partition("x")
    try:
        return int(actors), float(seconds)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: actors x seconds, as 64x10") from None


def lanes_of(row: dict[str, float]) -> int:
    return int(row["num_lanes"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    runs = [(8, 1.0), (16, 1.0), (64, 10.0), (256, 10.0)]
    parser.add_argument("--runs", type=run_of, nargs="*", default=runs, metavar="ACTORSxSECONDS")
    parser.add_argument("--rounds", type=int, default=4, help="shards an actor")
    parser.add_argument(
        "--lane", type=int, help="actors of a lane, instead of the pipeline's number"
    )
    parser.add_argument(
        "--cpus",
        type=int,
        help="CPUs that Ray is told this machine has (its tasks cost little)",
    )
    parser.add_argument(
        "--gpus",
        type=int,
        default=0,
        help="GPUs that Ray is told this machine has; every actor then takes one",
    )
    parser.add_argument("--events", action="store_true", help="record events of tasks also there")
    parser.add_argument("--dashboard", action="store_true", help="start Ray with its dashboard")
    parser.add_argument(
        "--shards",
        type=int,
        default=1_000_000,
        help="shards of the large plan and commit; 0 leaves them out",
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
    if not arguments.runs:
        return
    actor_pool.ACTORS_PER_LANE = arguments.lane or actor_pool.ACTORS_PER_LANE
    actor_pool.EVENTS_OF_LANES = arguments.events
    rows, gpus = [], float(arguments.gpus > 0)
    with forked_workers() as workers, tempfile.TemporaryDirectory() as folder:
        believed = {"num_cpus": arguments.cpus, "num_gpus": arguments.gpus or None}
        start_ray(include_dashboard=arguments.dashboard, **believed)
        for number, (actors, seconds) in enumerate(arguments.runs):
            place = Path(folder) / str(number)
            rows.append(simulate(place, actors, seconds, arguments.rounds, workers, gpus))
            print(json.dumps(rows[-1]), flush=True)
        import ray

        print(f"events that the timeline has: {len(ray.timeline())}")
        ray.shutdown()
    print_simulation(rows, arguments.gpu_rate, arguments.shard_size)


if __name__ == "__main__":
    # Run under the module's own name, so that the measured process finds `million`.
    from benchmarks.scale import main as _main

    _main()
