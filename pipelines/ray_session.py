"""The one place that connects to Ray: a cluster named by RAY_ADDRESS, or a quiet local one.

Every command calls `start_ray` first. A local cluster is this process's own and ends with it.
"""

from __future__ import annotations

import logging
import os
from typing import Any

QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every print of a worker appears twice
}


def start_ray(**local: Any) -> None:
    """Attach to RAY_ADDRESS, else start a local cluster (`local` goes to ray.init); nothing if connected already."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        return
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    # Ray Train asks the dashboard's state API about its controller, and complains every second without it.
    local = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": True, **local}
    ray.init(
        ignore_reinit_error=True,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": {key: os.environ[key] for key in QUIET}},
        **local,
    )
