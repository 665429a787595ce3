"""The files of a run's checkpoints: their names, which belong together, and which are removed.

A checkpoint is one file, step_N.pt, or an index, step_N.json, with a part of each worker. The index
is written last and deleted first: parts without one are what a killed writer left. checkpoints.py
writes and reads the files; `fae status` and `fae doctor` list them, without torch.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from ..config.sections import TrainingSection
from ..storage import paths

CHECKPOINTS = "checkpoints"
PARTS_FROM = 1 << 30
"""Bytes of a state that several workers write in parts. A smaller one is written in seconds, and
one file is easier to look after."""
_CHECKPOINT = re.compile(r"step_(\d+)\.(pt|json)")
_PART = re.compile(r"step_(\d+)-\d+-of-\d+-[0-9a-f]+\.part")


@dataclass(frozen=True)
class Part:
    """A part of a checkpoint, as its index names it: a file beside the index, and its bytes."""

    file: str
    bytes: int


def num_parts(training: TrainingSection, num_workers: int, size: int) -> int:
    """Files in which so many workers write a state of `size` bytes."""
    wanted = training.checkpoint_parts
    return num_workers if wanted is True or (wanted == "auto" and size >= PARTS_FROM) else 1


def in_background(training: TrainingSection) -> bool:
    """Whether training goes on while a checkpoint is written."""
    wanted = training.checkpoint_background
    return training.use_gpu if wanted == "auto" else wanted


def checkpoint_uri(run_uri: str, step: int, parts: int = 1) -> str:
    """Address of the checkpoint at `step`: its file, or the index of its parts."""
    return paths.join(
        run_uri, CHECKPOINTS, f"step_{step:09d}.pt" if parts == 1 else f"step_{step:09d}.json"
    )


def new_part(step: int, part: int, parts: int) -> str:
    """A name for the file of a part, which no writer before has used: none replaces another's."""
    return f"step_{step:09d}-{part + 1}-of-{parts}-{uuid.uuid4().hex[:8]}.part"


def step_of(uri: str) -> int | None:
    """The step of a checkpoint; None where the address is that of no whole one."""
    match = _CHECKPOINT.fullmatch(_name(uri))
    return int(match[1]) if match else None


def list_checkpoints(run_uri: str) -> list[str]:
    """Addresses of the run's checkpoints, files and indexes, lowest step first."""
    files = paths.list_files(paths.join(run_uri, CHECKPOINTS))
    found = [(step, file.uri) for file in files if (step := step_of(file.uri)) is not None]
    return [uri for _, uri in sorted(found)]


def write_index(run_uri: str, step: int, parts: list[Part]) -> None:
    """Complete the checkpoint whose parts are written."""
    text = json.dumps({"step": step, "parts": [asdict(part) for part in parts]}, indent=1)
    paths.write_bytes(checkpoint_uri(run_uri, step, len(parts)), text.encode())


def read_index(uri: str) -> list[Part]:
    """The parts of the checkpoint, first worker's first. Raises ValueError for another file."""
    try:
        parts = [Part(**part) for part in json.loads(paths.read_bytes(uri))["parts"]]
        if parts and all(_PART.fullmatch(part.file) for part in parts):
            return parts
    except (TypeError, KeyError, ValueError):
        pass
    raise ValueError("its index cannot be read")


def remove_old(run_uri: str, keep: int, step: int, parts: Iterable[Part] = ()) -> None:
    """Delete all but the `keep` newest checkpoints, and what killed writers left.

    `parts` are those of the checkpoint that was just written, at `step`. No worker may write
    another at the same time.
    """
    for uri in list_checkpoints(run_uri)[:-keep]:
        paths.delete(uri)
    named = {part.file for part in parts}
    for file in parts_without_index(run_uri, but_of=step):
        if _name(file.uri) not in named:
            paths.delete(file.uri)


def parts_without_index(run_uri: str, but_of: int | None = None) -> list[paths.FileInfo]:
    """Files beside the run's checkpoints that belong to none, or to the one at step `but_of`."""
    files = list(paths.list_files(paths.join(run_uri, CHECKPOINTS)))
    indexed = {step_of(file.uri) for file in files if file.uri.endswith(".json")} - {but_of}
    return [
        file
        for file in files
        if file.uri.endswith(paths.TEMPORARY_SUFFIX)
        or ((match := _PART.fullmatch(_name(file.uri))) and int(match[1]) not in indexed)
    ]


def _name(uri: str) -> str:
    return uri.rpartition("/")[2]
