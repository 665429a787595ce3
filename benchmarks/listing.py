"""Memory and time of planning.

    python -m benchmarks.listing SOURCE | NUMBER

SOURCE is any data.path. NUMBER first writes a Parquet list of so many S3 addresses, in another
process and not in the order of keys, so that sorting is measured too. Prints records, seconds, the
peak of resident memory, and the size of the plan.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.environment import run
from fae.pipelines.config.sections import DataSection
from fae.pipelines.data.sources import plan_images
from fae.pipelines.latents.plan import PLAN, ensure_plan
from fae.pipelines.storage import paths


def measure(source: str) -> dict[str, float]:
    """Figures of planning `source` as precompute does, into a store in a temporary folder."""
    before = peak_rss()
    started = time.monotonic()
    table = plan_images(DataSection(path=source))
    listed = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        plan = ensure_plan(folder, table, 512, {"backbone": "benchmark"})
        (file,) = paths.list_files(paths.join(folder, PLAN))
    ended = time.monotonic()
    rows = plan.num_images
    return {
        "records": rows,
        "list_seconds": listed - started,
        "plan_seconds": ended - listed,
        "table_bytes_per_record": table.nbytes / rows,
        "plan_bytes_per_record": file.size / rows,
        "rss_before_mb": before / 1e6,
        "peak_rss_mb": peak_rss() / 1e6,
        "peak_bytes_per_record": (peak_rss() - before) / rows,
    }


def peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_list(path: str, count: int) -> None:
    order = np.random.default_rng(0).permutation(count)
    with pq.ParquetWriter(path, pa.schema([("uri", pa.string()), ("label", pa.int64())])) as writer:
        for some in np.array_split(order, max(1, count // 100_000)):
            uris = [f"s3://bucket/train/n{i % 1000:08d}/n{i % 1000:08d}_{i:07d}.JPEG" for i in some]
            writer.write_table(pa.table({"uri": uris, "label": some % 1000}))


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m benchmarks.listing SOURCE | NUMBER")
    with tempfile.TemporaryDirectory() as folder:
        source = sys.argv[1]
        if source.isdigit():
            path = os.path.join(folder, "list.parquet")
            maker = multiprocessing.Process(target=write_list, args=(path, int(source)))
            maker.start()
            maker.join()
            source = path
        figures = measure(source)
    print(json.dumps({name: round(value, 1) for name, value in figures.items()}, indent=1))


if __name__ == "__main__":
    run(main)
