"""Inception-v3 of 2015, the network of FID, sFID and Inception Score, and that score from sums.

The network is torch-fidelity's port of TensorFlow's graph, with its resize. sFID's features are
those of ADM: the first seven channels of `mixed_6/conv`, in TensorFlow's order of axes, so ADM's
mu_s and sigma_s can be compared with.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fae_core.hashing import tensors_sha256
from fae_core.weights import WeightsError, read_tensors

POOL_DIM = 2048
SPATIAL_CHANNELS = 7
SPATIAL_DIM = 17 * 17 * SPATIAL_CHANNELS


class Inception(nn.Module):
    """The network, frozen and in float32. Build it with `load_inception`."""

    def __init__(self, network: Any, weights_sha256: str) -> None:
        super().__init__()
        self.network = network
        self.weights_sha256 = weights_sha256
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.mixed_6_conv = output

    @torch.inference_mode()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """`inception` [B, 2048], `spatial` [B, 2023] and `logits` [B, 1008] without bias.

        `images` are uint8 [B, S, S, 3]. GPUs compute in float32 too, not in TF32.
        """
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            pool, logits = self.network(images.permute(0, 3, 1, 2))
        spatial = self.mixed_6_conv[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return {"inception": pool, "spatial": spatial, "logits": logits}


def load_inception(weights: Path | None = None) -> Inception:
    """The network with the weights of a file, or with those that torch-fidelity downloads.

    The file is .pth or .safetensors in torch-fidelity's names. Nothing is unpickled. Raises
    WeightsError where torch-fidelity is not installed or the weights are missing or do not fit.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as fidelity
    except ImportError:
        raise WeightsError(
            "Inception scores need the package torch-fidelity: pip install 'fae-ray[evaluate]'. "
            "evaluate.scores=[frechet_backbone] needs no other package."
        ) from None
    if weights is None:
        state = _download(fidelity.URL_INCEPTION_V3)
    elif weights.is_file():
        state = read_tensors(weights)
    else:
        raise WeightsError(
            f"No Inception weights at {weights}: see evaluate.inception_weights and "
            "FAE_INCEPTION_WEIGHTS."
        )
    with tempfile.TemporaryDirectory() as folder:
        # torch-fidelity unpickles the file it is given, so that file holds these tensors alone.
        path = Path(folder) / "inception.pth"
        torch.save(state, path)
        try:
            network = fidelity.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], str(path)
            )
        except RuntimeError as error:
            raise WeightsError(
                f"{weights} is not torch-fidelity's Inception-v3 of 2015: {str(error)[:200]}"
            ) from None
    return Inception(network, tensors_sha256(state))


def _download(url: str) -> dict[str, Tensor]:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return dict(torch.hub.load_state_dict_from_url(url, weights_only=True))
    except OSError as error:
        raise WeightsError(
            f"Inception's weights could not be downloaded ({error}). Fetch {url} elsewhere and "
            "give the file as evaluate.inception_weights=… or FAE_INCEPTION_WEIGHTS; "
            "evaluate.scores=[frechet_backbone] needs no download."
        ) from None


def split_numbers(num_images: int, num_splits: int, seed: int) -> np.ndarray:
    """The split, int64 [n], of each image after torch-fidelity's shuffle.

    The sizes of the splits differ by at most one.
    """
    order = np.random.RandomState(seed).permutation(num_images)
    bounds = np.arange(1, num_splits) * num_images // num_splits
    numbers = np.empty(num_images, dtype=np.int64)
    numbers[order] = np.searchsorted(bounds, np.arange(num_images), side="right")
    return numbers


@dataclass
class SplitSums:
    """Sums over the images of each of S splits, float64.

    `counts` [S] are the images, `probabilities` [S, C] sum the class probabilities p, and
    `negentropies` [S] sum Σ p log p.
    """

    counts: np.ndarray
    probabilities: np.ndarray
    negentropies: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray, splits: np.ndarray, num_splits: int) -> SplitSums:
        """The sums of logits [n, C]; `splits` [n] is the split of each row."""
        log_p = torch.from_numpy(logits).double().log_softmax(dim=1).numpy()
        p = np.exp(log_p)
        member = np.zeros((num_splits, len(splits)))
        member[splits, np.arange(len(splits))] = 1.0
        return cls(member.sum(axis=1), member @ p, member @ (p * log_p).sum(axis=1))

    def merge(self, other: SplitSums) -> None:
        """Add the sums of `other`."""
        self.counts = self.counts + other.counts
        self.probabilities = self.probabilities + other.probabilities
        self.negentropies = self.negentropies + other.negentropies

    def score(self) -> float:
        """Inception Score (arXiv 1606.03498): exp of the mean KL(p ‖ mean p), mean over splits."""
        marginal = self.probabilities / self.counts[:, None]
        smallest = np.finfo(np.float64).tiny
        marginal_part = (marginal * np.log(marginal.clip(min=smallest))).sum(axis=1)
        return float(np.exp(self.negentropies / self.counts - marginal_part).mean())
