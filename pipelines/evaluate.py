"""`fae evaluate`: scores of a set of images against a reference, a Ray Data job."""

from __future__ import annotations

from pipelines.config import Recipe


def evaluate(recipe: Recipe, show_progress: bool = True) -> dict[str, float]:
    """Scores of `evaluate.images` against `evaluate.reference`, by name; also num_images and num_reference.

    Names: frechet_backbone, fid, sfid, inception_score, precision, recall, kid, rfid, psnr, ssim, lpips.
    """
    raise NotImplementedError
