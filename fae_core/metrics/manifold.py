"""Scores that need the features themselves: precision and recall of k-NN manifolds, and the kernel distance.

Precision and recall are Kynkäänniemi et al.'s (arXiv 1904.06991) as ADM's evaluator has them; the kernel distance is
KID (arXiv 1801.01401). Both equal torch-fidelity's on the same features; `pipelines/evaluate.py` gathers those.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fae_core.errors import UserError

BLOCK = 2048


class TooFewImages(UserError, ValueError):
    """A score that needs more images than there are."""


def precision_recall(
    generated: np.ndarray, real: np.ndarray, num_neighbors: int = 3
) -> tuple[float, float]:
    """Share of generated features [n, D] within the real manifold, and of real ones [m, D] within the generated.

    A manifold is the union of the balls around its points that reach to their `num_neighbors`-th neighbour.
    Distances are made 2,048 rows at a time. Raises TooFewImages.
    """
    fewest = min(len(generated), len(real))
    if fewest <= num_neighbors:
        raise TooFewImages(
            f"precision_recall with {num_neighbors} neighbours needs more than {num_neighbors} images of each set, "
            f"not {fewest}."
        )
    a, b = torch.from_numpy(generated).float(), torch.from_numpy(real).float()
    precision = _share_within(a, b, _radii(b, num_neighbors))
    recall = _share_within(b, a, _radii(a, num_neighbors))
    return precision, recall


def _radii(points: Tensor, num_neighbors: int) -> Tensor:
    # The nearest of all is the point itself.
    blocks = [torch.cdist(block, points) for block in points.split(BLOCK)]
    return torch.cat([distances.kthvalue(num_neighbors + 1).values for distances in blocks])


def _share_within(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    inside = [(torch.cdist(block, centres) <= radii).any(dim=1) for block in points.split(BLOCK)]
    return float(torch.cat(inside).double().mean())


def kernel_distance(
    a: np.ndarray,
    b: np.ndarray,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> float:
    """KID of features [n, D] and [m, D]: unbiased MMD² with the kernel (x·y / D + 1)³, mean over random subsets.

    It may be slightly negative. Subsets are drawn as torch-fidelity draws them. Raises TooFewImages.
    """
    if min(len(a), len(b)) < subset_size:
        raise TooFewImages(
            f"kid draws subsets of {subset_size} images, and there are {min(len(a), len(b))}. Set "
            "evaluate.kid_subset_size; scores of different sizes compare, with more noise for smaller ones."
        )
    random = np.random.RandomState(seed)
    distances = []
    for _ in range(num_subsets):
        x = a[random.choice(len(a), subset_size, replace=False)].astype(np.float64)
        y = b[random.choice(len(b), subset_size, replace=False)].astype(np.float64)
        within = sum(kernel.sum() - np.trace(kernel) for kernel in (_kernel(x, x), _kernel(y, y)))
        between = _kernel(x, y).mean()
        distances.append(within / (subset_size * (subset_size - 1)) - 2.0 * between)
    return float(np.mean(distances))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1.0) ** 3
