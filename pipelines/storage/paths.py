"""The one way to open a local, s3:// or hf:// path: whole reads and writes, listing, Arrow
filesystems.

A write is whole or absent: a temporary file renamed into place locally, one PUT on S3; `write_once`
never replaces (hard link locally, `If-None-Match: *` on S3). `writing` and `local_copy` are for
files of any size, which on S3 pass through a temporary file in parts (transfers.py). s3.py says
which environment variables apply on S3, and for how long its requests are retried; the first s3://
address imports it, and boto3 with it. hub.py does so for hf:// addresses, which are read and not
written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from fae_core.errors import UserError

from .temporary import temporary_folder

T = TypeVar("T")

SHIPPED = "shipped:"
"""How the address of a folder in the package begins: shipped:emoji, for example."""

TEMPORARY_SUFFIX = ".tmp"
"""Of the hidden files that local writes rename; those of a killed process stay."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w.-]+)?", re.ASCII)
_THERE_ALREADY = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")


class StorageError(UserError, OSError):
    """A path that cannot be read, written or listed; the message says what to check."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file or object: its whole address, its bytes, on S3 its ETag, and when it was written.

    `modified` is in seconds since 1970, None on the Hub.
    """

    uri: str
    size: int
    etag: str | None = None
    modified: float | None = None


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
    if is_s3(uri):
        from . import s3

        return s3.arrow_filesystem(), uri.removeprefix("s3://").rstrip("/")
    if is_hub(uri):
        from . import hub

        return hub.arrow_filesystem(), hub.path_of(uri)
    return fs.LocalFileSystem(), _local(uri)


def address_of(name: str) -> str:
    """The absolute local path or the address that a user's `name` means.

    A name OWNER/NAME that is no local path is a repository on the Hub. Raises StorageError where it
    is neither.
    """
    if is_remote(name):
        return name
    local = _local(name)
    if not _HUB_ID.fullmatch(name) or name.endswith(".safetensors") or os.path.exists(local):
        return local
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
    filesystem_, path = filesystem(uri)
    try:
        return filesystem_.open_input_file(path)
    except _failures(uri) as error:
        raise storage_error("open", uri, error) from None


def read_bytes(uri: str) -> bytes:
    """The whole content of `uri`. Raises StorageError."""
    try:
        if is_s3(uri):
            bucket, key = _bucket_key(uri)
            return _ask(
                "read", lambda client: client.get_object(Bucket=bucket, Key=key)["Body"].read()
            )
        if is_hub(uri):
            from . import hub

            return hub.read_bytes(uri)
        return Path(_local(uri)).read_bytes()
    except _failures(uri) as error:
        raise storage_error("read", uri, error) from None


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """`uri`, of any size, as a local file: itself, a copy that is deleted afterwards (S3), or a
    cached one (Hub).

    Raises StorageError.
    """
    if is_s3(uri):
        from . import transfers

        bucket, key = _bucket_key(uri)
        with temporary_folder() as folder:
            copy = folder / (os.path.basename(key) or "file")
            try:
                transfers.download(bucket, key, copy)
            except transfers.ObjectReplaced as error:
                raise StorageError(f"{error}. Read it again.") from None
            except _failures(uri) as error:
                raise storage_error("read", uri, error) from None
            yield copy
    elif is_hub(uri):
        from . import hub

        try:
            path = hub.download(uri)
        except hub.ERRORS as error:
            raise storage_error("read", uri, error) from None
        yield path
    else:
        yield Path(_local(uri))


def push(folder: Path, repository: str, private: bool) -> str:
    """Send the files of a local folder to the Hub's model repository OWNER/NAME.

    Creates the repository if it does not exist. Returns the commit's address. Raises StorageError.
    """
    from . import hub

    try:
        return hub.upload(folder, repository, private, "fae publish")
    except hub.ERRORS as error:
        raise storage_error("push to", f"hf://{repository}", error) from None


def exists(uri: str) -> bool:
    """Whether there is a file, folder or object, or any object below `uri`. Raises StorageError."""
    if is_hub(uri):
        from . import hub

        try:
            return hub.exists(uri)
        except hub.ERRORS as error:
            raise storage_error("look up", uri, error) from None
    if not is_s3(uri):
        return os.path.exists(_local(uri))
    bucket, key = _bucket_key(uri)
    prefixes = [key, f"{key}/"] if key else [""]
    try:
        for prefix in prefixes:
            # The object itself sorts before every longer key that begins with it: one is enough.
            page = _first_page(bucket, prefix)
            found = [item["Key"] for item in page.get("Contents", [])]
            if found and (prefix != key or found[0] == key or not key):
                return True
    except _failures(uri) as error:
        raise storage_error("look up", uri, error) from None
    return False


def write_bytes(uri: str, data: bytes) -> str:
    """Writes or replaces `uri` whole; returns its ETag (locally the MD5). Raises StorageError."""
    try:
        if is_s3(uri):
            bucket, key = _bucket_key(uri)
            return _ask("write", lambda client: _put(client, bucket, key, data))
        path = _local(uri)
        temporary = _write_temporary(path, data)
        try:
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
        _sync(os.path.dirname(path))
    except _failures(uri) as error:
        raise storage_error("write", uri, error) from None
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def write_once(uri: str, data: bytes) -> str:
    """Like `write_bytes`, but raises FileExistsError if `uri` is there already, even in a race."""
    try:
        if is_s3(uri):
            bucket, key = _bucket_key(uri)
            return _put_once(uri, bucket, key, data)
        path = _local(uri)
        temporary = _write_temporary(path, data)
        try:
            os.link(temporary, path)
        finally:
            os.unlink(temporary)
        _sync(os.path.dirname(path))
    except FileExistsError:
        raise FileExistsError(errno.EEXIST, "Written once and there already", uri) from None
    except _failures(uri) as error:
        raise storage_error("write", uri, error) from None
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def writing(uri: str) -> Iterator[Path]:
    """A path for a file of any size, which is at `uri` once the block has ended.

    It appears, or replaces what was there, whole. Where the block or the upload fails, `uri` is as
    it was. A file for S3 lies in the temporary directory (TMPDIR) meanwhile. Raises StorageError.
    """
    try:
        if is_s3(uri):
            from . import transfers

            bucket, key = _bucket_key(uri)
            with temporary_folder() as folder:
                copy = folder / (os.path.basename(key) or "file")
                yield copy
                transfers.upload(copy, bucket, key)
            return
        path = _local(uri)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = Path(_temporary_beside(path))
        try:
            yield temporary
            _sync(str(temporary))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(os.path.dirname(path))
    except _failures(uri) as error:
        raise storage_error("write", uri, error) from None


def delete(uri: str) -> None:
    """Removes the file or object; nothing happens where there is none. Raises StorageError."""
    try:
        if is_s3(uri):
            bucket, key = _bucket_key(uri)
            _ask("delete", lambda client: client.delete_object(Bucket=bucket, Key=key))
        else:
            Path(_local(uri)).unlink(missing_ok=True)
    except _failures(uri) as error:
        raise storage_error("delete", uri, error) from None


def list_files(uri: str, recursive: bool = True) -> Iterator[FileInfo]:
    """Every file under `uri`, or `uri` itself where it is a file; nothing where there is nothing.

    Streams in no promised order. Local folders that are symbolic links are not entered, and file
    links that leave `uri` are left out. Raises StorageError.
    """
    if is_s3(uri):
        yield from _list_s3(uri, recursive)
        return
    if is_hub(uri):
        yield from _list_hub(uri, recursive)
        return
    root = _local(uri)
    if os.path.isfile(root):
        found = iter([_local_info(root, os.stat(root))])
    elif os.path.isdir(root):
        found = _list_local(root, os.path.realpath(root), recursive)
    else:
        return
    if not uri.startswith(SHIPPED):
        yield from found
        return
    for info in found:
        yield replace(info, uri=uri.rstrip("/") + info.uri[len(root) :])


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly under `uri`, sorted; of links to folders none.

    Raises StorageError.
    """
    if is_s3(uri):
        bucket, key = _bucket_key(uri)
        below = f"{key}/" if key else ""
        try:
            pages = list(_pages(bucket, below, recursive=False))
        except _failures(uri) as error:
            raise storage_error("list", uri, error) from None
        found = [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", [])]
        return sorted(prefix[len(below) :].rstrip("/") for prefix in found)
    if is_hub(uri):
        below = f"{uri.rstrip('/')}/"
        inner = (file.uri[len(below) :].split("/") for file in list_files(uri))
        return sorted({parts[0] for parts in inner if len(parts) > 1})
    root = _local(uri)
    if not os.path.isdir(root):
        return []
    try:
        with os.scandir(root) as entries:
            return sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
    except OSError as error:
        raise storage_error("list", uri, error) from None


def storage_error(operation: str, uri: str, error: Exception) -> StorageError:
    """`error` as a StorageError: operation, address, what to check; no secret, no request id."""
    if isinstance(error, StorageError):
        return error
    if is_hub(uri):
        from . import hub

        return StorageError(f"Cannot {operation} {uri}: {hub.advice(error)}")
    if not uri.startswith("s3://"):
        return StorageError(f"Cannot {operation} {uri}: {_advice(error)}")
    from . import s3

    bucket, key = _bucket_key(uri)
    # A disk is full only where a file waits for its upload or was being read.
    unanswered = isinstance(error, s3.BotoCoreError)
    advice = _advice(error, s3.code_of(error), unanswered, temporary=True)
    return StorageError(f"Cannot {operation} bucket {bucket!r}, key {key!r}: {advice}")


def _advice(
    error: Exception, code: str = "", unanswered: bool = False, temporary: bool = False
) -> str:
    text = f"{code} {error}".upper()
    if "CREDENTIAL" in text:
        return "no AWS credentials. Check AWS_PROFILE, AWS_ACCESS_KEY_ID or the machine's role."
    if code in ("NoSuchBucket",) or "NO_SUCH_BUCKET" in text:
        return "the bucket does not exist (404). Check its name, AWS_ENDPOINT_URL and the region."
    if isinstance(error, FileNotFoundError) or code in ("NoSuchKey", "NotFound", "404"):
        return "it is not there (404). Check the path; it may have been removed meanwhile."
    if any(
        word in text for word in ("ACCESS_DENIED", "ACCESSDENIED", "FORBIDDEN", "403")
    ) or code in (
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
    ):
        return "access denied (403). Check the credentials and their right to list, read and write."
    retried = "The request was retried for FAE_S3_PATIENCE seconds."
    if code in ("SlowDown", "ServiceUnavailable") or "HTTP STATUS 503" in text:
        return (
            f"the server is too busy (503). {retried} Ask its operator, or read with fewer tasks."
        )
    if unanswered or any(
        word in text for word in ("NETWORK_CONNECTION", "CURLCODE", "CONNECT TO", "TIMED OUT")
    ):
        name = type(error).__name__
        return (
            f"no connection ({name}). Check AWS_ENDPOINT_URL, the region and the network. {retried}"
        )
    if code == "RequestTimeTooSkewed":
        return (
            "this machine's clock is not the server's (403). Set the clock, with NTP for example."
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = f"in {tempfile.gettempdir()} (or set TMPDIR)" if temporary else "there"
        return f"no space left {place}. Free some, then run the same command again: it resumes."
    if code:
        return f"the server answered {code}."
    if isinstance(error, OSError) and error.strerror:
        return f"{os.strerror(error.errno) if error.errno else error.strerror}."
    return f"{type(error).__name__}."


def _local(uri: str) -> str:
    if is_hub(uri):
        raise StorageError(
            f"{uri}: the Hub is read, and only `fae publish --push` writes there. Give a local "
            "path or s3://."
        )
    if uri.startswith(SHIPPED):
        return str(Path(__file__).parents[2] / "shipped" / uri.removeprefix(SHIPPED))
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))


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


def _list_local(folder: str, root: str, recursive: bool) -> Iterator[FileInfo]:
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
    except OSError as error:
        raise storage_error("list", folder, error) from None
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            if recursive:
                yield from _list_local(entry.path, root, recursive)
            continue
        target = os.path.realpath(entry.path) if entry.is_symlink() else ""
        if target and not target.startswith(root.rstrip("/") + "/"):
            continue
        try:
            if entry.is_file():
                yield _local_info(entry.path, entry.stat())
        except FileNotFoundError:
            continue


def _local_info(path: str, status: os.stat_result) -> FileInfo:
    return FileInfo(path, status.st_size, modified=status.st_mtime)


def _list_hub(uri: str, recursive: bool) -> Iterator[FileInfo]:
    from . import hub

    try:
        for address, size, content in hub.list_files(uri, recursive):
            yield FileInfo(address, size, content or None)
    except hub.ERRORS as error:
        raise storage_error("list", uri, error) from None


def _list_s3(uri: str, recursive: bool) -> Iterator[FileInfo]:
    bucket, key = _bucket_key(uri)
    try:
        if key:
            page = _first_page(bucket, key)
            for item in page.get("Contents", []):
                if item["Key"] == key:
                    yield _s3_info(bucket, item)
        for page in _pages(bucket, f"{key}/" if key else "", recursive):
            for item in page.get("Contents", []):
                # Consoles mark a folder with an empty object whose name ends in a slash.
                if not item["Key"].endswith("/"):
                    yield _s3_info(bucket, item)
    except _failures(uri) as error:
        raise storage_error("list", uri, error) from None


def _s3_info(bucket: str, item: dict[str, Any]) -> FileInfo:
    written = item["LastModified"].timestamp()
    return FileInfo(f"s3://{bucket}/{item['Key']}", item["Size"], _etag(item), written)


def _first_page(bucket: str, prefix: str) -> dict[str, Any]:
    return _ask(
        "list", lambda client: client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
    )


def _pages(bucket: str, prefix: str, recursive: bool) -> Iterator[dict[str, Any]]:
    asked: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix}
    if not recursive:
        asked["Delimiter"] = "/"
    while True:
        page = _ask("list", lambda client: client.list_objects_v2(**asked))
        yield page
        if not page.get("IsTruncated"):
            return
        asked["ContinuationToken"] = page["NextContinuationToken"]


def _ask(operation: str, request: Callable[[Any], T]) -> T:
    """What `request` returns, given S3's client; tried again as s3.py says."""
    from . import s3

    return s3.with_retries(operation, lambda: request(s3.client()))


def _failures(uri: str) -> tuple[type[Exception], ...]:
    """What an operation on `uri` raises where it fails."""
    if is_hub(uri):
        from . import hub

        return hub.ERRORS
    if not uri.startswith("s3://"):
        return (OSError,)
    from . import s3

    return OSError, s3.ClientError, s3.BotoCoreError


def _put(client: Any, bucket: str, key: str, data: bytes, **condition: str) -> str:
    return _etag(client.put_object(Bucket=bucket, Key=key, Body=data, **condition))


def _put_once(uri: str, bucket: str, key: str, data: bytes) -> str:
    from . import s3

    attempts = 0

    def attempt(client: Any) -> str:
        nonlocal attempts
        attempts += 1
        return _put(client, bucket, key, data, IfNoneMatch="*")

    try:
        return _ask("write", attempt)
    except s3.ClientError as error:
        # 409 is S3's answer to the loser of two conditional writes that overlap.
        if s3.code_of(error) not in _THERE_ALREADY:
            raise
        # An earlier attempt of this call may have written it, and only the answer was lost.
        if attempts > 1 and read_bytes(uri) == data:
            return hashlib.md5(data, usedforsecurity=False).hexdigest()
        raise FileExistsError(errno.EEXIST, "Written once and there already", uri) from None


def _bucket_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise StorageError(f"{uri}: no bucket. Expected s3://BUCKET/KEY.")
    if "@" in bucket or ":" in bucket:
        # The message does not repeat the address, which may hold a secret.
        raise StorageError(
            "An s3:// address holds no credentials or port: s3://BUCKET/KEY. Set "
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL instead."
        )
    return bucket, key.rstrip("/")


def _etag(answer: dict[str, Any]) -> str:
    return str(answer["ETag"]).strip('"')
