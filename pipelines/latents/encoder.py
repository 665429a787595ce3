"""The frozen backbone and the FAE encoder on one device: uint8 crops to latents."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fae_core.backbone import Backbone
from fae_core.checkpoint import CheckpointError
from fae_core.machine import num_cpus
from fae_core.precision import autocast, settled_precision

from ..config import Recipe
from ..networks import autoencoder_of, backbone_of


@dataclass
class LatentEncoder:
    """Frozen backbone and FAE encoder on one device: what an actor holds."""

    backbone: Backbone
    autoencoder: Any
    autoencoder_sha256: str
    columns: list[str]
    precision: str
    device: torch.device
    compile: bool = False

    def __post_init__(self) -> None:
        self.network = self.posterior
        if self.compile:
            self.network = torch.compile(self.posterior, dynamic=False, fullgraph=True)

    @classmethod
    def of(cls, recipe: Recipe, device: str = "cpu") -> LatentEncoder:
        """Load what the recipe names. Raises CheckpointError when the two do not fit."""
        backbone = backbone_of(recipe)
        loaded = autoencoder_of(recipe, backbone)
        return cls(
            backbone.to(device),
            loaded.module.to(device),
            loaded.weights_sha256,
            list(recipe.precompute.columns),
            settled_precision(recipe.precompute.precision, device == "cuda"),
            torch.device(device),
            recipe.precompute.compile,
        )

    @classmethod
    def for_actor(cls, recipe: Recipe, gpus: float, weights: dict[str, str]) -> LatentEncoder:
        """`of` on an actor's GPU or CPU.

        Raises CheckpointError where its weights are not those of `weights`, too.
        """
        if not gpus:
            torch.set_num_threads(recipe.precompute.threads_per_actor or num_cpus())
        made = cls.of(recipe, "cuda" if gpus else "cpu")
        found = (made.backbone.weights_sha256, made.autoencoder_sha256)
        if found != (weights["backbone weights"], weights["autoencoder weights"]):
            raise CheckpointError(
                "The weights here are not those that the job was planned with. Either they "
                "changed, or this node has another file at the same path. What is finished remains."
            )
        return made

    def micro_batches(self, images: np.ndarray, size: int) -> Iterator[Tensor]:
        """Device tensors [b, S, S, 3] of `images`.

        On a GPU the next copy runs while the caller computes.
        """
        pieces = (images[i : i + size] for i in range(0, len(images), size))
        if self.device.type != "cuda":
            # A copy, because arrays from Ray's object store are read-only and tensors are not.
            yield from (torch.from_numpy(piece.copy()) for piece in pieces)
            return
        stream = self._copies

        def send(piece: np.ndarray) -> tuple[Tensor, Tensor]:
            pinned = torch.empty(piece.shape, dtype=torch.uint8, pin_memory=True)
            pinned.numpy()[:] = piece
            with torch.cuda.stream(stream):
                return pinned.to(self.device, non_blocking=True), pinned

        sent = map(send, pieces)
        following = next(sent, None)
        while following is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(stream)
            (batch, _pinned), following = following, next(sent, None)
            batch.record_stream(current)
            yield batch

    @functools.cached_property
    def _copies(self) -> torch.cuda.Stream:
        """The stream of the copies to the GPU, one for all: torch keeps freed memory by stream."""
        return torch.cuda.Stream(self.device)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logvar, each float16 [b,C,H,W], of uint8 crops [b,S,S,3] on the device."""
        found = self.autoencoder.encode(self.backbone(images))
        mean, logvar = (
            values.transpose(1, 2).unflatten(2, self.backbone.grid).to(torch.float16)
            for values in (found.mean, found.logvar)
        )
        return mean, logvar

    def encode_batch(self, batch: Tensor) -> dict[str, Tensor]:
        """Columns float16 [b, C, H, W] of uint8 crops [b, S, S, 3] on the device."""
        columns: dict[str, Tensor] = {}
        for suffix in ("", "_flip"):
            if not {"mean" + suffix, "logvar" + suffix} & set(self.columns):
                continue
            with autocast(self.precision, self.device):
                mean, logvar = self.network(batch.flip(2) if suffix else batch)
            for name, values in (("mean" + suffix, mean), ("logvar" + suffix, logvar)):
                if name in self.columns:
                    columns[name] = values
        return columns

    @torch.inference_mode()
    def encode(self, images: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
        """Columns float16 [n,C,H,W] of uint8 crops [n,S,S,3], in micro-batches of `batch_size`."""
        outputs: dict[str, list[Tensor]] = {name: [] for name in self.columns}
        for batch in self.micro_batches(images, batch_size):
            size = len(batch)
            if self.compile and size < batch_size:  # another size would be compiled anew
                batch = F.pad(batch, (0, 0, 0, 0, 0, 0, 0, batch_size - size))
            for name, values in self.encode_batch(batch).items():
                outputs[name].append(values[:size])
        shape = (0, self.autoencoder.config.latent_dim, *self.backbone.grid)
        return {
            name: torch.cat(parts).cpu().numpy() if parts else np.zeros(shape, np.float16)
            for name, parts in outputs.items()
        }
