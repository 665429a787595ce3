"""The CPU tasks of `fae evaluate` and `fae probe`: from the images of a row to crops.

They import no torch: a process of such a task starts sooner and holds less memory.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ..config.sections import DataSection
from ..data.reading import load_crops
from ..data.records import ImageRecord
from .image_sets import read_piece


def decode_batch(row: dict[str, Any], data: DataSection, image_size: int) -> dict[str, Any]:
    """{records (JSON), paired} -> {images uint8 [n, S, S, 3], keys, pairs, errors}; for the probe.

    Images that cannot be decoded are left out of `images` and `keys`. `pairs` are positions in
    `images` of pairs whose two images are both there. keys, pairs and errors are JSON.
    """
    records = [ImageRecord(*values) for values in json.loads(str(row["records"]))]
    images, ok, errors = load_crops(records, image_size, data)
    place = {index: position for position, index in enumerate(ok)}
    firsts = range(0, len(records), 2) if bool(row["paired"]) else ()
    pairs = [(place[i], place[i + 1]) for i in firsts if i in place and i + 1 in place]
    return {
        "images": images,
        "keys": json.dumps([records[i].key for i in ok]),
        "pairs": json.dumps(pairs),
        "errors": json.dumps(errors),
    }


def decode_chunk(row: dict[str, Any], data: DataSection, image_size: int) -> dict[str, Any]:
    """{role?, chunk, start, captions?, images, originals?} -> with crops, kept int64 [n], errors.

    `images` and `originals` come as pieces of an image set (JSON) and leave as uint8 [n, S, S, 3].
    `kept` are the positions of the decoded images in the chunk; a pair is kept whole or left out.
    errors, and original_errors of `originals`, are JSON.
    """
    images, kept, errors = read_piece(json.loads(row["images"]), image_size, data)
    decoded: dict[str, Any] = {
        name: row[name] for name in ("role", "chunk", "start", "captions") if name in row
    }
    if "originals" in row:
        originals, whole, more = read_piece(json.loads(row["originals"]), image_size, data)
        both = sorted(set(kept) & set(whole))
        decoded["originals"] = originals[[whole.index(i) for i in both]]
        images, kept = images[[kept.index(i) for i in both]], both
        decoded["original_errors"] = json.dumps(more, ensure_ascii=False)
    return {
        **decoded,
        "images": images,
        "kept": np.asarray(kept, dtype=np.int64),
        "errors": json.dumps(errors, ensure_ascii=False),
    }
