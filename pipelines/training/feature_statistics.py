"""Exact channel statistics of a backbone's features over the first training images.

The first worker of a run on images makes them once, before its first step; they standardize the
features that autoencoder and pixel decoder see.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from fae_core.backbone import Backbone
from fae_core.latent_stats import ChannelStats
from fae_core.linear_baseline import Covariance, LinearBaseline

from ..config.sections import DataSection
from ..data.records import ImageRecord
from ..networks import features_of
from ..storage import paths
from .image_feed import image_batches
from .job import TrainingError
from .run_log import say

SMALLEST_STD = 1e-6


def fit_statistics(
    records: Sequence[ImageRecord],
    data: DataSection,
    image_size: int,
    run_uri: str,
    backbone: Backbone,
    precision: str,
    num_components: int | None = None,
) -> None:
    """Write mean and variance of the features of `records` into the run's folder.

    With `num_components`, also the linear PCA with so many. Does nothing where they exist already.
    Raises TrainingError where no image can be decoded, and for features that are not finite.
    """
    if paths.exists(_stats_uri(run_uri)):
        return
    device = backbone.mean.device
    say(f"feature statistics over {len(records)} images")
    stats, covariance = ChannelStats.empty(backbone.dim), Covariance(backbone.dim)
    for images in image_batches(records, data, image_size):
        crops = torch.from_numpy(images).to(device)
        features = features_of(backbone, crops, precision).cpu().numpy()
        try:
            stats.update(features)
        except ValueError as error:
            raise TrainingError(
                f"The backbone's features cannot be standardized: {error} Check backbone.weights."
            ) from None
        if num_components:
            covariance.update(features)
    if not stats.count:
        raise TrainingError(f"None of the first {len(records)} training images could be decoded.")
    if num_components:
        baseline = covariance.fit(min(num_components, backbone.dim))
        arrays = {name: np.ascontiguousarray(value) for name, value in vars(baseline).items()}
        paths.write_bytes(_baseline_uri(run_uri), safetensors.numpy.save(arrays))
    # Last: its presence says that both are there.
    paths.write_bytes(_stats_uri(run_uri), json.dumps(stats.to_dict()).encode())


def read_statistics(run_uri: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] float32 that `fit_statistics` wrote.

    No deviation is below 1e-6.
    """
    stats = ChannelStats.from_dict(json.loads(paths.read_bytes(_stats_uri(run_uri))))
    mean, std = stats.mean, np.maximum(stats.std, SMALLEST_STD)
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()


def read_baseline(run_uri: str) -> LinearBaseline:
    """The linear PCA that `fit_statistics` wrote."""
    return LinearBaseline(**safetensors.numpy.load(paths.read_bytes(_baseline_uri(run_uri))))


def _stats_uri(run_uri: str) -> str:
    return paths.join(run_uri, "feature_stats.json")


def _baseline_uri(run_uri: str) -> str:
    return paths.join(run_uri, "linear_baseline.safetensors")
