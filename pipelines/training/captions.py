"""The captions that a text-to-image generator trains on: counted before, tokenized in the feed.

Where their states are stored, the feed reads those instead.

The text encoder and its tokenizer belong to the run as the latents do. text_encoder.json in the
run's folder holds their hashes, and a run that goes on with others is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fae_core.text import CaptionTokenizer, as_batch, batch_length

from ..config import RecipeError
from ..config.sections import TrainingSection
from ..latents import LatentStore
from ..latents.reader import TextStore
from ..networks.text_encoder import count_captions
from ..sampling.prompts import Encode
from ..storage import StoreError, paths, refuse_other_work
from .run_folder import write_or_compare

TEXT_ENCODER = "text_encoder.json"


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
        tokens, mask = as_batch(*self.tokenizer(texts))
        return {"tokens": tokens, "mask": mask}


class StateFeed(NamedTuple):
    """What the feed of latents needs to give stored token states in the place of captions."""

    store: TextStore
    max_length: int
    dropout: float

    def tensors(self, states: Sequence[np.ndarray], uniform: Tensor) -> dict[str, Tensor]:
        """`states` float16 [n, L, D] and `mask` bool [n, L] of the captions' states [L, D].

        L and the dropping are `CaptionFeed`'s.
        """
        dropped = (uniform < self.dropout).tolist()
        chosen = [
            self.store.empty if out else some for some, out in zip(states, dropped, strict=True)
        ]
        return padded(chosen, self.max_length)


def padded(states: Sequence[np.ndarray], max_length: int) -> dict[str, Tensor]:
    """States float16 [n, L, D] and mask bool [n, L] of a batch of ragged ones, zero beside them."""
    length = batch_length(max(map(len, states)), max_length)
    values = np.zeros((len(states), length, states[0].shape[1]), np.float16)
    mask = np.zeros(values.shape[:2], bool)
    for row, some in enumerate(states):
        values[row, : len(some)] = some
        mask[row, : len(some)] = True
    return {"states": torch.from_numpy(values), "mask": torch.from_numpy(mask)}


def encode_from_store(
    text: TextStore, store: LatentStore, captions: Mapping[int, str], device: torch.device
) -> Encode:
    """What encodes `captions`, which are the first ones of rows of the latents, and the empty one
    by their stored states.
    """
    states = text.first_states(store.uri, store.manifest, list(captions))
    found = dict(zip(captions.values(), states, strict=True)) | {"": text.empty}

    def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        chosen = [found[one] for one in texts]
        batch = padded(chosen, max(map(len, chosen)))
        return batch["states"].float().to(device), batch["mask"].to(device)

    return encode


def encoded_once(encode: Encode, texts: Sequence[str]) -> Encode:
    """What encodes `texts` and the empty one by the states that `encode` gives them here, once.

    It does not keep `encode`, whose encoder may be larger than the network that is trained.
    """
    known = [*texts, ""]
    states, mask = encode(known)
    row_of = {text: row for row, text in enumerate(known)}

    def encoded(some: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = [row_of[text] for text in some]
        return states[rows], mask[rows]

    return encoded


def blank_captions(num: int, length: int, width: int | None = None) -> dict[str, Tensor]:
    """Tensors like those of `CaptionFeed`, of `num` captions that fill all `length` tokens, or with
    a `width` like those of `StateFeed`.
    """
    mask = torch.ones(num, length, dtype=torch.bool)
    if width is not None:
        return {"states": torch.zeros(num, length, width, dtype=torch.float16), "mask": mask}
    return {"tokens": torch.zeros(num, length, dtype=torch.int64), "mask": mask}


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
    texts = (text for _, several in store.captions() for text in several)
    return count_captions(texts, tokenizer)


def stored_marks(text: TextStore, training: TrainingSection) -> dict[str, str]:
    """What decides the states of a run that reads them from a store.

    It is what it is for a run that encodes captions itself, if that has the store's precision.
    """
    same = text.precision == training.precision
    return text.marks if same else {**text.marks, "text precision": text.precision}


def claim_text_encoder(run_uri: str, marks: Mapping[str, str]) -> None:
    """Write text_encoder.json into a new run's folder, or compare it.

    Raises RecipeError where the run began with another text encoder.
    """
    refuse_other_work(
        f"The run {run_uri} began with another text encoder",
        write_or_compare(paths.join(run_uri, TEXT_ENCODER), marks),
        "Choose another run=NAME, or give its encoder (text.name, text.weights).",
        RecipeError,
    )
