"""`fae train generator`: a diffusion transformer, of classes or of text, or STARFlow on a store.

The store's statistics normalize the latents and are saved in the checkpoint, with the fingerprints
of store and autoencoder, so that sampling refuses to decode with another one. A generator of
text trains with the frozen text encoder beside it, whose hash is in the checkpoint too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fae_core.flow_matching import flow_matching_loss, timesteps
from fae_core.generators.dit import DiT
from fae_core.generators.latent_model import LatentModel
from fae_core.generators.mmdit import MMDiT
from fae_core.generators.starflow import StarFlow, flow_loss
from fae_core.text import CaptionTokenizer, TextEncoder, untrained_text_encoder

from ..config import Recipe, RecipeError
from ..config.sections import STORED, GeneratorSection
from ..data.records import label_problem
from ..latents import LatentStore
from ..latents.reader import TextStore
from ..networks import check_fingerprints, load_checkpoint
from ..networks.text_encoder import SOURCE, CaptionEncoder, source_of, text_spec
from ..networks.untrained import backbone_spec, build_generator
from ..runtime.places import check_places
from ..sampling.prompts import Encode, has_prompts
from ..storage import StoreError, paths
from . import run_folder
from .batches import Batch
from .captions import (
    CaptionFeed,
    StateFeed,
    check_captions,
    claim_text_encoder,
    encode_from_store,
    encoded_once,
    stored_marks,
)
from .job import Job, UntrainedJob, check_batch
from .latent_feed import blank_latents, latent_feed, needed_columns
from .launch import Worker, enter_worker, launch
from .loop import run_job
from .preview import Preview, preview_prompts, some_captions
from .run_log import say


def train_generator(recipe: Recipe, callbacks: Sequence[Any] = ()) -> run_folder.TrainResult:
    """Train, resume or, where the run is finished, return at once; `callbacks` are Ray Train's.

    Raises RecipeError, StoreError for a store that is not finished or lacks columns,
    NonFiniteError.
    """
    run_uri = run_folder.run_folder(recipe)
    (latents,) = recipe.require("train generator", "latents=STORE")
    networks = ("autoencoder.checkpoint", "pixel_decoder.checkpoint", "generator.start_from")
    text_places = ("text.weights", "text.states", "prompts")
    check_places(recipe, ("storage", "latents", *text_places, *networks))
    store = LatentStore.open(latents)
    needed_columns(store, recipe.generator)
    check_settings(recipe)
    if not len(store):
        raise StoreError(
            f"{store.uri} stores no latents: none of its {store.manifest['planned']} images could "
            "be encoded."
        )
    captioned = recipe.generator.kind == "mmdit"
    if captioned:
        say(check_captions(store, CaptionTokenizer(text_spec(recipe.text))))
        marks = CaptionEncoder.load(text_spec(recipe.text)).fingerprints
        if text := stored_states(recipe):
            text.check_encoder(marks)
            text.check_latents(store.uri, store.manifest)
    elif problem := label_problem(store.labels(), recipe.generator.num_classes, store.class_names):
        raise StoreError(f"{store.uri} cannot train this generator: {problem}")
    recipe = run_folder.settle_precision(recipe, "generator", run_uri)
    sections = ("latents", "generator", "text") if captioned else ("latents", "generator")
    run_folder.claim_run(recipe, run_uri, sections)
    if captioned:
        claim_text_encoder(
            run_uri, stored_marks(text, recipe.generator.training) if text else marks
        )
    if run_folder.result(run_uri) is None:
        launch(_worker, recipe, recipe.generator.training, callbacks, store.account)
    return run_folder.train_result(run_uri, "generator")


def stored_states(recipe: Recipe) -> TextStore | None:
    """The store of token states that the recipe names. Raises StoreError, RecipeError."""
    if recipe.text.states == STORED:
        raise RecipeError(
            f"text.states={STORED} is for `fae run`, which makes the store. Give one that "
            "`fae precompute-text` has written."
        )
    return TextStore.open(recipe.text.states) if recipe.text.states else None


def check_settings(recipe: Recipe) -> None:
    """Raises RecipeError or TrainingError for settings that no generator can be trained with."""
    training = recipe.generator.training
    check_batch(training)
    with torch.device("meta"):
        build_generator(recipe.generator, latent_shape(recipe), recipe.text)


def latent_shape(recipe: Recipe) -> tuple[int, ...]:
    """[C, H, W] of the recipe's latents: the store's, else what the autoencoder will make."""
    if recipe.latents is not None and paths.exists(paths.join(recipe.latents, "manifest.json")):
        return LatentStore.open(recipe.latents).latent_shape
    return (recipe.autoencoder.latent_dim, *backbone_spec(recipe).grid)


def generator_loss(
    section: GeneratorSection, model: nn.Module, batch: Batch, encoder: TextEncoder | None = None
) -> dict[str, Tensor]:
    """The loss terms of one micro-batch from `latent_feed`; `model` may be wrapped.

    A model of text has the `encoder` of the batch's tokens, unless the batch has their states.
    """
    inner = getattr(model, "module", model)
    assert isinstance(inner, LatentModel)
    latents = inner.normalize(batch["latents"])
    if section.kind == "starflow":
        return flow_loss(model, latents, batch["noise"], batch["labels"], section.noise_std)
    t = timesteps(batch["time"], section.timesteps, section.shift)
    noise, weight = batch["noise"], section.cosine_weight
    if "mask" not in batch.tensors:
        return flow_matching_loss(model, latents, noise, t, batch["labels"], weight)
    mask = batch["mask"]
    states = encoder(batch["tokens"], mask) if encoder else batch["states"].float()

    def velocity(x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        result: Tensor = model(x, t, states, mask)
        return result

    return flow_matching_loss(velocity, latents, noise, t, states, weight)


def generator_job(
    section: GeneratorSection, model: DiT | MMDiT | StarFlow, encoder: TextEncoder | None = None
) -> Job:
    """The job that trains `model` on latents, an MMDiT with its frozen text encoder."""
    frozen = {} if encoder is None else {"text encoder": encoder}
    return Job(model, functools.partial(generator_loss, section, encoder=encoder), frozen=frozen)


def untrained_job(recipe: Recipe) -> UntrainedJob:
    """The recipe's job with initial weights, and its blank batches of any number of images.

    requirements.py measures them by their shapes.
    """
    if recipe.latents is not None:
        shape: tuple[int, ...] = LatentStore.open(recipe.latents).latent_shape
    else:
        shape = latent_shape(recipe)
    model, encoder = build_generator(recipe.generator, shape, recipe.text), None
    blank = functools.partial(blank_latents, shape=shape)
    if isinstance(model, MMDiT):
        blank = functools.partial(blank, text_length=recipe.text.max_length)
        if recipe.text.states:
            blank = functools.partial(blank, text_width=model.config.text_dim)
        else:
            encoder = untrained_text_encoder(text_spec(recipe.text))
    return generator_job(recipe.generator, model, encoder), blank


def starting_model(
    recipe: Recipe, store: LatentStore, text_marks: Mapping[str, str]
) -> DiT | MMDiT | StarFlow:
    """The network before the first step: untrained, or the one at `generator.start_from`.

    An untrained one normalizes by the store's statistics, a trained one by its own. `text_marks`
    are the fingerprints of the text encoder. Raises CheckpointError where the trained network is
    another autoencoder's or text encoder's, and RecipeError where it has another shape.
    """
    section, uri = recipe.generator, recipe.generator.start_from
    if uri is None:
        model = build_generator(section, store.latent_shape, recipe.text)
        mean, std = (
            torch.from_numpy(np.asarray(v)).float() for v in (store.stats.mean, store.stats.std)
        )
        model.set_latent_stats(mean, std.clamp_min(1e-6))
        return model
    loaded = load_checkpoint(uri, section.kind)
    marks = {"autoencoder": store.manifest["parts"]["autoencoder weights"], **text_marks}
    check_fingerprints(f"generator.start_from={uri}", loaded, marks)
    with torch.device("meta"):
        config = build_generator(section, store.latent_shape, recipe.text).config
    if loaded.module.config != config:
        raise RecipeError(
            f"generator.start_from={uri} is {loaded.module.config}; the recipe wants {config}."
        )
    trained: DiT | MMDiT | StarFlow = loaded.module.train()
    return trained


def _worker(config: dict[str, Any]) -> None:
    worker = enter_worker(config, "generator")
    recipe, section = worker.recipe, worker.recipe.generator
    (latents,) = recipe.require("train generator", "latents=STORE")
    store = LatentStore.open(latents)
    fingerprints = {
        "latents": store.manifest["fingerprint"],
        "autoencoder": store.manifest["parts"]["autoencoder weights"],
    }
    run_folder.claim_networks(worker.run_uri, fingerprints)
    text = _Text()
    if section.kind == "mmdit":
        text = _text_of(worker, store)
        fingerprints |= {**text.marks, SOURCE: source_of(text_spec(recipe.text))}
    torch.manual_seed(recipe.seed)
    model = starting_model(recipe, store, text.marks)
    run_job(
        worker,
        generator_job(section, model, text.encoder),
        latent_feed(store, section, recipe.seed, text.feed),
        Preview(recipe, store, worker.device, text.encode) if worker.is_first else None,
        lambda: fingerprints,
        [] if text.feed else store.class_names[: section.num_classes],
    )


class _Text(NamedTuple):
    """What a training on captions has besides: all empty for one on classes."""

    feed: CaptionFeed | StateFeed | None = None
    encoder: TextEncoder | None = None
    encode: Encode | None = None
    """The preview's, on the first worker."""
    marks: Mapping[str, str] = {}


def _text_of(worker: Worker, store: LatentStore) -> _Text:
    """From the recipe's encoder, which runs in every step, or from its stored states."""
    recipe, spec = worker.recipe, text_spec(worker.recipe.text)
    states = stored_states(recipe)
    if states is None:
        whole = CaptionEncoder.load(spec).to(worker.device)
        claim_text_encoder(worker.run_uri, whole.fingerprints)  # another file on this node
        feed = CaptionFeed(whole.tokenizer, recipe.text.dropout)
        return _Text(feed, whole.encoder, whole, whole.fingerprints)
    claim_text_encoder(worker.run_uri, stored_marks(states, worker.training))
    encode: Encode | None = None
    if worker.is_first and has_prompts(recipe):
        encode = encoded_once(CaptionEncoder.load(spec).to(worker.device), preview_prompts(recipe))
    elif worker.is_first:
        encode = encode_from_store(states, store, some_captions(store), worker.device)
    stored = StateFeed(states, spec.max_length, recipe.text.dropout)
    return _Text(stored, None, encode, states.marks)
