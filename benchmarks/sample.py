"""Images per second of sampling, decoders included, and the network's own share of the time.

    python -m benchmarks.sample [--networks dit starflow] [--images 8] [--steps 250]
                                [--device cuda] [KEY=VALUE ...]

The diffusion transformer integrates the ODE with the paper's guidance (the batch is doubled only
where the scale is not 1); the flow is inverted with cached keys and values, guided in its deep
block. "Network alone" is, for the diffusion transformer, the same number of calls at the same batch
sizes on tensors that are on the device already; for the flow it is one forward pass, which computes
all tokens at once as the inverse cannot. Weights are random, which does not change the time.
Overrides are the recipe's.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.environment import describe
from benchmarks.train import LATENT_SHAPE, seconds
from fae.pipelines.config.recipe import Recipe, load_recipe
from fae.pipelines.networks.untrained import (
    backbone_spec,
    build_autoencoder,
    build_generator,
    build_pixel_decoder,
)
from fae.pipelines.sampling.latent_decoder import LatentDecoder
from fae.pipelines.sampling.latent_sampler import (
    LatentSampler,
    image_noise,
    intervals,
    sampling_shift,
)
from fae_core.generators.dit import DiT
from fae_core.generators.starflow import StarFlow
from fae_core.precision import autocast
from fae_core.samplers import guidance_scale, timestep_grid

SMALL = ("generator.size=S", "pixel_decoder.size=S", "sample.guidance=paper")
"""Sizes for two CPU cores; the command line overrides them."""


def network_alone(
    model: DiT | StarFlow, recipe: Recipe, x: torch.Tensor, labels: torch.Tensor
) -> None:
    """The evaluations of the network that one sample takes, without the sampler."""
    with torch.inference_mode(), autocast(recipe.sample.precision, x.device):
        if isinstance(model, StarFlow):
            model(x, labels)
            return
        both, both_labels = torch.cat([x, x]), torch.cat([labels, labels])
        guidance = intervals(recipe.sample)
        shift = sampling_shift(recipe.sample, x.shape[1:])
        for t in timestep_grid(recipe.sample.num_steps, shift)[:-1]:
            if guidance_scale(t, guidance) == 1.0:
                model(x, torch.full((len(x),), t, device=x.device), labels)
            else:
                model(both, torch.full((len(both),), t, device=x.device), both_labels)


def measure(name: str, recipe: Recipe, images: int, device: torch.device) -> list[str]:
    """One row of the table."""
    torch.manual_seed(0)
    spec = backbone_spec(recipe)
    section = recipe.generator.model_copy(update={"kind": name})
    model = build_generator(section, LATENT_SHAPE).to(device).eval()
    autoencoder = build_autoencoder(recipe.autoencoder, spec).to(device).eval()
    decoder = build_pixel_decoder(recipe.pixel_decoder, spec, recipe.image_size).to(device).eval()
    decoder = LatentDecoder(autoencoder, decoder, {})
    if recipe.sample.compile and name == "dit":
        model.compile(dynamic=False, fullgraph=True)
    draw = LatentSampler(model, recipe.sample, recipe.seed, device)
    noise = image_noise(recipe.seed, range(images), LATENT_SHAPE)
    labels = torch.arange(images) % section.num_classes
    there = noise.to(device), labels.to(device)

    with torch.inference_mode():
        latents = draw(noise, labels, list(range(images)))
        decoder(latents)
        drawing = seconds(lambda: draw(noise, labels, list(range(images))), device, 1)
        painting = seconds(lambda: decoder(latents), device, 3)
    alone = seconds(lambda: network_alone(model, recipe, *there), device, 1)
    total = drawing + painting
    figures = (images / total, painting / total, alone / drawing)
    return [name, str(images), *(f"{figure:.3f}" for figure in figures)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--networks", nargs="+", choices=("dit", "starflow"), default=["dit", "starflow"]
    )
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--recipe", default="photos-dinov2s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments, overrides = parser.parse_known_args()
    settings = [*SMALL, f"sample.num_steps={arguments.steps}", *overrides]
    recipe = load_recipe(arguments.recipe, settings)
    device = torch.device(arguments.device)
    rows = [measure(name, recipe, arguments.images, device) for name in arguments.networks]
    print(f"\n{describe()}\n{arguments.recipe} {' '.join(settings)}\n")
    print("| network | images | images/s | decoders' share | network alone / sampler |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
