"""Checkpoints of a run: files written whole, of which the newest undamaged one is resumed from.

The loop saves and resumes by `Checkpoints`; state.py says what a checkpoint holds, and
checkpoint_files.py which files it is. In parts, each worker writes the rows that it has under FSDP,
and the same rows under DDP, and the first worker completes the checkpoint with an index. torch's
own distributed checkpoint is not used: its index is a pickle, or in safetensors there is none, so
that a missing part is not noticed, and it knows neither our storage's retries nor checksums.

In the background a thread writes a copy on the host, one at a time. Ray Train's
`checkpoint_upload_mode=ASYNC` is not used for it: it sends a folder that each worker has written to
its disk before, and which checkpoints are complete only Ray Train's own state then says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from ..config.sections import TrainingSection
from ..storage import paths
from . import checkpoint_files
from .checkpoint_files import Part, list_checkpoints
from .distributed import is_sharded
from .job import TrainingError
from .memory_plan import checkpoint_bytes
from .state import CheckpointDamaged, TrainState, write_content

LONGEST_WAIT = timedelta(days=1)
"""For the slowest worker's part; Ray Train notices lost workers long before."""
T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one run; all of its workers make it, save and resume together."""

    def __init__(self, run_uri: str, training: TrainingSection) -> None:
        self._run_uri, self._training = run_uri, training
        together = dist.is_available() and dist.is_initialized()
        self._rank, self._num_workers = (
            (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        )
        self._group: Any = None
        if self._num_workers > 1:
            self._group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None

    def save(self, state: TrainState) -> None:
        """Write the state, then delete all but the newest checkpoints; the one before is complete.

        In the background it only copies the state. Raises as `wait` does.
        """
        self.wait()
        parts = checkpoint_files.num_parts(self._training, self._num_workers, state_bytes(state))
        background = checkpoint_files.in_background(self._training)
        if parts > 1:
            content = state.content(self._rank, parts, copy=True)
        elif self._rank == 0:
            content = state.content(copy=background)
        else:
            if is_sharded(state.model):
                state.content()  # the first worker gathers
            return
        write = self._write_part if parts > 1 else self._write_file
        self._written = self._thread.submit(write, content)
        if not background:
            self.wait()

    @property
    def writing(self) -> bool:
        """Whether this worker writes in the background."""
        return self._written is not None and not self._written.done()

    def check(self) -> None:
        """Raises as `wait` does where writing in the background has failed; waits for nothing."""
        if not self.writing:
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises StorageError where this worker cannot write, TrainingError where another cannot.
        """
        written, self._written = self._written, None
        if written:
            written.result()

    def resume(self, state: TrainState) -> str:
        """Load the newest undamaged checkpoint into `state`; a line that says so.

        The line is empty where the run has no checkpoint. Raises TrainingError where all are
        damaged.
        """
        found = self._all(lambda: list_checkpoints(self._run_uri))[0]
        said = ""
        for uri in reversed(found):
            damage = next(filter(None, self._all(partial(self._load, state, uri))), "")
            if not damage:
                return f"{said}resumed at step {state.step} from {uri}"
            said += f"{uri} is damaged ({damage}); trying the one before. "
        if found:
            folder = paths.join(self._run_uri, checkpoint_files.CHECKPOINTS)
            raise TrainingError(
                f"{said}\nThere is none before. Delete {folder} to begin at step 0."
            )
        return ""

    def _write_file(self, content: dict[str, Any]) -> None:
        with paths.writing(checkpoint_files.checkpoint_uri(self._run_uri, content["step"])) as path:
            write_content(content, path)
        self._remove_old(content["step"], [])

    def _write_part(self, content: dict[str, Any]) -> None:
        step = content["step"]

        def write() -> Part:
            name = checkpoint_files.new_part(step, content["part"], content["parts"])
            folder = paths.join(self._run_uri, checkpoint_files.CHECKPOINTS)
            with paths.writing(paths.join(folder, name)) as path:
                write_content(content, path)
                return Part(name, path.stat().st_size)

        def complete() -> None:
            if self._rank == 0:
                checkpoint_files.write_index(self._run_uri, step, written)
                self._remove_old(step, written)

        written = self._all(write)
        self._all(complete)  # no worker writes its next part while the first one removes files

    def _remove_old(self, step: int, parts: list[Part]) -> None:
        checkpoint_files.remove_old(self._run_uri, self._training.keep_checkpoints, step, parts)

    def _load(self, state: TrainState, uri: str) -> str:
        """What is damaged in the checkpoint; empty where it was loaded."""
        try:
            state.load(self._files(state, uri))
        except CheckpointDamaged as error:
            return str(error)
        return ""

    def _files(self, state: TrainState, uri: str) -> Iterator[Path]:
        """Local copies of what this worker must read of the checkpoint, one at a time."""
        if uri.endswith(".pt"):
            with paths.local_copy(uri) as path:
                yield path
            return
        try:
            parts = checkpoint_files.read_index(uri)
        except ValueError as error:
            raise CheckpointDamaged(str(error)) from None
        own = self._rank % len(parts)  # last, because it has this worker's RNG
        others = [n for n in range(len(parts)) if n != own and state.needs(n, len(parts))]
        for part in (parts[number] for number in [*others, own]):
            file = paths.join(uri.rpartition("/")[0], part.file)
            there = next(paths.list_files(file), None)
            if there is None or there.size != part.bytes:
                size = f"{there.size:,} of {part.bytes:,} bytes" if there else "missing"
                raise CheckpointDamaged(f"{part.file}: {size}")
            with paths.local_copy(file) as path:
                yield path

    def _all(self, action: Callable[[], T]) -> list[T]:
        """What `action` returns on each worker. All raise where it fails on one of them."""
        if self._group is None:
            return [action()]
        result: T | None = None
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        told: list[Any] = [None] * self._num_workers
        dist.all_gather_object(told, (result, failure and f"{failure}"), self._group)
        if failure:
            raise failure
        for rank, (_, reason) in enumerate(told):
            if reason is not None:
                raise TrainingError(f"worker {rank} of {self._num_workers}: {reason}")
        return [result for result, _ in told]


def state_bytes(state: TrainState) -> int:
    """Bytes of a checkpoint of `state`, all workers' together."""
    modules = [network.module for network in state.networks.values()]
    return checkpoint_bytes(modules, bool(state.ema))
