"""Workers of a training without Ray: processes that talk through gloo, forked from one that has
imported torch."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch.distributed as dist


def on_workers(num: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)`, of a module's top level, returns on each of `num` workers.

    Raises what the first of them raises, BrokenProcessPool where one was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(num, context) as pool:
        store = os.path.join(folder, "store")
        calls = [pool.submit(_worker, rank, num, store, function, arguments) for rank in range(num)]
        return [call.result() for call in calls]


def _worker(rank: int, num: int, store: str, function: Callable, arguments: tuple) -> Any:
    dist.init_process_group("gloo", store=dist.FileStore(store, num), rank=rank, world_size=num)
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()
