"""WebDataset tar shards to image records: each image is a range of its tar file.

A member's name up to the first dot of its base name is the sample's key, the rest names the part
(webdataset's rule): `000.jpg` and `000.txt` are an image and its caption, `000.mask.png` is another
image of the same sample.
"""

from __future__ import annotations

import io
import json
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ..config.sections import DataSection
from ..storage import paths, s3
from .account import Account
from .conventions import CAPTION_NAMES, DEFAULT_CAPTION
from .listing import relative_path
from .records import IMAGE_SUFFIXES, ImageRecord, SourceError, batched
from .tables import make_record

COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
TAR_READ_AHEAD = 2**18
LONGEST_PADDING = 2**20
"""Bytes of zeros that may end a tar: tar pads to records of 10 KiB, or of up to 1 MiB (tar -b)."""
NOT_A_TAR = "not a .tar file"


@dataclass
class _Tar:
    """What one tar file holds: images by (sample, part), sidecar values by sample, and losses."""

    images: dict[tuple[str, str], str] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    captions: dict[str, Any] = field(default_factory=dict)
    parts: Counter[str] = field(default_factory=Counter)
    losses: list[tuple[str, str]] = field(default_factory=list)
    unread: float = 0.0
    """The share of its bytes that cannot be read."""
    unclosed: bool = False
    """Whether it stops where a member ends, without an end-of-archive block."""


def plan_tars(uris: Sequence[str], data: DataSection, account: Account) -> Iterator[ImageRecord]:
    """The images of the tar files among `uris`. A member, sidecar or rest of a tar that cannot be
    read is a recorded loss. Raises SourceError for compressed tars and samples of several images.
    """
    for uri in uris:
        if uri.lower().endswith(COMPRESSED_TAR):
            raise SourceError(
                f"{uri} is a compressed tar, from whose middle no image can be read. "
                "Unpack it to a plain .tar."
            )
    tars = [uri for uri in uris if uri.lower().endswith(".tar")]
    for uri in uris:
        if not uri.lower().endswith(".tar"):
            account.skip(NOT_A_TAR, uri)
    parts: Counter[str] = Counter()
    num_images = 0
    unclosed: list[str] = []
    with ThreadPoolExecutor(s3.CONNECTIONS) as pool:
        for some in batched(tars, s3.CONNECTIONS):
            read = pool.map(lambda uri: _read_tar(uri, data), some)
            for uri, tar in zip(some, read, strict=True):
                for address, message in tar.losses:
                    account.lose(address, message)
                account.lost_files += tar.unread
                unclosed += [uri] * tar.unclosed
                parts += tar.parts
                num_images += len(tar.images)
                yield from _records(uri, tar, data, account)
    if tars and not num_images and account.num_losses:
        first = account.losses[0]
        raise SourceError(
            f"{first['address']} is not a readable WebDataset shard: {first['message']}"
        )
    if unclosed:
        account.remarks.append(
            f"{len(unclosed)} of {len(tars)} tars end without an end-of-archive block, for example "
            f"{unclosed[0]}: their writer did not close them, or they are cut behind a member"
        )
    account.unused += [f"{count} members .{part}" for part, count in parts.most_common()]


def _records(uri: str, tar: _Tar, data: DataSection, account: Account) -> Iterator[ImageRecord]:
    relative = relative_path(uri, str(data.path))
    by_sample: dict[str, list[str]] = {}
    for sample, part in tar.images:
        by_sample.setdefault(sample, []).append(part)
    for sample, found in by_sample.items():
        chosen = [part for part in found if data.members is None or part == data.members]
        if len(chosen) > 1:
            raise SourceError(
                f"{uri}: sample {sample!r} has several images: {', '.join(sorted(found))}. Set "
                "data.members to the one to read, for example data.members="
                f"{sorted(found, key=len)[0]}."
            )
        for part in found:
            if part not in chosen:
                note = f"members .{part} (data.members={data.members})"
                if note not in account.unused:
                    account.unused.append(note)
        if not chosen:
            continue
        where = f"{uri}, member {sample}.{chosen[0]}"
        label, caption = tar.labels.get(sample), tar.captions.get(sample)
        if label is not None:
            account.labels_from = "members .cls and .json"
        if caption is not None:
            account.captions_from = "members .txt and .json"
        address = tar.images[sample, chosen[0]]
        yield make_record(f"{relative}/{sample}", address, label, caption, where, account)


def _read_tar(uri: str, data: DataSection) -> _Tar:
    found = _Tar()
    from_json: dict[str, dict[str, Any]] = {}
    try:
        # Read ahead: small members lie within one range, and large bodies are not fetched.
        with paths.open_input(uri) as file, io.BufferedReader(file, TAR_READ_AHEAD) as buffered:
            size, end = file.size(), 0
            try:
                with tarfile.open(fileobj=buffered, mode="r:") as tar:
                    for member in tar:
                        if member.isreg() and not member.issparse():
                            _read_member(uri, tar, member, size, data, found, from_json)
                        end = tar.offset
                found.unclosed = end == size
                problem = None if found.unclosed else _problem_at(buffered, end, size)
            except tarfile.TarError as error:
                problem = str(error)
            if problem:
                left = max(size - end, 0)
                of_all = f" ({left} of {size} bytes are left)" if left else ""
                message = f"the tar cannot be read to its end{of_all}: {problem}"
                found.losses.append((uri, message))
                found.unread = left / size if size else 1.0
    except (SourceError, MemoryError):
        raise
    except Exception as error:  # a client of the Hub raises what is no OSError
        raise paths.storage_error("read", uri, error) from None
    for sample, values in from_json.items():
        _take_json(f"{uri}, member {sample}.json", sample, values, data, found)
    return found


def _problem_at(file: io.BufferedReader, end: int, size: int) -> str | None:
    """Why tarfile stopped at byte `end`, None in a whole tar: zeros follow up to `size`."""
    if end > size:
        return f"the last member ends at byte {end}, and the tar at byte {size}"
    file.seek(end)
    rest = file.read(min(size - end, LONGEST_PADDING + 1))
    if rest[: tarfile.BLOCKSIZE].strip(b"\0"):
        return f"no header of a member at byte {end}"
    if rest.strip(b"\0") or len(rest) > LONGEST_PADDING:
        return (
            f"an end-of-archive block at byte {end}. Of tars that were joined, only the first is "
            "read: unpack them (tar --ignore-zeros) and pack them anew"
        )
    return None


def _read_member(
    uri: str,
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    size: int,
    data: DataSection,
    found: _Tar,
    from_json: dict[str, dict[str, Any]],
) -> None:
    folder, base = posixpath.split(member.name)
    stem, _, part = base.partition(".")
    part = part.lower()
    if not stem:
        return
    where = f"{uri}, member {ascii(member.name)[1:-1]}"
    try:
        member.name.encode()
    except UnicodeEncodeError:
        found.losses.append((where, "the member's name is not valid Unicode"))
        return
    sample = posixpath.join(folder, stem)
    if f".{part.rpartition('.')[2]}" in IMAGE_SUFFIXES:
        if member.offset_data + member.size > size:
            found.losses.append((where, "the tar ends within this member"))
            return
        address = f"{uri}#offset={member.offset_data}&size={member.size}"
        if (sample, part) in found.images:
            raise SourceError(
                f"The key {relative_path(uri, str(data.path))}/{sample} occurs twice: "
                f"{found.images[sample, part]} and {address}."
            )
        found.images[sample, part] = address
        return
    if part not in ("cls", "txt", "json"):
        found.parts[part] += 1
        return
    content = tar.extractfile(member)
    raw = content.read() if content else b""
    if len(raw) < member.size:
        found.losses.append((where, "the tar ends within this member"))
        return
    try:
        text = raw.decode("utf-8-sig")
        if part == "json":
            values = json.loads(text)
            if isinstance(values, dict):
                from_json[sample] = values
        elif part == "cls" and data.label_column is not None:
            found.labels[sample] = text.strip()
        elif part == "txt" and data.caption_column is not None:
            found.captions[sample] = text.strip()
    except UnicodeDecodeError as error:
        found.losses.append((where, f"it is not UTF-8 text (byte {error.start})"))
    except ValueError as error:
        found.losses.append((where, f"it is not JSON: {error}"))


def _take_json(
    where: str, sample: str, values: dict[str, Any], data: DataSection, found: _Tar
) -> None:
    """Take label and caption of a .json member, where .cls and .txt say nothing."""
    label = data.label_column
    if label is not None and values.get(label) is not None:
        found.labels.setdefault(sample, values[label])
    caption = data.caption_column
    if caption is None:
        return
    names = CAPTION_NAMES if caption == DEFAULT_CAPTION else (caption,)
    there = [name for name in names if values.get(name) is not None]
    if caption in there:
        found.captions.setdefault(sample, values[caption])
    elif len(there) == 1:
        found.captions.setdefault(sample, values[there[0]])
    elif there and sample not in found.captions:
        found.losses.append(
            (where, f"{' and '.join(there)} could both be the caption: set data.caption_column")
        )
