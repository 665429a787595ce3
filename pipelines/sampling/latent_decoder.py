"""Latents to images on one device: FAE's feature decoder, then the pixel decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fae_core.checkpoint import CheckpointError
from fae_core.pixel_decoder import to_uint8

from ..config import Recipe
from ..networks import check_fingerprints, load_checkpoint


@dataclass
class LatentDecoder:
    """The double decoder: raw latents [n, C, H, W] -> features -> images uint8 [n, S, S, 3]."""

    autoencoder: Any
    pixel_decoder: Any
    fingerprints: dict[str, str]
    """Content hashes of both."""

    @classmethod
    def of(cls, recipe: Recipe, device: torch.device, autoencoder_sha256: str) -> LatentDecoder:
        """Load the recipe's decoders.

        Raises CheckpointError where they do not belong to these latents or to each other.
        """
        needed = ("autoencoder.checkpoint", "pixel_decoder.checkpoint")
        uri, decoder_uri = recipe.require("decoding", *needed)
        loaded = load_checkpoint(uri, "autoencoder")
        if loaded.weights_sha256 != autoencoder_sha256:
            raise CheckpointError(
                f"{uri} is not the autoencoder of these latents: its weights hash to "
                f"{loaded.weights_sha256[:12]}…, theirs to {autoencoder_sha256[:12]}…."
            )
        decoder = load_checkpoint(decoder_uri, "pixel_decoder")
        wanted = {"backbone": loaded.fingerprints["backbone"]}
        check_fingerprints(decoder_uri, decoder, wanted)
        hashes = {"autoencoder": loaded.weights_sha256, "pixel decoder": decoder.weights_sha256}
        return cls(loaded.module.to(device), decoder.module.to(device), hashes)

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> Tensor:
        tokens = latents.flatten(2).transpose(1, 2)
        return to_uint8(self.pixel_decoder(self.autoencoder.decode(tokens)))
