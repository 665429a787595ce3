"""WebDataset tar shards to image records: each image is a range of its tar file."""

from __future__ import annotations

import io
import json
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..config.sections import DataSection
from ..storage import paths, s3
from .listing import relative_path
from .records import ImageRecord, SourceError, batched
from .tables import make_record

WEBDATASET_IMAGES = (".jpg", ".jpeg", ".png", ".webp")
COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
TAR_READ_AHEAD = 2**18


def plan_tars(uris: Sequence[str], data: DataSection) -> Iterator[ImageRecord]:
    for uri in uris:
        if uri.lower().endswith(COMPRESSED_TAR):
            raise SourceError(
                f"{uri} is a compressed tar, from whose middle no image can be read. "
                "Unpack it to a plain .tar."
            )
    tars = [uri for uri in uris if uri.lower().endswith(".tar")]

    def plan(uri: str) -> list[ImageRecord]:
        return list(_tar_records(uri, relative_path(uri, str(data.path)), data))

    with ThreadPoolExecutor(s3.CONNECTIONS) as pool:
        for some in batched(tars, s3.CONNECTIONS):
            for records in pool.map(plan, some):
                yield from records


def _tar_records(uri: str, relative: str, data: DataSection) -> Iterator[ImageRecord]:
    images: list[tuple[str, str]] = []
    values: dict[str, dict[str, Any]] = {}
    label, caption = data.label_column or "label", data.caption_column or "caption"
    try:
        # Read ahead: small members lie within one range, and large bodies are not fetched.
        with (
            paths.open_input(uri) as file,
            io.BufferedReader(file, TAR_READ_AHEAD) as buffered,
            tarfile.open(fileobj=buffered, mode="r:") as tar,
        ):
            for member in tar:
                folder, base = posixpath.split(member.name)
                stem, _, suffix = base.partition(".")
                suffix = "." + suffix.lower().rpartition(".")[2]
                if not member.isreg() or member.issparse() or not stem:
                    continue
                prefix = posixpath.join(folder, stem)
                if suffix in WEBDATASET_IMAGES:
                    images.append((prefix, f"{uri}#offset={member.offset_data}&size={member.size}"))
                elif suffix in (".cls", ".txt", ".json"):
                    content = tar.extractfile(member)
                    text = content.read().decode() if content else ""
                    known = values.setdefault(prefix, {})
                    if suffix == ".json":
                        given = json.loads(text)
                        if isinstance(given, dict):
                            values[prefix] = {
                                k: given[k] for k in (label, caption) if k in given
                            } | known
                    else:
                        known[label if suffix == ".cls" else caption] = text.strip()
    except (tarfile.TarError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SourceError(f"{uri} is not a readable WebDataset shard: {error}") from None
    for prefix, address in images:
        known = values.get(prefix, {})
        where = f"{uri}, member {prefix!r}"
        yield make_record(f"{relative}/{prefix}", address, known, data, where)
