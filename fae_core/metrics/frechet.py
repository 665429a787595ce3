"""Fréchet distance between Gaussians fitted to features, from moments that merge.

The distance is that of Heusel et al. (arXiv 1706.08500). `fae evaluate` merges one `Moments` for
each chunk of images, so the features of a whole set are never in one process; `frechet_of_features`
does the same for small sets in one process.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from fae_core.errors import TooFewImages


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] float64 of a set; `count` is its size, None where unknown."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None


@dataclass
class Moments:
    """Count, mean [D] and the sum of centred outer products [D, D], float64.

    They merge by Chan's formula, which is exact to rounding also where the mean is large.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """The moments of features [n, D]. Raises ValueError for NaN and infinity."""
        rows = np.asarray(features, dtype=np.float64)
        if not np.isfinite(rows).all():
            raise ValueError("Features must be finite.")
        if not len(rows):
            return cls(0, np.zeros(rows.shape[1]), np.zeros((rows.shape[1], rows.shape[1])))
        mean = rows.mean(axis=0)
        centred = rows - mean
        return cls(len(rows), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Add the rows of `other`. Raises ValueError for another number of dimensions."""
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"{len(other.mean)} dimensions do not merge into {len(self.mean)}.")
        count = self.count + other.count
        if not other.count:
            return
        delta = other.mean - self.mean
        self.scatter = (
            self.scatter
            + other.scatter
            + np.outer(delta, delta) * (self.count * other.count / count)
        )
        self.mean = self.mean + delta * (other.count / count)
        self.count = count

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance. Raises ValueError for fewer than two rows."""
        if self.count < 2:
            raise TooFewImages(f"A covariance needs two images or more, not {self.count}.")
        return Gaussian(self.mean, self.scatter / (self.count - 1), self.count)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """‖μa − μb‖² + tr(Σa + Σb − 2 (Σa Σb)^½), at least 0.

    The trace of the root is computed from the eigenvalues of Σa^½ Σb Σa^½. That matrix is
    symmetric, so there is no imaginary part, and singular covariances need no offset. Warns where a
    set has no more images than dimensions: its covariance is singular, and the distance depends
    more on the number of images than on their quality. Raises ValueError for different numbers of
    dimensions.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"{len(a.mean)} dimensions against {len(b.mean)}.")
    dim = len(a.mean)
    few = [g.count for g in (a, b) if g.count is not None and g.count <= dim]
    if few:
        warnings.warn(
            f"{min(few)} images for {dim} dimensions: the covariance is singular, and the Fréchet "
            "distance compares only with others from as many images. Take more images.",
            RuntimeWarning,
            stacklevel=2,
        )
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    product = root @ b.covariance @ root
    trace_of_root = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0.0)).sum()
    delta = a.mean - b.mean
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * trace_of_root
    return max(float(delta @ delta + spread), 0.0)


def frechet_of_features(a: np.ndarray, b: np.ndarray) -> float:
    """The Fréchet distance of features [n, D] and [m, D]."""
    return frechet_distance(Moments.of(a).gaussian(), Moments.of(b).gaussian())
