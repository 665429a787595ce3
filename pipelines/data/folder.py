"""A folder of images: its files by name, and labels from class folders or sidecars.

As torchvision's ImageFolder and Hugging Face's imagefolder read it: the first folder of a path is
the class, where no metadata file gives labels (sidecars.py).
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from ..config.sections import DataSection
from .account import Account
from .conventions import number_labels
from .listing import ends_with, relative_path
from .records import IMAGE_SUFFIXES, RECORDS
from .sidecars import Sidecars
from .tables import LISTS

NOT_AN_IMAGE = "not an image by its name (data.suffixes)"
NO_SUFFIX = "no suffix (data.suffixes=[''] takes such files)"
LIST = "a table or a list (data.path=FILE reads it)"
UNSUPPORTED = {
    (".heic", ".heif"): "HEIC, which Pillow does not read (convert with the package pillow-heif)",
    (".jxl",): "JPEG XL, which Pillow does not read (convert with the package pillow-jxl-plugin)",
}


def plan_folder(uris: pa.ChunkedArray, data: DataSection, account: Account) -> pa.Table:
    """The images among `uris` with labels and captions, in key order; columns RECORDS."""
    is_image = _named_as_images(uris, data)
    images, others = uris.filter(is_image), uris.filter(pc.invert(is_image))
    if not len(images):
        _count_others(others, account)
        return RECORDS.empty_table()
    first = images[0].as_py()
    # All begin with the same folder, so keys are in the order of the addresses.
    start = len(first) - len(relative_path(first, str(data.path)))
    keys = pc.utf8_slice_codeunits(images, start)
    sidecars = Sidecars(keys, start, data, account)
    _count_others(sidecars.read(others), account)
    labels = _labels(keys, data, account, sidecars)
    captions, several = _captions(keys, account, sidecars)
    return pa.table([keys, images, labels, captions, several], schema=RECORDS)


def _named_as_images(uris: pa.ChunkedArray, data: DataSection) -> pa.ChunkedArray:
    suffixes = IMAGE_SUFFIXES if data.suffixes is None else data.suffixes
    named = [suffix for suffix in suffixes if suffix]
    found = ends_with(uris, named) if named else pc.equal(uris, "")
    if "" in suffixes:
        found = pc.or_(found, pc.invert(pc.match_substring_regex(uris, r"\.[^./]*$")))
    return found


def _count_others(others: pa.ChunkedArray, account: Account) -> None:
    for suffixes, reason in UNSUPPORTED.items():
        matches = ends_with(others, suffixes)
        _count(others.filter(matches), reason, account)
        others = others.filter(pc.invert(matches))
    is_list = ends_with(others, LISTS)
    _count(others.filter(is_list), LIST, account)
    others = others.filter(pc.invert(is_list))
    has_suffix = pc.match_substring_regex(others, r"\.[^./]*$")
    _count(others.filter(pc.invert(has_suffix)), NO_SUFFIX, account)
    _count(others.filter(has_suffix), NOT_AN_IMAGE, account)


def _count(uris: pa.ChunkedArray, reason: str, account: Account) -> None:
    if len(uris):
        account.skip(reason, uris[0].as_py(), len(uris))


def _labels(
    keys: pa.ChunkedArray, data: DataSection, account: Account, sidecars: Sidecars
) -> pa.ChunkedArray:
    if data.label_column is None:
        return pa.chunked_array([pa.nulls(len(keys), pa.int64())])
    if sidecars.labels:
        texts = [None if v is None else str(v) for v in map(sidecars.labels.get, keys.to_pylist())]
        account.labels_from = ", ".join(sidecars.labels_from)
        named = pa.chunked_array([pa.array(texts, pa.large_string())])
    else:
        account.labels_from = "class folders"
        in_folder = pc.match_substring(keys, "/")
        folders = pc.replace_substring_regex(keys, "(?s)/.*", "")
        named = pc.if_else(in_folder, folders, pa.scalar(None, pa.large_string()))
        names = sorted(pc.unique(named).drop_null().to_pylist())
        account.class_names = names
        return pc.index_in(named, value_set=pa.array(names, pa.large_string())).cast(pa.int64())
    numbers, account.class_names = number_labels(named, str(data.path))
    return numbers


def _captions(
    keys: pa.ChunkedArray, account: Account, sidecars: Sidecars
) -> tuple[pa.Array, pa.Array]:
    several_type = RECORDS.field("captions").type
    if not sidecars.captions:
        return pa.nulls(len(keys), pa.large_string()), pa.nulls(len(keys), several_type)
    account.captions_from = ", ".join(sidecars.captions_from)
    of_image = [sidecars.captions.get(key, ()) for key in keys.to_pylist()]
    first = pa.array([texts[0] if texts else None for texts in of_image], pa.large_string())
    several = pa.array([list(t) if len(t) > 1 else None for t in of_image], several_type)
    return first, several
