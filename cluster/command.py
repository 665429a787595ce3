"""A `fae` command as a cluster's job runs it: module, arguments, checked paths, and the name that makes it one job."""

from __future__ import annotations

import difflib
import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from .environment import refuse_password
from .errors import SubmitError

MODULES = {
    "precompute": "pipelines.precompute",
    "train autoencoder": "pipelines.train_autoencoder",
    "train pixel-decoder": "pipelines.train_pixel_decoder",
    "train generator": "pipelines.train_generator",
    "sample": "pipelines.sample",
    "evaluate": "pipelines.evaluate",
    "probe": "pipelines.probe",
    "tune": "tune.search",
    "doctor": "pipelines.doctor",
}
PATH_KEYS = re.compile(r"^(output|storage|latents|data\.path)$|(^|\.)(checkpoint|start_from)$")
NAMED_BY_OUTPUT = ("precompute", "sample")


@dataclass(frozen=True)
class Command:
    """`name` of MODULES, RECIPE, and key=value arguments."""

    name: str
    recipe: str
    overrides: tuple[str, ...]

    @classmethod
    def parse(cls, words: Sequence[str]) -> Command:
        """From the words after `fae submit`. Raises SubmitError for an unknown command or a missing recipe."""
        words = list(words)
        name = " ".join(words[:2]) if words[:1] == ["train"] else "".join(words[:1])
        if name not in MODULES:
            near = difflib.get_close_matches(name, MODULES, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise SubmitError(
                f"No command {name!r} to submit.{hint} There are: {', '.join(MODULES)}."
            )
        rest = words[len(name.split()) :]
        if not rest or "=" in rest[0]:
            raise SubmitError(f"{name} needs a recipe: fae submit {name} RECIPE key=value …")
        for word in rest[1:]:
            key, equals, value = word.partition("=")
            if not equals and not (name == "doctor" and word.startswith("s3://")):
                raise SubmitError(
                    f"{word!r} is not key=value (for example output=s3://bucket/latents)."
                )
            refuse_password(key, value)
        return cls(name, rest[0], tuple(rest[1:]))

    @property
    def module(self) -> str:
        return MODULES[self.name]

    @property
    def entrypoint(self) -> str:
        """The shell command of the job."""
        return shlex.join(["python", "-m", self.module, self.recipe, *self.overrides])

    @property
    def only_asks(self) -> bool:
        """Whether it may be asked again after it was answered; other commands have nothing left to do."""
        return self.name == "doctor"

    def value(self, key: str, root: Path) -> str | None:
        """What the overrides, or else the recipe's file below `root`, give for the dotted `key`."""
        for word in reversed(self.overrides):
            if word.startswith(f"{key}="):
                return word.partition("=")[2]
        path = root / self.recipe
        if not self.recipe.endswith((".yaml", ".yml")):
            path = root / "pipelines" / "recipes" / f"{self.recipe}.yaml"
        try:
            found = yaml.safe_load(path.read_text())
            for part in key.split("."):
                found = found.get(part)
            return None if found is None else str(found)
        except (OSError, AttributeError, yaml.YAMLError):
            return None  # the job itself reads the recipe and says what is wrong with it

    def submission_id(self, root: Path) -> str:
        """`fae-precompute-latents-1a2b3c4d`: of the command and where it writes, so the same work has the same name."""
        if self.name in NAMED_BY_OUTPUT:
            place = [self.value("output", root) or ""]
        else:
            place = [self.value("storage", root) or "", self.value("run", root) or ""]
        shown = place[-1].rstrip("/").rpartition("/")[2]
        if not shown:
            place, shown = [self.recipe, *self.overrides], Path(self.recipe).stem
        digest = hashlib.sha256("\0".join([self.name, *place]).encode()).hexdigest()[:8]
        words = re.sub(r"[^a-z0-9]+", "-", f"fae-{self.name}-{shown}".lower()).strip("-")
        return f"{words[:36].strip('-')}-{digest}"

    def refuse_paths_of_this_machine(self, root: Path) -> None:
        """Raises SubmitError for relative paths: on the cluster they would be in the job's copy, which Ray deletes."""
        given = [word for word in self.overrides if PATH_KEYS.search(word.partition("=")[0])]
        relative = [word for word in given if not _is_shared(word.partition("=")[2])]
        if self.name.startswith("train") and not self.value("storage", root):
            relative.append("storage=runs (the default)")
        if relative:
            raise SubmitError(
                f"{', '.join(relative)}: a relative path means the job's own copy of the working tree, which the "
                "cluster deletes. Give s3://…, or an absolute path of a folder that every node shares."
            )


def _is_shared(path: str) -> bool:
    return "://" in path or path.startswith("/") or path in ("", "null")
