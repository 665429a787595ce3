"""`fae evaluate`: scores of a set of images against a reference, by Ray Data.

Generation scores compare two sets: Fréchet distances (of the backbone, FID, sFID), precision and
recall, and KID; the Inception Score needs no reference, nor do the scores of images and their
captions. Reconstruction scores compare each image with its own original and refuse a reference
without it (`comparison.py`). scores.json records what was compared; the same command again returns
its scores.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fae_core.metrics.frechet import frechet_distance
from fae_core.metrics.manifold import kernel_distance, precision_recall

from ..config import Recipe, with_absolute_paths
from ..config.facts import deciding_values
from ..config.sections import EvaluateSection
from ..data.crops import crop_version
from ..runtime.packages import versions
from ..runtime.places import check_places
from ..runtime.session import start_ray
from ..storage import differences, paths, refuse_other_work
from .comparison import FRECHET, PAIRED, check_made_with, needs_of, open_sets
from .errors import EvaluationError, ScoresMismatch
from .extractor import Extractor
from .features import Needs, Summary, compare_pairs, summarize
from .image_sets import ImageSet
from .npz_files import read_statistics, write_statistics
from .scores_page import scores_page
from .text_scores import CAPTIONED, check_captions, score_captions

FORMAT = "fae-scores-1"


def evaluate(recipe: Recipe, show_progress: bool = True) -> dict[str, float]:
    """Scores of `evaluate.images` against `evaluate.reference`, by name.

    Names are frechet_backbone, fid, sfid, inception_score, precision, recall, kid, rfid, psnr [dB],
    ssim, lpips, clip_score, image_to_text and text_to_image (with true_ and rebuilt_ before them
    for retrieval_rebuilt), as the recipe asks, and the counts num_images and num_reference; the
    latter is left out where the reference's file does not record it. With `evaluate.output`,
    scores.json and the sets' statistics are written there. Raises RecipeError, EvaluationError (a
    reference that a score cannot use, images that cannot be decoded), ScoresMismatch, WeightsError,
    TooFewImages.
    """
    started, written = time.monotonic(), recipe.to_yaml()
    recipe = with_absolute_paths(recipe)
    options, scores = recipe.evaluate, set(recipe.evaluate.scores)
    read = ("images", "reference", "inception_weights", "towers")
    check_places(recipe, ("backbone.weights", *(f"evaluate.{name}" for name in read)))
    images, reference = open_sets(options, recipe.image_size, recipe.data)
    sides = _sides(images, reference)
    needs = {role: needs_of(options, role, side) for role, side in sides}
    networks = {name for of_side in needs.values() for name in of_side.networks}
    of_captions = check_captions(images, recipe)
    made_with = {
        **Extractor(options, recipe.backbone, networks).fingerprints,
        **of_captions,
        "image_size": str(recipe.image_size),
        "crop": crop_version(recipe.data),
    }
    for _, side in sides:
        check_made_with(side, made_with)
    inputs = _inputs(recipe, images, reference, made_with)
    if (before := _scores_before(options.output, inputs)) is not None:
        return before

    summaries = _summaries(sides, needs, recipe, made_with, show_progress)
    result: dict[str, float] = {}
    num_pairs: int | None = None
    if reference is not None and scores & PAIRED - {"rfid"}:
        start_ray()
        wanted = {"psnr", "ssim"} if "reconstruction" in scores else set()
        wanted |= scores & {"lpips"}
        result, num_pairs = compare_pairs(images, reference, wanted, recipe, show_progress)
    if scores & CAPTIONED:
        start_ray()
        result |= score_captions(images, recipe, of_captions, show_progress)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        result = _scores(options, images, reference, summaries, num_pairs) | result
    notes = _notes(options.scores, images, reference, num_pairs)
    notes += dict.fromkeys(str(warning.message) for warning in caught)
    for note in notes:
        print(f"fae: warning: {note}", file=sys.stderr)
    if options.output is not None:
        about = {
            "format": FORMAT,
            "scores": result,
            "warnings": notes,
            **{role: _about(side, summaries[role]) for role, side in sides},
            "inputs": inputs,
            "run": {"seconds": time.monotonic() - started, "versions": versions()},
        }
        paths.write_bytes(paths.join(options.output, "recipe.yaml"), written.encode())
        paths.write_bytes(paths.join(options.output, "scores.html"), scores_page(about))
        paths.write_once(_scores_uri(options.output), json.dumps(about, indent=1).encode())
    return result


def _sides(images: ImageSet, reference: ImageSet | None) -> list[tuple[str, ImageSet]]:
    sides = [("images", images)]
    return sides if reference is None else [*sides, ("reference", reference)]


def _inputs(
    recipe: Recipe, images: ImageSet, reference: ImageSet | None, made_with: dict[str, str]
) -> dict[str, Any]:
    """What decides the scores: both sets, networks, settings; not where or by how many actors."""
    deciding = deciding_values(recipe, ["evaluate"], addresses=False)
    settings = {name.removeprefix("evaluate."): value for name, value in deciding.items()}
    sets = {role: side.identity for role, side in _sides(images, reference)}
    return {**sets, **made_with, **settings}


def _scores_before(output: str | None, inputs: dict[str, Any]) -> dict[str, float] | None:
    """The scores that `output` holds already. Raises ScoresMismatch where they are of others."""
    if output is None or not paths.exists(_scores_uri(output)):
        return None
    before = json.loads(paths.read_bytes(_scores_uri(output)))
    # Earlier versions also saved settings that decide nothing.
    saved, now = (
        deciding_values({"evaluate": values}, ["evaluate"]) for values in (before["inputs"], inputs)
    )
    refuse_other_work(
        f"{output} holds the scores of another comparison",
        differences(saved, now),
        "Choose another evaluate.output=….",
        ScoresMismatch,
    )
    return dict(before["scores"])


def _summaries(
    sides: Sequence[tuple[str, ImageSet]],
    needs: Mapping[str, Needs],
    recipe: Recipe,
    made_with: dict[str, str],
    show_progress: bool,
) -> dict[str, Summary]:
    """The sets' summaries by role. Their statistics are added to the sets and saved in the output.

    A job that was interrupted finds them there and does not extract features again, unless a score
    needs more than statistics.
    """
    output = recipe.evaluate.output
    summaries = {role: Summary() for role, _ in sides}
    missing: dict[str, tuple[ImageSet, Needs]] = {}
    saved = {role: paths.join(output, f"{role}_statistics.npz") for role in summaries if output}
    about = {
        role: {"identity": side.identity, "limit": recipe.evaluate.limit} for role, side in sides
    }
    for role, side in sides:
        if role in saved and (
            found := _saved(saved[role], side, needs[role], about[role], made_with)
        ):
            summaries[role] = found
        elif needs[role] != Needs():
            missing[role] = side, needs[role]
    if not missing:
        return summaries
    start_ray()
    networks = {name: made_with[name] for _, one in missing.values() for name in one.networks}
    for role, summary in summarize(missing, recipe, networks, show_progress):
        summaries[role] = summary
        made = {name: moments.gaussian() for name, moments in summary.moments.items()}
        missing[role][0].statistics |= made
        if role in saved and made:
            described = {**about[role], "content_sha256": summary.content_sha256}
            write_statistics(saved[role], made, made_with, described)
    return summaries


def _saved(
    uri: str, side: ImageSet, needs: Needs, about: dict[str, Any], made_with: dict[str, str]
) -> Summary | None:
    """The summary that `uri` holds of this set; None where it holds none, or not all of `needs`."""
    if not needs.moments or needs.gather or needs.splits or not paths.exists(uri):
        return None
    statistics, theirs, found = read_statistics(uri)
    if theirs != made_with or not set(needs.moments) <= statistics.keys():
        return None
    if {name: value for name, value in found.items() if name != "content_sha256"} != about:
        return None
    side.statistics |= statistics
    return Summary(content_sha256=found["content_sha256"])


def _scores(
    options: EvaluateSection,
    images: ImageSet,
    reference: ImageSet | None,
    summaries: dict[str, Summary],
    num_pairs: int | None,
) -> dict[str, float]:
    """The scores of two sets, and how many images each has: where only pairs were compared, it is
    the number of these. Raises EvaluationError.
    """
    result: dict[str, float] = {}
    features = {
        role: np.concatenate(summary.features)
        for role, summary in summaries.items()
        if summary.features
    }
    for score in dict.fromkeys(options.scores):
        if score in FRECHET and reference is not None:
            name = FRECHET[score]
            a, b = images.statistics[name], reference.statistics[name]
            if a.mean.shape != b.mean.shape:
                raise EvaluationError(
                    f"{score}: {images.uri} has {len(a.mean)} features, {reference.uri} has "
                    f"{len(b.mean)}. The reference's statistics are those of another network."
                )
            result[score] = frechet_distance(a, b)
        elif score == "inception_score":
            splits = summaries["images"].splits
            assert splits is not None  # `needs_of` asked for them
            if not splits.counts.all():
                raise EvaluationError(
                    f"inception_score: of {int(splits.counts.sum())} images that can be decoded, "
                    f"none is in some of evaluate.inception_splits={options.inception_splits}."
                )
            result[score] = splits.score()
        elif score == "precision_recall":
            result["precision"], result["recall"] = precision_recall(
                features["images"], features["reference"], options.num_neighbors
            )
        elif score == "kid":
            result[score] = kernel_distance(
                features["images"],
                features["reference"],
                options.kid_subsets,
                options.kid_subset_size,
                options.seed,
            )
    for role, side in _sides(images, reference):
        count = summaries[role].count or _known_count(side, num_pairs)
        if count is not None:
            result[f"num_{role}"] = count
    return result


def _known_count(side: ImageSet, num_pairs: int | None) -> int | None:
    """Images of a set without a summary, from its statistics, its pairs or else its listing."""
    counts = [gaussian.count for gaussian in side.statistics.values() if gaussian.count is not None]
    return counts[0] if counts else num_pairs or len(side.keys) or None


def _notes(
    scores: Sequence[str], images: ImageSet, reference: ImageSet | None, num_pairs: int | None
) -> list[str]:
    """What the user should know about these scores."""
    notes = []
    if num_pairs is not None and num_pairs < len(images.keys):
        notes.append(
            f"{', '.join(sorted(set(scores) & {'reconstruction', 'lpips'}))}: means over "
            f"{num_pairs} of {len(images.keys)} pairs; of the others an image cannot be decoded."
        )
    generation = sorted(set(scores) & {"fid", "sfid"})
    if (
        generation
        and reference is not None
        and images.kind == reference.kind == "source"
        and images.keys == reference.keys
    ):
        notes.append(
            f"{', '.join(generation)}: both sets have the same keys. If the images are "
            "reconstructions of the reference, this is rfid, not the FID of a generator."
        )
    return notes


def _about(side: ImageSet, summary: Summary) -> dict[str, Any]:
    counts = {name: gaussian.count for name, gaussian in side.statistics.items()}
    return {
        "uri": side.uri,
        "kind": side.kind,
        "content_sha256": summary.content_sha256 or None,
        "made_with": side.made_with,
        "counts": counts,
        "images_per_second": summary.images_per_second or None,
    }


def _scores_uri(output: str) -> str:
    return paths.join(output, "scores.json")
