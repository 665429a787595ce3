"""Rows through a pool of actors of one GPU each, on the Ray of RAY_ADDRESS; prints JSON.

No GPU is touched: Ray counts what its nodes declare.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fae.pipelines.config.sections import PrecomputeSection
from fae.pipelines.runtime.actor_pool import RowStages, run_rows
from tests.tiny import wait_for

NUM_ACTORS, NUM_ROWS = 2, 20
PATIENCE = 200.0


class OnGpu:
    """Waits for the other actor, then says on which node it is; the nodes share a disk."""

    def __init__(self, folder: str) -> None:
        import ray

        self.node = ray.get_runtime_context().get_node_id()
        self.folder = Path(folder)
        (self.folder / f"{self.node}.actor").touch()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import ray

        wait_for(lambda: len(list(self.folder.glob("*.actor"))) == NUM_ACTORS, PATIENCE)
        return {**row, "node": [self.node], "gpus": [len(ray.get_gpu_ids())]}


def doubled(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "doubled": 2 * row["index"]}


def main() -> None:
    pool = PrecomputeSection(num_actors=NUM_ACTORS, gpus_per_actor=1)
    rows = [{"index": index} for index in range(NUM_ROWS)]
    stages = RowStages(OnGpu, (str(Path.cwd()),), prepare=doubled)
    found = list(run_rows(rows, stages, pool))
    print(
        json.dumps(
            {
                "doubled": sorted(int(row["doubled"]) for row in found),
                "nodes": len({row["node"] for row in found}),
                "gpus": sorted({int(row["gpus"]) for row in found}),
            }
        )
    )


if __name__ == "__main__":
    main()
