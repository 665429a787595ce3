"""The files of a source, listed and sorted by address; what is skipped is counted in the account.

Hidden files are skipped as every loader of images skips them. Links that leave the source are a
decision of the user (`data.follow_links`): torchvision's ImageFolder follows them, and a link can
lead anywhere.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from ..config.sections import DataSection
from ..storage import paths
from .account import Account
from .records import ROWS_AT_ONCE, SourceError, batched

HIDDEN = "hidden (a name that begins with a dot)"
LINKED = "link out of the source (data.follow_links=false)"
NOT_UNICODE = "name is not valid Unicode"
NOT_A_FILE = "broken link or special file"


def list_addresses(data: DataSection, account: Account) -> pa.ChunkedArray:
    """Addresses of the readable files of `data.path`, sorted; the others are counted in `account`.

    Raises SourceError for links out of the source where `data.follow_links` is not set.
    """
    path = str(data.path)
    found = (
        _as_listed(path) if paths.is_portable(path) else _on_disk(path, data.follow_links, account)
    )
    chunks = []
    for some in batched(_visible(found, path, account), ROWS_AT_ONCE):
        chunks.append(pa.array(some, pa.large_string()))
    table = pa.table({"uri": pa.chunked_array(chunks, pa.large_string())})
    return in_order(table, "uri")["uri"]


def in_order(table: pa.Table, *columns: str) -> pa.Table:
    """`table` sorted by `columns`; itself where it is sorted already, as a listing of S3 is."""
    first = table[columns[0]]
    if pc.all(pc.less(first[:-1], first[1:])).as_py() is not False:
        return table
    return table.sort_by([(column, "ascending") for column in columns])


def relative_path(uri: str, path: str) -> str:
    """`uri` below `path` with forward slashes; its file name where `path` is that file."""
    root = source_root(path)
    return posixpath.basename(uri) if uri == root else uri[len(root) + 1 :]


def source_root(path: str) -> str:
    """How the addresses of the files of the source `path` begin: they are absolute or portable."""
    found = paths.source_root(path) if paths.is_portable(path) else paths.filesystem(path)[1]
    return found.rstrip("/")


def ends_with(uris: pa.ChunkedArray, suffixes: Sequence[str]) -> pa.ChunkedArray:
    """Whether each address ends with one of `suffixes`, in any case of letters."""
    pattern = "|".join(re.escape(suffix) for suffix in suffixes)
    return pc.match_substring_regex(uris, f"(?:{pattern})$", ignore_case=True)


def _visible(uris: Iterator[str], path: str, account: Account) -> Iterator[str]:
    for uri in uris:
        account.num_files += 1
        if any(part.startswith(".") for part in relative_path(uri, path).split("/")):
            account.skip(HIDDEN, uri)
        elif not _is_unicode(uri):
            account.skip(NOT_UNICODE, ascii(uri))
        else:
            yield uri


def _as_listed(path: str) -> Iterator[str]:
    return (file.uri for file in paths.list_files(path))


def _on_disk(path: str, follow: bool | None, account: Account) -> Iterator[str]:
    root = paths.filesystem(path)[1]
    if os.path.isfile(root):
        yield root
        return
    links: list[str] = []
    if os.path.isdir(root):
        yield from _walk(root, (os.path.realpath(root),), follow, links, account)
    if follow is None and links:
        raise SourceError(
            f"data.path={path!r} holds {len(links)} links to places outside it, for example "
            f"{links[0]}. Set data.follow_links=true to read what they lead to (as torchvision's "
            "ImageFolder does), or data.follow_links=false to leave them out."
        )
    for link in links:
        account.num_files += 1
        account.skip(LINKED, link)


def _walk(
    folder: str, above: tuple[str, ...], follow: bool | None, links: list[str], account: Account
) -> Iterator[str]:
    """Files below `folder`; `above` are the real folders on the way to it, so no cycle is
    entered.
    """
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except OSError as error:
        raise paths.storage_error("list", folder, error) from None
    inside = f"{above[0].rstrip('/')}/"
    for entry in entries:
        target = os.path.realpath(entry.path) if entry.is_symlink() else ""
        if entry.is_dir():
            if not target:
                real = f"{above[-1].rstrip('/')}/{entry.name}"
                yield from _walk(entry.path, (*above, real), follow, links, account)
            elif follow and target not in above:
                yield from _walk(entry.path, (*above, target), follow, links, account)
            elif not follow and not f"{target}/".startswith(inside):
                links.append(entry.path)
        elif entry.is_file():
            if target and not follow and not target.startswith(inside):
                links.append(entry.path)
            else:
                yield entry.path
        else:
            account.num_files += 1
            account.skip(NOT_A_FILE, entry.path)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
