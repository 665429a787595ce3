"""Rates of the latent store: writing, reading in file order and in training's order, opening.

    python -m benchmarks.store [--rows 65536] [--shape 32 16 16] [--large 1280000 100000000]

The store holds random latents in shards of 512, in a folder on the disk that is to be measured
(`--folder`). Each way of reading is measured twice: with the files in the page cache, and after
they were dropped from it (`posix_fadvise`), which does not reach the cache of a virtual disk's
host. Ratios are to a plain read of the same files in the same state by one process. For the large
stores only the manifest exists: opening it and building an epoch's order are measured.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.environment import describe
from fae.pipelines.config.sections import GeneratorSection, GeneratorTraining
from fae.pipelines.data.order import EpochOrder
from fae.pipelines.data.records import ImageRecord
from fae.pipelines.latents.manifest import commit, encode_manifest
from fae.pipelines.latents.plan import FORMAT, ensure_plan
from fae.pipelines.latents.reader import LatentStore
from fae.pipelines.latents.shards import write_shard
from fae.pipelines.storage import paths
from fae.pipelines.training.latent_feed import latent_feed

SHARD = 512
BATCH = 512
MEBI = 1 << 20


def write_store(folder: str, num_rows: int, shape: tuple[int, ...]) -> tuple[float, float]:
    """Plan, write and commit `num_rows` random latents.

    Returns the seconds of writing all shards, and of writing the same bytes by `write_bytes` alone.
    """
    records = [ImageRecord(f"{i:08d}", f"/none/{i}", label=i % 1000) for i in range(num_rows)]
    plan = ensure_plan(folder, records, SHARD, {"autoencoder weights": "none"})
    values = np.random.default_rng(0).normal(size=(SHARD, *shape)).astype(np.float16)
    ours = plain = 0.0
    for index in range(plan.num_shards):
        rows = plan.shard(index)
        latents = {"mean": np.roll(values, index, axis=0)[: len(rows)]}
        kept = list(range(len(rows)))
        started = time.perf_counter()
        write_shard(folder, index, rows, kept, latents, [], plan.fingerprint)
        ours += time.perf_counter() - started
        started = time.perf_counter()
        paths.write_bytes(paths.join(folder, "plain"), latents["mean"].tobytes())
        plain += time.perf_counter() - started
    commit(folder, plan, {})
    return ours, plain


def shard_files(folder: str) -> list[str]:
    return sorted(file.uri for file in paths.list_files(paths.join(folder, "shards")))


def read_files(folder: str) -> None:
    """Read every byte of every shard into one buffer of 4 MiB, as fast as disk or cache allow."""
    buffer = memoryview(bytearray(4 * MEBI))
    for path in shard_files(folder):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def read_arrow(folder: str) -> None:
    """Read every shard to an array by pyarrow alone."""
    for path in shard_files(folder):
        pq.read_table(path)["mean"].combine_chunks().to_numpy_ndarray()


def read_rows(folder: str) -> None:
    """Read one epoch's rows in training's order by one system call each, and nothing else.

    This bounds a reader of one thread that asks once a row. Mapped files need no calls, but one
    that is cut while it is read would end the process.
    """
    store = LatentStore.open(folder)
    entries = store.manifest["shards"]
    size = 2 * int(np.prod(store.latent_shape))
    ends_with = np.cumsum([entry["rows"] for entry in entries])
    order = EpochOrder(len(store), 0)
    files = [os.open(path, os.O_RDONLY) for path in shard_files(folder)]
    for step in range(len(store) // BATCH):
        rows, _ = order.batch(step, BATCH)
        batch = np.empty((BATCH, size), np.uint8)
        shards = np.searchsorted(ends_with, rows, side="right")
        starts = ends_with[shards] - [entries[shard]["rows"] for shard in shards]
        places = zip(shards.tolist(), (rows - starts).tolist(), batch, strict=True)
        for shard, row, target in places:
            os.preadv(files[shard], [target], entries[shard]["offsets"]["mean"] + row * size)
    for file in files:
        os.close(file)


def read_epoch(folder: str) -> None:
    """Read one epoch by the training reader, in training's order."""
    store = LatentStore.open(folder)
    reader = store.reader(BATCH, seed=0)
    for _ in range(len(store) // BATCH):
        next(reader)


def feed_epoch(folder: str) -> None:
    """Read one epoch by training's feed, a thread that also drops labels and draws noise."""
    store = LatentStore.open(folder)
    generator = GeneratorSection(training=GeneratorTraining(batch_size=BATCH))
    batches = latent_feed(store, generator, 0)(0, 0, 1, torch.device("cpu"))
    for _ in range(len(store) // BATCH):
        next(batches)


def drop_from_memory(folder: str) -> None:
    """Drop the shards' pages from the page cache."""
    for path in shard_files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(read: Callable[[str], None], folder: str, cached: bool) -> float:
    """Seconds of one read of the store, whose pages are in the page cache or not, by `cached`."""
    if cached:
        read_files(folder)
    else:
        drop_from_memory(folder)
    started = time.perf_counter()
    read(folder)
    return time.perf_counter() - started


def start_up(num_rows: int, results: Any) -> None:
    """Open a store of `num_rows` rows of which only the manifest exists, and order an epoch.

    Puts the rows, the manifest's MB, the seconds of both steps and memory [MiB] into `results`.
    """
    with tempfile.TemporaryDirectory() as folder:
        size = write_manifest(folder, num_rows)
        before, started = peak_rss(), time.perf_counter()
        store = LatentStore.open(folder)
        opened, memory = time.perf_counter(), peak_rss()
        order = EpochOrder(len(store), 0)
        order.batch(0, BATCH)
        ordered = time.perf_counter()
        # The batch that spans two epochs needs both orders at once.
        order.batch(num_rows // BATCH, BATCH)
    assert len(store) == num_rows
    results.put(
        (num_rows, size / 1e6, opened - started, ordered - opened, before, memory, peak_rss())
    )


def write_manifest(folder: str, num_rows: int) -> int:
    """Write the manifest of a store whose shards do not exist; returns its bytes."""
    entry = {"errors": 0, "bytes": 8394000, "offsets": {"mean": 4096}}
    shards = [
        {
            "name": f"{i:08d}.parquet",
            "rows": min(SHARD, num_rows - i * SHARD),
            "etag": f"{i:032x}",
            **entry,
        }
        for i in range(-(-num_rows // SHARD))
    ]
    counted = {"count": num_rows, "sums": ["1"] * 32, "squares": ["1"] * 32}
    manifest = {
        "format": FORMAT,
        "columns": ["mean"],
        "latent_shape": [32, 16, 16],
        "stored": num_rows,
        "statistics": {"mean": counted},
        "shards": shards,
    }
    data = encode_manifest(manifest)
    paths.write_bytes(paths.join(folder, "manifest.json"), data)
    return len(data)


def peak_rss() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def print_large(sizes: list[int]) -> None:
    """Print the table of `start_up`, with a process for each size."""
    print(
        "\n| rows | manifest [MB] | open [s] | order [s] | memory before [MiB] | peak, open "
        "| peak, two orders |"
    )
    print("|---|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for size in sizes:
        results = context.Queue()
        process = context.Process(target=start_up, args=(size, results))
        process.start()
        rows, *figures = results.get()
        process.join()
        print(f"| {rows} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |", flush=True)


def print_rates(folder: str, num_rows: int, shape: tuple[int, ...], feed: bool) -> None:
    """Print the table of writing and reading."""
    megabytes = num_rows * int(np.prod(shape)) * 2 / 1e6
    ours, plain = write_store(folder, num_rows, shape)
    print(f"\n{num_rows} rows of {shape}, {megabytes:.0f} MB\n")
    print("| what | MB/s | rows/s | ratio | to |\n|---|---|---|---|---|")

    def row(what: str, seconds: float, base: float | None, to: str) -> None:
        ratio = "" if base is None else f"{base / seconds:.3f}"
        rates = f"{megabytes / seconds:.0f} | {num_rows / seconds:.0f}"
        print(f"| {what} | {rates} | {ratio} | {to} |", flush=True)

    row("write the latents' bytes whole, with fsync", plain, None, "")
    row("write shards", ours, plain, "the bytes alone")
    ways = [
        ("by pyarrow alone", read_arrow),
        ("rows in training's order by one call each", read_rows),
        ("an epoch in training's order", read_epoch),
    ]
    if feed:
        ways.append(("an epoch by the feed of training, with its noise", feed_epoch))
    for cached in (True, False):
        state = "in memory" if cached else "dropped"
        base = timed(read_files, folder, cached)
        row(f"read the files, {state}", base, None, "")
        for name, read in ways:
            row(f"{name}, {state}", timed(read, folder, cached), base, "the files")
        after = timed(read_files, folder, cached)
        row(f"read the files again, {state}", after, base, "the files")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=65_536)
    parser.add_argument("--shape", type=int, nargs=3, default=[32, 16, 16])
    parser.add_argument("--folder", help="where the store is written; a temporary one without it")
    parser.add_argument("--large", type=int, nargs="*", default=[1_280_000, 100_000_000])
    parser.add_argument("--no-feed", action="store_true", help="leave out the noise of training")
    arguments = parser.parse_args()
    print(describe())
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print_rates(folder, arguments.rows, tuple(arguments.shape), not arguments.no_feed)
    if arguments.large:
        print_large(arguments.large)


if __name__ == "__main__":
    # Run under the module's own name, so that the measured processes find `start_up`.
    from benchmarks.store import main as _main

    _main()
