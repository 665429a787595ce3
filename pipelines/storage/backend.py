"""What paths.py asks of each kind of storage: the functions of local.py, objects.py and hub.py.

The modules themselves are the implementations. They raise what their ERRORS name, and paths.py
makes a StorageError of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pyarrow import fs

from fae_core.errors import UserError


class StorageError(UserError, OSError):
    """A path that cannot be read, written or listed; the message says what to check."""


class FileError(StorageError):
    """It is about this file alone: it is not there, for example. Its storage answers."""


class RefusedError(StorageError):
    """It is about this file alone or about all, which other reads tell: access is denied, a local
    read fails (EIO), or there is no such bucket or repository."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file or object: its whole address, its bytes, on S3 its ETag, and when it was written.

    `modified` is in seconds since 1970, None on the Hub.
    """

    uri: str
    size: int
    etag: str | None = None
    modified: float | None = None


class Readable(Protocol):
    """Storage that can be read. paths.py says what each function promises."""

    ERRORS: tuple[type[Exception], ...]

    def arrow(self, uri: str) -> tuple[fs.FileSystem, str]: ...
    def read_bytes(self, uri: str) -> bytes: ...
    def local_copy(self, uri: str) -> AbstractContextManager[Path]: ...
    def exists(self, uri: str) -> bool: ...
    def is_encrypted(self, uri: str) -> bool: ...
    def list_files(self, uri: str, recursive: bool) -> Iterator[FileInfo]: ...
    def list_folders(self, uri: str) -> list[str]: ...
    def explain(self, uri: str, error: Exception) -> tuple[type[StorageError], str]:
        """The kind of error, and what failed and what to check, after "Cannot read ".

        The words hold no secret and no request id.
        """
        ...


class Writable(Readable, Protocol):
    """Storage that can be written too."""

    def write_bytes(self, uri: str, data: bytes) -> str: ...
    def write_once(self, uri: str, data: bytes) -> str: ...
    def replace(self, uri: str, known: bytes, data: bytes) -> bool: ...
    def writing(self, uri: str) -> AbstractContextManager[Path]: ...
    def delete(self, uri: str) -> None: ...
