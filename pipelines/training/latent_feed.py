"""Latents for training a generator: rows of a store in seeded order, with their random numbers.

A thread makes them ahead, so that a step reads no file and draws nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from fae_core.draws import normal_draws, uniform_draws

from ..config.sections import GeneratorSection
from ..latents import LatentStore
from ..latents.reader import NO_LABEL, LatentBatch
from ..storage import StoreError
from .batches import Batch, blank_batch, to_device
from .captions import CaptionFeed, StateFeed, blank_captions
from .job import Feed, Part, parts_of


def needed_columns(store: LatentStore, generator: GeneratorSection) -> list[str]:
    """The store's columns that this training reads. Raises StoreError where one is missing."""
    columns = ["mean"]
    if generator.latents == "sample":
        columns.append("logvar")
    if generator.flip and "mean_flip" in store.columns:
        columns += [f"{name}_flip" for name in columns]
    absent = [name for name in columns if name not in store.columns]
    if absent:
        raise StoreError(
            f"{store.uri} stores {', '.join(store.columns)}; "
            f"generator.latents={generator.latents} needs {', '.join(absent)} too. Precompute with "
            f"precompute.columns=[{','.join(columns)}], or set generator.latents=mode."
        )
    return columns


def latent_feed(
    store: LatentStore,
    generator: GeneratorSection,
    seed: int,
    captions: CaptionFeed | StateFeed | None = None,
) -> Feed:
    """The feed of a generator's job.

    `batch["latents"]` are raw float32 [n, C, H, W] (mode or posterior sample, half of them
    mirrored), `labels` int64 [n] with the null class where dropped, `noise` float32 like the
    latents and `time` [n], both standard normal. With `captions` there are `tokens` int64 [n, L],
    or `states` float16 [n, L, D], and their `mask` bool [n, L] in the place of labels.
    """
    training = generator.training
    columns = needed_columns(store, generator)

    def batches(start_step: int, rank: int, world_size: int) -> Iterator[Batch]:
        parts = parts_of(training, rank, world_size)
        first = parts[0].places.start
        reader = store.reader(
            training.batch_size,
            seed,
            start_step=start_step,
            columns=columns,
            cache=generator.cache,
            captions=isinstance(captions, CaptionFeed),
            places=range(first, parts[-1].places.stop),
            text=captions.store if isinstance(captions, StateFeed) else None,
        )
        for read in reader:
            for part in parts:
                yield _make_batch(read, first, part, generator, seed, captions)

    def feed(start_step: int, rank: int, world_size: int, device: torch.device) -> Iterator[Batch]:
        return to_device(batches(start_step, rank, world_size), device)

    return feed


def blank_latents(
    num: int, shape: Sequence[int], text_length: int = 0, text_width: int | None = None
) -> Batch:
    """A batch such as `latent_feed` makes, of `num` latents [C, H, W] that are zero.

    Above 0, `text_length` is the number of tokens of its captions; with `text_width` it has their
    states.
    """
    tensors = {name: torch.zeros(num, *shape) for name in ("latents", "noise")}
    tensors["time"] = torch.zeros(num)
    if text_length:
        return blank_batch(tensors | blank_captions(num, text_length, text_width))
    return blank_batch(tensors | {"labels": torch.zeros(num, dtype=torch.int64)})


def _make_batch(
    read: LatentBatch,
    first: int,
    wanted: Part,
    generator: GeneratorSection,
    seed: int,
    captions: CaptionFeed | StateFeed | None,
) -> Batch:
    """The part `wanted` of what was read, which begins at place `first` of the global batch."""
    places = list(wanted.places)
    part = slice(wanted.places.start - first, wanted.places.stop - first)
    uniform = uniform_draws(seed, "choices", read.step, places, (2,))
    latents = _choose(read, "mean", part, uniform[:, 0].numpy() < 0.5)
    shape = latents.shape[1:]
    if generator.latents == "sample":
        logvar = _choose(read, "logvar", part, uniform[:, 0].numpy() < 0.5)
        noise = normal_draws(seed, "posterior", read.step, places, shape).numpy()
        latents = latents + np.exp(0.5 * logvar) * noise
    if captions is None:
        condition = {"labels": _labels(read, part, generator, uniform[:, 1])}
    elif isinstance(captions, StateFeed):
        assert read.states is not None
        condition = captions.tensors(read.states[part], uniform[:, 1])
    else:
        assert read.captions is not None
        condition = captions.tensors(read.captions[part], uniform[:, 1])
    tensors = {
        "latents": torch.from_numpy(latents),
        **condition,
        "noise": normal_draws(seed, "noise", read.step, places, shape),
        "time": normal_draws(seed, "time", read.step, places, ()),
    }
    keys = [f"row {row}" for row in read.rows[part]]
    return Batch(read.step, tensors, places, keys, wanted.weight, [])


def _labels(
    read: LatentBatch, part: slice, generator: GeneratorSection, uniform: torch.Tensor
) -> torch.Tensor:
    """Labels int64 [n] of the rows `part`; the null class where `uniform` [n] drops one."""
    labels = read.labels[part]
    unknown = (labels == NO_LABEL) & (generator.num_classes > 1)
    outside = (labels >= generator.num_classes) | unknown
    if outside.any():
        row, label = read.rows[part][outside][0], labels[outside][0]
        raise StoreError(
            f"Row {row} of the store has {'no label' if label == NO_LABEL else f'label {label}'}; "
            f"generator.num_classes is {generator.num_classes}. For images without classes set it "
            "to 1."
        )
    known = torch.from_numpy(np.maximum(labels, 0))
    dropped = uniform < generator.label_dropout
    return torch.where(dropped, torch.full_like(known, generator.num_classes), known)


def _choose(read: LatentBatch, name: str, part: slice, flipped: np.ndarray) -> np.ndarray:
    values = read.latents[name][part].astype(np.float32)
    mirrored = read.latents.get(f"{name}_flip")
    if mirrored is None:
        return values
    return np.where(flipped[:, None, None, None], mirrored[part].astype(np.float32), values)
