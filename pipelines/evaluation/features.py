"""Features of sets of images, computed by Ray Data and summarized: the input of every score.

One row is one chunk of images: decode and crop (CPU tasks) -> networks (actor pool) -> float64
moments, sums of the Inception Score and, where a score needs them, the features themselves. Chunks
are merged in their order, so the result has the same bits for any number of actors.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fae_core.checkpoint import CheckpointError
from fae_core.losses import lpips_distance
from fae_core.machine import num_cpus
from fae_core.metrics.frechet import Moments
from fae_core.metrics.inception import SplitSums, split_numbers
from fae_core.metrics.reconstruction import psnr, ssim
from fae_core.pixel_decoder import from_uint8

from ..config import Recipe
from ..config.sections import BackboneSection, EvaluateSection
from ..runtime.actor_pool import RowStages, run_rows
from ..runtime.progress import Progress
from .errors import EvaluationError
from .extractor import Extractor
from .image_sets import ImageSet
from .tasks import decode_chunk

PAIR_SCORES = ("psnr", "ssim", "lpips")

Row = dict[str, Any]


@dataclass(frozen=True)
class Needs:
    """What the scores need of a set; features are named inception, spatial and backbone."""

    moments: tuple[str, ...] = ()
    """Features whose mean and covariance are computed."""
    gather: str | None = None
    """Features that are kept for each image, None for none."""
    splits: bool = False
    """Whether the sums of the Inception Score's splits are computed."""

    @property
    def networks(self) -> set[str]:
        """The networks that compute all this: inception, backbone, both or none."""
        names = {*self.moments, *([self.gather] if self.gather else [])}
        inception = self.splits or bool(names & {"inception", "spatial"})
        return ({"inception"} if inception else set()) | (names & {"backbone"})


@dataclass
class Summary:
    """What `Needs` asks for, of a whole set."""

    count: int = 0
    """Images that were decoded."""
    moments: dict[str, Moments] = field(default_factory=dict)
    features: list[np.ndarray] = field(default_factory=list)
    """Gathered features, one float32 array [n, D] for each chunk."""
    splits: SplitSums | None = None
    content_sha256: str = ""
    """SHA-256 over the SHA-256 of each crop in order: identifies the pixels that were compared."""
    images_per_second: float = 0.0


def summarize(
    sets: Mapping[str, tuple[ImageSet, Needs]],
    recipe: Recipe,
    fingerprints: dict[str, str],
    show_progress: bool,
) -> Iterator[tuple[str, Summary]]:
    """(role, summary) of each of `sets` in turn, when its last chunk is done.

    One pool of actors serves all sets. `fingerprints` are those of the networks on the driver; an
    actor with other weights raises CheckpointError. Raises EvaluationError where more images of a
    set than the recipe allows cannot be decoded, or none can.
    """
    options = recipe.evaluate
    size = options.chunk_size
    pieces = {role: list(images.pieces(size)) for role, (images, _) in sets.items()}
    rows = [
        {"role": role, "chunk": i, "start": i * size, "images": json.dumps(piece)}
        for role, of_set in pieces.items()
        for i, piece in enumerate(of_set)
    ]
    shapes = {role: (needs, len(images.keys)) for role, (images, needs) in sets.items()}
    arguments = (options, recipe.backbone, shapes, fingerprints)
    with closing(_run(rows, SummarizeChunks, arguments, recipe)) as finished:
        for role, (images, needs) in sets.items():
            if show_progress:
                count = f"{len(images.keys)} images of {images.uri}"
                print(f"{role}: {count}", file=sys.stderr, flush=True)
            of_set = islice(finished, len(pieces[role]))
            with Progress(len(pieces[role]), len(images.keys), show_progress) as progress:
                summary = _summary(images, needs, of_set, options.max_error_rate, progress)
            yield role, summary


def _summary(
    images: ImageSet, needs: Needs, rows: Iterable[Row], max_error_rate: float, progress: Progress
) -> Summary:
    """The summary of a set of which `rows` are the chunks, in order."""
    whole, contents = Summary(), hashlib.sha256()
    errors: list[dict[str, str]] = []
    for row in rows:
        found = json.loads(str(row["errors"]))
        errors += found
        check_errors(images, errors, max_error_rate)
        contents.update(row["digests"])
        progress.add(int(row["rows"]), len(found), float(row["done_at"]))
        if row["rows"]:
            _merge(whole, row, needs)
    if not whole.count:
        raise EvaluationError(f"None of the {len(images.keys)} images of {images.uri} is readable.")
    whole.images_per_second = progress.close()["images_per_second"]
    whole.content_sha256 = contents.hexdigest()
    return whole


def compare_pairs(
    images: ImageSet, reference: ImageSet, scores: set[str], recipe: Recipe, show_progress: bool
) -> tuple[dict[str, float], int]:
    """Those of psnr [dB], ssim and lpips in `scores`: means over pairs of image and original.

    The second value is the number of pairs. The two sets have equal keys in equal order. Raises
    EvaluationError where more images of a set than the recipe allows cannot be decoded, or no pair.
    """
    size = recipe.evaluate.chunk_size
    pairs = zip(images.pieces(size), reference.pieces(size), strict=True)
    rows = [
        {"chunk": i, "start": i * size, "images": json.dumps(a), "originals": json.dumps(b)}
        for i, (a, b) in enumerate(pairs)
    ]
    sums = dict.fromkeys((name for name in PAIR_SCORES if name in scores), 0.0)
    count = 0
    errors: tuple[list[dict[str, str]], ...] = ([], [])
    with (
        Progress(len(rows), len(images.keys), show_progress) as progress,
        closing(_run(rows, ComparePairs, (recipe.evaluate, list(sums)), recipe)) as finished,
    ):
        for row in finished:
            failed = [json.loads(str(row[name])) for name in ("errors", "original_errors")]
            for side, so_far, some in zip((images, reference), errors, failed, strict=True):
                so_far += some
                check_errors(side, so_far, recipe.evaluate.max_error_rate)
            progress.add(int(row["rows"]), sum(map(len, failed)), float(row["done_at"]))
            count += int(row["rows"])
            for name in sums:
                sums[name] += float(row[name])
        progress.close()
    if not count:
        raise EvaluationError(f"No pair of {images.uri} and {reference.uri} could be decoded.")
    return {name: total / count for name, total in sums.items()}, count


def _run(
    rows: list[Row], actor: type, arguments: tuple[Any, ...], recipe: Recipe
) -> Generator[Row, None, None]:
    """The rows of the finished chunks, in order."""
    decode = partial(decode_chunk, data=recipe.data, image_size=recipe.image_size)
    stages = RowStages(actor, arguments, prepare=decode)
    return run_rows(rows, stages, recipe.evaluate, keep_order=True)


class SummarizeChunks:
    """The actor of `summarize`: it loads the networks once, on its GPU or its node's CPU.

    `sets` are what each set needs and how many images it has, by role. It makes one row of each
    chunk: rows (images decoded), errors, digests (SHA-256 of each crop), and what its set needs.
    Raises CheckpointError where its weights are not the driver's.
    """

    def __init__(
        self,
        options: EvaluateSection,
        backbone: BackboneSection,
        sets: dict[str, tuple[Needs, int]],
        fingerprints: dict[str, str],
    ) -> None:
        self.options = options
        self.needs = {role: needs for role, (needs, _) in sets.items()}
        self.splits = {
            role: split_numbers(num_images, options.inception_splits, options.seed)
            for role, (_, num_images) in sets.items()
        }
        networks = {name for needs in self.needs.values() for name in needs.networks}
        self.extract = Extractor(options, backbone, networks, device_of(options))
        for name, value in self.extract.fingerprints.items():
            if fingerprints[name] != value:
                raise CheckpointError(
                    f"The weights of {name} on this node are not those that the job started with."
                )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        role = str(batch["role"][0])
        needs = self.needs[role]
        images, kept = np.asarray(batch["images"][0]), np.asarray(batch["kept"][0], dtype=np.int64)
        row: dict[str, Any] = {
            "rows": [len(images)],
            "errors": batch["errors"],
            "digests": [b"".join(hashlib.sha256(image.tobytes()).digest() for image in images)],
        }
        features = self.extract(images, needs.networks)
        for name, values in features.items():
            if not np.isfinite(values).all():
                raise EvaluationError(f"The features {name} are not finite. Check the weights.")
        for name in needs.moments if len(images) else ():
            moments = Moments.of(features[name])
            row |= {f"{name}_mean": [moments.mean], f"{name}_scatter": [moments.scatter]}
        if needs.gather and len(images):
            row["features"] = [features[needs.gather]]
        if needs.splits and len(images):
            numbers = self.splits[role][int(batch["start"][0]) + kept]
            sums = SplitSums.of(features["logits"], numbers, self.options.inception_splits)
            row |= {f"split_{name}": [value] for name, value in vars(sums).items()}
        return {**row, "done_at": [time.time()]}


class ComparePairs:
    """The actor of `compare_pairs`: sums of `scores` over the pairs of a chunk."""

    def __init__(self, options: EvaluateSection, scores: list[str]) -> None:
        self.size, self.device = options.batch_size, torch.device(device_of(options))
        measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}
        if "lpips" in scores:
            lpips = lpips_distance().to(self.device)
            measures["lpips"] = lambda x, y: lpips(x * 2 - 1, y * 2 - 1)
        self.measures = {name: measures[name] for name in scores}

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        images, originals = (np.asarray(batch[name][0]) for name in ("images", "originals"))
        sums = dict.fromkeys(self.measures, 0.0)
        for start in range(0, len(images), self.size):
            x, y = (
                from_uint8(torch.from_numpy(part[start : start + self.size].copy())).to(self.device)
                for part in (images, originals)
            )
            for name, measure in self.measures.items():
                sums[name] += float(measure(x, y).double().sum())
        return {
            "rows": [len(images)],
            "errors": batch["errors"],
            "original_errors": batch["original_errors"],
            "done_at": [time.time()],
            **{name: [value] for name, value in sums.items()},
        }


def device_of(options: EvaluateSection) -> str:
    """The device of this actor; on a CPU, torch may use all cores of the node."""
    if options.gpus_per_actor > 0:
        return "cuda"
    torch.set_num_threads(num_cpus())
    return "cpu"


def _merge(whole: Summary, row: Row, needs: Needs) -> None:
    """Add the row of a chunk to the summary."""
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


def check_errors(images: ImageSet, errors: list[dict[str, str]], allowed: float) -> None:
    """Raises EvaluationError where more of the images could not be decoded than is allowed."""
    if len(errors) <= allowed * len(images.keys):
        return
    first = "\n".join(f"  {e['key']} [{e['stage']}] {e['message']}" for e in errors[:10])
    raise EvaluationError(
        f"{len(errors)} of {len(images.keys)} images of {images.uri} could not be decoded, more "
        f"than evaluate.max_error_rate={allowed:g} allows. The first:\n{first}"
    )
