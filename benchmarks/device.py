"""Are an accelerator's results right, and how near is it to its matrix rate? Runs without Ray.

    python -m benchmarks.device [KEY=VALUE ...] [--device cuda]
                                [--backbones dinov2_vitl14 dinov2_vitg14] [--batches 64 128 256]
                                [--only check encode train sample]

- check: networks, gradients and samplers with equal weights and inputs, on the CPU in float32 and
  on the device. Prints the relative error of each; the exit status is 1 where one exceeds its
  bound.
- encode: uint8 crops in memory to latents in memory, at each batch size, eager and compiled, beside
  the same network on a batch that is on the device already. The difference is the time during which
  the device waits for the loop.
- train, sample: benchmarks.train and benchmarks.sample at the paper's sizes, eager and compiled, in
  processes of their own.

Weights are random.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.environment import describe
from benchmarks.train import matrix_rate, seconds
from fae.pipelines.config.recipe import Recipe, load_recipe
from fae.pipelines.latents.encoder import LatentEncoder
from fae.pipelines.networks.loading import backbone_of
from fae.pipelines.networks.untrained import build_autoencoder
from fae_core.autoencoder import AutoencoderConfig, FeatureAutoencoder
from fae_core.flow_matching import flow_matching_loss
from fae_core.generators.dit import DiT, DiTConfig
from fae_core.generators.starflow import StarFlow, StarFlowConfig, flow_loss
from fae_core.pixel_decoder import PixelDecoder, PixelDecoderConfig
from fae_core.precision import autocast
from fae_core.samplers import PAPER_GUIDANCE, sample_ode

BOUNDS = {"fp32": 1e-3, "bf16": 5e-2}
"""Largest relative error by precision. Sums are in another order on the device, and bfloat16 rounds
to eight bits of mantissa in each of a few dozen layers."""
PARTS = ("check", "encode", "train", "sample")
PAPER_SIZES = (
    "backbone.name=dinov2_vitg14",
    "autoencoder.encoder.num_heads=24",
    "autoencoder.encoder.head_dim=256",
    "autoencoder.decoder.num_heads=24",
    "pixel_decoder.size=L",
    "generator.size=XL",
)
PAPER_TRAIN = (
    *PAPER_SIZES,
    "backbone.weights=random",
    "autoencoder.training.batch_size=64",
    "pixel_decoder.training.batch_size=16",
    "generator.training.batch_size=64",
)
PAPER_SAMPLE = (*PAPER_SIZES, "sample.precision=bf16")
BF16 = tuple(
    f"{name}.training.precision=bf16" for name in ("autoencoder", "pixel_decoder", "generator")
)

Loss = Callable[..., Tensor]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """‖found - wanted‖ / ‖wanted‖ in float64 on the CPU."""
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    return float((found - wanted).norm() / wanted.norm())


def result_and_gradient(
    network: nn.Module, loss: Loss, inputs: Sequence[Tensor], device: torch.device, precision: str
) -> Tensor:
    """The loss and the gradients of all parameters as one vector, float32 on `device`."""
    network.to(device).zero_grad(set_to_none=True)
    with autocast(precision, device):
        value = loss(network, *(t.to(device) for t in inputs))
    value.backward()
    gradients = [p.grad.flatten().float() for p in network.parameters() if p.grad is not None]
    return torch.cat([value.detach().float().reshape(1), *gradients])


def training_cases() -> dict[str, tuple[nn.Module, Loss, list[Tensor]]]:
    """Name -> (small network, its training loss, inputs) of every network that is trained."""
    grid, classes = (8, 8), torch.arange(4)
    latents, noise = torch.randn(2, 4, 16, *grid).unbind()
    features = torch.randn(4, 64, 192)
    autoencoder = FeatureAutoencoder(
        AutoencoderConfig(192, 16, grid, encoder_num_heads=3, encoder_head_dim=128,
                          decoder_depth=4, decoder_num_heads=3)
    )  # fmt: skip
    decoder = PixelDecoder(PixelDecoderConfig(192, grid, 64, width=192, depth=4, num_heads=3))
    dit = DiT(DiTConfig(16, grid, width=192, depth=6, num_heads=3, num_classes=10))
    flow = StarFlow(StarFlowConfig(16, grid, width=192, layers=(2, 4), num_classes=10))
    for network in (dit, flow):  # at their initialization most weights have no effect
        for parameter in network.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.05)
    return {
        "autoencoder": (
            autoencoder,
            lambda model, x, e: model(x, e)["loss"],
            [features, torch.randn(4, 64, 16)],
        ),
        "pixel decoder": (
            decoder,
            lambda model, x, y: F.mse_loss(model(x).float(), y),
            [features, torch.rand(4, 3, 64, 64)],
        ),
        "diffusion transformer": (
            dit,
            lambda model, x, e, t, y: flow_matching_loss(model, x, e, t, y)["loss"],
            [latents, noise, torch.rand(4), classes],
        ),
        "flow": (
            flow,
            lambda model, x, e, y: flow_loss(model, x, e, y, 0.3)["loss"],
            [latents, noise, classes],
        ),
    }


def check(recipe: Recipe, device: torch.device) -> bool:
    """Print the relative errors of the device; False where one exceeds BOUNDS."""
    print("| what | precision | relative error | bound |\n|---|---|---|---|")
    good = True

    def row(name: str, precision: str, found: Tensor, wanted: Tensor) -> None:
        nonlocal good
        error = relative_error(found, wanted)
        sound = error <= BOUNDS[precision]  # also false for NaN
        good = good and sound
        mark = "" if sound else " **exceeded**"
        print(f"| {name} | {precision} | {error:.1e}{mark} | {BOUNDS[precision]:.0e} |", flush=True)

    torch.manual_seed(0)
    cpu = torch.device("cpu")
    images = np.random.default_rng(0).integers(0, 256, (6, 256, 256, 3), np.uint8)
    wanted = torch.from_numpy(encoder_of(recipe, cpu, "fp32").encode(images, 4)["mean"])
    for precision in BOUNDS:
        for compiled in (False, True):
            found = encoder_of(recipe, device, precision, compiled).encode(images, 4)["mean"]
            name = f"latents{', compiled' if compiled else ''}"
            row(name, precision, torch.from_numpy(found), wanted)
    torch.manual_seed(0)
    for name, (network, loss, inputs) in training_cases().items():
        wanted = result_and_gradient(network, loss, inputs, cpu, "fp32")
        for precision in BOUNDS:
            found = result_and_gradient(network, loss, inputs, device, precision)
            row(f"{name}: loss and gradients", precision, found, wanted)
        if isinstance(network, DiT | StarFlow):
            row(f"{name}: samples", "fp32", *(drawn(network, inputs, d) for d in (device, cpu)))
    return good


def drawn(network: DiT | StarFlow, inputs: Sequence[Tensor], device: torch.device) -> Tensor:
    """Samples with the first input as noise.

    20 steps of the ODE with the paper's guidance, or the flow's guided inverse.
    """
    network.to(device).eval()
    noise, labels = inputs[0].to(device), inputs[-1].to(device)
    with torch.inference_mode():
        if isinstance(network, StarFlow):
            return network.sample(noise, labels, 1.0)
        return sample_ode(network, noise, labels, 20, 1.0, PAPER_GUIDANCE, network.null_class)


def encoder_of(
    recipe: Recipe, device: torch.device, precision: str, compiled: bool = False
) -> LatentEncoder:
    """The recipe's backbone with an untrained autoencoder, which is the same at each call."""
    backbone = backbone_of(recipe)
    torch.manual_seed(1)
    autoencoder = build_autoencoder(recipe.autoencoder, backbone.spec).eval()
    modules = backbone.to(device), autoencoder.to(device)
    return LatentEncoder(*modules, "", ["mean"], precision, device, compiled)


def measure_encoder(encoder: LatentEncoder, side: int, size: int, rate: float) -> list[str]:
    """Images/s of the loop and of the network alone, share of the matrix rate, and waiting share.

    The loop goes from memory to memory. The last figure is the share of its time in which the
    device waits.
    """
    device = encoder.device
    images = np.random.default_rng(0).integers(0, 256, (4 * size, side, side, 3), np.uint8)
    with torch.inference_mode():  # as in the loop; a tensor of another kind is compiled again
        there = torch.from_numpy(images[:size]).to(device)

    def alone() -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            for _ in range(4):
                encoder.network(there)

    def looped() -> None:
        encoder.encode(images, size)

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        encoder.posterior(there[:1])
    for warm in (looped, alone):  # kernels and, where asked for, compilation
        warm()
    in_loop, bare = seconds(looped, device, 3), seconds(alone, device, 3)
    share = counter.get_total_flops() * len(images) / in_loop / rate
    return [
        f"{len(images) / in_loop:.1f}", f"{len(images) / bare:.1f}", f"{share:.3f}",
        f"{max(0.0, 1 - bare / in_loop):.3f}",
    ]  # fmt: skip


def encode(recipe: Recipe, batches: Sequence[int], device: torch.device) -> list[list[str]]:
    """Rows of the table of encoding, for one backbone."""
    rate = matrix_rate(device, torch.bfloat16)
    rows = []
    for compiled in (False, True):
        encoder = encoder_of(recipe, device, "bf16", compiled)
        for size in batches:
            if compiled:
                torch.compiler.reset()  # torch keeps eight shapes of a function, then it refuses
            measured = measure_encoder(encoder, recipe.image_size, size, rate)
            rows.append([recipe.backbone.name, str(size), "yes" if compiled else "no", *measured])
            print("  ".join(rows[-1]), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbones", nargs="+", default=["dinov2_vitl14", "dinov2_vitg14"])
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--recipe", default="photos-dinov2s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments, overrides = parser.parse_known_args()
    device, status = torch.device(arguments.device), 0
    settings = ["backbone.weights=random", *overrides]
    print(f"{describe()}\n", flush=True)
    if "check" in arguments.only and not check(load_recipe(arguments.recipe, settings), device):
        status = 1
    if "encode" in arguments.only:
        rows = []
        for name in arguments.backbones:
            recipe = load_recipe(arguments.recipe, [*settings, f"backbone.name={name}"])
            rows += encode(recipe, arguments.batches, device)
        print(
            "\n| backbone | batch | compiled | images/s | network alone | of the matrix rate "
            "| device waits |"
        )
        print("|---|---|---|---|---|---|---|")
        for row in rows:
            print(f"| {' | '.join(row)} |")
    for part, paper, key in (
        ("train", PAPER_TRAIN, "{}.training.compile"),
        ("sample", PAPER_SAMPLE, "sample.compile"),
    ):
        if part not in arguments.only:
            continue
        for compiled in ("false", "true"):
            keys = {key.format(name) for name in ("autoencoder", "pixel_decoder", "generator")}
            asked = [*paper, *BF16, *(f"{k}={compiled}" for k in sorted(keys)), *overrides]
            command = [sys.executable, "-m", f"benchmarks.{part}", "--device", device.type, *asked]
            status |= subprocess.run(command, check=False).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
