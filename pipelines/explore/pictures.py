"""Which pictures a page shows: some of a latent store, or image files and folders."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fae_core.backbone_presets import parse_backbone_label
from fae_core.errors import UserError

from ..config import Recipe, RecipeError, load_recipe
from ..config.facts import recipe_for_any_images
from ..data import plan_source
from ..data.reading import load_crops
from ..data.records import ImageRecord, class_name, records_of
from ..latents.plan import PLAN, open_plan
from ..networks import load_checkpoint
from ..storage import paths

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class ExploreError(UserError, ValueError):
    """Pictures that no page can be made of; the message says what to give."""


@dataclass(frozen=True)
class Pictures:
    """Crops uint8 [n, S, S, 3] with their keys and labels, and the recipe of their networks."""

    images: np.ndarray
    keys: list[str]
    labels: list[str | None]
    recipe: Recipe
    about: str
    """Where they come from, in words."""


def pictures_of(places: Sequence[str], autoencoder: str | None, limit: int) -> Pictures:
    """At most `limit` pictures of a latent store, or of image files and folders.

    They are spread evenly over what is there. A store's recipe names its networks; images need
    `autoencoder`, a checkpoint. Raises ExploreError, SourceError, StorageError.
    """
    if len(places) == 1 and paths.exists(paths.join(places[0], PLAN)):
        return _of_store(places[0], autoencoder, limit)
    if autoencoder is None:
        for place in places:
            if not paths.exists(place) and next(iter(paths.list_files(place)), None) is None:
                raise ExploreError(f"{place} does not exist, or is an empty folder.")
        raise ExploreError(
            "Images need a trained autoencoder: --autoencoder RUN/autoencoder.safetensors, or "
            "shipped:emoji/autoencoder.safetensors to try it on emoji. "
            f"A latent store knows its own, and {places[0]} is none (it has no {PLAN})."
        )
    recipe = recipe_of(autoencoder)
    records, names = _listed(places, recipe)
    return _read(records, names, recipe, limit, ", ".join(places))


def recipe_of(autoencoder: str) -> Recipe:
    """A recipe for the checkpoint `autoencoder` and its backbone, for images of any source."""
    loaded = load_checkpoint(autoencoder, "autoencoder")
    recipe = recipe_for_any_images(autoencoder)
    label = loaded.fingerprints["backbone"].rpartition(":")[0]
    name, size, layers = parse_backbone_label(label)
    recipe.backbone.name, recipe.backbone.image_size, recipe.backbone.layers = name, size, layers
    recipe.image_size = int(loaded.fingerprints["image_size"])
    recipe.autoencoder.checkpoint = autoencoder
    return recipe


def _of_store(uri: str, autoencoder: str | None, limit: int) -> Pictures:
    recipe_uri = paths.join(uri, "recipe.yaml")
    if not paths.exists(recipe_uri):
        raise ExploreError(f"{uri} has no recipe.yaml, which names its autoencoder.")
    recipe = _read_recipe(recipe_uri)
    if autoencoder is not None:
        recipe.autoencoder.checkpoint = autoencoder
    plan = open_plan(uri)
    places = _spread(plan.num_images, limit)
    by_shard: dict[int, list[int]] = {}
    for place in places:
        by_shard.setdefault(place // plan.shard_size, []).append(place % plan.shard_size)
    records = [
        record
        for shard, rows in by_shard.items()
        for index, record in enumerate(plan.shard(shard))
        if index in rows
    ]
    names = list(plan.account.get("class_names", []))
    return _read(records, names, recipe, limit, uri, plan.num_images)


def _listed(places: Sequence[str], recipe: Recipe) -> tuple[list[ImageRecord], list[str]]:
    """Records of files and folders with their labels, and the names of the classes."""
    records: list[ImageRecord] = []
    names: list[str] = []
    for place in places:
        if place.lower().endswith(SUFFIXES):
            records.append(ImageRecord(place.rstrip("/").rpartition("/")[2], place))
            continue
        source = plan_source(recipe.data.model_copy(update={"path": place}))
        found = records_of(source.table)
        if len(places) == 1:
            return found, list(source.account.class_names)
        # Of several folders each is a class of its own.
        name = place.rstrip("/").rpartition("/")[2]
        names.append(name)
        label = len(names) - 1
        records += [replace(r, key=f"{name}/{r.key}", label=label) for r in found]
    return records, names


def _read(
    records: Sequence[ImageRecord],
    names: Sequence[str],
    recipe: Recipe,
    limit: int,
    source: str,
    total: int | None = None,
) -> Pictures:
    total = len(records) if total is None else total
    chosen = [records[place] for place in _spread(len(records), limit)]
    images, kept, errors = load_crops(chosen, recipe.image_size, recipe.data)
    if not kept:
        first = f" The first: {errors[0]['message']}" if errors else ""
        raise ExploreError(f"{source} holds no picture that can be read.{first}")
    shown = f"{len(kept)} of {total:,} pictures of {source}"
    if errors:
        shown += f"; {len(errors)} could not be read"
    return Pictures(
        images,
        [chosen[index].key for index in kept],
        [
            None if (label := chosen[index].label) is None else class_name(label, names)
            for index in kept
        ],
        recipe,
        shown,
    )


def _spread(total: int, limit: int) -> list[int]:
    """At most `limit` of `total` places, evenly spread."""
    if total <= limit:
        return list(range(total))
    return sorted({int(place) for place in np.linspace(0, total - 1, limit)})


def _read_recipe(uri: str) -> Recipe:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(paths.read_bytes(uri))
        try:
            return load_recipe(str(path))
        except RecipeError as error:
            raise RecipeError(str(error).replace(str(path), uri)) from None
