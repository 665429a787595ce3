"""hf:// addresses for paths.py: repositories of models and data sets on the Hugging Face Hub.

An address is hf://[datasets/]OWNER/NAME[@REVISION][/PATH]; of a data set that is listed, the last
part of PATH may be a pattern like train-*.parquet. HF_ENDPOINT names another server;
the token is HF_TOKEN, or the one that `hf auth login` stored. huggingface_hub retries requests.
The Hub is read here and written by `fae publish --push` alone, which calls `upload`.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from huggingface_hub import CommitOperationAdd, HfApi, HfFileSystem, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from pyarrow import fs

from .backend import FileError, FileInfo, RefusedError, StorageError

# The HTTP library differs between versions of huggingface_hub.
_HTTP_ERROR = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, NotImplementedError, _HTTP_ERROR)
"""What a request to the Hub raises when it fails; ValueError for a name that cannot be one."""
_NO_REPOSITORY = (RepositoryNotFoundError, RevisionNotFoundError)


def endpoint() -> str | None:
    """The server that HF_ENDPOINT names; None stands for the Hub itself."""
    return os.environ.get("HF_ENDPOINT") or None


def token() -> str | None:
    """The token of the environment; None stands for the one that `hf auth login` stored."""
    return os.environ.get("HF_TOKEN") or None


def filesystem() -> HfFileSystem:
    """The Hub as a file system of this environment."""
    return _filesystem(endpoint(), token())


@functools.cache
def _filesystem(server: str | None, secret: str | None) -> HfFileSystem:
    return HfFileSystem(endpoint=server, token=secret, skip_instance_cache=True)


def arrow(uri: str) -> tuple[fs.FileSystem, str]:
    """The Hub as Arrow's file system, in which a read of a file is a ranged GET."""
    return fs.PyFileSystem(_Ranges(filesystem())), path_of(uri)


class _Ranges(fs.FSSpecHandler):
    """Reads what is asked for; by itself HfFileSystem reads five megabytes more, each time."""

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(self.fs.open(path, mode="rb", cache_type="none"), mode="r")


def path_of(uri: str) -> str:
    """`uri` as HfFileSystem writes it, without scheme."""
    return uri.removeprefix("hf://").rstrip("/")


def exists(uri: str) -> bool:
    """Whether there is a file, a folder or a repository at `uri`."""
    hub = filesystem()
    hub.invalidate_cache()
    try:
        hub.info(path_of(uri), refresh=True)
    except FileNotFoundError:
        return False
    return True


def is_encrypted(uri: str) -> bool:
    return False


def read_bytes(uri: str) -> bytes:
    """The whole content of the file `uri`."""
    return bytes(filesystem().cat_file(path_of(uri)))


def split_pattern(uri: str) -> tuple[str, str]:
    """(folder, pattern) where the last part of `uri` is a pattern, else (`uri`, "")."""
    folder, _, last = uri.rstrip("/").rpartition("/")
    return (folder, last) if any(sign in last for sign in "*?[") else (uri.rstrip("/"), "")


def list_files(uri: str, recursive: bool) -> Iterator[FileInfo]:
    """Addresses begin as `uri` does. Where it ends in a pattern, they are of the files that match.

    What S3 calls an ETag is the content's hash here.
    """
    hub, (folder, pattern) = filesystem(), split_pattern(uri)
    hub.invalidate_cache()
    try:
        root = hub.resolve_path(path_of(folder)).unresolve()
        found: Any = hub.find(root, maxdepth=None if recursive else 1, detail=True)
    except FileNotFoundError:
        return
    for name, info in found.items():
        below = name.removeprefix(root)
        if not pattern or fnmatch.fnmatchcase(below.removeprefix("/"), pattern):
            yield FileInfo(folder + below, int(info["size"]), info.get("blob_id") or None)


def list_folders(uri: str) -> list[str]:
    below = f"{uri.rstrip('/')}/"
    inner = (file.uri[len(below) :].split("/") for file in list_files(uri, recursive=True))
    return sorted({parts[0] for parts in inner if len(parts) > 1})


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A copy that stays in the cache of huggingface_hub."""
    place: Any = filesystem().resolve_path(path_of(uri))
    copy = hf_hub_download(
        place.repo_id,
        place.path_in_repo,
        repo_type=place.repo_type,
        revision=place.revision,
        endpoint=endpoint(),
        token=token(),
    )
    yield Path(copy)


def upload(folder: Path, files: Sequence[str], repository: str, private: bool, message: str) -> str:
    """Send `files` of `folder` to the model repository OWNER/NAME; returns the commit's address.

    The repository is created if it does not exist; one that exists keeps its visibility. Files that
    it has and `files` lacks stay. Raises StorageError for `private` where it is public.
    """
    api = HfApi(endpoint=endpoint(), token=token())
    api.create_repo(repository, repo_type="model", private=private, exist_ok=True)
    if private and not api.model_info(repository).private:
        raise StorageError(
            f"{repository} is a public repository, and nothing was sent. Make it private in its "
            "settings on the Hub, push to a new name, or push without --private."
        )
    operations = [CommitOperationAdd(name, folder / name) for name in files]
    commit = api.create_commit(repository, operations, commit_message=message, repo_type="model")
    return str(commit.commit_url)


def explain(uri: str, error: Exception) -> tuple[type[StorageError], str]:
    kind, advice = _advice(error)
    return kind, f"{uri}: {advice}"


def _advice(error: Exception) -> tuple[type[StorageError], str]:
    """The kind of `error`, and what to check."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return RefusedError, (
            f"access denied ({status}). Set HF_TOKEN to a token that may read (to push: write) "
            "this repository, and accept its conditions on the Hub if it has some."
        )
    unanswered = isinstance(error, _HTTP_ERROR) and not isinstance(error, HfHubHTTPError)
    if unanswered or isinstance(error, LocalEntryNotFoundError | ConnectionError):
        return StorageError, (
            f"no connection ({type(error).__name__}). Check the network and HF_ENDPOINT; "
            "HF_HUB_OFFLINE=1 allows only files that are in the cache."
        )
    if isinstance(error, FileNotFoundError) or status == 404:
        # The Hub also denies a repository to whom has no token for it.
        no_repository = isinstance(error, _NO_REPOSITORY) or isinstance(
            error.__cause__, _NO_REPOSITORY
        )
        return RefusedError if no_repository else FileError, (
            "it is not there (404). Check owner, name, revision and path. A private repository "
            "needs HF_TOKEN."
        )
    if isinstance(error, ValueError | NotImplementedError):
        return FileError, "expected hf://OWNER/NAME/PATH or hf://datasets/OWNER/NAME/PATH."
    kind = StorageError if isinstance(error, ERRORS) else FileError
    return kind, f"the server answered {status}." if status else f"{type(error).__name__}."
