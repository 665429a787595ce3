"""What the page of `fae explore` knows of its pictures: tokens, maps, neighbours and errors.

Tokens are what costs room: 256 patches of 384 channels are 393 kB a picture. The page gets them as
at most NUM_DIRECTIONS principal directions of the unit vectors in one byte each. Cosines of those
differ little from the exact ones, and the page says by how much.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from fae_core.figures import PrincipalBasis, principal_basis

from ..latents import LatentEncoder
from ..networks import features_of
from .pictures import Pictures

NUM_DIRECTIONS = 48
NUM_NEIGHBOURS = 6
BATCH = 8
CHECKED_PAIRS = 20_000
"""Pairs of patches by which the error of the cosines is measured."""


def explore_data(pictures: Pictures) -> dict[str, Any]:
    """Everything that the page shows of `pictures`, as JSON knows it.

    Raises CheckpointError where backbone and autoencoder do not belong together.
    """
    features, latents, rebuilt, grid, backbone = _tokens(pictures)
    kinds = {"latents": latents, "features": features}
    widths = {name: f"{tokens.shape[-1]} channels" for name, tokens in kinds.items()}
    cosines = _cosines(features, rebuilt)
    errors = 1.0 - cosines
    scale = max(float(np.percentile(errors, 99.5)), 1e-6)
    lost = _variance_lost(features, rebuilt)
    labels = sorted({label for label in pictures.labels if label is not None})
    thumbs = _thumbnails(pictures.images)
    described = []
    for id_, tokens in kinds.items():
        values, scales = quantized(tokens)
        described.append(
            {
                "id": id_,
                "name": id_,
                "about": f"{backbone}, {widths[id_]}" if id_ == "features" else widths[id_],
                "dims": values.shape[-1],
                "tokens": _base64(values),
                "scales": _base64(scales),
                "difference": round(cosine_difference(tokens, values, scales), 4),
                "neighbours": neighbours(tokens.mean(1)),
            }
        )
    basis, latent_basis = principal_basis(features), principal_basis(latents)
    return {
        "grid": list(grid),
        "labels": labels,
        "images": [
            {
                "key": key,
                "label": None if label is None else labels.index(label),
                "thumb": thumb,
                "error": round(float(error), 4),
                "lost": round(100 * float(share), 1),
            }
            for key, label, thumb, error, share in zip(
                pictures.keys, pictures.labels, thumbs, errors.mean(1), lost, strict=True
            )
        ],
        "kinds": described,
        "colours": {
            "features": _colours(basis, features),
            "latents": _colours(latent_basis, latents),
            "rebuilt": _colours(basis, rebuilt),
        },
        "patch_errors": _base64(np.rint(np.clip(errors / scale, 0, 1) * 255).astype(np.uint8)),
        "error_scale": scale,
        "maps": [m for id_, tokens in kinds.items() for m in maps(tokens.mean(1), id_)],
    }


@torch.inference_mode()
def _tokens(
    pictures: Pictures,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int], str]:
    """Features [n, N, D], latents [n, N, C] and rebuilt features, all float32; grid, backbone."""
    encoder = LatentEncoder.of(pictures.recipe, "cuda" if torch.cuda.is_available() else "cpu")
    found: list[list[torch.Tensor]] = [[], [], []]
    for batch in encoder.micro_batches(pictures.images, BATCH):
        features = features_of(encoder.backbone, batch, encoder.precision)
        mean = encoder.autoencoder.encode(features).mean
        parts = (features, mean, encoder.autoencoder.decode(mean))
        for kept, part in zip(found, parts, strict=True):
            kept.append(part.float().cpu())
    whole = [torch.cat(parts).numpy() for parts in found]
    return whole[0], whole[1], whole[2], encoder.backbone.grid, pictures.recipe.backbone.name


def quantized(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [n, N, k] and float32 scales [n, N]: a cosine is nearly a product times both scales.

    They are the projections of the unit vectors of `tokens` [n, N, D] to their leading directions,
    not centred, because a cosine is not. What the other directions would add to a product is left
    out: making the projections unit vectors again would give six times the difference.
    """
    unit = _unit(tokens).reshape(-1, tokens.shape[-1])
    dims = min(NUM_DIRECTIONS, unit.shape[1])
    if dims < unit.shape[1]:
        _, vectors = np.linalg.eigh(unit.T.astype(np.float64) @ unit)
        unit = unit @ vectors[:, ::-1][:, :dims].astype(np.float32)
    scales = np.maximum(np.abs(unit).max(1, keepdims=True), 1e-12) / 127
    values = np.rint(unit / scales).astype(np.int8)
    shape = tokens.shape[:2]
    return values.reshape(*shape, dims), scales.astype(np.float32).reshape(shape)


def cosine_difference(tokens: np.ndarray, values: np.ndarray, scales: np.ndarray) -> float:
    """The difference from exact cosines of `tokens` that 95 % of random pairs keep below."""
    exact = _unit(tokens.astype(np.float32)).reshape(-1, tokens.shape[-1])
    near = (values * scales[..., None]).reshape(-1, values.shape[-1])
    random = np.random.default_rng(0)
    first, second = random.integers(0, len(exact), (2, CHECKED_PAIRS))
    differences = (exact[first] * exact[second]).sum(1) - (near[first] * near[second]).sum(1)
    return float(np.percentile(np.abs(differences), 95))


def neighbours(vectors: np.ndarray) -> list[list[tuple[int, float]]]:
    """The nearest others of each row of `vectors` [n, D] by cosine: (row, cosine), best first."""
    unit = _unit(vectors)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    count = min(NUM_NEIGHBOURS, len(vectors) - 1)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    return [
        [(int(other), round(float(similarity[row, other]), 3)) for other in others]
        for row, others in enumerate(order)
    ]


def maps(vectors: np.ndarray, name: str) -> list[dict[str, Any]]:
    """Maps of `vectors` [n, D] to the plane: PCA, and UMAP where umap-learn is installed."""
    centred = vectors - vectors.mean(0)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    shares = values**2 / max(float((values**2).sum()), 1e-12)
    flat = np.pad(centred @ directions[:2].T, ((0, 0), (0, max(0, 2 - len(directions)))))
    kept = 100 * float(shares[:2].sum())
    about = f"Means over patches; two directions with {kept:.0f} % of their variance."
    found = [_map(f"{name}: PCA", about, flat)]
    try:
        import umap
    except ImportError:
        return found
    if len(vectors) > 4:
        reducer = umap.UMAP(n_neighbors=min(15, len(vectors) - 1), metric="cosine", random_state=0)
        about = "Means over patches, cosine. Distances between groups say little."
        found.append(_map(f"{name}: UMAP", about, reducer.fit_transform(vectors)))
    return found


def _map(name: str, about: str, points: np.ndarray) -> dict[str, Any]:
    x, y = (np.round(points[:, axis].astype(float), 4).tolist() for axis in (0, 1))
    return {"name": name, "about": about, "x": x, "y": y}


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-12))


def _cosines(features: np.ndarray, rebuilt: np.ndarray) -> np.ndarray:
    """Cosine [n, N] of each patch's true and rebuilt features."""
    return np.asarray((_unit(features) * _unit(rebuilt)).sum(-1))


def _variance_lost(features: np.ndarray, rebuilt: np.ndarray) -> np.ndarray:
    """Squared error of each picture [n] over the variance of all features."""
    variance = max(float(((features - features.mean((0, 1))) ** 2).sum(-1).mean()), 1e-12)
    return np.asarray(((features - rebuilt) ** 2).sum(-1).mean(1) / variance)


def _colours(basis: PrincipalBasis, tokens: np.ndarray) -> str:
    return _base64(basis.colours(tokens.reshape(-1, tokens.shape[-1])))


def _thumbnails(images: np.ndarray) -> Sequence[str]:
    """JPEG data addresses of uint8 images [n, S, S, 3]; smaller ones where there are many."""
    side = min(images.shape[1], 256 if len(images) <= 100 else 160)
    found = []
    for image in images:
        buffer = io.BytesIO()
        picture = Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)
        picture.save(buffer, "JPEG", quality=82)
        found.append("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())
    return found


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
