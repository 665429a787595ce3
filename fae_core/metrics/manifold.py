"""Scores that need the features of whole sets: precision and recall, and the kernel distance.

Precision and recall are those of Kynkäänniemi et al. (arXiv 1904.06991) as in ADM's evaluator; the
kernel distance is KID (arXiv 1801.01401). All equal torch-fidelity's on the same features. `fae
evaluate` gathers the features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fae_core.errors import TooFewImages

BLOCK = 2048


def precision_recall(
    generated: np.ndarray, real: np.ndarray, num_neighbors: int = 3
) -> tuple[float, float]:
    """Precision and recall of generated features [n, D] against real features [m, D].

    Precision is the share of generated features within the manifold of the real ones, recall the
    share of real features within the manifold of the generated ones. A manifold is the union of
    balls around its points, each with the distance to the point's `num_neighbors`-th neighbour as
    its radius. Distances are computed for 2,048 rows at a time. Raises TooFewImages.
    """
    fewest = min(len(generated), len(real))
    if fewest <= num_neighbors:
        raise TooFewImages(
            f"precision_recall with {num_neighbors} neighbours needs more than {num_neighbors} "
            f"images of each set, not {fewest}."
        )
    a, b = torch.from_numpy(generated).float(), torch.from_numpy(real).float()
    precision = _share_within(a, b, _radii(b, num_neighbors))
    recall = _share_within(b, a, _radii(a, num_neighbors))
    return precision, recall


def _radii(points: Tensor, num_neighbors: int) -> Tensor:
    # The nearest neighbour of each point is the point itself.
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
    """KID of features [n, D] and [m, D]: the mean unbiased MMD² of random subsets.

    The kernel is (x·y / D + 1)³, and the result may be slightly negative. Subsets are drawn as
    torch-fidelity draws them. Raises TooFewImages.
    """
    if min(len(a), len(b)) < subset_size:
        raise TooFewImages(
            f"kid draws subsets of {subset_size} images, and there are {min(len(a), len(b))}. Set "
            "evaluate.kid_subset_size; scores of different sizes compare, with more noise for "
            "smaller ones."
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
