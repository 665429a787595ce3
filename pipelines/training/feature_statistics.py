"""Exact channel statistics of a backbone's features over the first training images.

The first worker of a run on images makes them once, before its first step; they standardize the
features that autoencoder and pixel decoder see. Those of latents scale a pixel decoder's noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from fae_core.latent_stats import ChannelStats
from fae_core.linear_baseline import Covariance, LinearBaseline

from ..storage import paths
from .job import TrainingError
from .run_log import say

SMALLEST_STD = 1e-6


def fit_statistics(
    features: Iterable[np.ndarray],
    dim: int,
    run_uri: str,
    num_components: int | None = None,
    of: str = "feature",
) -> None:
    """Write mean and variance of `features` [n, N, dim] into the run's folder, as `of`_stats.json.

    With `num_components`, also the linear PCA with so many. Does nothing, and asks for no feature,
    where they exist already. Raises TrainingError for none, where no image could be decoded, and
    for features that are not finite.
    """
    if paths.exists(_stats_uri(run_uri, of)):
        return
    say(f"{of} statistics")
    stats, covariance = ChannelStats.empty(dim), Covariance(dim)
    for batch in features:
        try:
            stats.update(batch)
        except ValueError as error:
            raise TrainingError(
                f"The backbone's features cannot be standardized: {error} Check backbone.weights."
            ) from None
        if num_components:
            covariance.update(batch)
    if not stats.count:
        raise TrainingError("None of the first training images could be decoded.")
    if num_components:
        baseline = covariance.fit(min(num_components, dim))
        arrays = {name: np.ascontiguousarray(value) for name, value in vars(baseline).items()}
        paths.write_bytes(_baseline_uri(run_uri), safetensors.numpy.save(arrays))
    # Last: its presence says that both are there.
    paths.write_bytes(_stats_uri(run_uri, of), json.dumps(stats.to_dict()).encode())


def read_statistics(run_uri: str, of: str = "feature") -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] float32 that `fit_statistics` wrote.

    No deviation is below 1e-6.
    """
    stats = ChannelStats.from_dict(json.loads(paths.read_bytes(_stats_uri(run_uri, of))))
    mean, std = stats.mean, np.maximum(stats.std, SMALLEST_STD)
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()


def read_baseline(run_uri: str) -> LinearBaseline:
    """The linear PCA that `fit_statistics` wrote."""
    return LinearBaseline(**safetensors.numpy.load(paths.read_bytes(_baseline_uri(run_uri))))


def _stats_uri(run_uri: str, of: str) -> str:
    return paths.join(run_uri, f"{of}_stats.json")


def _baseline_uri(run_uri: str) -> str:
    return paths.join(run_uri, "linear_baseline.safetensors")
