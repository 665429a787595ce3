"""What a CPU computes fastest, and how much of its matrix rate a step of each trainer reaches.

    python -m benchmarks.cpu [--threads 1] [--repeats 5] [--tables rates attention trainers]

Figures are processor time (all threads of the process), the best of several calls, because other
jobs on the machine lengthen wall time. The tables decide `fae_core/precision.py` and the lengths in
`fae_core/attention.py`. A trainer's step is a whole one: frozen networks, forward and backward
pass, clipping, optimizer and average, with random weights on blank images. torch counts its
floating-point operations: matrix products, convolutions and attention.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.environment import describe
from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.training import requirements
from fae_core import attention as kernels
from fae_core.backbone import load_backbone
from fae_core.precision import settled_precision

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
SHAPES = ((32, 32), (32, 64), (32, 128), (16, 256), (4, 1024))
"""Images and tokens of the attention's rows; 6 heads of 64."""
SIDE = 1024
"""Of the square matrices whose product is the machine's matrix rate."""
NUM_IMAGES = 8
TRAINERS = (
    ("autoencoder", "emoji-dinov2s", ()),
    ("pixel_decoder", "emoji-dinov2s", ()),
    ("generator", "emoji-dinov2s", ("text.max_length=16",)),  # the longest caption has 14 tokens
    ("autoencoder", "fashion-dinov2s", ()),
    ("pixel_decoder", "fashion-dinov2s", ()),
    ("generator", "fashion-dinov2s", ()),
    ("generator", "fashion-dinov2s", ("generator.kind=starflow", "generator.layers=[2,2,6]")),
)
"""Network, recipe and overrides of the rows of the trainers' table."""


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{describe()}, {arguments.threads} threads\n")
    for name in arguments.tables:
        TABLES[name](arguments.repeats)
        print(flush=True)


def print_rates(repeats: int) -> None:
    """Matrix products and DINOv2-S in both dtypes."""
    print("| what | float32 | bf16 |\n|---|---|---|")
    rates = [f"{matrix_rate(dtype, repeats):.0f}" for dtype in DTYPES.values()]
    print(f"| product of matrices of {SIDE} [GFLOP/s] | {' | '.join(rates)} |")
    speeds = [f"{backbone_rate(dtype, repeats):.1f}" for dtype in DTYPES.values()]
    print(f"| DINOv2-S at 224 px [images/s] | {' | '.join(speeds)} |")


def print_attention(repeats: int) -> None:
    """Both kernels in both dtypes, by length."""
    names = [f"{name}, {kind}" for name in DTYPES for kind in ("fused", "plain")]
    print(f"| images × tokens, forward + backward [ms] | {' | '.join(names)} |")
    print("|---|" + "---|" * len(names))
    for images, tokens in SHAPES:
        cells = []
        for dtype in DTYPES.values():
            for fused in (True, False):
                forward, backward = attention_times(images, tokens, dtype, fused, repeats)
                cells.append(f"{forward * 1e3:.1f} + {backward * 1e3:.1f}")
        print(f"| {images} × {tokens} | {' | '.join(cells)} |", flush=True)


def print_trainers(repeats: int) -> None:
    """A step of each trainer, in the precision that `auto` takes here."""
    dtype = torch.bfloat16 if settled_precision("auto") == "bf16" else torch.float32
    rate = matrix_rate(dtype, repeats)
    print(f"{rate:.0f} GFLOP/s, {dtype}\n")
    print("| network | recipe | batch | images/s | GFLOP per image | of the matrix rate |")
    print("|---|---|---|---|---|---|")
    for network, name, overrides in TRAINERS:
        recipe = load_recipe(name, list(overrides))
        what = recipe.generator.kind if network == "generator" else network
        step, size = requirements.blank_step(recipe, network, torch.device("cpu"))
        with FlopCounterMode(display=False) as counter:
            step()
        flops, duration = counter.get_total_flops(), best(step, repeats)
        print(
            f"| {what} | {name} | {size} | {size / duration:.1f} | {flops / size / 1e9:.2f} "
            f"| {flops / duration / 1e9 / rate:.2f} |",
            flush=True,
        )


def matrix_rate(dtype: torch.dtype, repeats: int) -> float:
    """GFLOP/s of processor time of a product of square matrices."""
    a, b = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    return 2 * SIDE**3 / best(lambda: a @ b, repeats) / 1e9


def backbone_rate(dtype: torch.dtype, repeats: int) -> float:
    """Images per second of processor time through DINOv2-S under autocast."""
    backbone = load_backbone("dinov2_vits14", "random")
    images = torch.zeros(NUM_IMAGES, 224, 224, 3, dtype=torch.uint8)

    @torch.inference_mode()
    def features() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return backbone(images)

    return NUM_IMAGES / best(features, repeats)


def attention_times(
    images: int, tokens: int, dtype: torch.dtype, fused: bool, repeats: int
) -> tuple[float, float]:
    """Seconds of processor time of the forward and of the backward pass."""
    shape = (images, 6, tokens, 64)
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(3))
    gradient = torch.randn(shape).to(dtype)
    kernels.LONGEST_PLAIN = dict.fromkeys(DTYPES.values(), 0 if fused else tokens)
    forward = best(lambda: kernels.attention(q, k, v), repeats)
    both = best(lambda: kernels.attention(q, k, v).backward(gradient), repeats)
    return forward, both - forward


def best(call: Callable[[], object], repeats: int) -> float:
    """Seconds of processor time of the fastest of so many calls, after one that warms up."""
    call()
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        seconds.append(time.process_time() - started)
    return min(seconds)


TABLES = {"rates": print_rates, "attention": print_attention, "trainers": print_trainers}


if __name__ == "__main__":
    main()
