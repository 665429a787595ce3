"""The working tree as one zip for Ray's job server: which files go in, and a limit on their size.

.gitignore and .rayignore files count in every folder, and in those above up to the repository's
root; SECRETS, HIDDEN, MADE and DATA count always. A link to a folder of the tree, as a checkout's
`fae/pipelines` is, is sent as that folder's files, because unpacking a zip makes no links. The
zip's bytes depend on the files alone, so Ray uploads equal trees once.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from .errors import SubmitError

LIMIT = 50_000_000
"""Largest tree [bytes] that is sent without `--max-size`; Ray's own limit is 512 MiB."""
IGNORE_FILES = (".gitignore", ".rayignore")
SECRETS = (
    "*[Cc]redentials*", "[Ss]ecret.*", "[Ss]ecrets.*", "kubeconfig*", "auth_token",
    "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.p12", "*.pfx", "!*.py",
)  # fmt: skip
"""Files by their own name or a folder's. A folder of such a name is looked into for its Python."""
HIDDEN = (".*", *(f"!{name}" for name in IGNORE_FILES))  # .ssh/, .kube/, .env, .netrc, …
MADE = (
    "venv/", "env/", "node_modules/", "__pycache__/", "*.egg-info/",
    "/build/", "/dist/", "/site/", "/runs/", "/data/", "/latents/", "/samples/", "/fae-demo/",
    "mlruns/", "mlartifacts/", "mlflow.db*", "*.log",
)  # fmt: skip
DATA = (
    "*.parquet", "*.safetensors", "*.pt", "*.pth", "*.ckpt", "*.onnx", "*.npy", "*.npz",
    "*.tar", "*.zip",
    "*.jpg", "*.jpeg", "*.png", "*.webp", "*.gif", "*.bmp", "*.tif", "*.tiff",
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


def working_tree(root: Path, limit: int = LIMIT, whole: tuple[str, ...] = ()) -> WorkingTree:
    """What would be sent of `root`; of its folders `whole`, "a/b/", weights and pictures too.

    Raises SubmitError for no folder, the home folder, nothing to send, or more than `limit` bytes.
    """
    if not root.is_dir():
        raise SubmitError(f"--working-dir {root}: no such folder.")
    if _home_is_below(root.resolve()):
        raise SubmitError(
            f"--working-dir {root}: your home folder would be sent, with what programs keep there. "
            "Change to the folder of your code, or give it as --working-dir."
        )
    tree = WorkingTree(root, tuple(sorted(_files(root, whole).items())))
    if not tree.files:
        raise SubmitError(
            f"--working-dir {root}: holds nothing to send that no .gitignore or .rayignore leaves "
            "out."
        )
    if tree.size > limit:
        largest = sorted(tree.files, key=lambda file: -file[1])[:10]
        lines = "\n".join(f"  {size / 1e6:9.1f} MB  {name}" for name, size in largest)
        raise SubmitError(
            f"{root}: {tree.size / 1e6:.1f} MB in {len(tree.files)} files, more than the limit of "
            f"{limit / 1e6:.0f} MB. Data belongs in a bucket. Leave files out with a .rayignore "
            f"(written like .gitignore), or raise --max-size. The largest:\n{lines}"
        )
    return tree


def _home_is_below(folder: Path) -> bool:
    """Whether the user's home folder is `folder` or lies in it; a user may have none."""
    with contextlib.suppress(RuntimeError):
        return Path.home().resolve().is_relative_to(folder)
    return False


def _files(root: Path, whole: tuple[str, ...]) -> dict[str, int]:
    # Paths relative to `root`, and sizes [bytes].
    rules, top = _Rules(root, whole), root.resolve()
    files: dict[str, int] = {}
    links: dict[str, Path] = {}
    for folder, folders, names in os.walk(root):
        inside = "" if Path(folder) == root else f"{Path(folder).relative_to(root).as_posix()}/"
        rules.read(Path(folder), inside)
        folders[:] = [name for name in folders if not rules.leave_out(f"{inside}{name}/")]
        for name in [*folders, *names]:
            path = Path(folder) / name
            if path.is_symlink():
                if path.exists():  # neither broken nor a circle
                    links[inside + name] = path.resolve()
            elif path.is_file() and not rules.leave_out(inside + name):
                files[inside + name] = path.stat().st_size
    # A link is followed only to what is sent anyway, files first: folders may hold linked ones.
    for link, target in links.items():
        if target.is_relative_to(top) and not rules.leave_out(link):
            size = files.get(target.relative_to(top).as_posix())
            files |= {} if size is None else {link: size}
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
    """The ignore files read so far; each matches paths relative to its folder, as in git.

    They only add to what is left out: no `!pattern` of the tree brings a secret back.
    """

    def __init__(self, root: Path, whole: tuple[str, ...]) -> None:
        self.whole = whole
        self.folders = GitIgnoreSpec.from_lines([*HIDDEN, *MADE])
        self.files = GitIgnoreSpec.from_lines([*SECRETS, *HIDDEN, *MADE])
        self.data = GitIgnoreSpec.from_lines(DATA)
        self.read_specs: list[tuple[str, str, GitIgnoreSpec]] = []
        top = root.resolve()
        chain = [top, *top.parents]
        depth = next((n for n, folder in enumerate(chain) if (folder / ".git").exists()), 0)
        for folder in chain[1 : depth + 1]:
            self.read(folder, "", f"{top.relative_to(folder).as_posix()}/")

    def read(self, folder: Path, inside: str, above: str = "") -> None:
        """Take in the ignore files of `folder`.

        It is `inside` the tree, "" or "a/b/", or it is the one in which the tree is at `above`.
        """
        lines = [
            line
            for name in IGNORE_FILES
            if (folder / name).is_file()
            for line in (folder / name).read_text(errors="replace").splitlines()
        ]
        if lines:
            self.read_specs.append((inside, above, GitIgnoreSpec.from_lines(lines)))

    def leave_out(self, path: str) -> bool:
        """Whether any rule is against `path`; a folder's path ends with /."""
        if (self.folders if path.endswith("/") else self.files).match_file(path):
            return True
        if not path.startswith(self.whole) and self.data.match_file(path):
            return True
        return any(
            spec.match_file(above + path.removeprefix(inside))
            for inside, above, spec in self.read_specs
            if path.startswith(inside)
        )
