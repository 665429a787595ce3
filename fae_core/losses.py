"""The pixel decoder's losses: pixel error, perceptual distance, and the adversarial terms' weights.

The paper has a reconstruction, a perceptual and an adversarial loss "following" TiTok (arXiv
2512.07829, eq. 4.2) and gives no weights; the defaults in the recipe are those of ml-starflow and
TA-TiTok.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fae_core.backbone import Backbone
from fae_core.errors import UserError


def pixel_error(output: Tensor, target: Tensor, kind: str, scales: int = 1) -> Tensor:
    """Mean absolute (`l1`) or squared (`l2`) error of images [B, 3, S, S], 0-dim.

    With `scales` above 1 it is the mean over the images and their halvings, S, S/2, S/4 and so on.
    Raises ValueError for another kind.
    """
    if kind not in ("l1", "l2"):
        raise ValueError(f"Pixel loss {kind!r} is neither l1 nor l2.")
    error = F.l1_loss if kind == "l1" else F.mse_loss
    pairs = _pyramid(output, target, scales)
    return torch.stack([error(a, b) for a, b in pairs]).mean()


def edge_error(output: Tensor, target: Tensor, scales: int = 1) -> Tensor:
    """Mean absolute error of the differences between neighbouring pixels, 0-dim.

    It is the mean over rows and columns of images [B, 3, S, S], and over `scales` as in
    `pixel_error`.
    """
    pairs = _pyramid(output, target, scales)
    errors = [F.l1_loss(a.diff(dim=d), b.diff(dim=d)) for a, b in pairs for d in (-2, -1)]
    return torch.stack(errors).mean()


def _pyramid(output: Tensor, target: Tensor, scales: int) -> list[tuple[Tensor, Tensor]]:
    pairs = [(output, target)]
    while len(pairs) < scales:
        output, target = F.avg_pool2d(output, 2), F.avg_pool2d(target, 2)
        pairs.append((output, target))
    return pairs


class BackboneDistance(nn.Module):
    """Perceptual distance [B] of images [B, 3, S, S] in [0, 1] by a frozen backbone.

    It is LPIPS without the learned weights, so it needs no weights but the backbone's: tokens of
    `num_taps` blocks are scaled to unit length, their squared difference is summed over channels
    and averaged over tokens and blocks. The distance is between 0 and 4.
    """

    def __init__(self, backbone: Backbone, num_taps: int = 4) -> None:
        super().__init__()
        # A list keeps the backbone out of the submodules, so it is neither trained nor saved.
        self._backbone = [backbone]
        depth = len(backbone.model.blocks)
        self.blocks = [depth * (i + 1) // num_taps - 1 for i in range(num_taps)]

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        backbone = self._backbone[0]
        with torch.no_grad():
            wanted = backbone.intermediate(target, self.blocks)
        total = output.new_zeros(len(output))
        for a, b in zip(backbone.intermediate(output, self.blocks), wanted, strict=True):
            difference = F.normalize(a.float(), dim=-1) - F.normalize(b.float(), dim=-1)
            total = total + difference.square().sum(-1).mean(-1)
        return total / len(self.blocks)


def lpips_distance() -> nn.Module:
    """LPIPS with VGG-16 of the package `lpips`, frozen.

    Raises UserError where the package or its weights are missing.
    """
    try:
        import lpips
    except ImportError:
        raise UserError(
            "LPIPS needs the package lpips: pip install 'fae-ray[lpips]'. As a loss, "
            "losses.perceptual=backbone needs no other package."
        ) from None
    try:
        network: Any = lpips.LPIPS(net="vgg", verbose=False)
    except OSError as error:
        raise UserError(
            f"lpips could not load VGG-16's weights, which torchvision downloads ({error}). Put "
            "vgg16-397923af.pth into torch's hub folder; as a loss, losses.perceptual=backbone "
            "needs no download."
        ) from None
    return network.eval().requires_grad_(False)


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, largest: float = 1e4
) -> Tensor:
    """‖∂reconstruction/∂W‖ / ‖∂adversarial/∂W‖ at the last layer W, at most `largest`, detached.

    The weight is VQGAN's, its constants are those of RAE's code.
    """
    (by_reconstruction,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (by_adversary,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    ratio = by_reconstruction.norm() / (by_adversary.norm() + 1e-6)
    return ratio.clamp(0.0, largest).detach()


def noise_scale(sigma: float, rms: float, reference_rms: float | None) -> float:
    """Standard deviation of the noise on raw features, scaled to this backbone's features.

    The paper has `sigma` 0.4 for DINOv2 and scales it for other backbones in proportion to the norm
    of their features. `rms` is the root mean square of this backbone's features, `reference_rms`
    that of DINOv2's; None, for DINOv2 itself, returns sigma.
    """
    return sigma if reference_rms is None else sigma * rms / reference_rms
