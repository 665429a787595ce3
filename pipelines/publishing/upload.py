"""`fae publish --push`: a published folder, checked against its fae.json, to the Hub."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..storage import paths
from .findings import PublishError

ACCOUNT = "fae.json"


def file_account(path: Path) -> dict[str, Any]:
    """Size [bytes] and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def push(folder: str | Path, repository: str, private: bool = False) -> str:
    """Send a published local folder to the model repository OWNER/NAME; the commit's address.

    The token is HF_TOKEN, or the one that `hf auth login` stored. Raises PublishError for a folder
    that is incomplete, changed or has other files, and StorageError where the Hub refuses, or
    where `private` is asked for and the repository is there and public.
    """
    place = Path(folder).expanduser()
    if not (place / ACCOUNT).is_file():
        raise PublishError(f"{place} has no {ACCOUNT}: `fae publish RUN --output FOLDER` makes it.")
    try:
        files = dict(json.loads((place / ACCOUNT).read_text())["files"])
    except (ValueError, TypeError, KeyError):
        raise PublishError(f"{place / ACCOUNT} is damaged. Publish into a new folder.") from None
    there = {p.relative_to(place).as_posix() for p in place.rglob("*") if not p.is_dir()}
    if others := sorted(there - {*files, ACCOUNT}):
        raise PublishError(
            f"{place} holds files that are not in {ACCOUNT}, and nothing was sent: "
            f"{', '.join(others[:5])}{', …' * (len(others) > 5)}. Move them elsewhere."
        )
    changed = [
        name
        for name, account in files.items()
        if name not in there or file_account(place / name) != account
    ]
    if changed:
        raise PublishError(
            f"{place}: {', '.join(changed)} differ from {ACCOUNT}. Publish into a new folder."
        )
    return paths.push(place, [*files, ACCOUNT], repository, private)
