"""What the CPU tasks of evaluation and probes run: pieces of an image set to crops. Imports no torch."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ..config import Recipe
from ..config.sections import DataSection
from ..data.reading import load_crops
from ..data.records import ImageRecord
from .image_sets import read_piece


def decode_batch(row: dict[str, Any], data: DataSection, image_size: int) -> dict[str, Any]:
    """{records, paired} -> {images uint8 [n,S,S,3], keys, pairs (positions in `images`), errors}, the last three JSON."""
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


def decode_chunk(row: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """{images, originals?} (pieces of work) -> crops of them, positions in the chunk, errors; of pairs, both or none."""
    images, kept, errors = read_piece(json.loads(row["images"]), recipe)
    decoded = {"chunk": row["chunk"], "start": row["start"]}
    if "originals" in row:
        originals, whole, more = read_piece(json.loads(row["originals"]), recipe)
        both = sorted(set(kept) & set(whole))
        decoded["originals"] = originals[[whole.index(i) for i in both]]
        images, kept, errors = images[[kept.index(i) for i in both]], both, errors + more
    return {
        **decoded,
        "images": images,
        "kept": np.asarray(kept, dtype=np.int64),
        "errors": json.dumps(errors, ensure_ascii=False),
    }
