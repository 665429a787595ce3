"""The working tree as one zip for Ray's job server: what is left out, how large it is, and a limit with names.

.gitignore and .rayignore files count in every folder; EXCLUDED counts always. The zip's bytes depend on the files
alone, so the same tree is uploaded once.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from .errors import SubmitError

LIMIT = 50_000_000
"""Largest tree [bytes] that is sent without asking for more (`--max-size`); Ray's own end is 512 MiB."""
IGNORE_FILES = (".gitignore", ".rayignore")
EXCLUDED = (
    ".git", ".hg", ".svn", ".venv/", "venv/", "env/", "node_modules/", "__pycache__/", ".*_cache/", "*.egg-info/",
    "/build/", "/dist/", "/site/", "/runs/", "/data/", "/latents/", "/samples/", "/fae-demo/", "mlruns/", "mlartifacts/", "mlflow.db*",
    "*.parquet", "*.safetensors", "*.pt", "*.pth", "*.ckpt", "*.onnx", "*.npy", "*.npz", "*.tar", "*.zip", "*.log",
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
        """One zip without a top folder; a fixed date in it, so equal files make equal bytes."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, _ in self.files:
                source = self.root / name
                entry = zipfile.ZipInfo(name)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = (source.stat().st_mode & 0o777) << 16
                archive.writestr(entry, source.read_bytes())


def working_tree(root: Path, limit: int = LIMIT) -> WorkingTree:
    """What would be sent of `root`. Raises SubmitError for no folder, nothing to send, or more than `limit` bytes."""
    if not root.is_dir():
        raise SubmitError(f"--working-dir {root}: no such folder.")
    tree = WorkingTree(root, tuple(sorted(_walk(root))))
    if not tree.files:
        raise SubmitError(f"--working-dir {root}: holds nothing to send.")
    if tree.size > limit:
        largest = sorted(tree.files, key=lambda file: -file[1])[:10]
        lines = "\n".join(f"  {size / 1e6:9.1f} MB  {name}" for name, size in largest)
        raise SubmitError(
            f"{root}: {tree.size / 1e6:.1f} MB in {len(tree.files)} files, more than the limit of {limit / 1e6:.0f} MB. "
            "Data belongs in a bucket. Leave files out with a .rayignore (written like .gitignore), or raise "
            f"--max-size. The largest:\n{lines}"
        )
    return tree


def _walk(root: Path) -> Iterator[tuple[str, int]]:
    # Each spec is of one folder and matches paths relative to it, as git does.
    specs: dict[str, GitIgnoreSpec] = {"": GitIgnoreSpec.from_lines(EXCLUDED)}
    for folder, folders, names in os.walk(root):
        inside = "" if Path(folder) == root else Path(folder).relative_to(root).as_posix()
        rules = [
            line
            for name in IGNORE_FILES
            if name in names
            for line in (Path(folder) / name).read_text(errors="replace").splitlines()
        ]
        if rules:
            # EXCLUDED comes last: no `!pattern` of the tree brings a secret back.
            specs[inside] = GitIgnoreSpec.from_lines(rules if inside else [*rules, *EXCLUDED])
        above = [""] + [p for p in specs if p and (inside == p or inside.startswith(f"{p}/"))]

        def left_out(path: str, above: list[str] = above) -> bool:
            return any(specs[p].match_file(path.removeprefix(f"{p}/" if p else "")) for p in above)

        prefix = f"{inside}/" if inside else ""
        folders[:] = [name for name in folders if not left_out(f"{prefix}{name}/")]
        for name in names:
            file = Path(folder) / name
            if left_out(prefix + name) or not file.is_file():
                continue
            # A link is followed only inside the tree: what is outside was not asked to be sent.
            if file.resolve().is_relative_to(root.resolve()):
                yield prefix + name, file.stat().st_size
