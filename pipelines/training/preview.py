"""The validation of a generator's training: samples from the same noise, as one picture."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fae_core.figures import pca_map, picture_grid, principal_basis
from fae_core.generators.dit import DiT
from fae_core.generators.mmdit import MMDiT
from fae_core.generators.starflow import StarFlow

from ..config import Recipe
from ..data.records import class_name
from ..latents import LatentStore
from ..sampling import LatentDecoder
from ..sampling.latent_sampler import LatentSampler, image_noise
from ..sampling.prompts import Encode, Prompts, has_prompts, read_prompts

GRID_ROWS = 4
GRID_COLUMNS = 6
PREVIEW_STEPS = 50


class Preview:
    """Samples from the same noise at every validation.

    They are pictures where the recipe names both decoders, else PCA maps of the latents. A row has
    one class, or one prompt: the recipe's, else captions of the store.
    """

    def __init__(
        self,
        recipe: Recipe,
        store: LatentStore,
        device: torch.device,
        encode: Encode | None = None,
    ) -> None:
        self.recipe = recipe
        self.store = store
        self.device = device
        self.decoder: LatentDecoder | None = None
        if recipe.autoencoder.checkpoint and recipe.pixel_decoder.checkpoint:
            autoencoder = store.manifest["parts"]["autoencoder weights"]
            self.decoder = LatentDecoder.of(recipe, device, autoencoder)
        self.prompts: Prompts | None = None
        if encode is None:
            num_rows = min(GRID_ROWS, recipe.generator.num_classes)
            self.names = [class_name(row, store.class_names) for row in range(num_rows)]
        else:
            texts = list(some_captions(store).values())
            if has_prompts(recipe):
                texts = preview_prompts(recipe)
            self.prompts = Prompts(texts, encode)
            self.names = [self.prompts.name(row) for row in range(len(texts))]

    def __call__(self, model: nn.Module, step: int) -> tuple[dict[str, float], bytes | None]:
        """The standard deviation of the normalized samples, and their grid, classes in rows."""
        assert isinstance(model, DiT | MMDiT | StarFlow)
        labels = torch.arange(len(self.names)).repeat_interleave(GRID_COLUMNS)
        noise = image_noise(self.recipe.seed, range(len(labels)), self.store.latent_shape)
        sample = self.recipe.sample.model_copy(
            update={"num_steps": min(self.recipe.sample.num_steps, PREVIEW_STEPS)}
        )
        with torch.inference_mode():
            draw = LatentSampler(model, sample, self.recipe.seed, self.device, self.prompts)
            latents = draw(noise, labels, list(range(len(labels))))
            if self.decoder:
                tiles: list[np.ndarray] = list(self.decoder(latents).cpu().numpy())
            else:
                tiles = _maps(model.normalize(latents).float().cpu().numpy())
        rows = [tiles[i : i + GRID_COLUMNS] for i in range(0, len(tiles), GRID_COLUMNS)]
        figure = picture_grid(rows, [""] * GRID_COLUMNS, names_of_rows=self.names)
        return {"sample_std": float(model.normalize(latents).std())}, figure


def preview_prompts(recipe: Recipe) -> list[str]:
    """The recipe's prompts that the preview draws, one a row."""
    return [record["prompt"] for record in read_prompts(recipe)[:GRID_ROWS]]


def some_captions(store: LatentStore) -> dict[int, str]:
    """The first caption of images that lie evenly in the store, by row."""
    wanted = set(np.linspace(0, len(store) - 1, GRID_ROWS).astype(int).tolist())
    return {row: several[0] for row, (_, several) in enumerate(store.captions()) if row in wanted}


def _maps(latents: np.ndarray) -> list[np.ndarray]:
    """Principal components of normalized latents [n, C, H, W] as colours: uint8 pictures."""
    n, channels, height, width = latents.shape
    tokens = latents.reshape(n, channels, -1).transpose(0, 2, 1)
    basis = principal_basis(tokens)
    return [pca_map(t, (height, width), basis) for t in tokens]
