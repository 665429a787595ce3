"""Generator and decoders together on one device: image indices and labels to images.

The label of an image is its class, or for a generator of text the number of its prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fae_core.checkpoint import GENERATORS
from fae_core.generators.dit import DiT
from fae_core.generators.mmdit import MMDiT
from fae_core.generators.starflow import StarFlow

from ..config import Recipe, RecipeError
from ..data.records import class_name, class_number
from ..networks import load_checkpoint
from ..networks.text_encoder import CaptionEncoder, encoder_of
from .guide import checked_guide
from .latent_decoder import LatentDecoder
from .latent_sampler import LatentSampler, image_noise
from .prompts import Prompts, has_prompts, read_prompts


class ImageSampler:
    """Generator and decoders on one device, and what identifies them.

    Raises CheckpointError for networks that do not belong together, and RecipeError for settings
    that the generator cannot be sampled with.
    """

    def __init__(self, recipe: Recipe, device: str = "cpu") -> None:
        networks = ("generator", "autoencoder", "pixel_decoder")
        generator, *_ = recipe.require("sample", *(f"{name}.checkpoint" for name in networks))
        self.recipe = recipe
        self.device = torch.device(device)
        loaded = load_checkpoint(generator, *GENERATORS)
        self.decoder = LatentDecoder.of(recipe, self.device, loaded.fingerprints["autoencoder"])
        self.model = loaded.module.to(self.device)
        self.fingerprints = {"generator": loaded.weights_sha256, **self.decoder.fingerprints}
        self.prompts: Prompts | None = None
        self.guide: DiT | MMDiT | None = None
        if uri := recipe.sample.guide:
            guide = load_checkpoint(uri, *GENERATORS)
            self.guide = checked_guide(f"sample.guide={uri}", guide, loaded).to(self.device)
            self.fingerprints["guide"] = guide.weights_sha256
        self._latents().check()
        self.compiled = recipe.sample.compile and not isinstance(self.model, StarFlow)
        if self.compiled:
            for network in (self.model, self.guide) if self.guide else (self.model,):
                network.compile(dynamic=False, fullgraph=True)
        config = self.model.config
        self.shape = (config.latent_dim, *config.grid)
        self.class_names = loaded.class_names
        self.records: list[dict[str, Any]] = []
        """What the prompts' file says of each prompt; empty for a generator of classes."""
        self.text: CaptionEncoder | None = None
        if isinstance(self.model, MMDiT):
            if recipe.sample.classes:
                raise RecipeError(f"{generator} draws prompts; it has no sample.classes.")
            self.records = read_prompts(recipe)
            self.text = encoder_of(generator, loaded, recipe.text.name, recipe.text.weights)
            texts = [record["prompt"] for record in self.records]
            self.prompts = Prompts(texts, self.text.to(self.device))
        elif has_prompts(recipe):
            raise RecipeError(
                f"{generator} draws classes (sample.classes), no prompts: those need a generator "
                "of kind mmdit."
            )
        self.num_classes: int = len(self.records) or config.num_classes
        self.classes = [
            class_number(given, self.class_names, self.num_classes, "sample.classes:")
            for given in recipe.sample.classes or []
        ]
        """Numbers of the recipe's classes, empty for all of the generator's or all prompts."""

    def labels(self, indices: list[int]) -> list[int]:
        """The class or prompt of each image: the recipe's in turn."""
        classes = self.classes or range(self.num_classes)
        return [classes[i % len(classes)] for i in indices]

    def name(self, label: int) -> str:
        """What people call the images with `label`: the class's name or number, or the prompt."""
        return self.prompts.name(label) if self.prompts else class_name(label, self.class_names)

    def __call__(self, indices: list[int], labels: list[int]) -> np.ndarray:
        """Pictures uint8 [n, S, S, 3] of image `indices`, in batches of the recipe's size."""
        options = self.recipe.sample
        # Another batch size would be compiled anew.
        pad_to = min(options.batch_size, options.shard_size) if self.compiled else 0
        return draw_images(self._latents(), self.decoder, indices, labels, pad_to)

    def _latents(self) -> LatentSampler:
        return LatentSampler(
            self.model,
            self.recipe.sample,
            self.recipe.seed,
            self.device,
            self.prompts,
            self.guide,
        )


@torch.inference_mode()
def draw_images(
    draw: LatentSampler,
    decoder: LatentDecoder,
    indices: list[int],
    labels: list[int],
    pad_to: int = 0,
) -> np.ndarray:
    """Pictures uint8 [n, S, S, 3] of the images `indices` with their `labels`.

    Batches have the sampler's `batch_size`; smaller ones are filled up to `pad_to` images.
    """
    size, config = draw.sample.batch_size, draw.model.config
    parts = []
    for start in range(0, len(indices), size):
        some, wanted = indices[start : start + size], labels[start : start + size]
        count = len(some)
        some, wanted = (part + part[-1:] * (pad_to - count) for part in (some, wanted))
        noise = image_noise(draw.seed, some, (config.latent_dim, *config.grid))
        latents = draw(noise, torch.tensor(wanted), some)[:count]
        parts.append(decoder(latents).cpu().numpy())
    return np.concatenate(parts)
