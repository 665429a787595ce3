"""Local files for paths.py, those of the package (shipped:) among them.

A file is written under a temporary name in its own folder, synced, and renamed or linked into
place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from pyarrow import fs

from .backend import FileError, FileInfo, RefusedError, StorageError

SHIPPED = "shipped:"
"""How the address of a folder in the package begins: shipped:emoji, for example."""
TEMPORARY_SUFFIX = ".tmp"
"""Of the hidden files that are renamed; those of a killed process stay."""
ERRORS: tuple[type[Exception], ...] = (OSError,)
_OF_ONE_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
# Damage of a file or its permissions; but also a mount that is away, or whose ticket has expired.
_OF_ONE_OR_ALL = (
    *(errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EUCLEAN, errno.EBADMSG, errno.EINVAL),
)


def path_of(uri: str) -> str:
    """The absolute path that `uri` means: of a file:// address, in the package, or of the user."""
    if uri.startswith(SHIPPED):
        return str(Path(__file__).parents[2] / "shipped" / uri.removeprefix(SHIPPED))
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))


def arrow(uri: str) -> tuple[fs.FileSystem, str]:
    return fs.LocalFileSystem(), path_of(uri)


def read_bytes(uri: str) -> bytes:
    return Path(path_of(uri)).read_bytes()


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    yield Path(path_of(uri))


def exists(uri: str) -> bool:
    return os.path.exists(path_of(uri))


def is_encrypted(uri: str) -> bool:
    return False


def write_bytes(uri: str, data: bytes) -> str:
    path = path_of(uri)
    temporary = _write_temporary(path, data)
    try:
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
    _sync(os.path.dirname(path))
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def write_once(uri: str, data: bytes) -> str:
    path = path_of(uri)
    temporary = _write_temporary(path, data)
    try:
        os.link(temporary, path)
    finally:
        os.unlink(temporary)
    _sync(os.path.dirname(path))
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def replace(uri: str, known: bytes, data: bytes) -> bool:
    path = path_of(uri)
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if Path(path).read_bytes() != known:
            return False
        write_bytes(uri, data)
        return True
    finally:
        os.close(folder)


@contextlib.contextmanager
def writing(uri: str) -> Iterator[Path]:
    path = path_of(uri)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = Path(_temporary_beside(path))
    try:
        yield temporary
        _sync(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(os.path.dirname(path))


def delete(uri: str) -> None:
    Path(path_of(uri)).unlink(missing_ok=True)


def list_files(uri: str, recursive: bool) -> Iterator[FileInfo]:
    root = path_of(uri)
    if os.path.isfile(root):
        found = iter([_info(root, os.stat(root))])
    elif os.path.isdir(root):
        found = _below(root, os.path.realpath(root), recursive)
    else:
        return
    if not uri.startswith(SHIPPED):
        yield from found
        return
    for info in found:
        yield dataclasses.replace(info, uri=uri.rstrip("/") + info.uri[len(root) :])


def list_folders(uri: str) -> list[str]:
    root = path_of(uri)
    if not os.path.isdir(root):
        return []
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))


def explain(uri: str, error: Exception) -> tuple[type[StorageError], str]:
    kind: type[StorageError] = StorageError
    if not isinstance(error, OSError) or error.errno in _OF_ONE_FILE:
        kind = FileError
    elif error.errno in _OF_ONE_OR_ALL:
        kind = RefusedError
    return kind, f"{uri}: {advice(error)}"


def advice(error: Exception, place: str = "there") -> str:
    """What to check after `error`; `place` is where files are written."""
    if isinstance(error, FileNotFoundError):
        return "it is not there (404). Check the path; it may have been removed meanwhile."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left {place}. Free some, then run the same command again: it resumes."
    if isinstance(error, OSError) and error.strerror:
        return f"{os.strerror(error.errno) if error.errno else error.strerror}."
    return f"{type(error).__name__}."


def _write_temporary(path: str, data: bytes) -> str:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = _temporary_beside(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    return temporary


def _temporary_beside(path: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name[:100]}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")


def _sync(path: str) -> None:
    # A new name survives a power cut only once its folder is synced, as the content does its file.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _below(folder: str, root: str, recursive: bool) -> Iterator[FileInfo]:
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
    except OSError as error:
        raise StorageError(f"Cannot list {folder}: {advice(error)}") from None
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            if recursive:
                yield from _below(entry.path, root, recursive)
            continue
        target = os.path.realpath(entry.path) if entry.is_symlink() else ""
        if target and not target.startswith(root.rstrip("/") + "/"):
            continue
        try:
            if entry.is_file():
                yield _info(entry.path, entry.stat())
        except FileNotFoundError:
            continue


def _info(path: str, status: os.stat_result) -> FileInfo:
    return FileInfo(path, status.st_size, modified=status.st_mtime)
