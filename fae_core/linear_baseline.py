"""Linear PCA of standardized features: the baseline of an autoencoder of the same latent size.

The covariance is summed batch by batch, so features are not kept. Training fits the PCA together
with the channel statistics, and validation reports its error beside the autoencoder's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


class Covariance:
    """Running float64 sums of features for their mean, standard deviation and correlation."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.total = np.zeros(dim)
        self.products = np.zeros((dim, dim))

    def update(self, features: np.ndarray) -> None:
        """Add features [..., D]."""
        rows = features.reshape(-1, features.shape[-1]).astype(np.float64)
        self.count += len(rows)
        self.total += rows.sum(0)
        self.products += rows.T @ rows

    def fit(self, num_components: int) -> LinearBaseline:
        """The PCA by the `num_components` leading eigenvectors of the channels' correlations."""
        mean = self.total / self.count
        covariance = self.products / self.count - np.outer(mean, mean)
        std = np.sqrt(np.maximum(np.diag(covariance), 1e-12))
        _, vectors = np.linalg.eigh(covariance / np.outer(std, std))
        return LinearBaseline(mean, std, vectors[:, ::-1][:, :num_components])


@dataclass(frozen=True)
class LinearBaseline:
    """Channel mean and standard deviation [D], and orthonormal components [D, C]."""

    mean: np.ndarray
    std: np.ndarray
    components: np.ndarray

    def reconstruct(self, features: np.ndarray) -> np.ndarray:
        """Raw features [..., D], float64, reconstructed from C components for each token."""
        standardized = (features.astype(np.float64) - self.mean) / self.std
        return (standardized @ self.components @ self.components.T) * self.std + self.mean
