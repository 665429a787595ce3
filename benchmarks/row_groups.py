"""Reading a Parquet source shard by shard: one row group for all images against groups of 100.

    python -m benchmarks.row_groups [--images 8192] [--bytes 48000] [--shard 256] [--large-gb 6]

What precompute's reading tasks do, without decoding: each layout in a process of its own, with its
processor seconds, the bytes that it read from the file, its peak memory, and how much of that is
above the start of the reading. `--large-gb` reads one group of that size as well, to see that
memory does not grow with it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.environment import describe
from fae.pipelines.config.sections import DataSection
from fae.pipelines.data.reading import RowStreams, read_records
from fae.pipelines.data.records import records_of
from fae.pipelines.data.sources import plan_source
from fae.pipelines.latents.precompute_job import shards_in_large_groups, units_of


def write_source(path: Path, num_images: int, size: int, group: int) -> None:
    """Write `num_images` values of `size` random bytes in row groups of `group` rows."""
    random = np.random.default_rng(0)
    schema = pa.schema([("image", pa.large_binary())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num_images, group):
            rows = min(group, num_images - start)
            values = (random.bytes(size) for _ in range(rows))
            table = pa.table({"image": pa.array(values, pa.large_binary())})
            writer.write_table(table, row_group_size=rows)


def read_source(path: str, shard: int, results: Any) -> None:
    """Put (processor seconds, bytes read, peak memory, the same above the start [MiB])."""
    data = DataSection(path=path)
    source = plan_source(data)
    records = records_of(source.table)
    num_shards = -(-len(records) // shard)
    grouped = shards_in_large_groups(source.table["uri"], source.large_groups, shard)
    # The peak so far is that of imports and planning.
    Path("/proc/self/clear_refs").write_text("5")
    before, read_before, started = status("VmRSS"), bytes_read(), time.process_time()
    for unit in units_of(range(num_shards), grouped):
        with RowStreams() as streams:
            for index in unit:
                blobs = read_records(records[index * shard : (index + 1) * shard], data, streams)
                assert all(isinstance(blob, bytes) for blob in blobs)
    seconds = time.process_time() - started
    peak = status("VmHWM")
    results.put((seconds, bytes_read() - read_before, peak, peak - before))


def status(name: str) -> float:
    """A figure of this process's memory [MiB] (Linux): VmRSS is now, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def bytes_read() -> int:
    """Bytes that this process has read from files, the page cache included (Linux)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def measure(path: Path, shard: int) -> tuple[float, int, float, float]:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=read_source, args=(str(path), shard, results))
    process.start()
    figures: tuple[float, int, float, float] = results.get()
    process.join()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--bytes", type=int, default=48_000)
    parser.add_argument("--shard", type=int, default=256)
    parser.add_argument("--large-gb", type=float, default=0.0)
    parser.add_argument(
        "--folder", help="where the sources are written; a temporary one without it"
    )
    options = parser.parse_args()
    print(describe())
    head = (
        "processor seconds | bytes read / bytes of the file | peak memory [MiB] | above the start"
    )
    print(f"\n| layout | {head} |")
    print("|---|---:|---:|---:|---:|")
    layouts = [(f"{options.images} images in groups of 100", options.images, 100)]
    layouts += [(f"{options.images} images in one group", options.images, options.images)]
    if options.large_gb:
        number = int(options.large_gb * 1e9 / options.bytes)
        layouts.append((f"{number} images in one group", number, number))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name, number, group in layouts:
            path = Path(folder) / "source.parquet"
            write_source(path, number, options.bytes, group)
            seconds, read, peak, above = measure(path, options.shard)
            share = read / path.stat().st_size
            print(
                f"| {name} | {seconds:.2f} | {share:.2f} | {peak:.0f} | {above:.0f} |", flush=True
            )


if __name__ == "__main__":
    main()
