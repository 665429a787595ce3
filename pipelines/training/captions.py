"""The captions that a text-to-image generator trains on: counted before, tokenized in the feed.

The text encoder and its tokenizer belong to the run as the latents do. text_encoder.json in the
run's folder holds their hashes, and a run that goes on with others is refused.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fae_core.text import CaptionTokenizer

from ..config import RecipeError
from ..latents import LatentStore
from ..storage import StoreError, differences, paths, refuse_other_work

TEXT_ENCODER = "text_encoder.json"
LENGTH_STEP = 8
"""A batch has the tokens of its longest caption, up to a multiple of this: few different shapes."""
COUNTED_CAPTIONS = 100_000
"""Captions whose tokens are counted before a training: half a minute of one core."""


class CaptionFeed(NamedTuple):
    """What the feed of latents needs to give captions too."""

    tokenizer: CaptionTokenizer
    dropout: float

    def tensors(self, captions: Sequence[str | None], uniform: Tensor) -> dict[str, Tensor]:
        """`tokens` int64 [n, L] and `mask` bool [n, L] of the captions of n images.

        L is at most the tokenizer's length; columns without any text are left out.
        A caption is the empty one where its number in [0, 1) of `uniform` [n] is below `dropout`.
        """
        dropped = (uniform < self.dropout).tolist()
        texts = ["" if out else text for text, out in zip(captions, dropped, strict=True)]
        tokens, mask = self.tokenizer(texts)
        longest = int(mask.sum(dim=1).max())
        length = max(1, -(-longest // LENGTH_STEP)) * LENGTH_STEP
        return {"tokens": tokens[:, :length], "mask": mask[:, :length]}


def blank_captions(num: int, length: int) -> dict[str, Tensor]:
    """Tensors like those of `CaptionFeed`, of `num` captions that fill all `length` tokens."""
    tokens = torch.zeros(num, length, dtype=torch.int64)
    return {"tokens": tokens, "mask": torch.ones(num, length, dtype=torch.bool)}


def check_captions(store: LatentStore, tokenizer: CaptionTokenizer) -> str:
    """A sentence about the captions of the store: how many, how many are cut or have unknown words.

    Raises StoreError where an image has none.
    """
    missing = [
        key
        for key, several in store.captions()
        if not all(text.strip() for text in several or ("",))
    ]
    if missing:
        raise StoreError(
            f"{len(missing)} of {len(store)} images of {store.uri} have no caption, or an empty "
            f"one, for example {missing[0]!r}. A generator of kind mmdit is trained on captions: "
            "give each image one (data.caption_column, text files beside the images), or leave it "
            "out of the source."
        )
    texts = itertools.chain.from_iterable(several for _, several in store.captions())
    some = list(itertools.islice(texts, COUNTED_CAPTIONS + 1))
    whole = len(some) <= COUNTED_CAPTIONS
    counts = tokenizer.count(some[:COUNTED_CAPTIONS])
    limit = tokenizer.spec.max_length
    return (
        f"captions: {counts.total:,} {'in all' if whole else 'looked at'}, {counts.cut:,} longer "
        f"than {limit} tokens (cut), {counts.unknown:,} with words that the tokenizer does not know"
    )


def claim_text_encoder(run_uri: str, marks: Mapping[str, str]) -> None:
    """Write text_encoder.json into a new run's folder, or compare it.

    Raises RecipeError where the run began with another text encoder.
    """
    uri = paths.join(run_uri, TEXT_ENCODER)
    try:
        paths.write_once(uri, json.dumps(dict(marks), indent=1).encode())
        return
    except FileExistsError:
        there = json.loads(paths.read_bytes(uri))
    refuse_other_work(
        f"The run {run_uri} began with another text encoder",
        differences(there, marks, show=str),
        "Choose another run=NAME, or give its encoder (text.name, text.weights).",
        RecipeError,
    )
