"""Scores of captioned images: CLIP score, and retrieval by true and by rebuilt features.

One row is one chunk of images with their captions: decode and crop (CPU tasks) -> towers (actor
pool) -> an embedding of each image and of each caption. The driver compares them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fae_core.checkpoint import CheckpointError
from fae_core.metrics.text_image import clip_scores, retrieval_top1
from fae_core.towers import Towers, load_towers

from ..config import Recipe
from ..latents import LatentEncoder
from ..networks import features_of
from ..runtime.actor_pool import RowStages, run_rows
from ..runtime.progress import Progress
from .errors import EvaluationError
from .features import check_errors, device_of
from .image_sets import ImageSet
from .tasks import decode_chunk

CAPTIONED = {"clip_score", "retrieval", "retrieval_rebuilt"}
"""Scores that compare images with their captions."""

Row = dict[str, Any]


def check_captions(images: ImageSet, recipe: Recipe) -> dict[str, str]:
    """Fingerprints of the networks of the captioned scores that the recipe asks for.

    Raises RecipeError, WeightsError and CheckpointError where the networks are not to be had or do
    not fit, and EvaluationError where an image has no caption.
    """
    scores = sorted(CAPTIONED & set(recipe.evaluate.scores))
    if not scores:
        return {}
    recipe.require(", ".join(scores), "evaluate.towers")
    if images.records is None:
        raise EvaluationError(f"{', '.join(scores)}: {images.uri} holds no captions.")
    without = [r.key for r in images.records if not (r.caption or "").strip()]
    if without:
        raise EvaluationError(
            f"{', '.join(scores)}: {len(without)} of {len(images.records)} images of {images.uri} "
            f"have no caption, for example {without[0]!r}."
        )
    return _Embedder(recipe, "cpu").fingerprints


def score_captions(
    images: ImageSet, recipe: Recipe, fingerprints: dict[str, str], show_progress: bool
) -> dict[str, float]:
    """Those of clip_score, retrieval and retrieval_rebuilt that the recipe asks for.

    Retrieval gives image_to_text and text_to_image, shares in [0, 1] whose nearest one is right; by
    rebuilt features they begin with `rebuilt_`, and the same by true ones with `true_`. A text is
    right for every image that has it among its captions. num_images counts the decoded ones. Raises
    EvaluationError where too many cannot be decoded.
    """
    assert images.records is not None
    size = recipe.evaluate.chunk_size
    parts = [images.records[at : at + size] for at in range(0, len(images.records), size)]
    rows = [
        {
            "chunk": index,
            "start": index * size,
            "images": json.dumps(piece),
            "captions": json.dumps([list(r.captions or (r.caption,)) for r in part]),
        }
        for index, (piece, part) in enumerate(zip(images.pieces(size), parts, strict=True))
    ]
    decode = partial(decode_chunk, data=recipe.data, image_size=recipe.image_size)
    stages = RowStages(EmbedChunks, (recipe, fingerprints), prepare=decode)
    found: dict[str, list[np.ndarray]] = {}
    captions: list[list[str]] = []
    errors: list[dict[str, str]] = []
    with (
        Progress(len(rows), len(images.keys), show_progress) as progress,
        closing(run_rows(rows, stages, recipe.evaluate, keep_order=True)) as finished,
    ):
        for row in finished:
            kept = json.loads(str(row["kept_captions"]))
            failed = json.loads(str(row["errors"]))
            captions += kept
            errors += failed
            check_errors(images, errors, recipe.evaluate.max_error_rate)
            progress.add(len(kept), len(failed), float(row["done_at"]))
            for name in _names(recipe) if kept else ():
                found.setdefault(name, []).append(np.asarray(row[name], dtype=np.float32))
        progress.close()
    if not captions:
        raise EvaluationError(f"None of the images of {images.uri} could be decoded.")
    embeddings = {name: torch.from_numpy(np.concatenate(some)) for name, some in found.items()}
    scores = dict(_scores(recipe.evaluate.scores, embeddings, captions))
    return {**scores, "num_images": len(captions)}


def _scores(
    scores: Sequence[str], embeddings: dict[str, Tensor], captions: Sequence[Sequence[str]]
) -> Iterator[tuple[str, float]]:
    """Scores by name of embeddings `image` [N, D], `text` [M, D] and, where rebuilt, two more."""
    # A text is right for every image that has it among its captions.
    numbers: dict[str, int] = {}
    of_image = [{numbers.setdefault(text, len(numbers)) for text in some} for some in captions]
    of_text = [{numbers[text]} for some in captions for text in some]
    firsts = np.cumsum([0, *(len(some) for some in captions)])[:-1]
    texts = embeddings["text"]
    if "clip_score" in scores:
        yield "clip_score", float(clip_scores(embeddings["image"], texts[firsts]).double().mean())
    kinds = {"": "image"} if "retrieval" in scores else {}
    if "retrieval_rebuilt" in scores:
        kinds |= {"true_": "true", "rebuilt_": "rebuilt"}
    for prefix, kind in kinds.items():
        pictures = embeddings[kind]
        yield f"{prefix}image_to_text", retrieval_top1(pictures, texts, of_image, of_text)
        yield f"{prefix}text_to_image", retrieval_top1(texts, pictures, of_text, of_image)


class EmbedChunks:
    """The actor of `score_captions`: embeddings of the images of a chunk and of their captions."""

    def __init__(self, recipe: Recipe, fingerprints: dict[str, str]) -> None:
        self.embed = _Embedder(recipe, device_of(recipe.evaluate))
        if self.embed.fingerprints != fingerprints:
            raise CheckpointError(
                "The networks on this node are not those that the evaluation started with."
            )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        images = np.asarray(batch["images"][0])
        all_captions = json.loads(str(batch["captions"][0]))
        captions = [all_captions[place] for place in np.asarray(batch["kept"][0], dtype=np.int64)]
        embeddings = self.embed(images, captions) if len(images) else {}
        return {
            "kept_captions": [json.dumps(captions)],
            "errors": batch["errors"],
            "done_at": [time.time()],
            **{name: [values.cpu().numpy()] for name, values in embeddings.items()},
        }


def _names(recipe: Recipe) -> list[str]:
    """The embeddings that the scores need."""
    scores = recipe.evaluate.scores
    names = ["text", *(["image"] if {"clip_score", "retrieval"} & set(scores) else [])]
    return [*names, "true", "rebuilt"] if "retrieval_rebuilt" in scores else names


class _Embedder:
    """The networks on one device: crops and captions to embeddings."""

    def __init__(self, recipe: Recipe, device: str) -> None:
        (folder,) = recipe.require("captioned scores", "evaluate.towers")
        self.names, self.size = _names(recipe), recipe.evaluate.batch_size
        self.towers: Towers = load_towers(folder).to(torch.device(device))
        self.fingerprints = {"towers": self.towers.weights_sha256}
        self.encoder: LatentEncoder | None = None
        if "rebuilt" in self.names:
            self.encoder = LatentEncoder.of(recipe, device)
            self.fingerprints["autoencoder"] = self.encoder.autoencoder_sha256
            # Refused here, before any image is read.
            self.towers.pool(torch.zeros(1, 4, self.encoder.backbone.spec.dim, device=device))

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, captions: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        """Embeddings by name: of images [n, D], of all their captions in order [m, D]."""
        texts = [text for several in captions for text in several]
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, len(texts), self.size):
            some = self.towers.texts(texts[start : start + self.size])
            parts.setdefault("text", []).append(some)
        for start in range(0, len(images), self.size):
            crops = images[start : start + self.size].copy()
            if "image" in self.names:
                parts.setdefault("image", []).append(self.towers.images(crops))
            if self.encoder is not None:
                for name, features in self._features(crops).items():
                    parts.setdefault(name, []).append(self.towers.pool(features))
        return {name: torch.cat(some) for name, some in parts.items()}

    def _features(self, crops: np.ndarray) -> dict[str, Tensor]:
        """The backbone's patch features [n, N, D], and those that the autoencoder rebuilds."""
        assert self.encoder is not None
        batch = torch.from_numpy(crops).to(self.encoder.device)
        features = features_of(self.encoder.backbone, batch, "fp32")
        autoencoder = self.encoder.autoencoder
        return {
            "true": features,
            "rebuilt": autoencoder.decode(autoencoder.encode(features).mean).float(),
        }
