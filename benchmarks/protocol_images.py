"""What the samplers' settings do to the Fréchet distance of a trained generator.

    python -m benchmarks.protocol_images NETWORKS TRAINING [--images 500] [--steps 50]
        [--tables protocols methods guidance] [--guide GENERATOR]

NETWORKS is a published folder with a generator of text, like shipped:emoji. It draws the captions
of some pictures of TRAINING with each setting, all from the same noise. The distance is between the
backbone's class tokens of what is drawn and of the true pictures. The first row is the true
pictures after autoencoder and pixel decoder: what a perfect generator could reach.

`protocols` are the settings of public code; benchmarks/protocols.py measures them on exact
velocities. `methods` are Euler's and Heun's at as many evaluations of the network. `guidance` is
away from the empty prompt, and away from GENERATOR, a weaker one, by the same scales.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import fae
from benchmarks.environment import describe, run
from benchmarks.retrieval import captioned, class_tokens
from fae_core.metrics.frechet import Moments, frechet_distance


def protocols(num_steps: int) -> dict[str, dict[str, Any]]:
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


def methods(num_steps: int) -> dict[str, dict[str, Any]]:
    """The same, for fewer evaluations too; a step of Heun's but the last costs two."""
    rows = {}
    for evaluations in (9, 15, num_steps | 1, 51):
        rows[f"Euler, {evaluations} evaluations"] = {"num_steps": evaluations}
        heun = {"sampler": "heun", "num_steps": (evaluations + 1) // 2}
        rows[f"Heun, {evaluations} evaluations"] = heun
    return rows


def guidances(guide: str | None) -> dict[str, dict[str, Any]]:
    """The same: the empty prompt's field or that of `guide` as what guidance leads away from."""
    rows: dict[str, dict[str, Any]] = {}
    for scale in (1.5, 2.0, 3.0):
        rows[f"guidance {scale:g}, empty prompt"] = {"guidance": scale}
        if guide is not None:
            rows[f"guidance {scale:g}, guide"] = {"guidance": scale, "guide": guide}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks")
    parser.add_argument("training")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--steps", type=int, default=50)
    tables = ("protocols", "methods", "guidance")
    parser.add_argument("--tables", nargs="+", choices=tables, default=["protocols"])
    parser.add_argument("--guide", help="a weaker generator, for the table guidance")
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
    rows: dict[str, dict[str, Any]] = {}
    if "protocols" in arguments.tables:
        rows |= protocols(arguments.steps)
    if "methods" in arguments.tables:
        rows |= methods(arguments.steps)
    if "guidance" in arguments.tables:
        rows |= guidances(arguments.guide)
    for name, keys in rows.items():
        keys = {"num_steps": arguments.steps, **keys}
        drawn = fae.sample(arguments.networks, model, prompts=captions, **keys)
        value = frechet_distance(moments(torch.from_numpy(drawn)).gaussian(), true)
        print(f"| {name} | {value:.1f} |", flush=True)


if __name__ == "__main__":
    run(main)
