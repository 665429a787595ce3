"""Temporary folders for large files on their way to or from S3, which no killed process leaves.

A process holds a lock on each of its folders, and the kernel releases it when the process ends. The
next process that needs a folder removes those without a lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "fae-files-"


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new folder in the temporary directory (TMPDIR), removed when the block ends."""
    _remove_abandoned()
    # Under its final name a folder is always locked; another process would remove it otherwise.
    made = Path(tempfile.mkdtemp(prefix=f"new-{PREFIX}"))
    folder = made.with_name(made.name.removeprefix("new-"))
    descriptor = os.open(made, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        made.rename(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _remove_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or another process removes it too
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
