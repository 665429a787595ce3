"""Whether an s3:// prefix is good for a latent store: a part of `fae doctor`.

Every operation that the store relies on is tried once, and what it wrote is removed. Client and
settings are those of every other command (storage/s3.py), but the requests are sent without its
retries, so that a check reports at once what does not work.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from ..storage import paths, s3
from ..training import checkpoint_files
from .finding import Finding

RULE_ID = "fae-abort-incomplete-uploads"
RULE_DAYS = 7
SKEW_WARNING, SKEW_PROBLEM = 60.0, 300.0
"""Seconds between this clock and the server's. S3 refuses requests that are 15 minutes off."""
MOST_RUNS = 200
"""Folders below the prefix that are looked at as if they were trainings' runs."""
CONTENT = b"fae doctor wrote this to see whether it can; it may be deleted.\n"


def check_bucket(uri: str, fix: bool = False, abort_uploads: bool = False) -> Iterator[Finding]:
    """Findings about `uri`. They end early where the later checks depend on one that failed.

    With `fix`, the lifecycle rule that aborts incomplete uploads is added where it is missing. With
    `abort_uploads`, those that are there now are aborted.
    """
    bucket, _, prefix = uri.removeprefix("s3://").rstrip("/").partition("/")
    if not bucket:
        yield Finding("problem", "bucket", f"{uri} names no bucket. Expected s3://BUCKET/PREFIX.")
        return
    folder = f"{prefix}/" if prefix else ""
    probe = f"{folder}.fae-doctor-{uuid.uuid4().hex}"
    try:
        client = s3.client()
        answer = client.list_objects_v2(Bucket=bucket, Prefix=folder, MaxKeys=1)
    except (ClientError, BotoCoreError) as error:
        if isinstance(error, ClientError):
            yield from _clock(error.response)
        yield Finding("problem", "list", str(paths.storage_error("list", uri, error)))
        return
    yield Finding("ok", "list", f"s3://{bucket}/{folder} at {client.meta.endpoint_url}")
    yield from _clock(answer)
    try:
        written = _write_and_read(client, bucket, probe)
        yield written
        if written.level == "problem":
            return
        yield _conditional(client, bucket, probe)
        yield _multipart(client, bucket, f"{probe}.parts")
        yield from _unfinished_uploads(client, bucket, folder, abort_uploads)
        yield from _parts_without_index(f"s3://{bucket}/{prefix}".rstrip("/"))
        yield _lifecycle(client, bucket, folder, fix)
    finally:
        yield from _clean(client, bucket, [probe, f"{probe}.parts"])


def clock_skew(date: str, now: float) -> float:
    """Seconds that `now` is ahead of `date`, a server's HTTP `Date` header."""
    return now - parsedate_to_datetime(date).timestamp()


def covering_rule(rules: list[dict[str, Any]], folder: str) -> dict[str, Any] | None:
    """The first enabled lifecycle rule that aborts every incomplete upload below `folder`."""
    for rule in rules:
        scope = rule.get("Filter") or {}
        # A rule that also filters by tag or size does not cover everything below the prefix.
        if set(scope) - {"Prefix"}:
            continue
        prefix = scope.get("Prefix", rule.get("Prefix", ""))
        aborts = "AbortIncompleteMultipartUpload" in rule
        if aborts and rule.get("Status") == "Enabled" and folder.startswith(prefix):
            return rule
    return None


def _clock(answer: dict[str, Any]) -> Iterator[Finding]:
    date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    if not date:
        return
    skew = clock_skew(date, time.time())
    text = f"this machine is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the server"
    if abs(skew) > SKEW_PROBLEM:
        yield Finding(
            "problem", "clock", f"{text}; S3 refuses more than 900 s. Set the clock with NTP."
        )
    elif abs(skew) > SKEW_WARNING:
        yield Finding("warning", "clock", f"{text}. Set the clock with NTP.")
    else:
        yield Finding("ok", "clock", f"{text} (its Date header has whole seconds)")


def _write_and_read(client: Any, bucket: str, key: str) -> Finding:
    settings = client.meta.config.request_checksum_calculation
    error = _attempt("write and read", bucket, key, lambda: _round_trip(client, bucket, key))
    if error is None:
        text = f"by boto3 and by Arrow, whole and in ranges; checksums {settings}"
        return Finding("ok", "write, read", text)
    if settings != "when_required":
        # Ceph, for example, accepts boto3's newer checksums and answers Arrow's with 411.
        error += (
            " If the credentials may read and write, the server may not support the checksums of "
            "newer clients: set AWS_REQUEST_CHECKSUM_CALCULATION=when_required and "
            "AWS_RESPONSE_CHECKSUM_VALIDATION=when_required, on the nodes too, and run this again."
        )
    return Finding("problem", "write, read", error)


def _round_trip(client: Any, bucket: str, key: str) -> None:
    """Write with boto3 and read with Arrow, then the other way round. Raises StorageError."""
    uri = f"s3://{bucket}/{key}"
    client.put_object(Bucket=bucket, Key=key, Body=CONTENT)
    part = client.get_object(Bucket=bucket, Key=key, Range="bytes=4-11")["Body"].read()
    if part != CONTENT[4:12]:
        raise paths.StorageError(
            f"{uri}: {len(part)} bytes came where bytes 4 to 11 were asked for. The server, or a "
            "proxy before it, does not read in ranges, as Arrow and the training reader do."
        )
    with paths.open_input(uri) as file:
        by_arrow = bytes(file.read())
    filesystem, path = paths.filesystem(uri)
    with filesystem.open_output_stream(path) as stream:
        stream.write(CONTENT)
    by_boto3 = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    if by_boto3 != CONTENT or by_arrow != CONTENT:
        raise paths.StorageError(
            f"{uri}: Arrow reads {len(by_arrow)} bytes and boto3 {len(by_boto3)} of "
            f"{len(CONTENT)} written. The server, or a proxy before it, changes the content."
        )


def _conditional(client: Any, bucket: str, key: str) -> Finding:
    """Whether the server refuses to replace `key`, which exists, under If-None-Match: *."""
    try:
        client.put_object(Bucket=bucket, Key=key, Body=CONTENT, IfNoneMatch="*")
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code in ("PreconditionFailed", "412"):
            return Finding("ok", "write once", "a second PUT with If-None-Match: * was refused")
        return Finding(
            "problem",
            "write once",
            f"a PUT with If-None-Match: * failed with {code}. A manifest could not be committed "
            "here; the server needs conditional writes (AWS, Ceph and MinIO support them).",
        )
    except BotoCoreError as error:
        failure = paths.storage_error("write", f"s3://{bucket}/{key}", error)
        return Finding("problem", "write once", str(failure))
    return Finding(
        "problem",
        "write once",
        "the server ignored If-None-Match: *, so two jobs that write one store could both commit. "
        "Use a server with conditional writes, and never run two jobs on one output.",
    )


def _multipart(client: Any, bucket: str, key: str) -> Finding:
    def upload() -> None:
        started = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        part = client.upload_part(
            Bucket=bucket, Key=key, UploadId=started, PartNumber=1, Body=CONTENT
        )
        client.complete_multipart_upload(
            Bucket=bucket,
            Key=key,
            UploadId=started,
            MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]},
        )
        if client.head_object(Bucket=bucket, Key=key)["ContentLength"] != len(CONTENT):
            raise paths.StorageError(f"{key}: a multipart upload differs in size from its parts.")
        abandoned = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=abandoned)

    error = _attempt("upload in parts", bucket, key, upload)
    if error is None:
        return Finding("ok", "multipart", "one upload in parts completed, another was aborted")
    return Finding("problem", "multipart", error)


def _unfinished_uploads(client: Any, bucket: str, folder: str, abort: bool) -> Iterator[Finding]:
    """A finding where uploads in parts below `folder` were begun and neither completed nor aborted.

    Of a killed writer such an upload stays; of a running one it is in work, and S3 tells them apart
    by their age alone.
    """
    uploads: list[dict[str, Any]] = []

    def look() -> None:
        for page in client.get_paginator("list_multipart_uploads").paginate(
            Bucket=bucket, Prefix=folder
        ):
            uploads.extend(page.get("Uploads", []))

    def remove() -> None:
        for upload in uploads:
            client.abort_multipart_upload(
                Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
            )

    if error := _attempt("list the uploads of", bucket, folder, look):
        yield Finding("warning", "uploads", error)
    if not uploads:
        return
    number = f"{len(uploads)} unfinished upload{'s' if len(uploads) > 1 else ''}"
    if abort:
        error = _attempt("abort the uploads of", bucket, folder, remove)
        yield (
            Finding("problem", "uploads", error)
            if error
            else Finding("ok", "uploads", f"aborted {number}")
        )
        return
    oldest = min(uploads, key=lambda upload: upload["Initiated"])
    yield Finding(
        "warning",
        "uploads",
        f"{number} below {folder or 'the bucket'}, the oldest of {oldest['Key']} since "
        f"{oldest['Initiated']:%Y-%m-%d %H:%M} UTC. Killed writers leave parts that are stored and "
        "paid for. While no job writes there, "
        f"`fae doctor s3://{bucket}/{folder} --abort-uploads` removes them.",
    )


def _parts_without_index(uri: str) -> Iterator[Finding]:
    """A finding for each run at or directly below `uri` with parts of a checkpoint that is none."""
    for name in ["", *paths.list_folders(uri)[:MOST_RUNS]]:
        run = paths.join(uri, name) if name else uri
        parts = checkpoint_files.parts_without_index(run)
        if parts:
            yield Finding(
                "warning",
                "checkpoints",
                f"{len(parts)} part{'s' if len(parts) > 1 else ''} without an index in {run}/"
                f"{checkpoint_files.CHECKPOINTS}, {sum(p.size for p in parts) / (1 << 20):,.0f} "
                "MiB: of a save in work, or of a killed one. The run's next save removes them; if "
                f"it will not go on, delete {parts[0].uri} and the like.",
            )


def _lifecycle(client: Any, bucket: str, folder: str, fix: bool) -> Finding:
    try:
        rules = _rules(client, bucket)
        found = covering_rule(rules, folder)
        if found:
            days = found["AbortIncompleteMultipartUpload"].get("DaysAfterInitiation")
            return Finding("ok", "lifecycle", f"incomplete uploads are aborted after {days} days")
        rule = {
            "ID": RULE_ID,
            "Status": "Enabled",
            "Filter": {"Prefix": folder},
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": RULE_DAYS},
        }
        if not fix:
            return Finding(
                "warning",
                "lifecycle",
                f"no rule aborts incomplete uploads below {folder or 'the bucket'}: killed writers "
                "leave parts that are stored and paid for. "
                f"`fae doctor s3://{bucket}/{folder} --fix` adds the rule {RULE_ID} "
                f"({RULE_DAYS} days) to the bucket's {len(rules)} other rules.",
            )
        kept = [other for other in rules if other.get("ID") != RULE_ID]
        client.put_bucket_lifecycle_configuration(
            Bucket=bucket, LifecycleConfiguration={"Rules": [*kept, rule]}
        )
        after = _rules(client, bucket)
        if covering_rule(after, folder) and len(after) == len(kept) + 1:
            return Finding(
                "ok", "lifecycle", f"added {RULE_ID} ({RULE_DAYS} days); {len(kept)} others kept"
            )
        return Finding(
            "problem",
            "lifecycle",
            f"the server accepted {RULE_ID} but does not list it with the {len(kept)} others. "
            "Check the bucket's rules.",
        )
    except (ClientError, BotoCoreError) as error:
        advice = paths.storage_error("read or set the lifecycle rules of", f"s3://{bucket}", error)
        return Finding("warning", "lifecycle", str(advice))


def _rules(client: Any, bucket: str) -> list[dict[str, Any]]:
    try:
        answer = client.get_bucket_lifecycle_configuration(Bucket=bucket)
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") == "NoSuchLifecycleConfiguration":
            return []
        raise
    rules: list[dict[str, Any]] = answer["Rules"]
    return rules


def _clean(client: Any, bucket: str, keys: list[str]) -> Iterator[Finding]:
    """Remove `keys` and their unfinished uploads; a finding for each that cannot be removed."""
    for key in keys:

        def remove(key: str = key) -> None:
            client.delete_object(Bucket=bucket, Key=key)
            pending = client.list_multipart_uploads(Bucket=bucket, Prefix=key).get("Uploads", [])
            for upload in pending:
                client.abort_multipart_upload(
                    Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )

        if error := _attempt("delete", bucket, key, remove):
            yield Finding("warning", "delete", f"{error} Remove s3://{bucket}/{key} yourself.")


def _attempt(operation: str, bucket: str, key: str, action: Callable[[], None]) -> str | None:
    """Run `action`. Returns None, or its failure in words as the storage room reports it."""
    try:
        action()
    except (ClientError, BotoCoreError, OSError) as error:
        return str(paths.storage_error(operation, f"s3://{bucket}/{key}", error))
    return None
