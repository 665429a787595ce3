"""The one way to open a local, s3:// or hf:// path: whole reads and writes, listing, Arrow
filesystems.

A write is whole or absent: a temporary file renamed into place locally, one PUT on S3; `write_once`
never replaces (hard link locally, `If-None-Match: *` on S3), and `replace` only what the caller
knows (a lock locally, `If-Match` on S3). `writing` and `local_copy` are for
files of any size, which on S3 pass through a temporary file in parts (transfers.py). Each kind of
storage is a module (backend.py); the first s3:// address imports objects.py, and boto3 with it, the
first hf:// address hub.py. The Hub is read and not written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from . import local
from .backend import FileError, FileInfo, Readable, RefusedError, StorageError, Writable
from .local import SHIPPED, TEMPORARY_SUFFIX

__all__ = [
    "SHIPPED",
    "TEMPORARY_SUFFIX",
    "FileError",
    "FileInfo",
    "RefusedError",
    "StorageError",
    "address_of",
    "delete",
    "exists",
    "filesystem",
    "is_encrypted",
    "is_hub",
    "is_portable",
    "is_remote",
    "is_s3",
    "join",
    "list_files",
    "list_folders",
    "local_copy",
    "open_input",
    "push",
    "read_bytes",
    "replace",
    "source_root",
    "storage_error",
    "write_bytes",
    "write_once",
    "writing",
]

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w.-]+)?", re.ASCII)


def is_s3(uri: str) -> bool:
    """Whether `uri` is an s3:// address. Raises StorageError for a scheme that is not supported."""
    scheme, separator, _ = uri.partition("://")
    if separator and scheme not in ("s3", "hf", "file") and scheme.isalnum():
        raise StorageError(
            f"{uri}: {scheme}:// is not supported. Give a local path, s3:// or hf://."
        )
    return bool(separator) and scheme == "s3"


def is_hub(uri: str) -> bool:
    """Whether `uri` is an hf:// address, of a repository on the Hugging Face Hub."""
    return uri.startswith("hf://")


def is_remote(uri: str) -> bool:
    """Whether `uri` is an s3:// or hf:// address. Raises StorageError for another scheme."""
    return is_s3(uri) or is_hub(uri)


def is_portable(uri: str) -> bool:
    """Whether `uri` names the same files on every host: s3://, hf:// or a folder of the package.

    Such addresses are kept in plans and records as they are, others as absolute local paths. Raises
    StorageError for another scheme.
    """
    return uri.startswith(SHIPPED) or is_remote(uri)


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The Arrow filesystem of `uri` and the path inside it, without scheme, absolute if local."""
    return _readable(uri).arrow(uri)


def address_of(name: str) -> str:
    """The absolute local path or the address that a user's `name` means.

    A name OWNER/NAME that is no local path is a repository on the Hub. Raises StorageError where it
    is neither.
    """
    if is_remote(name):
        return name
    path = local.path_of(name)
    if not _HUB_ID.fullmatch(name) or name.endswith(".safetensors") or os.path.exists(path):
        return path
    try:
        there = exists(f"hf://{name}")
    except StorageError as error:
        raise StorageError(f"{name}: no such file or folder here. {error}") from None
    if not there:
        raise StorageError(
            f"{name}: no such file or folder here, and no repository of that name on the Hub that "
            "this machine may read (a private one needs HF_TOKEN)."
        )
    return f"hf://{name}"


def join(uri: str, *parts: str) -> str:
    """`uri` and `parts` with one slash between them; parts are relative."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)]) if parts else uri


def source_root(uri: str) -> str:
    """The folder or file that `uri` names; where it is hf:// and ends in a pattern, the folder."""
    if not is_hub(uri):
        return uri.rstrip("/")
    from . import hub

    return hub.split_pattern(uri)[0]


def open_input(uri: str) -> pa.NativeFile:
    """`uri` open for reading at any offset; on S3 a read is a ranged GET. Raises StorageError."""
    with _explained("open", uri):
        filesystem_, path = filesystem(uri)
        return filesystem_.open_input_file(path)


def read_bytes(uri: str) -> bytes:
    """The whole content of `uri`. Raises StorageError."""
    with _explained("read", uri):
        return _readable(uri).read_bytes(uri)


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """`uri`, of any size, as a local file: itself, a copy that is deleted afterwards (S3), or a
    cached one (Hub).

    Raises StorageError.
    """
    with contextlib.ExitStack() as stack:
        with _explained("read", uri):  # and not what the caller's block raises
            path = stack.enter_context(_readable(uri).local_copy(uri))
        yield path


def push(folder: Path, files: Sequence[str], repository: str, private: bool) -> str:
    """Send `files` of a local folder to the Hub's model repository OWNER/NAME.

    Creates the repository if it does not exist. Returns the commit's address. Raises StorageError,
    also where `private` is asked for and the repository is public.
    """
    from . import hub

    with _explained("push to", f"hf://{repository}"):
        return hub.upload(folder, files, repository, private, "fae publish")


def exists(uri: str) -> bool:
    """Whether there is a file, folder or object, or any object below `uri`. Raises StorageError."""
    with _explained("look up", uri):
        return _readable(uri).exists(uri)


def is_encrypted(uri: str) -> bool:
    """Whether `uri` is an object with SSE-KMS or SSE-C, whose ETag is not the MD5 of its content.

    Raises StorageError.
    """
    with _explained("look up", uri):
        return _readable(uri).is_encrypted(uri)


def write_bytes(uri: str, data: bytes) -> str:
    """Writes or replaces `uri` whole; returns its ETag (locally the MD5). Raises StorageError."""
    with _explained("write", uri):
        return _writable(uri).write_bytes(uri, data)


def write_once(uri: str, data: bytes) -> str:
    """Like `write_bytes`, but raises FileExistsError if `uri` is there already, even in a race."""
    backend = _writable(uri)
    try:
        return backend.write_once(uri, data)
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, "Written once and there already", uri) from None
    except backend.ERRORS as error:
        raise storage_error("write", uri, error) from None


def replace(uri: str, known: bytes, data: bytes) -> bool:
    """Replaces the whole content of `uri`, `known`, by `data`; returns whether it did.

    It does not where another process has replaced it meanwhile, even in a race. Raises
    StorageError.
    """
    with _explained("write", uri):
        return _writable(uri).replace(uri, known, data)


@contextlib.contextmanager
def writing(uri: str) -> Iterator[Path]:
    """A path for a file of any size, which is at `uri` once the block has ended.

    It appears, or replaces what was there, whole. Where the block or the upload fails, `uri` is as
    it was. A file for S3 lies in the temporary directory (TMPDIR) meanwhile. Raises StorageError.
    """
    with _explained("write", uri), _writable(uri).writing(uri) as path:
        yield path


def delete(uri: str) -> None:
    """Removes the file or object; nothing happens where there is none. Raises StorageError."""
    with _explained("delete", uri):
        _writable(uri).delete(uri)


def list_files(uri: str, recursive: bool = True) -> Iterator[FileInfo]:
    """Every file under `uri`, or `uri` itself where it is a file; nothing where there is nothing.

    Streams in no promised order. Local folders that are symbolic links are not entered, and file
    links that leave `uri` are left out. Raises StorageError.
    """
    with _explained("list", uri):
        yield from _readable(uri).list_files(uri, recursive)


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly under `uri`, sorted; of links to folders none.

    Raises StorageError.
    """
    with _explained("list", uri):
        return _readable(uri).list_folders(uri)


def storage_error(operation: str, uri: str, error: Exception) -> StorageError:
    """`error` as a StorageError: operation, address, what to check; no secret, no request id.

    It is a FileError or RefusedError where the storage answers.
    """
    if isinstance(error, StorageError):
        return error
    kind, words = _readable(uri).explain(uri, error)
    return kind(f"Cannot {operation} {words}")


def _readable(uri: str) -> Readable:
    if is_hub(uri):
        from . import hub

        return hub
    return _writable(uri)


def _writable(uri: str) -> Writable:
    if is_hub(uri):
        raise StorageError(
            f"{uri}: the Hub is read, and only `fae publish --push` writes there. Give a local "
            "path or s3://."
        )
    if is_s3(uri):
        from . import objects

        return objects
    return local


@contextlib.contextmanager
def _explained(operation: str, uri: str) -> Iterator[None]:
    """Makes a StorageError of what the storage of `uri` raises in the block."""
    errors = _readable(uri).ERRORS
    try:
        yield
    except errors as error:
        raise storage_error(operation, uri, error) from None
