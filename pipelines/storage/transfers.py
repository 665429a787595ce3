"""Files of any size to and from S3: boto3's managed transfers, which send and read them in parts.

S3 takes at most 5 GiB in one PUT. An upload in parts appears as one object when it is completed,
and is aborted where it fails. paths.py calls these functions; it keeps single PUTs for what is
small and for what is written once.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from boto3.s3.transfer import TransferConfig, create_transfer_manager
from s3transfer.exceptions import RetriesExceededError

from . import s3

WAITING_CHUNKS = 64
"""Pieces of 256 KiB that were read and wait for the disk at most."""


class ObjectReplaced(OSError):
    """The object was replaced while its parts were read."""


def upload(path: Path, bucket: str, key: str) -> None:
    """Write the file at `path` to the object, in parts where it is large.

    Raises ClientError, BotoCoreError or OSError; the object is then as it was.
    """
    with _manager(s3.PART_SIZE) as manager:
        manager.upload(str(path), bucket, key).result()


def download(bucket: str, key: str, path: Path) -> None:
    """Write the object to `path`, which must not exist, by ranged reads where it is large.

    Raises ClientError, BotoCoreError or OSError, ObjectReplaced among them.
    """
    try:
        with _manager(s3.RANGE_SIZE) as manager:
            manager.download(bucket, key, str(path)).result()
    except RetriesExceededError as error:
        raise error.last_exception from None


def _manager(part_size: int) -> Any:
    config = TransferConfig(
        multipart_threshold=part_size,
        multipart_chunksize=part_size,
        max_concurrency=s3.TRANSFER_REQUESTS,
        max_io_queue=WAITING_CHUNKS,
        num_download_attempts=1,  # _RetryingClient has made its own
        preferred_transfer_client="classic",  # the other one has its own client and retries
    )
    return create_transfer_manager(_RetryingClient(s3.client()), config)


class _RetryingClient:
    """S3's client, each of whose transfer requests is retried by itself as s3.py says.

    The managed transfer gives up with its first failed part, and its own retries of reads have no
    pauses. An abort is tried once: it follows an operation that was retried for long.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def head_object(self, **asked: Any) -> Any:
        return s3.with_retries("read", lambda: self._client.head_object(**asked))

    def get_object(self, **asked: Any) -> Any:
        def attempt() -> dict[str, Any]:
            answer = self._client.get_object(**asked)
            return {**answer, "Body": io.BytesIO(answer["Body"].read())}

        try:
            return s3.with_retries("read", attempt)
        except s3.ClientError as error:
            if s3.code_of(error) not in ("PreconditionFailed", "412"):
                raise
            place = f"s3://{asked['Bucket']}/{asked['Key']}"
            raise ObjectReplaced(f"{place} was replaced while it was read") from None

    def put_object(self, **asked: Any) -> Any:
        return _send(self._client.put_object, asked)

    def upload_part(self, **asked: Any) -> Any:
        return _send(self._client.upload_part, asked)

    def create_multipart_upload(self, **asked: Any) -> Any:
        return s3.with_retries("write", lambda: self._client.create_multipart_upload(**asked))

    def complete_multipart_upload(self, **asked: Any) -> Any:
        attempts = 0

        def attempt() -> Any:
            nonlocal attempts
            attempts += 1
            return self._client.complete_multipart_upload(**asked)

        try:
            return s3.with_retries("write", attempt)
        except s3.ClientError as error:
            # An earlier attempt may have completed it, and only the answer was lost.
            if attempts == 1 or s3.code_of(error) != "NoSuchUpload":
                raise
            there = self.head_object(Bucket=asked["Bucket"], Key=asked["Key"])
            if there["ETag"].strip('"') != _etag_of(asked["MultipartUpload"]["Parts"]):
                raise
            return there


def _send(request: Callable[..., Any], asked: dict[str, Any]) -> Any:
    body = asked["Body"]

    def attempt() -> Any:
        body.seek(0)
        return request(**asked)

    return s3.with_retries("write", attempt)


def _etag_of(parts: list[dict[str, Any]]) -> str:
    """The ETag of the object that these uploaded parts make: the MD5 of theirs, and how many."""
    digests = b"".join(bytes.fromhex(part["ETag"].strip('"')) for part in parts)
    return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"
