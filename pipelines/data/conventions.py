"""The names and types by which people give labels and captions, and what is made of them.

Captions: the column `caption`, or the one of CAPTION_NAMES that is there (Hugging Face writes
`text`, generators `prompt`); a list of texts is several captions of one image. Labels: integers,
integers that pandas or CSV turned into floats, or class names, which are numbered in the order of
their names as torchvision's ImageFolder numbers its folders.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..config.sections import DataSection
from .records import SourceError

CAPTION_NAMES = ("caption", "text", "prompt", "captions")
DEFAULT_CAPTION, DEFAULT_LABEL = "caption", "label"
_INTEGER = re.compile(r"[+-]?\d+(\.0*)?")


def caption_column(names: Sequence[str], data: DataSection, where: str) -> str | None:
    """The column of `names` that holds captions; None where captions are off or absent.

    Raises SourceError where several could be meant, or where the named one is not there.
    """
    wanted = data.caption_column
    if wanted is None or wanted in names:
        return wanted
    if wanted != DEFAULT_CAPTION:
        raise SourceError(
            f"{where} has no column {wanted!r} (data.caption_column). It has: {', '.join(names)}."
        )
    there = [name for name in CAPTION_NAMES if name in names]
    if len(there) > 1:
        raise SourceError(
            f"{where}: {' and '.join(there)} could both hold the captions. Set data.caption_column "
            "to one of them, or to null."
        )
    return there[0] if there else None


def captions_of(value: Any) -> tuple[str, ...]:
    """The captions in a cell: a text, or a list of texts. Raises ValueError for another type."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ()
    texts = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(text, dict | list | bytes) for text in texts):
        raise ValueError(f"a caption is text or a list of texts, not {type(texts[0]).__name__}")
    return tuple(str(text) for text in texts if text is not None and str(text).strip())


def label_of(value: Any) -> int | str | None:
    """The integer that `value` means, else the class name that it is; None where it is empty.

    Raises ValueError for a number that is no integer and for values of other types.
    """
    if value is None or value == "" or value != value:
        return None
    if isinstance(value, bool | int):
        return int(value)
    if isinstance(value, float):
        if value.is_integer():
            return int(value)
        raise ValueError(f"the label {value!r} is not an integer")
    if isinstance(value, str):
        text = value.strip()
        return int(text.partition(".")[0]) if _INTEGER.fullmatch(text) else text
    raise ValueError(f"the label {value!r} is neither an integer nor a class name")


def number_labels(labels: pa.ChunkedArray, where: str) -> tuple[pa.ChunkedArray, list[str]]:
    """(int64 labels, class names) of labels as text: numbers stay, names get their place in order.

    Raises SourceError where some are numbers and some are names.
    """
    present = pc.unique(labels).drop_null()
    numeric = pc.match_substring_regex(present, r"^[+-]?\d+$")
    if not len(present) or pc.all(numeric).as_py():
        return labels.cast(pa.int64()), []
    if pc.any(numeric).as_py():
        number = present.filter(numeric)[0].as_py()
        name = present.filter(pc.invert(numeric))[0].as_py()
        raise SourceError(
            f"{where}: some labels are numbers ({number}) and some are names ({name!r}). Number "
            "all classes or name all, or set data.label_column=null."
        )
    names = sorted(present.to_pylist())
    places = pc.index_in(labels, value_set=pa.array(names, labels.type))
    return places.cast(pa.int64()), names
