"""Whether the store and the disks have room for a training's checkpoints: `fae train … --dry-run`.

A checkpoint for S3, or each worker's part of it, passes through the temporary directory of the host
that writes it, and of each host that reads it.
"""

from __future__ import annotations

import os
import shutil
import tempfile

from ..config import Recipe
from ..storage import paths, s3
from ..training import requirements

MEBI = 1 << 20


def checkpoint_text(recipe: Recipe, network: str) -> str:
    """A table for people, with a warning where a checkpoint is too large for store or disk.

    The disks are those of this machine. Raises as `memory_of` does.
    """
    size = requirements.checkpoint_size(recipe, network)
    parts = requirements.checkpoint_parts(recipe, network, size)
    lines = ["checkpoint, estimated [MiB]", _row(size, "one checkpoint")]
    if parts > 1:
        lines.append(_row(size // parts, f"each of its {parts} parts, one from each worker"))
    if paths.is_s3(recipe.storage):
        lines += _object(size // parts)
        disk, needed = tempfile.gettempdir(), size
        where = f"free in {disk} here, through which it passes"
        advice = "Set TMPDIR to a folder on a larger disk."
    else:
        kept = requirements.training_of(recipe, network).keep_checkpoints
        disk, needed = _existing(recipe.storage), (kept + 1) * size
        lines.append(_row(needed, f"the {kept} that are kept, and the one that is written"))
        where = f"free in {disk} here"
        advice = "Lower keep_checkpoints, or set storage to a larger disk."
    free = shutil.disk_usage(disk).free
    lines.append(_row(free, where))
    if needed > free:
        lines.append(f"  This will not fit. {advice}")
    return "\n".join(lines)


def num_parts(size: int) -> int:
    """Parts in which `size` bytes are uploaded: boto3 doubles them until they are few enough."""
    part = s3.PART_SIZE
    while -(-size // part) > s3.MOST_PARTS:
        part *= 2
    return -(-size // part)


def _object(size: int) -> list[str]:
    parts = num_parts(size)
    lines = [_row(s3.LARGEST_OBJECT, f"S3's largest object; of {s3.MOST_PARTS:,} parts, {parts:,}")]
    if size > s3.LARGEST_OBJECT:
        lines.append("  S3 will refuse it. Train a smaller network, or set storage to a disk.")
    return lines


def _row(size: int, name: str) -> str:
    return f"  {size / MEBI:>9,.0f}  {name}"


def _existing(uri: str) -> str:
    """The innermost folder of the local path that exists already."""
    path = os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path
