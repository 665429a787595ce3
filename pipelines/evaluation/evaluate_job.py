"""`fae evaluate`: scores of a set of images against a reference, a Ray Data job on any kind of set (`image_sets.py`).

Generation scores compare two sets: Fréchet distances (of the backbone, FID, sFID), precision and recall, KID; the
Inception Score has no reference. Reconstruction scores compare each image with its own original, and refuse a reference
without it. scores.json says what was compared; the same command again returns it.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

import numpy as np

from fae_core.errors import UserError
from fae_core.metrics.frechet import frechet_distance
from fae_core.metrics.manifold import kernel_distance, precision_recall

from ..config import Recipe, RecipeError, with_absolute_paths
from ..config.facts import deciding_values
from ..data.crops import CROPS
from ..runtime import versions
from ..runtime.session import start_ray
from ..storage import paths
from .features import Extractor, Needs, Summary, compare_pairs, summarize
from .image_sets import EvaluationError, ImageSet, open_set, read_statistics, write_statistics

FORMAT = "fae-scores-1"
FRECHET = {
    "frechet_backbone": "backbone",
    "fid": "inception",
    "rfid": "inception",
    "sfid": "spatial",
}
PAIRED = {"rfid", "reconstruction", "lpips"}


class ScoresMismatch(UserError, ValueError):
    """The output holds the scores of another comparison; the message names what differs."""


def evaluate(recipe: Recipe, show_progress: bool = True) -> dict[str, float]:
    """Scores of `evaluate.images` against `evaluate.reference`, by name; also num_images and num_reference.

    Names: frechet_backbone, fid, sfid, inception_score, precision, recall, kid, rfid, psnr, ssim, lpips. num_reference
    is absent where the reference does not tell. Raises RecipeError, EvaluationError (the wrong reference for a score,
    images that cannot be decoded), ScoresMismatch, WeightsError, TooFewImages.
    """
    started, written = time.monotonic(), recipe.to_yaml()
    recipe = with_absolute_paths(recipe)
    options, scores = recipe.evaluate, set(recipe.evaluate.scores)
    images, reference = _open_sets(recipe)
    needs = _needs(recipe, images, reference)
    extractor = Extractor(recipe, needs["images"].networks | needs["reference"].networks)
    fingerprints = extractor.fingerprints
    del extractor
    crop = CROPS[recipe.data.decoder]
    made_with = {**fingerprints, "image_size": str(recipe.image_size), "crop": crop}
    for side in (images, reference):
        if side is not None:
            _check_made_with(side, made_with)
    inputs = _inputs(recipe, images, reference, made_with)
    if (before := _scores_before(recipe, inputs)) is not None:
        return before

    summaries: dict[str, Summary] = {}
    for role, side in (("images", images), ("reference", reference)):
        if side is not None:
            summaries[role] = _summary(role, side, needs[role], recipe, made_with, show_progress)
    result: dict[str, float] = {}
    if reference is not None and scores & PAIRED - {"rfid"}:
        start_ray()
        wanted = {"psnr", "ssim"} if "reconstruction" in scores else set()
        wanted |= scores & {"lpips"}
        result |= compare_pairs(images, reference, wanted, recipe, show_progress)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        result = _scores(recipe, images, reference, summaries) | result
    notes = [*_notes(recipe, images, reference), *dict.fromkeys(str(w.message) for w in caught)]
    for note in notes:
        print(f"fae: warning: {note}", file=sys.stderr)
    if options.output is not None:
        about = {
            "format": FORMAT,
            "scores": result,
            "warnings": notes,
            **{role: _about(side, summaries[role]) for role, side in _sides(images, reference)},
            "inputs": inputs,
            "run": {"seconds": time.monotonic() - started, "versions": versions()},
        }
        paths.write_bytes(paths.join(options.output, "recipe.yaml"), written.encode())
        paths.write_once(_scores_uri(options.output), json.dumps(about, indent=1).encode())
    return result


def _sides(images: ImageSet, reference: ImageSet | None) -> list[tuple[str, ImageSet]]:
    return [("images", images)] + ([("reference", reference)] if reference is not None else [])


def _open_sets(recipe: Recipe) -> tuple[ImageSet, ImageSet | None]:
    options, scores = recipe.evaluate, set(recipe.evaluate.scores)
    if options.images is None or not scores:
        raise RecipeError("evaluate needs evaluate.images=… and one score or more.")
    alone = scores - {"inception_score"}
    if options.reference is None and alone:
        raise RecipeError(
            f"{', '.join(sorted(alone))}: these compare with evaluate.reference=…, which is not set."
        )
    images = open_set("images", recipe)
    reference = open_set("reference", recipe) if alone else None
    if reference is not None and scores & PAIRED:
        _pair(images, reference, sorted(scores & PAIRED))
    return images, reference


def _pair(images: ImageSet, reference: ImageSet, scores: list[str]) -> None:
    """Bring the reference into the order of the images' keys. Raises EvaluationError where they are not its originals."""
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
            raise EvaluationError(
                f"{names}: {side.uri} has keys that differ in their suffix alone."
            )
    mine, theirs = set(images.keys), set(reference.keys)
    if mine != theirs:
        lonely = min(mine ^ theirs)
        where = images.uri if lonely in mine else reference.uri
        raise EvaluationError(
            f"{names}: of {len(mine)} images in {images.uri} and {len(theirs)} in {reference.uri} "
            f"{len(mine & theirs)} have the same key ({lonely!r} is in {where} alone). {advice}"
        )
    if reference.records is not None:
        by_key = dict(zip(reference.keys, reference.records, strict=True))
        reference.records = [by_key[key] for key in images.keys]
        reference.keys = list(images.keys)


def _needs(recipe: Recipe, images: ImageSet, reference: ImageSet | None) -> dict[str, Needs]:
    """What is to be made of each set's images, beyond the statistics that it brings."""
    scores = set(recipe.evaluate.scores)
    wanted = dict.fromkeys(FRECHET[score] for score in recipe.evaluate.scores if score in FRECHET)
    gather = recipe.evaluate.features if scores & {"kid", "precision_recall"} else None
    found = {"images": Needs(), "reference": Needs()}
    for role, side in _sides(images, reference):
        needs = Needs(
            tuple(name for name in wanted if name not in side.statistics),
            gather,
            splits="inception_score" in scores and role == "images",
        )
        if side.kind == "statistics" and needs != Needs():
            brought = ", ".join(side.statistics)
            missing = [f"the statistics of {name}" for name in needs.moments]
            missing += ["the images themselves"] if gather or needs.splits else []
            raise EvaluationError(
                f"{side.uri} holds statistics alone ({brought}); {', '.join(recipe.evaluate.scores)} needs "
                f"{' and '.join(missing)}. Give the images."
            )
        if "kid" in scores and len(side.keys) < recipe.evaluate.kid_subset_size:
            raise EvaluationError(
                f"kid: {side.uri} has {len(side.keys)} images, fewer than evaluate.kid_subset_size="
                f"{recipe.evaluate.kid_subset_size}. Smaller subsets are noisier and compare with their like."
            )
        if needs.splits and len(side.keys) < recipe.evaluate.inception_splits:
            raise EvaluationError(
                f"inception_score: {len(side.keys)} images are fewer than evaluate.inception_splits="
                f"{recipe.evaluate.inception_splits}."
            )
        found[role] = needs
    return found


def _check_made_with(side: ImageSet, made_with: dict[str, str]) -> None:
    if side.kind == "samples":
        return
    for name, theirs in side.made_with.items():
        if name in made_with and made_with[name] != theirs:
            raise EvaluationError(
                f"The statistics in {side.uri} were made with {name} {theirs}, here it is {made_with[name]}. "
                "Give the images, or set the recipe's backbone, evaluate.backbone_token and image_size alike."
            )


def _inputs(
    recipe: Recipe, images: ImageSet, reference: ImageSet | None, made_with: dict[str, str]
) -> dict[str, Any]:
    """What decides the scores: both sets, networks, settings; not where or by how many actors."""
    deciding = deciding_values(recipe, ["evaluate"], addresses=False)
    settings = {name.removeprefix("evaluate."): value for name, value in deciding.items()}
    sets = {role: side.identity for role, side in _sides(images, reference)}
    return {**sets, **made_with, **settings}


def _scores_before(recipe: Recipe, inputs: dict[str, Any]) -> dict[str, float] | None:
    output = recipe.evaluate.output
    if output is None or not paths.exists(_scores_uri(output)):
        return None
    before = json.loads(paths.read_bytes(_scores_uri(output)))
    theirs = before["inputs"]
    differing = [k for k in sorted(theirs.keys() | inputs.keys()) if theirs.get(k) != inputs.get(k)]
    if differing:
        lines = "\n".join(
            f"  {k}: {theirs.get(k)!r} there, {inputs.get(k)!r} now" for k in differing
        )
        raise ScoresMismatch(
            f"{output} holds the scores of another comparison:\n{lines}\nChoose another evaluate.output=…."
        )
    return dict(before["scores"])


def _summary(
    role: str,
    side: ImageSet,
    needs: Needs,
    recipe: Recipe,
    made_with: dict[str, str],
    show_progress: bool,
) -> Summary:
    """The set in features; its statistics go to the output, and come from there after an interruption."""
    if needs == Needs():
        return Summary()
    output = recipe.evaluate.output
    identity = {"identity": side.identity, "limit": recipe.evaluate.limit}
    saved = paths.join(output, f"{role}_statistics.npz") if output else None
    if saved and not needs.gather and not needs.splits and paths.exists(saved):
        statistics, theirs, about = read_statistics(saved)
        same = {k: v for k, v in about.items() if k != "content_sha256"} == identity
        if same and theirs == made_with and set(needs.moments) <= statistics.keys():
            side.statistics |= statistics
            return Summary(content_sha256=about["content_sha256"])
    if show_progress:
        print(f"{role}: {len(side.keys)} images of {side.uri}", file=sys.stderr, flush=True)
    start_ray()
    networks = {name: made_with[name] for name in needs.networks}
    summary = summarize(side, needs, recipe, networks, show_progress)
    made = {name: moments.gaussian() for name, moments in summary.moments.items()}
    side.statistics |= made
    if saved and made:
        about = {**identity, "content_sha256": summary.content_sha256}
        write_statistics(saved, made, made_with, about)
    return summary


def _scores(
    recipe: Recipe, images: ImageSet, reference: ImageSet | None, summaries: dict[str, Summary]
) -> dict[str, float]:
    options, result = recipe.evaluate, dict[str, float]()
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
                    f"{score}: {len(a.mean)} features of {images.uri} against {len(b.mean)} of {reference.uri}. "
                    "The reference's statistics are another network's."
                )
            result[score] = frechet_distance(a, b)
        elif score == "inception_score":
            splits = summaries["images"].splits
            assert splits is not None
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
        count = summaries[role].count or _known_count(side)
        if count is not None:
            result["num_images" if role == "images" else "num_reference"] = count
    return result


def _known_count(side: ImageSet) -> int | None:
    counts = [gaussian.count for gaussian in side.statistics.values() if gaussian.count is not None]
    return counts[0] if counts else len(side.keys) or None


def _notes(recipe: Recipe, images: ImageSet, reference: ImageSet | None) -> list[str]:
    notes = []
    generation = sorted(set(recipe.evaluate.scores) & {"fid", "sfid"})
    if (
        generation
        and reference is not None
        and images.kind == reference.kind == "source"
        and images.keys == reference.keys
    ):
        notes.append(
            f"{', '.join(generation)}: both sets have the same keys. If the images are reconstructions of the "
            "reference, this is rfid, not the FID of a generator."
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
