"""The two sets that `fae evaluate` compares: opened, paired, and checked against the scores.

Only listings and file headers are read here, so a reference that a score cannot use is refused
before any image is decoded.
"""

from __future__ import annotations

from fae_core.metrics.reconstruction import WINDOW

from ..config import RecipeError
from ..config.sections import DataSection, EvaluateSection
from .errors import EvaluationError
from .features import Needs
from .image_sets import ImageSet, open_set
from .text_scores import CAPTIONED

FRECHET = {
    "frechet_backbone": "backbone",
    "fid": "inception",
    "rfid": "inception",
    "sfid": "spatial",
}
"""Fréchet distances, and the features whose statistics each compares."""
PAIRED = {"rfid", "reconstruction", "lpips"}
"""Scores of reconstructions: the reference holds the original of each image."""


def open_sets(
    options: EvaluateSection, image_size: int, data: DataSection
) -> tuple[ImageSet, ImageSet | None]:
    """The images, and the reference where a score needs one, paired where a score needs pairs.

    Raises RecipeError where the recipe names no set or no score, and EvaluationError.
    """
    scores = set(options.scores)
    if options.images is None:
        raise RecipeError("evaluate.images is not set: the folder or the samples to score.")
    if not scores:
        raise RecipeError("evaluate.scores is empty. Set one or more, as evaluate.scores=[rfid].")
    compared = sorted(scores - {"inception_score"} - CAPTIONED)
    if not compared:
        return open_set("images", options.images, options.limit, image_size, data), None
    if options.reference is None:
        raise RecipeError(
            f"{', '.join(compared)}: these compare with evaluate.reference=…, which is not set."
        )
    images = open_set("images", options.images, options.limit, image_size, data)
    reference = open_set("reference", options.reference, options.limit, image_size, data)
    if "reconstruction" in scores and image_size < WINDOW:
        raise RecipeError(
            f"reconstruction: image_size={image_size}, and SSIM's window is {WINDOW} px wide."
        )
    if scores & PAIRED:
        _pair(images, reference, sorted(scores & PAIRED))
    return images, reference


def needs_of(options: EvaluateSection, role: str, side: ImageSet) -> Needs:
    """What has to be computed of `side` for the scores, besides the statistics in its file.

    Raises EvaluationError where the set cannot give it, or has too few images for a score.
    """
    scores = set(options.scores)
    wanted = dict.fromkeys(FRECHET[score] for score in options.scores if score in FRECHET)
    needs = Needs(
        moments=tuple(name for name in wanted if name not in side.statistics),
        gather=options.features if scores & {"kid", "precision_recall"} else None,
        splits="inception_score" in scores and role == "images",
    )
    if side.kind == "statistics" and needs != Needs():
        held = ", ".join(side.statistics)
        missing = [f"the statistics of {name}" for name in needs.moments]
        missing += ["the images themselves"] if needs.gather or needs.splits else []
        raise EvaluationError(
            f"{side.uri} holds statistics alone ({held}); {', '.join(options.scores)} needs "
            f"{' and '.join(missing)}. Give the images."
        )
    if needs.moments and len(side.keys) < 2:
        raise EvaluationError(
            f"{', '.join(score for score in options.scores if score in FRECHET)}: {side.uri} has "
            f"{len(side.keys)} image, and a covariance needs two or more. Give more images, or "
            "another score."
        )
    if "precision_recall" in scores and len(side.keys) <= options.num_neighbors:
        raise EvaluationError(
            f"precision_recall: {side.uri} has {len(side.keys)} images, and evaluate.num_neighbors="
            f"{options.num_neighbors} needs more than that. Give more images, or lower it."
        )
    if "kid" in scores and len(side.keys) < options.kid_subset_size:
        raise EvaluationError(
            f"kid: {side.uri} has {len(side.keys)} images, fewer than evaluate.kid_subset_size="
            f"{options.kid_subset_size}. Smaller subsets give a noisier score, which compares only "
            "with scores of subsets of the same size."
        )
    if needs.splits and len(side.keys) < options.inception_splits:
        raise EvaluationError(
            f"inception_score: {len(side.keys)} images are fewer than evaluate.inception_splits="
            f"{options.inception_splits}."
        )
    return needs


def check_made_with(side: ImageSet, made_with: dict[str, str]) -> None:
    """Raises EvaluationError where statistics of `side` were made with other networks or crops."""
    if side.kind == "samples":
        return
    for name, theirs in side.made_with.items():
        if name in made_with and made_with[name] != theirs:
            raise EvaluationError(
                f"The statistics in {side.uri} were made with {name} {theirs}, here it is "
                f"{made_with[name]}. Give the images, or set the recipe's backbone, "
                "evaluate.backbone_token and image_size to what made them."
            )


def _pair(images: ImageSet, reference: ImageSet, scores: list[str]) -> None:
    """Put the reference into the order of the images' keys.

    Raises EvaluationError where it does not hold the original of each image.
    """
    names = f"{', '.join(scores)}: reconstruction scores compare each image with its own original"
    advice = "Give the folder of the originals; for generated images the score is fid, not rfid."
    if images.kind == "samples":
        raise EvaluationError(f"{names}, and {images.uri} holds generated samples. {advice}")
    if reference.statistics or reference.kind == "samples":
        raise EvaluationError(
            f"{names}, and {reference.uri} is a reference for generation. {advice}"
        )
    if images.kind == "statistics":
        raise EvaluationError(f"{names}, and {images.uri} holds statistics alone.")
    for side in (images, reference):
        if len(set(side.keys)) < len(side.keys):
            raise EvaluationError(f"{names}: {side.uri} has keys that differ only in their suffix.")
    mine, theirs = set(images.keys), set(reference.keys)
    if mine != theirs:
        lonely = min(mine ^ theirs)
        where = images.uri if lonely in mine else reference.uri
        raise EvaluationError(
            f"{names}: of {len(mine)} images in {images.uri} and {len(theirs)} in {reference.uri} "
            f"{len(mine & theirs)} have the same key ({lonely!r} is only in {where}). {advice}"
        )
    if reference.records is not None:
        by_key = dict(zip(reference.keys, reference.records, strict=True))
        reference.records = [by_key[key] for key in images.keys]
        reference.keys = list(images.keys)
