"""The similarity of each reconstruction to its original; LPIPS is in `fae_core.losses`."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 11
"""Side [px] of SSIM's window, and of the smallest image that has an SSIM."""


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [B] in dB of images in [0, 1]."""
    error = (output - target).float().square().flatten(1).mean(1)
    return -10.0 * torch.log10(error.clamp_min(1e-12))


def ssim(output: Tensor, target: Tensor) -> Tensor:
    """Structural similarity [B] of images [B, 3, S, S] in [0, 1], averaged over channels.

    Wang et al. 2004 with a Gaussian window of 11 px and sigma 1.5; equal to scikit-image's with
    gaussian_weights=True, sigma=1.5 and use_sample_covariance=False.
    """
    # In float64: the variances are small differences, and a GPU convolves float32 in TF32.
    x, y = output.double(), target.double()
    place = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device)
    offset = place - place[: 1 - WINDOW, None] - WINDOW // 2
    window = torch.exp(-(offset**2) / (2 * 1.5**2)) * (offset.abs() <= WINDOW // 2)
    window = window / window.sum(1, keepdim=True)

    def blur(x: Tensor) -> Tensor:
        return window @ x @ window.T

    mean_x, mean_y = blur(x), blur(y)
    variance_x = blur(x * x) - mean_x.square()
    variance_y = blur(y * y) - mean_y.square()
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    value = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x.square() + mean_y.square() + c1) * (variance_x + variance_y + c2)
    )
    return value.flatten(1).mean(1).float()
