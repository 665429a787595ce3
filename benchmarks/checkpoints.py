"""How long two workers stand still at a checkpoint: one file or parts, then or in the background.

    python -m benchmarks.checkpoints [--width 2048] [--layers 16] [--saves 3]

Two processes train a stack of linear layers with AdamW and a moving average on this CPU, without
Ray, and save into a folder (`--folder`, on the disk that is to be measured). Training stands still
from the call of `save` until all workers have returned from it. Steps are measured between saves,
and while a checkpoint is being written in the background.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.environment import describe
from fae.pipelines.config.sections import TrainingSection
from fae.pipelines.training.checkpoints import Checkpoints, state_bytes
from fae.pipelines.training.distributed import shard
from fae.pipelines.training.state import TrainState

NUM_WORKERS = 2
STEPS = 4
"""Before each save."""
WAYS = [(False, False), (True, False), (False, True), (True, True)]
"""In parts, in the background."""


class Stack(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


def step(state: TrainState, width: int) -> float:
    """Seconds of one optimizer step of all workers."""
    started = time.perf_counter()
    network = state.networks["model"]
    network.prepare(1.0)
    state.model(torch.randn(8, width)).square().mean().backward()
    network.optimizer.step()
    state.step += 1
    state.update_ema()
    dist.barrier()
    return time.perf_counter() - started


def worker(rank: int, given: argparse.Namespace, folder: str, sharded: bool, told: Any) -> None:
    """Measure every way; the first worker puts (parts, background) and lists of seconds."""
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, f"store-{sharded}"), NUM_WORKERS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_WORKERS)
    torch.manual_seed(0)
    model = Stack(given.width, given.layers)
    if sharded:
        shard(model)
    state = TrainState(model, TrainingSection(ema_decay=0.999))
    step(state, given.width)
    if rank == 0:
        told.put(state_bytes(state))
    for parts, background in WAYS:
        training = TrainingSection(
            checkpoint_parts=parts, checkpoint_background=background, keep_checkpoints=1
        )
        run = os.path.join(folder, "run")
        checkpoints = Checkpoints(run, training)
        still: list[float] = []
        complete: list[float] = []
        alone: list[float] = []
        beside: list[float] = []
        for _ in range(given.saves):
            alone += [step(state, given.width) for _ in range(STEPS)]
            dist.barrier()
            started = time.perf_counter()
            checkpoints.save(state)
            dist.barrier()
            still.append(time.perf_counter() - started)
            while background and writes(checkpoints):
                beside.append(step(state, given.width))
            checkpoints.wait()
            complete.append(time.perf_counter() - started)
        dist.barrier()
        if rank == 0:
            told.put((still, complete, alone, beside))
            shutil.rmtree(run)
        dist.barrier()
    dist.destroy_process_group()


def writes(checkpoints: Checkpoints) -> bool:
    """Whether a checkpoint of any worker is being written."""
    busy = torch.tensor(float(checkpoints.writing))
    dist.all_reduce(busy)
    return bool(busy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--folder", help="where runs are written; a temporary folder otherwise")
    given = parser.parse_args()
    print(describe())
    context = multiprocessing.get_context("spawn")
    for sharded in (False, True):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            told = context.Queue()
            workers = [
                context.Process(target=worker, args=(rank, given, folder, sharded, told))
                for rank in range(NUM_WORKERS)
            ]
            for one in workers:
                one.start()
            print(f"{'fsdp' if sharded else 'ddp'}, state of {told.get() / 1e9:.2f} GB")
            print("| written | stands still [s] | complete after [s] | step [s] | meanwhile [s] |")
            print("|---|---|---|---|---|")
            for parts, background in WAYS:
                still, complete, alone, beside = told.get()
                name = f"{'parts' if parts else 'one file'}{', background' * background}"
                cells = [f"{statistics.median(values):.2f}" for values in (still, complete, alone)]
                cells.append(f"{statistics.median(beside):.2f}" if beside else "")
                print(f"| {name} | {' | '.join(cells)} |", flush=True)
            for one in workers:
                one.join()


if __name__ == "__main__":
    main()
