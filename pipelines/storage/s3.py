"""S3 for paths.py: clients made from the environment, and retries while a server is busy or away.

AWS_ENDPOINT_URL (or AWS_ENDPOINT_URL_S3), AWS_DEFAULT_REGION and the usual credentials apply.
AWS_NO_SIGN_REQUEST=1 reads public buckets without credentials. FAE_S3_ADDRESSING=path|virtual says
how buckets are addressed (the default is path where an endpoint is set). FAE_S3_PATIENCE is the
number of seconds during which an operation is retried (default 180).
"""

from __future__ import annotations

import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    SSLError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.utils import parse_timestamp
from pyarrow import fs

from fae_core.errors import UserError

from .retry_metrics import count_retry

RETRY_SECONDS = 180.0
CONNECTIONS = 32
"""Requests that one process has in flight at most."""
CONNECT_TIMEOUT, READ_TIMEOUT = 5, 30
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
SAID_AFTER = 5.0
PART_SIZE = 64 << 20
"""Bytes of an uploaded part; boto3 raises it where a file would need more than MOST_PARTS. A
smaller file is one PUT."""
RANGE_SIZE = 16 << 20
"""Bytes of one ranged read of a large object, of which TRANSFER_REQUESTS are in memory."""
TRANSFER_REQUESTS = 8
"""Parts of one file that are sent or read at once."""
MOST_PARTS, LARGEST_OBJECT = 10_000, 5 << 40
"""Limits of S3, the second in bytes."""
ARROW_FIRST_PAUSE = 0.025

_BUSY_STATUS = (429, 500, 502, 503, 504)
_BUSY_CODES = ("SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling")
_PASSING = (HTTPClientError, BotoConnectionError, IncompleteReadError)
_TRUE = ("1", "true", "yes", "on")
_CREDENTIALS = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"),
    *("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"),
)

T = TypeVar("T")


class S3SettingsError(UserError, ValueError):
    """An environment variable about S3 that cannot be used."""


@dataclass(frozen=True)
class Settings:
    """Where S3 is and how to call it; hashable, because it is the key of the kept clients."""

    endpoint: str | None
    region: str | None
    anonymous: bool
    addressing: str
    retry_seconds: float

    @classmethod
    def from_environment(cls) -> Settings:
        """The settings that the environment gives. Raises S3SettingsError for an invalid value."""
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION")
        addressing = os.environ.get("FAE_S3_ADDRESSING") or ("path" if endpoint else "auto")
        if addressing not in ("auto", "path", "virtual"):
            raise S3SettingsError(f"FAE_S3_ADDRESSING={addressing!r}: expected path or virtual.")
        given = os.environ.get("FAE_S3_PATIENCE", str(RETRY_SECONDS))
        try:
            retry_seconds = float(given)
        except ValueError:
            retry_seconds = -1.0
        if not 0.0 <= retry_seconds < math.inf:
            raise S3SettingsError(f"FAE_S3_PATIENCE={given!r}: expected seconds, 0 or more.")
        anonymous = os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in _TRUE
        return cls(endpoint or None, region or None, anonymous, addressing, retry_seconds)


def client() -> Any:
    """The boto3 client of this environment. Its own retries are off: call it in `with_retries`.

    Raises botocore's NoCredentialsError, unless AWS_NO_SIGN_REQUEST is set.
    """
    return _kept("client", _client)


def arrow_filesystem() -> fs.S3FileSystem:
    """Arrow's file system of this environment; it retries for as long as `with_retries` does."""
    return _kept("arrow", _arrow)


def with_retries(operation: str, request: Callable[[], T]) -> T:
    """What `request` returns; retried after growing pauses while its error `is_transient`.

    In a process that is connected to Ray each retry is counted under the name `operation`
    (retry_metrics.py). Raises the last error where the next pause would end after FAE_S3_PATIENCE.

    boto3's own retries do not serve: they take attempts from a quota that all threads share, which
    a short outage under many reads uses up, and they do not cover the reading of the body.
    """
    settings = Settings.from_environment()
    started = time.monotonic()
    attempt, said = 0, False
    while True:
        try:
            return request()
        except (ClientError, BotoCoreError) as error:
            pause = random.uniform(0.5, 1.0) * min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
            waited = time.monotonic() - started
            if not is_transient(error) or waited + pause > settings.retry_seconds:
                raise
            count_retry(operation, code_of(error) or type(error).__name__)
            if waited > SAID_AFTER and not said:
                logging.getLogger(__name__).warning(
                    "S3 at %s: %s; trying for %.0f s in all (FAE_S3_PATIENCE).",
                    settings.endpoint or "AWS",
                    code_of(error) or type(error).__name__,
                    settings.retry_seconds,
                )
                said = True
        time.sleep(pause)
        attempt += 1


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed a little later.

    True for 429, 5xx, a timeout and a connection that fails or breaks; never for 403 or 404.
    """
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in _BUSY_STATUS or code_of(error) in _BUSY_CODES
    return isinstance(error, _PASSING) and not isinstance(error, SSLError)


def code_of(error: Exception) -> str:
    """The server's code for the error, like NoSuchKey; empty where it gave none."""
    if isinstance(error, ClientError):
        return str(error.response.get("Error", {}).get("Code", ""))
    return ""


_made: dict[tuple[str, Settings], tuple[tuple[str | None, ...], Any]] = {}
_making = threading.Lock()


def _kept(kind: str, make: Callable[[Settings], Any]) -> Any:
    """What `make` gave of this environment, made anew where its credentials are others now."""
    settings = Settings.from_environment()
    credentials = tuple(os.environ.get(name) for name in _CREDENTIALS)
    with _making:
        with_which, there = _made.get((kind, settings), (None, None))
        if with_which != credentials:
            there = make(settings)
            _made[kind, settings] = credentials, there
        return there


def _client(settings: Settings) -> Any:
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},
        s3={"addressing_style": settings.addressing},
        max_pool_connections=CONNECTIONS,
        connect_timeout=CONNECT_TIMEOUT,
        read_timeout=READ_TIMEOUT,
        signature_version=UNSIGNED if settings.anonymous else None,
    )
    session = botocore.session.get_session()
    if not settings.anonymous and session.get_credentials() is None:
        raise NoCredentialsError  # a client without any would be kept
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_time_of)
    return boto3.Session(botocore_session=session).client(
        "s3", endpoint_url=settings.endpoint, region_name=settings.region, config=config
    )


def _time_of(written: str) -> datetime:
    """The time in an answer; botocore's own parser takes most of the time of a listing."""
    try:
        return datetime.fromisoformat(written)
    except ValueError:  # headers have the format of HTTP
        return parse_timestamp(written)


def _arrow(settings: Settings) -> fs.S3FileSystem:
    # Arrow pauses 25 ms, 50 ms, ... between attempts: this many attempts last `retry_seconds`. Its
    # "standard" strategy, the default, ends after three, and all threads share its quota.
    attempts = math.ceil(math.log2(settings.retry_seconds / ARROW_FIRST_PAUSE + 1))
    options: dict[str, Any] = {
        "retry_strategy": fs.AwsDefaultS3RetryStrategy(max_attempts=attempts),
        "connect_timeout": CONNECT_TIMEOUT,
        # Seconds without a byte. Arrow's documentation says that Linux ignores it; Arrow 25 does
        # not.
        "request_timeout": READ_TIMEOUT,
        "anonymous": settings.anonymous,
        "force_virtual_addressing": settings.addressing == "virtual",
    }
    if settings.region:
        options["region"] = settings.region
    if settings.endpoint:
        given = settings.endpoint
        parts = urlsplit(given if "://" in given else f"https://{given}")
        options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
        # Without a region Arrow asks AWS where the bucket is, which another server cannot answer.
        options.setdefault("region", "us-east-1")
    return fs.S3FileSystem(**options)
