"""A planned image as a record, and many of them as an Arrow table.

A plan of ten million images stays in columns; Python objects would take several times the memory.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa

from fae_core.errors import UserError

from ..config import RecipeError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".avif", ".avifs", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    *(".pbm", ".pgm", ".ppm", ".pnm", ".qoi"),
)
"""Names of the formats that crops.py decodes; which one a file is, its content says."""
ROWS_AT_ONCE = 2**16
RECORDS = pa.schema(
    [
        ("key", pa.large_string()),
        ("uri", pa.large_string()),
        ("label", pa.int64()),
        ("caption", pa.large_string()),
        ("captions", pa.list_(pa.large_string())),
    ]
)
"""The columns of a plan in memory. `captions` are all of an image that has several, else null."""

T = TypeVar("T")


class SourceError(UserError, ValueError):
    """A source that cannot be planned; the message is for the person who named it."""


@dataclass(frozen=True)
class ImageRecord:
    """One planned image; `uri` is FILE, FILE#row=N (Parquet) or FILE#offset=O&size=S (tar)."""

    key: str
    uri: str
    label: int | None = None
    caption: str | None = None
    captions: tuple[str, ...] | None = None
    """All captions of an image that has several; `caption` is the first."""


def records_table(records: Iterable[ImageRecord], with_labels: bool = True) -> pa.Table:
    """`records` as columns; an iterator is taken in as it goes, never held whole as objects.

    Without `with_labels` the labels are null.
    """
    batches = []
    for some in batched(records, ROWS_AT_ONCE):
        try:
            columns = [
                [None] * len(some)
                if name == "label" and not with_labels
                else [getattr(record, name) for record in some]
                for name in RECORDS.names
            ]
            batches.append(pa.record_batch(columns, schema=RECORDS))
        except UnicodeEncodeError:
            for record in some:
                check_text(record.key, record.uri, record.caption or "")
            raise
    return pa.Table.from_batches(batches, schema=RECORDS)


def records_of(table: pa.Table) -> list[ImageRecord]:
    """The rows of a table with the columns RECORDS; `captions` may be absent."""
    rows = whole_records(table).to_pylist()
    for row in rows:
        row["captions"] = None if row["captions"] is None else tuple(row["captions"])
    return [ImageRecord(**row) for row in rows]


def whole_records(table: pa.Table) -> pa.Table:
    """The table with all columns of RECORDS; without the column `captions` nobody has several."""
    if "captions" not in table.column_names:
        nulls = pa.nulls(len(table), RECORDS.field("captions").type)
        table = table.append_column("captions", nulls)
    return table.select(RECORDS.names).cast(RECORDS)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`items` in lists of `size`, the last one shorter."""
    iterator = iter(items)
    while some := list(itertools.islice(iterator, size)):
        yield some


def check_text(*texts: str) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise SourceError(f"{text!r} is not valid Unicode. Rename the file.") from None


def source_digest(records: pa.Table | Sequence[ImageRecord]) -> str:
    """SHA-256 over key, uri, label and captions of every record in order."""
    digest = hashlib.sha256()
    table = whole_records(records) if isinstance(records, pa.Table) else records_table(records)
    for batch in table.to_batches(max_chunksize=8192):
        for *row, captions in zip(*(c.to_pylist() for c in batch.columns), strict=True):
            # A record without several captions hashes as it did before there could be several.
            digest.update(json.dumps(row if captions is None else [*row, captions]).encode())
    return digest.hexdigest()


def class_name(label: int, names: Sequence[str]) -> str:
    """What people call class `label`: its name where `names` has one, else its number."""
    return names[label] if 0 <= label < len(names) else str(label)


def class_number(given: int | str, names: Sequence[str], num_classes: int, what: str) -> int:
    """The number of the class `given` by number or name, one of `num_classes` classes.

    `names` may be empty or cover the first classes only; `what` begins the messages. Raises
    RecipeError for what is no class.
    """
    text = str(given)
    if isinstance(given, str) and text in names:
        return names.index(text)
    if text.strip().lstrip("+-").isdigit():
        if 0 <= int(text) < num_classes:
            return int(text)
        ends = f" ({names[0]} … {names[-1]})" if names else ""
        raise RecipeError(
            f"{what} {text} is none of the generator's {num_classes} classes{ends}. "
            "Classes are numbered from 0."
        )
    if not names:
        raise RecipeError(
            f"{what} {text!r} is a name, and this generator's classes have none. Give numbers from "
            f"0 to {num_classes - 1}."
        )
    near = difflib.get_close_matches(text, names, n=1, cutoff=0.0)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise RecipeError(
        f"{what} {text!r} is none of the generator's {num_classes} classes "
        f"({names[0]} … {names[-1]}).{hint}"
    )


def label_problem(
    labelled: Iterable[tuple[str, int | None]], num_classes: int, names: Sequence[str] = ()
) -> str | None:
    """Why a generator of `num_classes` cannot train on these labels, None where it can.

    `labelled` are (key, label) of its images, `names` those of the classes where they have some.
    """
    without = "to train without classes set data.label_column=null generator.num_classes=1."
    missing: list[str] = []
    highest: tuple[int, str] = (-1, "")
    count = 0
    for key, label in labelled:
        count += 1
        if label is None:
            missing.append(key)
        elif label < 0:
            return f"the label of {key!r} is {label}. Number the classes from 0."
        else:
            highest = max(highest, (label, key))
    if highest[0] >= num_classes:
        label, key = highest
        named = f" ({names[label]})" if label < len(names) else ""
        return (
            f"the label of {key!r} is {label}{named}, and generator.num_classes is "
            f"{num_classes}. Set "
            f"generator.num_classes={label + 1}, or {without}"
        )
    if missing and num_classes > 1:
        return (
            f"{len(missing)} of {count} images have no label, for example {missing[0]!r}, and "
            f"generator.num_classes is {num_classes}. Give them one, or {without}"
        )
    return None


def key_hash(key: str) -> int:
    """The first 64 bits of the key's SHA-256."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])


def hash_order(record: ImageRecord) -> tuple[int, str]:
    """Sorts records into an order that has nothing to do with their names."""
    return key_hash(record.key), record.key


def split_records(
    records: Sequence[ImageRecord], validation_fraction: float
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """(training, validation) records in the order of their keys' hashes.

    An image's side depends on its own key alone. Raises SourceError where none is left to train on.
    """
    threshold = int(validation_fraction * 2**64)
    shuffled = sorted(records, key=hash_order)
    training = [record for record in shuffled if key_hash(record.key) >= threshold]
    validation = [record for record in shuffled if key_hash(record.key) < threshold]
    if not training:
        raise SourceError(
            f"All {len(records)} images fall into the validation split. Lower "
            "data.validation_fraction "
            f"({validation_fraction}) or add images."
        )
    return training, validation
