"""Sections of the networks that are trained: autoencoder, pixel decoder, generator."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
)

from .base import Execution, HashedPath, InputPath, OutputPath, Section
from .training import TrainingSection


class EncoderSection(Section):
    kind: Literal["attention", "linear", "transformer"] = "attention"
    """attention is the paper's; the others are its ablation."""
    num_heads: int = Field(24, gt=0)
    head_dim: int = Field(256, gt=0)
    depth: int = Field(1, gt=0)
    """Layers of kind transformer (the paper's ablation: 6); the others have one."""
    activation: Literal["gelu", "silu", "relu", "identity"] = "gelu"
    """Between skip sum and projection; not in the paper."""
    pre_norm: bool = False
    """RMSNorm before the attention; not in the paper."""


class DecoderSection(Section):
    depth: int = Field(6, gt=0)
    num_heads: int = Field(24, gt=0)


class AutoencoderSection(Section):
    latent_dim: int = Field(32, gt=0)
    encoder: EncoderSection = EncoderSection()
    decoder: DecoderSection = DecoderSection()
    kl_weight: float = Field(1e-6, ge=0.0)
    """β; not in the paper: 1e-6 is what both public reimplementations and ml-starflow use, for a mean-reduced error."""
    checkpoint: HashedPath[str | None] = None
    """A trained autoencoder (.safetensors): what precompute encodes with."""
    flip: bool = True
    """Train on randomly mirrored images; not in the paper."""
    statistics_images: int = Field(4096, gt=0)
    """Training images whose features give the per-channel mean and variance; not in the paper."""
    training: TrainingSection = TrainingSection()


class LossesSection(Section):
    """Losses of the pixel decoder; the paper names their kinds and gives no weight. These are ml-starflow's (TA-TiTok's)."""

    pixel: Literal["l1", "l2"] = "l2"
    pixel_weight: float = Field(1.0, ge=0.0)
    perceptual: Literal["lpips", "backbone", "both", "none"] = "lpips"
    """lpips (the package, VGG-16), backbone (the frozen backbone's own features: nothing to download), both or none."""
    lpips_weight: float = Field(1.0, ge=0.0)
    backbone_weight: float = Field(1.0, ge=0.0)
    """Weight of the backbone's distance; ours."""
    adversarial_weight: float = Field(0.1, ge=0.0)
    """0 trains without a discriminator."""
    adversarial_start: int = Field(0, ge=0)
    """Step from which the model hears the discriminator."""
    discriminator_start: int = Field(0, ge=0)
    """Step from which the discriminator itself is trained."""
    discriminator: Literal["patch", "backbone"] = "patch"
    """patch: a PatchGAN on pixels. backbone: small heads on the frozen backbone's features."""
    discriminator_learning_rate: float = Field(1e-4, gt=0.0)
    lecam_weight: float = Field(1e-3, ge=0.0)
    adaptive: bool = False
    """Scale the adversarial term by the ratio of gradient norms at the last layer (VQGAN, RAE)."""
    augment: bool = True
    """Shift and recolour what the discriminator sees (DiffAugment)."""


class PixelDecoderTraining(TrainingSection):
    """The paper: batches of 512, else as the autoencoder's."""

    batch_size: int = Field(512, gt=0)
    weight_decay: float = Field(1e-4, ge=0.0)
    """Not in the paper: ml-starflow's."""


class PixelDecoderSection(Section):
    size: Literal["S", "B", "L"] = "L"
    """The paper's is L."""
    width: int | None = Field(None, gt=0)
    """Instead of the size's; likewise the next two."""
    depth: int | None = Field(None, gt=0)
    num_heads: int | None = Field(None, gt=0)
    stage: Literal["noisy", "finetune"] = "noisy"
    """noisy: on the backbone's features plus noise. finetune: on features that the autoencoder rebuilds."""
    start_from: InputPath[str | None] = None
    """Stage finetune: the first stage's pixel_decoder.safetensors."""
    noise_sigma: float = Field(0.4, ge=0.0)
    """Stage noisy: standard deviation of the noise on raw features; the paper's for DINOv2."""
    noise_reference_rms: float | None = Field(None, gt=0.0)
    """Other backbones: the RMS of DINOv2's features; sigma is scaled by this backbone's RMS over it."""
    latent_noise: float = Field(0.0, ge=0.0)
    """Stage finetune: noise on the latents, in their standard deviations; a decoder for STARFlow wants the flow's."""
    flip: bool = True
    """Train on randomly mirrored images; not in the paper."""
    statistics_images: int = Field(4096, gt=0)
    losses: LossesSection = LossesSection()
    training: PixelDecoderTraining = PixelDecoderTraining()
    checkpoint: HashedPath[str | None] = None
    """A trained pixel decoder (.safetensors): what sampling decodes with."""


class GeneratorTraining(TrainingSection):
    """The paper: 2 M steps of 512 images, constant 1e-4, no warm-up."""

    steps: int = Field(2_000_000, gt=0)
    batch_size: int = Field(512, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["cosine", "constant"] = "constant"
    weight_decay: float = Field(0.0, ge=0.0)
    """Not in the paper: SiT's and LightningDiT's."""
    ema_decay: float | None = Field(0.9999, gt=0.0, lt=1.0)
    """Not in the paper: SiT's and LightningDiT's."""


class GeneratorSection(Section):
    kind: Literal["dit", "starflow"] = "dit"
    size: str = "XL"
    """dit: S, B, L, XL. starflow: S, B, M, L, XL. The paper's is XL of both."""
    width: int | None = Field(None, gt=0)
    """Instead of the size's; likewise the next three."""
    depth: int | None = Field(None, gt=0)
    num_heads: int | None = Field(None, gt=0)
    layers: list[int] | None = None
    """starflow: layers of each block, data side first."""
    num_classes: int = Field(1000, gt=0)
    label_dropout: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of labels replaced by the null class; not in the paper: DiT's."""
    latents: Literal["sample", "mode"] = "mode"
    """Train on posterior samples (the store needs logvar) or on their modes; not in the paper."""
    flip: bool = True
    """Half of the images mirrored, where the store has mean_flip; not in the paper."""
    patch_size: int = Field(1, gt=0)
    """dit: latent cells per token's side."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    rope: bool = True
    qk_norm: bool = False
    """With mlp=gelu norm=layernorm rope=false the dit is SiT, else LightningDiT."""
    timesteps: Literal["uniform", "lognormal"] = "uniform"
    """dit: distribution of training times; not in the paper ("the original works"): SiT's; LightningDiT's is lognormal."""
    shift: float = Field(1.0, gt=0.0)
    """dit: timestep shift in training, alpha with t = 1 noise. The paper's 0.4 is 2.5 here; 1 is none."""
    cosine_weight: float = Field(0.0, ge=0.0)
    """dit: weight of LightningDiT's cosine term; not in the paper."""
    noise_std: float = Field(0.3, ge=0.0)
    """starflow: noise on normalized latents; 0.3 is STARFlow's for SD-VAE, for FAE it is not in the paper."""
    checkpoint_activations: Execution[bool] = False
    cache: Execution[OutputPath[str | None]] = None
    """Folder on each host for whole shards of a store on S3; without it each worker fetches the rows that it needs."""
    training: GeneratorTraining = GeneratorTraining()
    checkpoint: HashedPath[str | None] = None
    """A trained generator (.safetensors): what sampling draws from."""
