"""A `fae` command as a job: its words, its recipe, the paths it may use, and its name.

A job runs `python -m fae COMMAND RECIPE key=value …`. Which words are a command is known to the
command line alone, which hands the names in.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from fae.pipelines.config import Recipe, load_recipe
from fae.pipelines.config.facts import path_values
from fae.pipelines.storage import paths

from .environment import refuse_password
from .errors import SubmitError

RECIPES = "fae/pipelines/config/recipes"
"""Folder of the shipped recipes in a working tree."""
PLACES = {
    "precompute": ("output",),
    "precompute-text": ("output",),
    "sample": ("output",),
    "evaluate": ("evaluate.output",),
    "probe": ("probe.output",),
    "train": ("storage", "run"),
    "tune": ("storage", "tune.name"),
    "run": ("storage",),
}
"""By a command's first word: the recipe's keys that say where it writes; the others only ask."""


@dataclass(frozen=True)
class Command:
    """A command's name, RECIPE, and key=value arguments; doctor's may also be s3:// addresses."""

    name: str
    recipe: str
    arguments: tuple[str, ...]

    @classmethod
    def parse(cls, words: Sequence[str], names: Collection[str]) -> Command:
        """From the words after `fae submit`; `names` are the commands that can be jobs.

        Raises SubmitError for another command, a missing recipe, a word that is not key=value, and
        a password in an address.
        """
        words = list(words)
        grouped = any(name.startswith(f"{words[0]} ") for name in names) if words else False
        name = " ".join(words[: 2 if grouped else 1])
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise SubmitError(
                f"No command {name!r} to submit.{hint} There are: {', '.join(names)}."
            )
        rest = words[len(name.split()) :]
        if not rest or "=" in rest[0]:
            raise SubmitError(f"{name} needs a recipe: fae submit {name} RECIPE key=value …")
        for word in rest[1:]:
            key, equals, value = word.partition("=")
            if not equals and not (name == "doctor" and _is_bucket(word)):
                raise SubmitError(
                    f"{word!r} is not key=value (for example output=s3://bucket/latents)."
                )
            refuse_password(key, value)
        return cls(name, rest[0], tuple(rest[1:]))

    @property
    def entrypoint(self) -> str:
        """The shell command of the job."""
        words = ["python", "-m", "fae", *self.name.split(), self.recipe, *self.arguments]
        return shlex.join(words)

    @property
    def recipe_is_file(self) -> bool:
        return self.recipe.endswith((".yaml", ".yml"))

    @property
    def places(self) -> tuple[str, ...]:
        """The recipe's keys that say where the command writes."""
        return PLACES.get(self.name.split()[0], ())

    def load(self, root: Path | None = None) -> Recipe:
        """The recipe as the job will read it: a file below `root`, or a shipped one by its name.

        The working tree `root` may ship other recipes than this installation, and then they count.
        Raises RecipeError.
        """
        name = self.recipe
        if root is not None:
            sent = root / (name if self.recipe_is_file else f"{RECIPES}/{name}.yaml")
            name = str(sent) if self.recipe_is_file or sent.is_file() else name
        return load_recipe(name, [word for word in self.arguments if not _is_bucket(word)])

    def submission_id(self, recipe: Recipe) -> str:
        """`fae-precompute-latents-1a2b3c4d`: of the command and where it writes.

        So the same work has the same name. What has no place of its own is named by its arguments:
        a chain, whose stages have folders by their content, and a command that writes nothing.
        """
        place = [attrgetter(key)(recipe) for key in self.places]
        if place and all(place) and self.name != "run":
            shown = place[-1].rstrip("/").rpartition("/")[2]
        else:
            place, shown = [self.recipe, *self.arguments], Path(self.recipe).stem
        digest = hashlib.sha256("\0".join([self.name, *place]).encode()).hexdigest()[:8]
        words = re.sub(r"[^a-z0-9]+", "-", f"fae-{self.name}-{shown}".lower()).strip("-")
        return f"{words[:36].strip('-')}-{digest}"

    def shipped_folders(self, recipe: Recipe) -> tuple[str, ...]:
        """Folders of a working tree that hold the recipe's `shipped:` networks and images."""
        found = [path.value for path in path_values(recipe).values()]
        names = {
            value.removeprefix(paths.SHIPPED).partition("/")[0]
            for value in found
            if value.startswith(paths.SHIPPED)
        }
        return tuple(sorted(f"fae/shipped/{name}/" for name in names))

    def refuse_paths_of_this_machine(self, recipe: Recipe) -> None:
        """Raises SubmitError for relative paths.

        On the cluster they would be in the job's copy of the working tree, which Ray deletes. A
        default path counts only where the command writes there.
        """
        defaults = path_values(Recipe())
        relative = []
        for key, path in path_values(recipe).items():
            default = " (the default)" * (path == defaults.get(key))
            if not _is_shared(path.value) and (not default or key in self.places):
                relative.append(f"{key}={path.value}{default}")
        if relative:
            raise SubmitError(
                f"{', '.join(relative)}: a relative path means the job's own copy of the working "
                "tree, which the cluster deletes. Give s3://…, or an absolute path of a folder "
                "that every node shares."
            )


def _is_bucket(word: str) -> bool:
    return word.startswith("s3://")


def _is_shared(path: str) -> bool:
    return "://" in path or path.startswith(("/", paths.SHIPPED))
