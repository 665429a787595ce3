"""The page of `fae evaluate`: scores.html beside scores.json, with what each score means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..pages import report_page
from ..pages.blocks import Section, Table, Words

MEANINGS = {
    "frechet_backbone": ("lower", "Fréchet distance of the two sets' backbone features"),
    "fid": (
        "lower",
        "Fréchet distance of Inception features; compare equal numbers of images only",
    ),
    "sfid": ("lower", "Fréchet distance of Inception's spatial features"),
    "inception_score": ("higher", "how sure and how varied Inception's classes are; no reference"),
    "precision": ("higher", "share of images that lie near the reference"),
    "recall": ("higher", "share of the reference that lies near the images"),
    "kid": ("lower", "kernel distance of Inception features"),
    "rfid": ("lower", "FID of reconstructions and their originals"),
    "psnr": ("higher", "pixels of an image and its original [dB]"),
    "ssim": ("higher", "structure of an image and its original, at most 1"),
    "lpips": ("lower", "perceptual distance of an image and its original"),
    "clip_score": ("higher", "100 times the cosine of image and caption, mean"),
    "image_to_text": ("higher", "share of images whose nearest caption is theirs"),
    "text_to_image": ("higher", "share of captions whose nearest image is theirs"),
    "true_image_to_text": ("higher", "the same by the backbone's true features"),
    "true_text_to_image": ("higher", "the same by the backbone's true features"),
    "rebuilt_image_to_text": ("higher", "the same by rebuilt features"),
    "rebuilt_text_to_image": ("higher", "the same by rebuilt features"),
    "num_images": ("", "images that were scored"),
    "num_reference": ("", "images that they were compared with"),
}
"""By score: which direction is better, and what it is."""


def scores_page(about: Mapping[str, Any]) -> bytes:
    """The page about what scores.json holds."""
    rows = []
    for name, value in about["scores"].items():
        better, meaning = MEANINGS.get(name, ("", ""))
        shown = f"{value:,.0f}" if name.startswith("num_") else f"{value:.6g}"
        rows.append([name, shown, better, meaning])
    inputs = [
        [name, str(value)]
        for name, value in about["inputs"].items()
        if isinstance(value, (str, int, float))
    ]
    versions = ", ".join(f"{name} {v}" for name, v in about["run"]["versions"].items())
    sections: list[Section] = [
        ("Scores", [Table(["score", "value", "better", "what it is"], rows)]),
        ("Warnings", [Words(text) for text in about["warnings"]]),
        ("What was compared", [Table(["part", "value"], inputs), Words(versions)]),
    ]
    took = f"{about['run']['seconds']:,.0f} s; the same inputs give these scores again"
    return report_page("Scores", took, sections, "Made by fae evaluate.")
