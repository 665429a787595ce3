"""Objects on S3 for paths.py: small ones by one request, of any size through transfers.py.

s3.py makes the clients and retries requests.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from botocore.exceptions import ParamValidationError
from pyarrow import fs

from . import local, s3, transfers
from .backend import FileError, FileInfo, RefusedError, StorageError
from .temporary import temporary_folder

T = TypeVar("T")

ERRORS: tuple[type[Exception], ...] = (OSError, s3.ClientError, s3.BotoCoreError)
_THERE_ALREADY = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")
_WRONG_KEY = ("InvalidAccessKeyId", "SignatureDoesNotMatch")
_OLD_TOKEN = ("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired")


def arrow(uri: str) -> tuple[fs.FileSystem, str]:
    return s3.arrow_filesystem(), uri.removeprefix("s3://").rstrip("/")


def read_bytes(uri: str) -> bytes:
    bucket, key = split(uri)
    return _ask("read", lambda client: client.get_object(Bucket=bucket, Key=key)["Body"].read())


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    bucket, key = split(uri)
    with temporary_folder() as folder:
        copy = folder / (os.path.basename(key) or "file")
        try:
            transfers.download(bucket, key, copy)
        except transfers.ObjectReplaced as error:
            raise StorageError(f"{error}. Read it again.") from None
        yield copy


def exists(uri: str) -> bool:
    bucket, key = split(uri)
    for prefix in [key, f"{key}/"] if key else [""]:
        # The object itself sorts before every longer key that begins with it: one is enough.
        found = [item["Key"] for item in _first_page(bucket, prefix).get("Contents", [])]
        if found and (prefix != key or found[0] == key or not key):
            return True
    return False


def is_encrypted(uri: str) -> bool:
    bucket, key = split(uri)
    said = _ask("read", lambda client: client.head_object(Bucket=bucket, Key=key))
    with_kms = said.get("ServerSideEncryption", "").startswith("aws:kms")
    return with_kms or "SSECustomerAlgorithm" in said


def write_bytes(uri: str, data: bytes) -> str:
    bucket, key = split(uri)
    return _ask("write", lambda client: _put(client, bucket, key, data))


def write_once(uri: str, data: bytes) -> str:
    return _put_if(uri, data, IfNoneMatch="*")


def replace(uri: str, known: bytes, data: bytes) -> bool:
    bucket, key = split(uri)

    def content_and_etag(client: Any) -> tuple[bytes, str]:
        answer = client.get_object(Bucket=bucket, Key=key)
        return answer["Body"].read(), answer["ETag"]

    content, etag = _ask("read", content_and_etag)
    if content != known:
        return False
    try:
        _put_if(uri, data, IfMatch=etag)
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def writing(uri: str) -> Iterator[Path]:
    bucket, key = split(uri)
    with temporary_folder() as folder:
        copy = folder / (os.path.basename(key) or "file")
        yield copy
        transfers.upload(copy, bucket, key)


def delete(uri: str) -> None:
    bucket, key = split(uri)
    _ask("delete", lambda client: client.delete_object(Bucket=bucket, Key=key))


def list_files(uri: str, recursive: bool) -> Iterator[FileInfo]:
    bucket, key = split(uri)
    if key:
        for item in _first_page(bucket, key).get("Contents", []):
            if item["Key"] == key:
                yield _info(bucket, item)
    for page in _pages(bucket, f"{key}/" if key else "", recursive):
        for item in page.get("Contents", []):
            # Consoles mark a folder with an empty object whose name ends in a slash.
            if not item["Key"].endswith("/"):
                yield _info(bucket, item)


def list_folders(uri: str) -> list[str]:
    bucket, key = split(uri)
    below = f"{key}/" if key else ""
    pages = _pages(bucket, below, recursive=False)
    found = [item["Prefix"] for page in pages for item in page.get("CommonPrefixes", [])]
    return sorted(prefix[len(below) :].rstrip("/") for prefix in found)


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of an s3:// address. Raises StorageError where it is not one."""
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


def explain(uri: str, error: Exception) -> tuple[type[StorageError], str]:
    bucket, key = split(uri)
    kind, advice = _advice(error, s3.code_of(error))
    return kind, f"bucket {bucket!r}, key {key!r}: {advice}"


def _advice(error: Exception, code: str) -> tuple[type[StorageError], str]:
    """The kind of `error`, and what to check."""
    # Arrow's errors have no code, but it is in their text, behind the key, which may be any word.
    # What has a number is the machine's own error.
    said = "" if isinstance(error, OSError) and error.errno else str(error)
    text = f"{code} {said.rpartition('AWS Error ')[2]}".upper()
    if "Credential" in type(error).__name__ or "CREDENTIAL" in text:
        return StorageError, (
            "no AWS credentials. Check AWS_PROFILE, AWS_ACCESS_KEY_ID or the machine's role."
        )
    if code in _OLD_TOKEN or "HTTP STATUS 400" in text:
        return StorageError, (
            f"the server answered {code or 400}. The credentials may have expired: renew them."
        )
    if code == "NoSuchBucket" or "NO_SUCH_BUCKET" in text:
        return RefusedError, (
            "the bucket does not exist (404). Check its name, AWS_ENDPOINT_URL and the region."
        )
    if isinstance(error, FileNotFoundError) or code in ("NoSuchKey", "NotFound", "404"):
        return FileError, local.advice(FileNotFoundError())
    if code == "InvalidObjectState" or "INVALID_OBJECT_STATE" in text:
        return FileError, "the object is archived (InvalidObjectState). Restore it first."
    if isinstance(error, ParamValidationError):
        return FileError, "no valid name of a bucket, or key. Expected s3://BUCKET/KEY."
    retried = "The request was retried for FAE_S3_PATIENCE seconds."
    if isinstance(error, s3.BotoCoreError):
        return StorageError, _no_connection(error, retried)
    if code in _WRONG_KEY or any(
        word in text for word in ("ACCESS_DENIED", "ACCESSDENIED", "FORBIDDEN", "403")
    ):
        kind = StorageError if code in _WRONG_KEY else RefusedError
        return kind, (
            "access denied (403). Check the credentials and their right to list, read and write."
        )
    if code in ("SlowDown", "ServiceUnavailable") or "HTTP STATUS 503" in text:
        return StorageError, (
            f"the server is too busy (503). {retried} Ask its operator, or read with fewer tasks."
        )
    if any(word in text for word in ("NETWORK_CONNECTION", "CURLCODE", "CONNECT TO", "TIMED OUT")):
        return StorageError, _no_connection(error, retried)
    if code == "RequestTimeTooSkewed":
        return StorageError, (
            "this machine's clock is not the server's (403). Set the clock, with NTP for example."
        )
    if code:
        return StorageError, f"the server answered {code}."
    # A disk is full only where a file waits for its upload or was being read.
    kind = StorageError if isinstance(error, ERRORS) else FileError
    return kind, local.advice(error, f"in {tempfile.gettempdir()} (or set TMPDIR)")


def _no_connection(error: Exception, retried: str) -> str:
    return (
        f"no connection ({type(error).__name__}). Check AWS_ENDPOINT_URL, the region and the "
        f"network. {retried}"
    )


def _info(bucket: str, item: dict[str, Any]) -> FileInfo:
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


def _put(client: Any, bucket: str, key: str, data: bytes, **condition: str) -> str:
    return _etag(client.put_object(Bucket=bucket, Key=key, Body=data, **condition))


def _put_if(uri: str, data: bytes, **condition: str) -> str:
    """The ETag of what it has written. FileExistsError where the condition is not met."""
    bucket, key = split(uri)
    attempts = 0

    def attempt(client: Any) -> str:
        nonlocal attempts
        attempts += 1
        return _put(client, bucket, key, data, **condition)

    try:
        return _ask("write", attempt)
    except s3.ClientError as error:
        # 409 is S3's answer to the loser of two conditional writes that overlap.
        if s3.code_of(error) not in _THERE_ALREADY:
            raise
        # An earlier attempt of this call may have written it, and only the answer was lost.
        if attempts > 1 and read_bytes(uri) == data:
            return hashlib.md5(data, usedforsecurity=False).hexdigest()
        raise FileExistsError(uri) from None


def _etag(answer: dict[str, Any]) -> str:
    return str(answer["ETag"]).strip('"')


def _ask(operation: str, request: Callable[[Any], T]) -> T:
    """What `request` returns, given S3's client; tried again as s3.py says."""
    return s3.with_retries(operation, lambda: request(s3.client()))
