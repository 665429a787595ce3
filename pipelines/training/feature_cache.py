"""`data.feature_cache`: the frozen backbone's features of a small set, computed once and kept.

Autoencoder and pixel decoder train on the same crops in every epoch, and on CPUs the backbone is
half of their step. The cache holds each image's crop and its features, also those of the mirrored
crop where the training mirrors. A folder of its own belongs to each fingerprint: images, crop,
backbone and precision. What was computed before an interruption is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fae_core.backbone import Backbone
from fae_core.draws import uniform_draws

from ..config import Recipe
from ..config.sections import (
    AutoencoderSection,
    DataSection,
    PixelDecoderSection,
    TrainingSection,
)
from ..data import EpochOrder
from ..data.decoding import decoded
from ..data.records import ImageRecord
from ..networks import backbone_fingerprints, features_of
from ..storage import fingerprint_of, paths
from .batches import Batch, to_device
from .image_feed import HELD_OUT_BATCH, PlannedBatch, image_batches, image_feed, step_parts
from .job import Feed, TrainingError
from .run_log import say

PART_IMAGES = 8 * HELD_OUT_BATCH
"""Images of one file of the cache."""
MANIFEST = "manifest.json"
Error = dict[str, str]


@dataclass(frozen=True)
class FeatureCache:
    """Crops and features of `num_images` images in files of PART_IMAGES each.

    `errors` are the images that cannot be decoded, by their number.
    """

    folder: Path
    num_images: int
    errors: dict[int, Error]

    def features(self, limit: int) -> Iterator[np.ndarray]:
        """The features float32 [n, N, D] of the first `limit` images, without bad ones."""
        for first in range(0, min(limit, self.num_images), HELD_OUT_BATCH):
            items = range(first, min(first + HELD_OUT_BATCH, limit, self.num_images))
            rows = [self._row(item, "features") for item in items if item not in self.errors]
            if rows:
                yield torch.stack(rows).numpy()

    def batch(self, part: PlannedBatch, keys: Sequence[str], seed: int, flip: bool) -> Batch:
        """`images` and `features` of a planned micro-batch, mirrored as `random_flips` does it."""
        kept = [i for i, item in enumerate(part.items) if item not in self.errors]
        samples = [part.samples[i] for i in kept] or part.samples[:1]
        draws = uniform_draws(seed, "flip", part.step, samples)
        images, features = [], []
        for i, draw in zip(kept or [0], draws, strict=True):
            mirrored = flip and bool(draw < 0.5)
            crop = self._row(part.items[i], "images")
            images.append(crop.flip(1) if mirrored else crop)
            name = "features_flip" if mirrored else "features"
            features.append(self._row(part.items[i], name))
        tensors = {"images": torch.stack(images), "features": torch.stack(features)}
        errors = [self.errors[item] for item in part.items if item in self.errors]
        weight = part.weight * len(kept) / len(part.items)
        return Batch(part.step, tensors, samples, [keys[i] for i in kept], weight, errors)

    def _row(self, item: int, name: str) -> Tensor:
        part, row = divmod(item, PART_IMAGES)
        with safe_open(str(self.folder / _part_name(part)), framework="pt") as file:
            tensor: Tensor = file.get_slice(name)[row]
        return tensor


@dataclass(frozen=True)
class TrainingFeatures:
    """A worker's feed, and (number of images) -> the features of the first of them in batches."""

    feed: Feed
    first: Callable[[int], Iterator[np.ndarray]]


def training_features(
    recipe: Recipe,
    section: AutoencoderSection | PixelDecoderSection,
    records: Sequence[ImageRecord],
    backbone: Backbone,
) -> TrainingFeatures:
    """What trains the network of `section` on `records`, from a cache where the recipe has one.

    All workers call it: the first of each host writes the cache. Raises TrainingError.
    """
    data, size, training = recipe.data, recipe.image_size, section.training
    if data.feature_cache is None:
        return TrainingFeatures(
            image_feed(records, data, size, recipe.seed, training),
            lambda limit: computed_features(
                records[:limit], data, size, backbone, training.precision
            ),
        )
    from ray.train import get_context
    from ray.train.collective import barrier

    folder = cache_folder(recipe, records, backbone, training.precision, section.flip)
    if get_context().get_local_rank() == 0:
        write_cache(folder, recipe, records, backbone, training.precision, section.flip)
    barrier()
    cache = open_cache(folder, len(records))
    feed = cached_feed(cache, records, recipe.seed, training, section.flip)
    return TrainingFeatures(feed, cache.features)


def computed_features(
    records: Sequence[ImageRecord], data: DataSection, size: int, backbone: Backbone, precision: str
) -> Iterator[np.ndarray]:
    """Features float32 [n, N, D] of the records in batches, computed in `precision`."""
    for images in image_batches(records, data, size):
        crops = torch.from_numpy(images).to(backbone.mean.device)
        yield features_of(backbone, crops, precision).cpu().numpy()


def cache_folder(
    recipe: Recipe,
    records: Sequence[ImageRecord],
    backbone: Backbone,
    precision: str,
    flip: bool,
) -> Path:
    """The folder under `data.feature_cache` of all that decides the features of `records`.

    Raises TrainingError where they would take more than `data.feature_cache_gib`, and for an
    address that is no local folder.
    """
    root = str(recipe.data.feature_cache)
    if paths.is_remote(root):
        raise TrainingError(f"data.feature_cache={root}: give a local folder.")
    _check_size(recipe, len(records), backbone, flip)
    keys = json.dumps([[record.key, record.uri] for record in records])
    decides = {
        **backbone_fingerprints(recipe, backbone),
        "records": hashlib.sha256(keys.encode()).hexdigest(),
        "decoder": recipe.data.decoder,
        "color_profile": recipe.data.color_profile,
        "max_pixels": recipe.data.max_pixels,
        "precision": precision,
        "flip": flip,
    }
    return Path(root) / fingerprint_of(decides)[:16]


def cached_feed(
    cache: FeatureCache,
    records: Sequence[ImageRecord],
    seed: int,
    training: TrainingSection,
    flip: bool,
) -> Feed:
    """The feed of `image_feed` with features: the same images in the same steps, mirrored alike."""
    order = EpochOrder(len(records), seed)

    def batches(start_step: int, rank: int, world_size: int) -> Iterator[Batch]:
        for step in range(start_step, training.steps):
            for part in step_parts(order, training, step, rank, world_size):
                yield cache.batch(part, [records[i].key for i in part.items], seed, flip)

    def feed(start_step: int, rank: int, world_size: int, device: torch.device) -> Iterator[Batch]:
        return to_device(batches(start_step, rank, world_size), device)

    return feed


def _check_size(recipe: Recipe, num_images: int, backbone: Backbone, flip: bool) -> None:
    numbers = backbone.grid[0] * backbone.grid[1] * backbone.dim * (2 if flip else 1)
    size = num_images * (4 * numbers + 3 * recipe.image_size**2) / 2**30
    if size > recipe.data.feature_cache_gib:
        raise TrainingError(
            f"data.feature_cache would hold {size:.1f} GiB for {num_images} images, above "
            f"data.feature_cache_gib={recipe.data.feature_cache_gib:g}. Train without it, or raise "
            "the limit where the disk has room."
        )


def _part_name(part: int) -> str:
    return f"part_{part:05d}.safetensors"


def write_cache(
    folder: Path,
    recipe: Recipe,
    records: Sequence[ImageRecord],
    backbone: Backbone,
    precision: str,
    flip: bool,
) -> None:
    """Write the parts that `folder` lacks, then the manifest with the hashes of all."""
    if (folder / MANIFEST).exists():
        return
    say(f"feature cache of {len(records)} images in {folder}")
    starts = range(0, len(records), PART_IMAGES)
    missing = [i for i in starts if not (folder / _part_name(i // PART_IMAGES)).exists()]
    batches = [
        records[j : min(j + HELD_OUT_BATCH, i + PART_IMAGES)]
        for i in missing
        for j in range(i, min(i + PART_IMAGES, len(records)), HELD_OUT_BATCH)
    ]
    made = decoded(batches, recipe.data, recipe.image_size)
    for start in missing:
        count = min(PART_IMAGES, len(records) - start)
        crops = np.zeros((count, recipe.image_size, recipe.image_size, 3), np.uint8)
        errors: dict[int, Error] = {}
        features: dict[str, list[Tensor]] = {"features": []}
        if flip:
            features["features_flip"] = []
        for first in range(0, count, HELD_OUT_BATCH):
            images, kept, failed = next(made)
            size = min(HELD_OUT_BATCH, count - first)
            crops[first + np.array(kept, int)] = images
            bad = [start + first + i for i in range(size) if i not in kept]
            errors |= dict(zip(bad, failed, strict=True))
            batch = torch.from_numpy(crops[first : first + size]).to(backbone.mean.device)
            features["features"].append(features_of(backbone, batch, precision).cpu())
            if flip:
                mirrored = features_of(backbone, batch.flip(2), precision).cpu()
                features["features_flip"].append(mirrored)
        tensors = {name: torch.cat(parts) for name, parts in features.items()}
        tensors["images"] = torch.from_numpy(crops)
        content = save(tensors, {"errors": json.dumps(errors)})
        paths.write_bytes(str(folder / _part_name(start // PART_IMAGES)), content)
        say(f"features of {start + count} of {len(records)} images")
    files = sorted(folder.glob("part_*.safetensors"))
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    paths.write_bytes(str(folder / MANIFEST), json.dumps(hashes, indent=1).encode())


def open_cache(folder: Path, num_images: int) -> FeatureCache:
    """The cache in `folder`, each file read and compared with its hash.

    Raises TrainingError for a damaged one.
    """
    try:
        hashes = json.loads((folder / MANIFEST).read_bytes())
        errors: dict[int, Error] = {}
        for name, expected in hashes.items():
            file = folder / name
            if hashlib.sha256(file.read_bytes()).hexdigest() != expected:
                raise ValueError(f"{file} has changed since it was written")
            with safe_open(str(file), framework="pt") as opened:
                found = json.loads(opened.metadata()["errors"])
            errors |= {int(item): error for item, error in found.items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(
            f"The feature cache {folder} is damaged: {error}. Delete that folder; it is computed "
            "again."
        ) from None
    return FeatureCache(folder, num_images, errors)
