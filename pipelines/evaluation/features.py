"""Features of a set of images by Ray Data actors, summarized on the way: what `fae evaluate` makes its scores from.

One row is one chunk: decode and crop (CPU tasks) -> networks (actor pool) -> float64 moments, sums of the Inception Score,
and the features themselves only where a score needs them. Chunks come back and are merged in their order, so the result
has the same bits for any number of actors.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fae_core.backbone import Backbone
from fae_core.checkpoint import CheckpointError
from fae_core.losses import lpips_distance
from fae_core.metrics.frechet import Moments
from fae_core.metrics.inception import Inception, SplitSums, load_inception, split_numbers
from fae_core.metrics.reconstruction import psnr, ssim
from fae_core.pixel_decoder import from_uint8

from ..config import Recipe, RecipeError
from ..networks import backbone_of
from ..runtime import Progress, RowStages, run_rows
from ..storage import paths
from .image_sets import EvaluationError, ImageSet
from .tasks import decode_chunk

PAIR_SCORES = ("psnr", "ssim", "lpips")


@dataclass(frozen=True)
class Needs:
    """What is made of a set: moments and gathered features by name (inception, spatial, backbone), score splits."""

    moments: tuple[str, ...] = ()
    gather: str | None = None
    splits: bool = False

    @property
    def networks(self) -> set[str]:
        """Of inception and backbone, those that it takes."""
        names = {*self.moments, *([self.gather] if self.gather else [])}
        inception = self.splits or bool(names & {"inception", "spatial"})
        return ({"inception"} if inception else set()) | (names & {"backbone"})


@dataclass
class Summary:
    """A set, or a chunk of it, in features."""

    count: int = 0
    moments: dict[str, Moments] = field(default_factory=dict)
    features: list[np.ndarray] = field(default_factory=list)
    splits: SplitSums | None = None
    content_sha256: str = ""
    """Over the SHA-256 of each crop in order: what was compared, wherever it lay."""
    images_per_second: float = 0.0


class Extractor:
    """The networks on one device, and what identifies them."""

    def __init__(self, recipe: Recipe, networks: set[str], device: str = "cpu") -> None:
        self.recipe, self.device = recipe, torch.device(device)
        self.backbone: Backbone | None = None
        self.inception: Inception | None = None
        self.fingerprints: dict[str, str] = {}
        if "backbone" in networks:
            self.backbone = backbone_of(recipe).to(self.device)
            section, token = recipe.backbone, recipe.evaluate.backbone_token
            if token == "class" and getattr(self.backbone.model, "cls_token", None) is None:
                raise RecipeError(
                    f"{section.name} has no class token. Set evaluate.backbone_token=mean."
                )
            size = self.backbone.spec.image_size
            self.fingerprints["backbone"] = (
                f"{section.name}@{size} {token} {self.backbone.weights_sha256}"
            )
        if "inception" in networks:
            self.inception = inception_of(recipe).to(self.device)
            self.fingerprints["inception"] = self.inception.weights_sha256

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Features float32 [n, D] by name of uint8 crops [n, S, S, 3]: backbone; inception, spatial, logits."""
        size = self.recipe.evaluate.batch_size
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, len(images), size):
            # A copy, because arrays from Ray's object store are read-only and torch has no such tensor.
            batch = torch.from_numpy(images[start : start + size].copy()).to(self.device)
            features: dict[str, Tensor] = {}
            if self.backbone is not None:
                patches, token = self.backbone.tokens(batch)
                if self.recipe.evaluate.backbone_token == "mean" or token is None:
                    token = patches.mean(dim=1)
                features["backbone"] = token
            if self.inception is not None:
                features |= self.inception(batch)
            for name, values in features.items():
                parts.setdefault(name, []).append(values.float().cpu())
        return {name: torch.cat(values).numpy() for name, values in parts.items()}


def inception_of(recipe: Recipe) -> Inception:
    """Inception with the recipe's weights, the environment's, or the download. Raises WeightsError."""
    uri = recipe.evaluate.inception_weights or os.environ.get("FAE_INCEPTION_WEIGHTS")
    if uri is None or not paths.is_s3(uri):
        return load_inception(None if uri is None else Path(uri).expanduser())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / uri.rpartition("/")[2]
        path.write_bytes(paths.read_bytes(uri))
        return load_inception(path)


def summarize(
    images: ImageSet,
    needs: Needs,
    recipe: Recipe,
    fingerprints: dict[str, str],
    show_progress: bool,
) -> Summary:
    """The whole set in features. Raises EvaluationError where too many images cannot be decoded."""
    options = recipe.evaluate
    pieces = images.pieces(options.chunk_size)
    rows = [
        {"chunk": i, "start": i * options.chunk_size, "images": json.dumps(piece)}
        for i, piece in enumerate(pieces)
    ]
    arguments = (recipe, needs, len(images.keys), fingerprints)
    progress = Progress(len(rows), len(images.keys), show_progress)
    whole, contents = Summary(), hashlib.sha256()
    errors: list[dict[str, str]] = []
    for row in _run(rows, SummarizeChunks, arguments, recipe):
        found = json.loads(str(row["errors"]))
        errors += found
        _check_errors(images, errors, options.max_error_rate)
        contents.update(row["digests"])
        progress.add(int(row["rows"]), len(found), float(row["done_at"]))
        if row["rows"]:
            _merge(whole, row, needs)
    whole.images_per_second = progress.close()["images_per_second"]
    whole.content_sha256 = contents.hexdigest()
    return whole


def compare_pairs(
    images: ImageSet, reference: ImageSet, scores: set[str], recipe: Recipe, show_progress: bool
) -> dict[str, float]:
    """Mean PSNR, SSIM and LPIPS (those of `scores`) of images against the originals of the same key."""
    size = recipe.evaluate.chunk_size
    pairs = zip(images.pieces(size), reference.pieces(size), strict=True)
    rows = [
        {"chunk": i, "start": i * size, "images": json.dumps(a), "originals": json.dumps(b)}
        for i, (a, b) in enumerate(pairs)
    ]
    progress = Progress(len(rows), len(images.keys), show_progress)
    sums = dict.fromkeys((name for name in PAIR_SCORES if name in scores), 0.0)
    count = 0
    for row in _run(rows, ComparePairs, (recipe, list(sums)), recipe):
        progress.add(int(row["rows"]), 0, float(row["done_at"]))
        count += int(row["rows"])
        for name in sums:
            sums[name] += float(row[name])
    progress.close()
    if not count:
        raise EvaluationError("None of the pairs could be decoded.")
    return {name: total / count for name, total in sums.items()}


def _run(
    rows: list[dict[str, Any]], actor: type, arguments: tuple[Any, ...], recipe: Recipe
) -> Iterator[dict[str, Any]]:
    """The rows of the finished chunks, in order."""
    stages = RowStages(actor, arguments, prepare=partial(decode_chunk, recipe=recipe))
    return run_rows(rows, stages, recipe.evaluate, keep_order=True)


class SummarizeChunks:
    """The actor: one accelerator (or the CPU) each, networks loaded once."""

    def __init__(
        self, recipe: Recipe, needs: Needs, num_images: int, fingerprints: dict[str, str]
    ) -> None:
        self.needs, self.options = needs, recipe.evaluate
        self.extract = Extractor(recipe, needs.networks, _device(recipe))
        for name, value in self.extract.fingerprints.items():
            if fingerprints[name] != value:
                raise CheckpointError(
                    f"The weights of {name} on this node are not those that the job began with."
                )
        self.splits = split_numbers(num_images, self.options.inception_splits, self.options.seed)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        images, kept = np.asarray(batch["images"][0]), np.asarray(batch["kept"][0], dtype=np.int64)
        row: dict[str, Any] = {
            "rows": [len(images)],
            "errors": batch["errors"],
            "digests": [b"".join(hashlib.sha256(image.tobytes()).digest() for image in images)],
        }
        features = self.extract(images)
        for name in self.needs.moments if len(images) else ():
            moments = Moments.of(features[name])
            row |= {f"{name}_mean": [moments.mean], f"{name}_scatter": [moments.scatter]}
        if self.needs.gather and len(images):
            row["features"] = [features[self.needs.gather]]
        if self.needs.splits and len(images):
            numbers = self.splits[int(batch["start"][0]) + kept]
            sums = SplitSums.of(features["logits"], numbers, self.options.inception_splits)
            row |= {f"split_{name}": [value] for name, value in vars(sums).items()}
        return {**row, "done_at": [time.time()]}


class ComparePairs:
    """The actor of the paired scores."""

    def __init__(self, recipe: Recipe, scores: list[str]) -> None:
        self.size, self.scores, self.device = recipe.evaluate.batch_size, scores, _device(recipe)
        self.lpips = lpips_distance().to(self.device) if "lpips" in scores else None

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        images, originals = (np.asarray(batch[name][0]) for name in ("images", "originals"))
        sums = dict.fromkeys(self.scores, 0.0)
        for start in range(0, len(images), self.size):
            x, y = (
                from_uint8(torch.from_numpy(part[start : start + self.size].copy())).to(self.device)
                for part in (images, originals)
            )
            values = {"psnr": psnr, "ssim": ssim}
            for name in self.scores:
                if name == "lpips":
                    assert self.lpips is not None
                    distances = self.lpips(x * 2 - 1, y * 2 - 1)
                else:
                    distances = values[name](x, y)
                sums[name] += float(distances.double().sum())
        return {
            "rows": [len(images)],
            "done_at": [time.time()],
            **{name: [value] for name, value in sums.items()},
        }


def _device(recipe: Recipe) -> str:
    if recipe.evaluate.gpus_per_actor > 0:
        return "cuda"
    torch.set_num_threads(os.cpu_count() or 1)
    return "cpu"


def _merge(whole: Summary, row: dict[str, Any], needs: Needs) -> None:
    count = int(row["rows"])
    whole.count += count
    for name in needs.moments:
        moments = Moments(
            count, np.asarray(row[f"{name}_mean"]), np.asarray(row[f"{name}_scatter"])
        )
        if name in whole.moments:
            whole.moments[name].merge(moments)
        else:
            whole.moments[name] = moments
    if needs.gather:
        whole.features.append(np.array(row["features"], dtype=np.float32))
    if needs.splits:
        names = ("counts", "probabilities", "negentropies")
        sums = SplitSums(*(np.array(row[f"split_{name}"]) for name in names))
        if whole.splits is None:
            whole.splits = sums
        else:
            whole.splits.merge(sums)


def _check_errors(images: ImageSet, errors: list[dict[str, str]], allowed: float) -> None:
    if len(errors) <= allowed * len(images.keys):
        return
    first = "\n".join(f"  {e['key']} [{e['stage']}] {e['message']}" for e in errors[:10])
    raise EvaluationError(
        f"{len(errors)} of {len(images.keys)} images of {images.uri} could not be decoded, more than "
        f"evaluate.max_error_rate={allowed:g} allows. The first:\n{first}"
    )
