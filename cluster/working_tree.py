"""The working tree as one zip for Ray's job server: which files go in, and a limit on their size.

.gitignore and .rayignore files count in every folder; EXCLUDED counts always. A link to a folder of
the tree, as `fae/pipelines` of a checkout is, is sent as that folder's files, because unpacking a
zip makes no links. The zip's bytes depend on the files alone, so Ray uploads equal trees once.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from .errors import SubmitError

LIMIT = 50_000_000
"""Largest tree [bytes] that is sent without `--max-size`; Ray's own limit is 512 MiB."""
IGNORE_FILES = (".gitignore", ".rayignore")
EXCLUDED = (
    ".git", ".hg", ".svn", ".venv/", "venv/", "env/", "node_modules/", "__pycache__/", ".*_cache/",
    "*.egg-info/",
    "/build/", "/dist/", "/site/", "/runs/", "/data/", "/latents/", "/samples/", "/fae-demo/",
    "mlruns/", "mlartifacts/", "mlflow.db*", "*.log",
    "*.parquet", "*.safetensors", "*.pt", "*.pth", "*.ckpt", "*.onnx", "*.npy", "*.npz",
    "*.tar", "*.zip",
    "*.jpg", "*.jpeg", "*.png", "*.webp", "*.gif", "*.bmp", "*.tif", "*.tiff",
    ".env", ".env.*", "*.pem", "*.key", ".aws/", ".netrc", "auth_token",
)  # fmt: skip


@dataclass(frozen=True)
class WorkingTree:
    """Files of `root` that go to the cluster, sorted, with their bytes."""

    root: Path
    files: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        return sum(size for _, size in self.files)

    def __contains__(self, path: str) -> bool:
        return any(name == path for name, _ in self.files)

    def write_zip(self, path: Path) -> None:
        """Write the zip, without a top folder and with one fixed date for all files."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, _ in self.files:
                source = self.root / name
                entry = zipfile.ZipInfo(name)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = (source.stat().st_mode & 0o777) << 16
                archive.writestr(entry, source.read_bytes())


def working_tree(root: Path, limit: int = LIMIT) -> WorkingTree:
    """What would be sent of `root`.

    Raises SubmitError for no folder, nothing to send, or more than `limit` bytes.
    """
    if not root.is_dir():
        raise SubmitError(f"--working-dir {root}: no such folder.")
    tree = WorkingTree(root, tuple(sorted(_files(root).items())))
    if not tree.files:
        raise SubmitError(f"--working-dir {root}: holds nothing to send.")
    if tree.size > limit:
        largest = sorted(tree.files, key=lambda file: -file[1])[:10]
        lines = "\n".join(f"  {size / 1e6:9.1f} MB  {name}" for name, size in largest)
        raise SubmitError(
            f"{root}: {tree.size / 1e6:.1f} MB in {len(tree.files)} files, more than the limit of "
            f"{limit / 1e6:.0f} MB. Data belongs in a bucket. Leave files out with a .rayignore "
            f"(written like .gitignore), or raise --max-size. The largest:\n{lines}"
        )
    return tree


def _files(root: Path) -> dict[str, int]:
    # Paths relative to `root`, and sizes [bytes].
    rules, top = _Rules(), root.resolve()
    files: dict[str, int] = {}
    links: dict[str, Path] = {}
    for folder, folders, names in os.walk(root):
        inside = "" if Path(folder) == root else f"{Path(folder).relative_to(root).as_posix()}/"
        rules.read(root, inside, names)
        folders[:] = [name for name in folders if not rules.leave_out(f"{inside}{name}/")]
        for name in folders:
            if (Path(folder) / name).is_symlink():
                links[inside + name] = (Path(folder) / name).resolve()
        for name in names:
            file = Path(folder) / name
            if rules.leave_out(inside + name) or not file.is_file():
                continue
            # A link is followed only inside the tree: what is outside was not asked to be sent.
            if file.resolve().is_relative_to(top):
                files[inside + name] = file.stat().st_size
    return files | {
        path: size
        for link, target in links.items()
        for path, size in _linked(files, link, target, top)
        if not rules.leave_out(path)
    }


def _linked(files: dict[str, int], link: str, target: Path, top: Path) -> Iterator[tuple[str, int]]:
    # Those of `files` that lie below the link's target, under the link's name. No link among them
    # is followed, so there are no loops; what was left out where it lies is left out here too.
    if not target.is_relative_to(top) or (top / link).is_relative_to(target):
        return
    place = f"{target.relative_to(top).as_posix()}/"
    for path, size in files.items():
        if path.startswith(place):
            yield f"{link}/{path.removeprefix(place)}", size


class _Rules:
    """The ignore files read so far; each matches paths relative to its folder, as in git."""

    def __init__(self) -> None:
        self.specs: dict[str, GitIgnoreSpec] = {"": GitIgnoreSpec.from_lines(EXCLUDED)}

    def read(self, root: Path, folder: str, names: Collection[str]) -> None:
        """Take in those of IGNORE_FILES that are among the `names` of `folder`, "" or "a/b/"."""
        lines = [
            line
            for name in IGNORE_FILES
            if name in names
            for line in (root / folder / name).read_text(errors="replace").splitlines()
        ]
        if lines:
            # EXCLUDED comes last: no `!pattern` of the tree brings a secret back.
            self.specs[folder] = GitIgnoreSpec.from_lines(lines if folder else [*lines, *EXCLUDED])

    def leave_out(self, path: str) -> bool:
        """Whether a folder above `path` has a rule against it; a folder's path ends with /."""
        return any(
            spec.match_file(path.removeprefix(folder))
            for folder, spec in self.specs.items()
            if path.startswith(folder)
        )
