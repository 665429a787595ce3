"""The part of `fae probe` that runs on many machines: what the probes need of each image.

decode (CPU tasks) -> backbone, autoencoder, pooling and comparison of patches (actor pool), by Ray
Data. Patch tokens stay in the actors; one pooled vector of each kind leaves them for each image, so
25,000 images are some hundred MB.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from fae_core.metrics.probes import (
    match_patches,
    object_patches,
    similarity_correlation,
    within_one_patch,
)
from fae_core.precision import autocast

from ..config import Recipe
from ..config.sections import ProbeSection
from ..data.records import ImageRecord
from ..latents import LatentEncoder
from ..networks import features_of
from ..runtime.actor_pool import RowStages, run_rows
from ..runtime.progress import Progress
from .errors import ProbeError
from .tasks import decode_batch

KINDS = ("true", "reconstructed", "latent")
"""Kinds of tokens: the backbone's features, the autoencoder's reconstruction of them, latents."""
Pair = tuple[ImageRecord, ImageRecord]


@dataclass(frozen=True)
class Probed:
    """What the actors found out about one image."""

    pooled: dict[str, np.ndarray]
    """One vector for each of KINDS: [D], [D], [C]."""
    similarity: float
    """Correlation of the patches' cosine matrices of latents and features."""
    matches: tuple[int, int]
    """Of a pair's first image: the patches of its object whose match by latents is within one
    patch of the match by features, and all of them. (0, 0) for other images."""


def extract(
    recipe: Recipe,
    images: Sequence[ImageRecord],
    pairs: Sequence[Pair],
    weights: dict[str, str],
    show_progress: bool,
) -> dict[str, Probed]:
    """What the actors found out about `images`, by key, without those that cannot be decoded.

    `images` contain those of `pairs`. `weights` are the "backbone weights" and "autoencoder
    weights" of the driver; an actor with others raises CheckpointError. Raises ProbeError where
    more images fail than the recipe allows, and for features that are not finite.
    """
    options = recipe.probe
    rows = batches_of(images, pairs, options.batch_size)
    decode = partial(decode_batch, data=recipe.data, image_size=recipe.image_size)
    stages = RowStages(ProbeImages, (recipe, weights), prepare=decode)
    found: dict[str, Probed] = {}
    errors: list[dict[str, str]] = []
    with (
        Progress(len(rows), len(images), show_progress) as progress,
        closing(run_rows(rows, stages, options)) as finished,
    ):
        for row in finished:
            keys, failed = json.loads(str(row["keys"])), json.loads(str(row["errors"]))
            for index, key in enumerate(keys):
                pooled = {kind: np.asarray(row[kind][index]) for kind in KINDS}
                if not all(np.isfinite(vector).all() for vector in pooled.values()):
                    raise ProbeError(f"Features of {key!r} are not finite. Check the checkpoint.")
                right, total = row["matches"][index]
                found[key] = Probed(
                    pooled, float(row["similarity"][index]), (int(right), int(total))
                )
            errors += failed
            progress.add(len(keys), len(failed), float(row["probed_at"]))
            if len(errors) > options.max_error_rate * len(images):
                first = "\n".join(
                    f"  {e['key']} [{e['stage']}] {e['message']}" for e in errors[:10]
                )
                raise ProbeError(
                    f"{len(errors)} of {len(images)} images could not be decoded, more than "
                    f"probe.max_error_rate={options.max_error_rate:g} allows. The first:\n{first}"
                )
        progress.close()
    return found


@dataclass
class Networks:
    """Backbone and autoencoder on one device: from images to the three kinds of patch tokens."""

    encoder: LatentEncoder

    @classmethod
    def of(cls, recipe: Recipe, encoder: LatentEncoder | None = None) -> Networks:
        """The networks of `encoder`, else those that the recipe names.

        Raises CheckpointError where the autoencoder belongs to another backbone.
        """
        encoder = encoder or LatentEncoder.of(recipe)
        return cls(dataclasses.replace(encoder, precision=recipe.probe.precision))

    @property
    def grid(self) -> tuple[int, int]:
        return self.encoder.backbone.grid

    @torch.inference_mode()
    def tokens(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Patch tokens float32 by kind, of uint8 crops [n, S, S, 3].

        True and reconstructed tokens are [n, N, D]; latents are the posterior's mean [n, N, C].
        """
        encoder = self.encoder
        if not len(images):
            dims = (
                encoder.backbone.dim,
                encoder.backbone.dim,
                encoder.autoencoder.config.latent_dim,
            )
            shapes = [(0, self.grid[0] * self.grid[1], dim) for dim in dims]
            return {k: np.zeros(s, np.float32) for k, s in zip(KINDS, shapes, strict=True)}
        (batch,) = encoder.micro_batches(images, len(images))
        features = features_of(encoder.backbone, batch, encoder.precision)
        with autocast(encoder.precision, encoder.device):
            latents = encoder.autoencoder.encode(features).mode()
            rebuilt = encoder.autoencoder.decode(latents)
        found = dict(zip(KINDS, (features, rebuilt, latents), strict=True))
        return {kind: value.float().cpu().numpy() for kind, value in found.items()}


def batches_of(
    images: Sequence[ImageRecord], pairs: Sequence[Pair], size: int
) -> list[dict[str, Any]]:
    """Rows {records (JSON), paired} of at most `size` images. The pairs come first, none cut."""
    paired = [record for pair in pairs for record in pair]
    keys = {record.key for record in paired}
    rest = [record for record in images if record.key not in keys]
    even = size - size % 2
    return [
        {
            "records": json.dumps([dataclasses.astuple(r) for r in some[i : i + step]]),
            "paired": both,
        }
        for some, step, both in ((paired, even, True), (rest, size, False))
        for i in range(0, len(some), step)
    ]


class ProbeImages:
    """The actor of `extract`: it loads the networks once, on its GPU or its node's CPU."""

    def __init__(self, recipe: Recipe, weights: dict[str, str]) -> None:
        self.options, self.seed = recipe.probe, recipe.seed
        encoder = LatentEncoder.for_actor(recipe, recipe.probe.gpus_per_actor, weights)
        self.networks = Networks.of(recipe, encoder)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        images = np.asarray(batch["images"][0])
        tokens = self.networks.tokens(images)
        matches = np.zeros((len(images), 2), np.int64)
        for first, second in json.loads(str(batch["pairs"][0])):
            matches[first] = _matches(
                tokens, first, second, self.networks.grid, self.options, self.seed
            )
        pool = np.max if self.options.pooling == "max" else np.mean
        return {
            "keys": batch["keys"],
            "errors": batch["errors"],
            "probed_at": [time.time()],
            "similarity": [similarity_correlation(tokens["latent"], tokens["true"])],
            "matches": [matches],
            **{kind: [pool(value, axis=1)] for kind, value in tokens.items()},
        }


def _matches(
    tokens: dict[str, np.ndarray],
    first: int,
    second: int,
    grid: tuple[int, int],
    options: ProbeSection,
    seed: int,
) -> tuple[int, int]:
    """Patches of the first image's object whose match in the second image by latents is within one
    patch of their match by features, and the number of all patches of the object."""
    latents = tokens["latent"]
    patches = object_patches(latents[first], grid, options.num_clusters, seed)
    ours = match_patches(latents[first][patches], latents[second])
    theirs = match_patches(tokens["true"][first][patches], tokens["true"][second])
    return int(within_one_patch(ours, theirs, grid).sum()), len(patches)
