"""The frozen text encoder of a recipe, loaded, and checked to be the one of a generator.

Training encodes the captions of a batch, sampling its prompts. What a generator was trained with is
in its checkpoint: the hashes of encoder and tokenizer, and how captions enter.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fae_core.checkpoint import Loaded
from fae_core.text import (
    MINILM,
    CaptionTokenizer,
    TextEncoder,
    TextSpec,
    as_batch,
    load_text_encoder,
    text_fingerprints,
)

from ..config.sections import TextSection
from .loading import check_fingerprints

COUNTED_CAPTIONS = 100_000
"""Captions whose tokens are counted before a job: half a minute of one core."""
SOURCE = "text source"
"""Fingerprint of a generator that says where its encoder came from; it is not compared."""


class CaptionEncoder:
    """Captions to the states of their tokens on one device."""

    def __init__(self, tokenizer: CaptionTokenizer, encoder: TextEncoder) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder

    @classmethod
    def load(cls, spec: TextSpec) -> CaptionEncoder:
        """Tokenizer and encoder on the CPU. Raises WeightsError."""
        return cls(CaptionTokenizer(spec), load_text_encoder(spec))

    def to(self, device: torch.device) -> CaptionEncoder:
        """Moves the encoder. Returns itself."""
        self.encoder.to(device)
        return self

    @property
    def fingerprints(self) -> dict[str, str]:
        """What decides a caption's states, by name."""
        return text_fingerprints(self.encoder, self.tokenizer)

    def __call__(self, captions: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Token states [B, L, D] float32 and the mask bool [B, L] of what is text."""
        device = next(self.encoder.parameters()).device
        ids, mask = (t.to(device, non_blocking=True) for t in self.tokenizer(captions))
        states: Tensor = self.encoder(ids, mask)
        return states, mask

    @torch.inference_mode()
    def states_of(self, captions: Sequence[str], batch_size: int) -> list[np.ndarray]:
        """The token states of each caption, float16 [L, D] without padding.

        Captions of like length are encoded together, `batch_size` at once.
        """
        device = next(self.encoder.parameters()).device
        ids, mask = self.tokenizer(captions)
        lengths = mask.sum(dim=1)
        found: dict[int, np.ndarray] = {}
        for places in lengths.argsort(stable=True).split(batch_size):
            some = as_batch(ids[places], mask[places])
            states = self.encoder(*(t.to(device, non_blocking=True) for t in some))
            rows = states.half().cpu().numpy()
            for place, row in zip(places.tolist(), rows, strict=True):
                found[place] = row[: int(lengths[place])]
        return [found[place] for place in range(len(captions))]


def text_spec(section: TextSection) -> TextSpec:
    """The encoder that the recipe's section `text` describes."""
    return TextSpec(
        section.name, section.weights, section.max_length, section.template, section.layer
    )


def count_captions(captions: Iterable[str], tokenizer: CaptionTokenizer) -> str:
    """A sentence on how many captions there are, are cut, or have unknown words."""
    some = list(itertools.islice(captions, COUNTED_CAPTIONS + 1))
    whole = len(some) <= COUNTED_CAPTIONS
    counts = tokenizer.count(some[:COUNTED_CAPTIONS])
    return (
        f"captions: {counts.total:,} {'in all' if whole else 'looked at'}, {counts.cut:,} longer "
        f"than {tokenizer.spec.max_length} tokens (cut), {counts.unknown:,} with words that the "
        "tokenizer does not know"
    )


@functools.cache
def identity_of(spec: TextSpec) -> dict[str, str]:
    """The hashes of encoder and tokenizer, computed once a process. Raises WeightsError."""
    marks = CaptionEncoder.load(spec).fingerprints
    return {name: marks[name] for name in ("text encoder", "text tokenizer")}


def source_of(spec: TextSpec) -> str:
    """What may be told of where the encoder comes from: a private folder is not named."""
    if spec.weights == "hub":
        return f"hub:{spec.name}"
    return MINILM if spec.weights == MINILM else "a folder"


def known_source(generator: Loaded) -> tuple[str, str] | None:
    """(name, weights) of a generator's encoder, as the section `text` has them.

    None where it came from a folder of its trainer's.
    """
    where = generator.fingerprints[SOURCE]
    if where.startswith("hub:"):
        return where.removeprefix("hub:"), "hub"
    return ("", MINILM) if where == MINILM else None


def encoder_of(uri: str, generator: Loaded, name: str, weights: str) -> CaptionEncoder:
    """The encoder that the text-to-image `generator` was trained with, loaded as `name` and
    `weights` say, with the generator's own length, template and layer.

    `uri` names the generator in messages. Raises WeightsError, and CheckpointError where it is
    another encoder or tokenizer.
    """
    marks: Mapping[str, str] = generator.fingerprints
    settings = json.loads(marks["text settings"])
    found = CaptionEncoder.load(TextSpec(name, weights, **settings))
    check_fingerprints(f"{uri} (text encoder: {marks[SOURCE]})", generator, found.fingerprints)
    return found
