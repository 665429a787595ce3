"""Semantic probes on plain arrays: k-NN, linear probe, patch similarity and patch matching.

arXiv 2512.07829 probes latents with DINOv2's pretrained linear head and shows similarity and
matching in pictures only; the other numbers are not in the paper. `fae probe` applies these
functions to features, to their reconstructions and to latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

Z_95 = 1.959963984540054
KNN_CHUNK = 512
HELD_OUT_EVERY = 5
KMEANS_STARTS = 4
SMALLEST_OBJECT = 1 / 16
"""The smallest share of the patches that counts as an object."""


@dataclass(frozen=True)
class Accuracy:
    """`num_right` correct answers out of `num_images`."""

    num_right: int
    num_images: int

    @property
    def value(self) -> float:
        return self.num_right / self.num_images

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval (JASA 22, 1927).

        Unlike the normal approximation it holds at 0 and 1 and for few images.
        """
        n, p = self.num_images, self.value
        centre = (p + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
        half = Z_95 * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n * n)) / (1 + Z_95**2 / n)
        return max(0.0, centre - half), min(1.0, centre + half)


def knn_accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    num_neighbors: int,
) -> Accuracy:
    """k-NN accuracy on `test` [m, D]: the majority label of the nearest `train` vectors [n, D].

    Nearness is the cosine; of labels with equal votes the smallest wins. Raises ValueError for more
    neighbours than training vectors.
    """
    if num_neighbors > len(train):
        raise ValueError(f"{num_neighbors} neighbours of {len(train)} training vectors.")
    classes, codes = np.unique(train_labels, return_inverse=True)
    reference, right = _unit(train), 0
    for start in range(0, len(test), KNN_CHUNK):
        similarity = _unit(test[start : start + KNN_CHUNK]) @ reference.T
        nearest = np.argpartition(-similarity, num_neighbors - 1, axis=1)[:, :num_neighbors]
        votes = np.zeros((len(nearest), len(classes)), np.int64)
        np.add.at(votes, (np.arange(len(nearest))[:, None], codes[nearest]), 1)
        right += int((classes[votes.argmax(1)] == test_labels[start : start + KNN_CHUNK]).sum())
    return Accuracy(right, len(test))


@dataclass(frozen=True)
class LinearProbe:
    """Multinomial logistic regression on standardized vectors.

    `head` is scikit-learn's pipeline of standardization and regression, `regularization` its C.
    """

    head: Any
    regularization: float

    @classmethod
    def fit(
        cls,
        features: np.ndarray,
        labels: np.ndarray,
        grid: Sequence[float],
        max_iterations: int = 1000,
    ) -> LinearProbe:
        """Fit to features [n, D] with the best C of `grid`; a smaller C regularizes more.

        C is chosen by the accuracy on every fifth image of each class, the smallest of equals; the
        head is then fitted to all images.
        """
        held = held_out(labels)
        best = min(grid)
        if len(grid) > 1 and held.any():
            scores = {}
            for c in sorted(grid):
                head = _head(c, max_iterations).fit(_double(features[~held]), labels[~held])
                scores[c] = head.score(_double(features[held]), labels[held])
            best = max(scores, key=lambda c: scores[c])
        return cls(_head(best, max_iterations).fit(_double(features), labels), best)

    def accuracy(self, features: np.ndarray, labels: np.ndarray) -> Accuracy:
        """The accuracy on features [m, D], also of another kind than the head was fitted to."""
        right = self.head.predict(_double(features)) == labels
        return Accuracy(int(right.sum()), len(labels))


def held_out(labels: np.ndarray) -> np.ndarray:
    """bool [n], true at the second, seventh, … image of each class: each keeps its first image."""
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        held[np.flatnonzero(labels == label)[1::HELD_OUT_EVERY]] = True
    return held


def cosine_matrix(tokens: np.ndarray) -> np.ndarray:
    """Cosines [..., N, N] between the patch tokens [..., N, D] of an image."""
    unit = _unit(tokens)
    return unit @ np.swapaxes(unit, -1, -2)


def similarity_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pearson correlation [B] of the cosine matrices of two sets of tokens [B, N, *].

    It is taken over pairs of different patches. It is 0 where all tokens of an image are equal.
    """
    rows, columns = np.triu_indices(first.shape[1], 1)
    a, b = (cosine_matrix(tokens)[:, rows, columns] for tokens in (first, second))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    norm = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.where(norm > 1e-12, (a * b).sum(1) / np.maximum(norm, 1e-12), 0.0)


def match_patches(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The indices [n], int64, of the tokens of `target` [N, D] nearest to those of `source` [n, D].

    The nearest token is the one with the largest cosine.
    """
    return np.asarray((_unit(source) @ _unit(target).T).argmax(1))


def within_one_patch(first: np.ndarray, second: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """bool [n], true where two patches of `grid` are the same or neighbours, also diagonally."""
    rows = np.abs(first // grid[1] - second // grid[1])
    columns = np.abs(first % grid[1] - second % grid[1])
    return np.asarray((rows <= 1) & (columns <= 1))


def object_patches(
    tokens: np.ndarray, grid: tuple[int, int], num_clusters: int, seed: int
) -> np.ndarray:
    """Indices of the patches, of tokens [N, D], that belong to an image's object.

    The tokens, scaled to unit length, are clustered by K-means as in the paper. The paper does not
    say which cluster is the object: here it is the one with the smallest share of patches on the
    border, because a background extends to the border. Clusters of less than a sixteenth of the
    image are ignored.
    """
    means = KMeans(min(num_clusters, len(tokens)), n_init=KMEANS_STARTS, random_state=seed)
    clusters = means.fit_predict(_unit(tokens))
    border = np.zeros(grid, bool)
    border[[0, -1]] = border[:, [0, -1]] = True
    members = [np.flatnonzero(clusters == c) for c in np.unique(clusters)]
    members = [m for m in members if len(m) >= SMALLEST_OBJECT * len(tokens)] or members
    return min(members, key=lambda m: float(border.ravel()[m].mean()))


def _head(regularization: float, max_iterations: int) -> Any:
    return make_pipeline(
        StandardScaler(), LogisticRegression(C=regularization, max_iter=max_iterations)
    )


def _double(features: np.ndarray) -> np.ndarray:
    # The solver's line search stalls on float32.
    return np.asarray(features, np.float64)


def _unit(vectors: np.ndarray) -> np.ndarray:
    double = np.asarray(vectors, np.float64)
    return double / np.maximum(np.linalg.norm(double, axis=-1, keepdims=True), 1e-12)
