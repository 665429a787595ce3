"""Latents to images on one device: FAE's feature decoder, then the pixel decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fae_core.checkpoint import CheckpointError, Loaded
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
        autoencoder = load_checkpoint(uri, "autoencoder")
        pixel_decoder = load_checkpoint(decoder_uri, "pixel_decoder")
        made = cls.join(autoencoder, pixel_decoder, decoder_uri, device)
        made.check_latents(autoencoder_sha256, uri)
        return made

    @classmethod
    def join(
        cls, autoencoder: Loaded, pixel_decoder: Loaded, decoder_uri: str, device: torch.device
    ) -> LatentDecoder:
        """Both networks on `device`.

        Raises CheckpointError, which names `decoder_uri`, where the pixel decoder was trained on
        another backbone than the autoencoder.
        """
        wanted = {"backbone": autoencoder.fingerprints["backbone"]}
        check_fingerprints(decoder_uri, pixel_decoder, wanted)
        hashes = {
            "autoencoder": autoencoder.weights_sha256,
            "pixel decoder": pixel_decoder.weights_sha256,
        }
        return cls(autoencoder.module.to(device), pixel_decoder.module.to(device), hashes)

    def check_latents(self, autoencoder_sha256: str, uri: str) -> None:
        """Raises CheckpointError unless the latents of that autoencoder are this one's.

        `uri` is this autoencoder's address, for the message.
        """
        found = self.fingerprints["autoencoder"]
        if found == autoencoder_sha256:
            return
        if " " in autoencoder_sha256:  # words, of `fae import`
            raise CheckpointError(
                f"{uri} is not the autoencoder of these latents: the generator was imported, and "
                f"its autoencoder is {autoencoder_sha256}. If it was trained on latents that "
                "`fae export` wrote, import it with --autoencoder."
            )
        raise CheckpointError(
            f"{uri} is not the autoencoder of these latents: its weights hash to {found[:12]}…, "
            f"theirs to {autoencoder_sha256[:12]}…."
        )

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> Tensor:
        tokens = latents.flatten(2).transpose(1, 2)
        return to_uint8(self.pixel_decoder(self.autoencoder.decode(tokens)))
