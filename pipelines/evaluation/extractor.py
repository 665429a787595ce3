"""The networks of evaluation on one device: from uint8 crops to features and logits."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fae_core.backbone import Backbone, load_backbone
from fae_core.metrics.inception import Inception, load_inception

from ..config import RecipeError
from ..config.sections import BackboneSection, EvaluateSection
from ..storage import paths


class Extractor:
    """The networks on one device, and their fingerprints by name (backbone, inception).

    `networks` is what `Needs.networks` gives. Raises RecipeError where the backbone has no class
    token and the recipe asks for it, and WeightsError.
    """

    def __init__(
        self,
        options: EvaluateSection,
        backbone: BackboneSection,
        networks: set[str],
        device: str = "cpu",
    ) -> None:
        self.device, self.batch_size = torch.device(device), options.batch_size
        self.token = options.backbone_token
        self.backbone: Backbone | None = None
        self.inception: Inception | None = None
        self.fingerprints: dict[str, str] = {}
        if "backbone" in networks:
            loaded = load_backbone(backbone.name, backbone.weights, backbone.image_size)
            self.backbone = loaded.to(self.device)
            if self.token == "class" and getattr(loaded.model, "cls_token", None) is None:
                raise RecipeError(
                    f"{backbone.name} has no class token. Set evaluate.backbone_token=mean."
                )
            self.fingerprints["backbone"] = (
                f"{backbone.name}@{loaded.spec.image_size} {self.token} {loaded.weights_sha256}"
            )
        if "inception" in networks:
            self.inception = inception_of(options.inception_weights).to(self.device)
            self.fingerprints["inception"] = self.inception.weights_sha256

    @torch.inference_mode()
    def __call__(
        self, images: np.ndarray, networks: Collection[str] = ("backbone", "inception")
    ) -> dict[str, np.ndarray]:
        """Features float32 [n, D] by name, of uint8 crops [n, S, S, 3], by those of `networks`.

        Names are backbone, and of Inception inception, spatial and logits.
        """
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, len(images), self.batch_size):
            # A copy, because arrays from Ray's object store are read-only and tensors are not.
            some = images[start : start + self.batch_size].copy()
            batch = torch.from_numpy(some).to(self.device)
            features: dict[str, Tensor] = {}
            if self.backbone is not None and "backbone" in networks:
                patches, token = self.backbone.tokens(batch)
                if self.token == "mean" or token is None:
                    token = patches.mean(dim=1)
                features["backbone"] = token
            if self.inception is not None and "inception" in networks:
                features |= self.inception(batch)
            for name, values in features.items():
                parts.setdefault(name, []).append(values.float().cpu())
        return {name: torch.cat(values).numpy() for name, values in parts.items()}


def inception_of(weights: str | None) -> Inception:
    """Inception-v3 with weights from `weights`, else $FAE_INCEPTION_WEIGHTS, else its download.

    `weights` is a local path or an s3:// address. Raises WeightsError.
    """
    uri = weights or os.environ.get("FAE_INCEPTION_WEIGHTS")
    if uri is None or not paths.is_s3(uri):
        return load_inception(None if uri is None else Path(uri).expanduser())
    with paths.local_copy(uri) as path:
        return load_inception(path)
