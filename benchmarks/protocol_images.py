"""What the samplers' settings of public code do to the Fréchet distance of a trained generator.

    python -m benchmarks.protocol_images NETWORKS TRAINING [--images 500] [--steps 50]

NETWORKS is a published folder with a generator of text, like shipped:emoji. It draws the captions
of some pictures of TRAINING with each setting, all from the same noise. The distance is between the
backbone's class tokens of what is drawn and of the true pictures. The first row is the true
pictures after autoencoder and pixel decoder: what a perfect generator could reach.
benchmarks/protocols.py does this on exact velocities.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import fae
from benchmarks.environment import describe, run
from benchmarks.retrieval import captioned, class_tokens
from fae_core.metrics.frechet import Moments, frechet_distance


def settings(num_steps: int) -> dict[str, dict[str, Any]]:
    """Arguments of `fae.sample` by the name of their row."""
    rows: dict[str, dict[str, Any]] = {"ODE": {}}
    for scale in (1.0, 2.0):
        for last in (None, 0.04):
            name = f"SDE, w = {scale:g}σ, last step {last or 1 / num_steps:g}"
            rows[name] = {"sampler": "sde", "diffusion_scale": scale, "last_step": last}
    for start, scale in ((0.7, 2.5), (0.875, 6.7)):
        for channels in (None, 3):
            which = "all channels" if channels is None else f"{channels} channels"
            rows[f"ODE, guidance {scale:g} from t = {start:g}, {which}"] = {
                "guidance": [{"start": start, "end": 0.0, "scale": scale}],
                "guidance_channels": channels,
            }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks")
    parser.add_argument("training")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    print(describe())
    model = fae.FeatureAutoencoder.from_pretrained(arguments.networks)
    captions, pictures = captioned(arguments.training, model.image_size, arguments.images)

    def moments(images: torch.Tensor) -> Moments:
        return Moments.of(class_tokens(model.backbone, images).double().numpy())

    true = moments(pictures).gaussian()
    decoded = torch.from_numpy(model.decode_images(model.encode_images(pictures.numpy())))
    value = frechet_distance(moments(decoded).gaussian(), true)
    print(f"| true latents, decoded | {value:.1f} |", flush=True)
    for name, keys in settings(arguments.steps).items():
        drawn = fae.sample(
            arguments.networks, model, prompts=captions, num_steps=arguments.steps, **keys
        )
        value = frechet_distance(moments(torch.from_numpy(drawn)).gaussian(), true)
        print(f"| {name} | {value:.1f} |", flush=True)


if __name__ == "__main__":
    run(main)
