"""The encoder of benchmarks/scale.py, which sleeps for a shard's service time.

It is not in scale.py because every actor imports this module, and 256 actors have no memory for
torch.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np

LATENT_SHAPE = (4, 2, 2)


class SleepingEncoder:
    """An actor with the input and output of `EncodeShards` (latents/precompute_job.py).

    `parts` holds the seconds of a shard.
    """

    def __init__(self, recipe: Any, plan_id: Any, parts: dict[str, str]) -> None:
        self.columns = list(recipe.precompute.columns)
        self.seconds = float(parts["service seconds"])

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        time.sleep(self.seconds)
        ok = np.asarray(batch["ok"][0], dtype=np.int64)
        latents = np.full((len(ok), *LATENT_SHAPE), int(batch["shard"][0]) % 1000, np.float16)
        return {
            "shard": batch["shard"],
            "ok": [ok],
            "errors": [json.dumps(json.loads(str(batch["errors"][0])))],
            "encoded_at": [time.time()],
            **{name: [latents] for name in self.columns},
        }
