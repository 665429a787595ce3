"""`fae train generator`: a diffusion transformer or STARFlow on the latents of a finished store.

The store's statistics normalize the latents and are saved in the checkpoint, with the fingerprints
of store and autoencoder, so that sampling refuses to decode with another one. Every
`validate_every` steps a grid of samples from the same noise goes to MLflow: pictures where the
recipe names decoders, else PCA maps of latents.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fae_core.figures import pca_map, picture_grid, principal_basis
from fae_core.flow_matching import flow_matching_loss, timesteps
from fae_core.generators.dit import DiT
from fae_core.generators.latent_model import LatentModel
from fae_core.generators.starflow import StarFlow, flow_loss

from ..config import Recipe
from ..config.sections import GeneratorSection
from ..data.records import class_name, label_problem
from ..latents import LatentStore
from ..networks import backbone_spec
from ..networks.untrained import build_generator
from ..runtime.places import check_places
from ..sampling import LatentDecoder, LatentSampler, image_noise
from ..storage import StoreError, paths
from . import run_folder
from .batches import Batch
from .job import Job, UntrainedJob, check_batch
from .latent_feed import blank_latents, latent_feed, needed_columns
from .launch import enter_worker, launch
from .loop import run_job

GRID_CLASSES = 4
GRID_COLUMNS = 6
PREVIEW_STEPS = 50
PREVIEWED_WITH = ("autoencoder.checkpoint", "pixel_decoder.checkpoint")


def train_generator(recipe: Recipe, callbacks: Sequence[Any] = ()) -> run_folder.TrainResult:
    """Train, resume or, where the run is finished, return at once; `callbacks` are Ray Train's.

    Raises RecipeError, StoreError for a store that is not finished or lacks columns,
    NonFiniteError.
    """
    run_uri = run_folder.run_folder(recipe)
    (latents,) = recipe.require("train generator", "latents=STORE")
    check_places(recipe, ("storage", "latents", *PREVIEWED_WITH))
    store = LatentStore.open(latents)
    needed_columns(store, recipe.generator)
    check_settings(recipe)
    if not len(store):
        raise StoreError(
            f"{store.uri} stores no latents: none of its {store.manifest['planned']} images could "
            "be encoded."
        )
    if problem := label_problem(store.labels(), recipe.generator.num_classes, store.class_names):
        raise StoreError(f"{store.uri} cannot train this generator: {problem}")
    recipe = run_folder.settle_precision(recipe, "generator", run_uri)
    run_folder.claim_run(recipe, run_uri, ("latents", "generator"))
    if run_folder.result(run_uri) is None:
        launch(_worker, recipe, recipe.generator.training, callbacks, store.account)
    return run_folder.train_result(run_uri, "generator")


def check_settings(recipe: Recipe) -> None:
    """Raises RecipeError or TrainingError for settings that no generator can be trained with."""
    training = recipe.generator.training
    check_batch(training, training.num_workers)
    with torch.device("meta"):
        build_generator(recipe.generator, latent_shape(recipe))


def latent_shape(recipe: Recipe) -> tuple[int, ...]:
    """[C, H, W] of the recipe's latents: the store's, else what the autoencoder will make."""
    if recipe.latents is not None and paths.exists(paths.join(recipe.latents, "manifest.json")):
        return LatentStore.open(recipe.latents).latent_shape
    return (recipe.autoencoder.latent_dim, *backbone_spec(recipe).grid)


def generator_loss(section: GeneratorSection, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The loss terms of one micro-batch from `latent_feed`; `model` may be wrapped."""
    inner = getattr(model, "module", model)
    assert isinstance(inner, LatentModel)
    latents = inner.normalize(batch["latents"])
    if section.kind == "starflow":
        return flow_loss(model, latents, batch["noise"], batch["labels"], section.noise_std)
    t = timesteps(batch["time"], section.timesteps, section.shift)
    return flow_matching_loss(
        model, latents, batch["noise"], t, batch["labels"], section.cosine_weight
    )


def generator_job(section: GeneratorSection, model: DiT | StarFlow) -> Job:
    """The job that trains `model` on latents."""
    return Job(model, functools.partial(generator_loss, section))


def untrained_job(recipe: Recipe) -> UntrainedJob:
    """The recipe's job with initial weights, and its blank batches of any number of images.

    requirements.py measures them by their shapes.
    """
    if recipe.latents is not None:
        shape: tuple[int, ...] = LatentStore.open(recipe.latents).latent_shape
    else:
        shape = latent_shape(recipe)
    job = generator_job(recipe.generator, build_generator(recipe.generator, shape))
    return job, functools.partial(blank_latents, shape=shape)


def _worker(config: dict[str, Any]) -> None:
    worker = enter_worker(config, "generator")
    recipe, section = worker.recipe, worker.recipe.generator
    (latents,) = recipe.require("train generator", "latents=STORE")
    store = LatentStore.open(latents)
    torch.manual_seed(recipe.seed)
    model = build_generator(section, store.latent_shape)
    mean, std = (
        torch.from_numpy(np.asarray(v)).float() for v in (store.stats.mean, store.stats.std)
    )
    model.set_latent_stats(mean, std.clamp_min(1e-6))
    fingerprints = {
        "latents": store.manifest["fingerprint"],
        "autoencoder": store.manifest["parts"]["autoencoder weights"],
    }
    run_job(
        worker,
        generator_job(section, model),
        latent_feed(store, section, recipe.seed),
        _Preview(recipe, store, worker.device) if worker.is_first else None,
        lambda: fingerprints,
        store.class_names[: section.num_classes],
    )


class _Preview:
    """Samples from the same noise at every validation.

    They are pictures where the recipe names both decoders, else PCA maps of the latents.
    """

    def __init__(self, recipe: Recipe, store: LatentStore, device: torch.device) -> None:
        self.recipe = recipe
        self.store = store
        self.device = device
        self.decoder: LatentDecoder | None = None
        if recipe.autoencoder.checkpoint and recipe.pixel_decoder.checkpoint:
            autoencoder = store.manifest["parts"]["autoencoder weights"]
            self.decoder = LatentDecoder.of(recipe, device, autoencoder)

    def __call__(self, model: nn.Module, step: int) -> tuple[dict[str, float], bytes | None]:
        """The standard deviation of the normalized samples, and their grid, classes in rows."""
        assert isinstance(model, DiT | StarFlow)
        num_classes = min(GRID_CLASSES, self.recipe.generator.num_classes)
        labels = torch.arange(num_classes).repeat_interleave(GRID_COLUMNS)
        noise = image_noise(self.recipe.seed, range(len(labels)), self.store.latent_shape)
        sample = self.recipe.sample.model_copy(
            update={"num_steps": min(self.recipe.sample.num_steps, PREVIEW_STEPS)}
        )
        with torch.inference_mode():
            draw = LatentSampler(model, sample, self.recipe.seed, self.device)
            latents = draw(noise, labels, list(range(len(labels))))
            if self.decoder:
                tiles: list[np.ndarray] = list(self.decoder(latents).cpu().numpy())
            else:
                tiles = _maps(model.normalize(latents).float().cpu().numpy())
        rows = [tiles[i : i + GRID_COLUMNS] for i in range(0, len(tiles), GRID_COLUMNS)]
        names = [class_name(row, self.store.class_names) for row in range(len(rows))]
        figure = picture_grid(rows, [""] * GRID_COLUMNS, names_of_rows=names)
        return {"sample_std": float(model.normalize(latents).std())}, figure


def _maps(latents: np.ndarray) -> list[np.ndarray]:
    """Principal components of normalized latents [n, C, H, W] as colours: uint8 pictures."""
    n, channels, height, width = latents.shape
    tokens = latents.reshape(n, channels, -1).transpose(0, 2, 1)
    basis = principal_basis(tokens)
    return [pca_map(t, (height, width), basis) for t in tokens]
