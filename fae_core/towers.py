"""A pair of towers, one for images and one for texts, that embed both in one space.

CLIP, SigLIP and SigLIP2 (of a fixed resolution) of transformers, from a local folder with
configuration, tokenizer, image processor and safetensors. The scores of text to image compare their
embeddings. Features that an autoencoder rebuilds enter the image tower at its pooling head, as in
the paper's retrieval (arXiv 2512.07829), where the head pools all patches: that is SigLIP's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fae_core.hashing import tensors_sha256
from fae_core.text import quiet_transformers
from fae_core.weights import WeightsError


class Towers(nn.Module):
    """Frozen image and text towers. Build them with `load_towers`."""

    def __init__(self, model: Any, tokenizer: Any, processor: Any) -> None:
        super().__init__()
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.processor: Any = processor
        self.max_length = int(model.config.text_config.max_position_embeddings)
        self.weights_sha256 = tensors_sha256(model.state_dict())
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def images(self, crops: np.ndarray) -> Tensor:
        """Embeddings [n, D] float32 of uint8 crops [n, S, S, 3], prepared by the processor."""
        pixels = self.processor(
            images=list(crops), input_data_format="channels_last", return_tensors="pt"
        )["pixel_values"]
        return _embedding(self.model.get_image_features(pixel_values=pixels.to(self.device)))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [n, D] float32; longer texts are cut at the tower's length.

        SigLIP's and SigLIP2's texts are in lower case, as in their training; SigLIP2's tokenizer
        does not see to it before huggingface/transformers#43101 (google-research/big_vision#187).
        """
        if self.model.config.model_type == "siglip":
            texts = [text.lower() for text in texts]
        # SigLIP was trained on texts padded to its length, and without a mask.
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        given = {"input_ids": tokens["input_ids"].to(self.device)}
        if not self.pools_patches:
            given["attention_mask"] = tokens["attention_mask"].to(self.device)
        return _embedding(self.model.get_text_features(**given))

    @torch.no_grad()
    def pool(self, features: Tensor) -> Tensor:
        """Embeddings [n, D] float32 of an image tower's patch features [n, N, width].

        They are its last layer's after the final norm, true or rebuilt. Raises WeightsError where
        the tower does not pool patches, or has another width.
        """
        if not self.pools_patches:
            raise WeightsError(
                f"{type(self.model).__name__} takes an image's embedding from its class token, "
                "which no autoencoder rebuilds. Give towers that pool patches, as SigLIP's."
            )
        width = int(self.model.config.vision_config.hidden_size)
        if features.shape[-1] != width:
            raise WeightsError(
                f"The towers pool features of {width} channels; the backbone's have "
                f"{features.shape[-1]}. The backbone must be the image tower itself."
            )
        return _embedding(self.model.vision_model.head(features))

    @property
    def pools_patches(self) -> bool:
        """Whether the image's embedding is made of all patches (SigLIP), not of a class token."""
        return hasattr(self.model.vision_model, "head")

    @property
    def device(self) -> torch.device:
        """Where the towers are."""
        return next(self.model.parameters()).device


def load_towers(folder: str | Path) -> Towers:
    """The towers in `folder`, float32, on the CPU.

    Raises WeightsError where there are none, or where their weights are pickled or incomplete.
    """
    place = Path(folder)
    config = place / "config.json"
    if not config.is_file() or not list(place.glob("*.safetensors")):
        raise WeightsError(f"{folder}: no folder with config.json and .safetensors files.")
    kind = str(json.loads(config.read_text()).get("model_type"))
    if kind not in ("clip", "siglip"):
        raise WeightsError(
            f"{folder} holds a {kind}; needed is a CLIP, a SigLIP or a SigLIP2 of one resolution."
        )
    try:
        with quiet_transformers() as transformers:
            model, report = transformers.AutoModel.from_pretrained(
                str(place), use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(place))
            processor = transformers.AutoImageProcessor.from_pretrained(str(place))
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(f"The towers in {folder} did not load: {reason}") from None
    if report["missing_keys"]:
        raise WeightsError(
            f"{folder} has no weights for {len(report['missing_keys'])} tensors of "
            f"{type(model).__name__}, the first {sorted(report['missing_keys'])[0]}."
        )
    return Towers(model, tokenizer, processor)


def _embedding(output: Any) -> Tensor:
    """The embedding, which newer versions of transformers return inside an output."""
    result: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return result.float()
