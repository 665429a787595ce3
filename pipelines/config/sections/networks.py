"""Sections of the networks that are trained: autoencoder, pixel decoder, generator."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from .base import Execution, HashedPath, InputPath, OutputPath, Section
from .training import TrainingSection


class EncoderSection(Section):
    """The encoder from patch features to latents. The paper's has one attention layer."""

    kind: Literal["attention", "linear", "transformer"] = "attention"
    """attention is the paper's: one self-attention layer and a projection. linear, the projection
    alone, and transformer, ordinary blocks before it, are its ablation."""
    num_heads: int = Field(24, gt=0)
    """Attention heads; 24 is the paper's for DINOv2-g."""
    head_dim: int = Field(256, gt=0)
    """Channels of a head of kind attention; the paper's."""
    depth: int = Field(1, gt=0)
    """Layers of kind transformer, 6 in the paper's ablation; the other kinds have one."""
    activation: Literal["gelu", "silu", "relu", "identity"] = "gelu"
    """Activation between the sum with the skip branch and the projection; not in the paper."""
    pre_norm: bool = False
    """Whether an RMSNorm stands before the attention; not in the paper."""


class DecoderSection(Section):
    """The decoder from latents back to patch features, of the backbone's width."""

    depth: int = Field(6, gt=0)
    """Transformer blocks; the paper's."""
    num_heads: int = Field(24, gt=0)
    """Attention heads, which divide the backbone's width; 24 is the paper's for DINOv2-g."""


class AutoencoderSection(Section):
    """The feature autoencoder: the network and its training."""

    latent_dim: int = Field(32, gt=0)
    """Channels of a latent; the paper's main results have 32, its ablation also 48 and 64."""
    encoder: EncoderSection = EncoderSection()
    decoder: DecoderSection = DecoderSection()
    kl_weight: float = Field(1e-6, ge=0.0)
    """β, the weight of the KL divergence. Not in the paper: 1e-6 is what both public
    reimplementations and ml-starflow use, for an error that is averaged."""
    checkpoint: HashedPath[str | None] = None
    """A trained autoencoder (.safetensors), which every other job uses and `fae train autoencoder`
    ignores."""
    flip: bool = True
    """Train on randomly mirrored images; not in the paper."""
    statistics_images: int = Field(4096, gt=0)
    """Training images whose features give the mean and variance of each channel; not in the
    paper."""
    training: TrainingSection = TrainingSection()


class LossesSection(Section):
    """Losses of the pixel decoder. The paper names their kinds and gives no weight, so none of
    these values is in the paper: they are ml-starflow's, which are TA-TiTok's."""

    pixel: Literal["l1", "l2"] = "l2"
    """Error of the pixels: mean absolute (l1) or squared (l2); not in the paper: ml-starflow's."""
    pixel_weight: float = Field(1.0, ge=0.0)
    """Weight of the pixel error; not in the paper: ml-starflow's."""
    scales: int = Field(1, gt=0)
    """Sizes at which pixel and edge error are taken, each half of the one before; not in the paper,
    which has one."""
    edge_weight: float = Field(0.0, ge=0.0)
    """Weight of the error of the differences between neighbouring pixels, against blurred edges;
    not in the paper."""
    perceptual: Literal["lpips", "backbone", "both", "none"] = "lpips"
    """Perceptual distance: lpips (the package, VGG-16), backbone (the frozen backbone's own
    features, nothing to download), both or none."""
    lpips_weight: float = Field(1.0, ge=0.0)
    """Weight of LPIPS; not in the paper: ml-starflow's."""
    backbone_weight: float = Field(1.0, ge=0.0)
    """Weight of the distance by the backbone's features; not in the paper: this project's."""
    adversarial_weight: float = Field(0.1, ge=0.0)
    """Weight of the adversarial term; 0 trains without a discriminator. Not in the paper:
    ml-starflow's."""
    adversarial_start: int = Field(0, ge=0)
    """Step from which the decoder's loss has the adversarial term; not in the paper:
    ml-starflow's."""
    discriminator_start: int = Field(0, ge=0)
    """Step from which the discriminator itself is trained; not in the paper: ml-starflow's."""
    discriminator: Literal["patch", "backbone"] = "patch"
    """patch: a PatchGAN on pixels, as in ml-starflow. backbone: small heads on the features of the
    frozen backbone, as in RAE. Not in the paper."""
    discriminator_learning_rate: float = Field(1e-4, gt=0.0)
    """The discriminator's largest learning rate, on the decoder's schedule; not in the paper:
    ml-starflow's."""
    lecam_weight: float = Field(1e-3, ge=0.0)
    """Weight of the LeCam penalty on the discriminator; not in the paper: ml-starflow's."""
    adaptive: bool = False
    """Scale the adversarial term by the ratio of gradient norms at the last layer, as VQGAN and RAE
    do; not in the paper."""
    augment: bool = True
    """Shift and recolour what the discriminator sees (DiffAugment); not in the paper."""


class PixelDecoderTraining(TrainingSection):
    """How the pixel decoder is trained: in the paper as the autoencoder, in batches of 512."""

    batch_size: int = Field(512, gt=0)
    """Images of one optimizer step, over all workers and accumulation; the paper's."""
    weight_decay: float = Field(1e-4, ge=0.0)
    """AdamW's weight decay. Not in the paper: 1e-4 is ml-starflow's."""


class PixelDecoderSection(Section):
    """The decoder from patch features to pixels: the network, its training and its losses."""

    size: Literal["S", "B", "L", "RAE-B", "RAE-L", "RAE-XL"] = "L"
    """Width, depth and heads by a ViT's name; L is the paper's. Those of RAE have a class token;
    RAE-XL is that of its published decoders, which `fae import rae` reads."""
    width: int | None = Field(None, gt=0)
    """Channels of a token; the size's without it."""
    depth: int | None = Field(None, gt=0)
    """Transformer blocks; the size's without it."""
    num_heads: int | None = Field(None, gt=0)
    """Attention heads, which divide the width; the size's without it."""
    head: Literal["linear", "convolution"] = "linear"
    """From tokens to pixels. linear is the paper's: a patch of pixels from each token. convolution
    doubles the grid up to the image's size, so small decoders leave no blocks; not in the paper."""
    mlp_width: int | None = Field(None, gt=0)
    """Hidden channels of the MLP; the size's without it, which is four times the width in S, B and
    L."""
    stage: Literal["noisy", "finetune"] = "noisy"
    """noisy: train on the backbone's features with noise. finetune: train on features that the
    autoencoder reconstructs. `fae run` sets it for each of its stages."""
    start_from: InputPath[str | None] = None
    """Stage finetune: pixel_decoder.safetensors of the first stage, or what `fae import rae` wrote;
    `fae run` then trains no first stage."""
    noise_sigma: float = Field(0.4, ge=0.0)
    """Stage noisy: standard deviation of the noise on raw features; 0.4 is the paper's for
    DINOv2."""
    noise_reference_rms: float | None = Field(None, gt=0.0)
    """Other backbones than DINOv2: the root mean square of DINOv2's features. The noise is scaled
    by this backbone's over it, as the paper scales by the norm."""
    latent_noise: float = Field(0.0, ge=0.0)
    """Stage finetune: noise on the latents, in units of each channel's standard deviation over the
    images of `statistics_images`. A decoder for STARFlow wants the noise that the flow was trained
    with. Not in the paper."""
    flip: bool = True
    """Train on randomly mirrored images; not in the paper."""
    statistics_images: int = Field(4096, gt=0)
    """Training images whose features give the mean and variance of each channel, which scale the
    decoder's input and the noise; not in the paper."""
    losses: LossesSection = LossesSection()
    training: PixelDecoderTraining = PixelDecoderTraining()
    checkpoint: HashedPath[str | None] = None
    """A trained pixel decoder (.safetensors) that sampling decodes with; `fae run` then trains
    none."""


class GeneratorTraining(TrainingSection):
    """How the generator is trained: in the paper 2 M steps of 512 images at a constant 1e-4."""

    steps: int = Field(2_000_000, gt=0)
    """Optimizer steps of the whole training; 2 M are the paper's 800 epochs."""
    batch_size: int = Field(512, gt=0)
    """Images of one optimizer step, over all workers and accumulation; the paper's."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rate grows linearly from 0; the paper has none."""
    schedule: Literal["cosine", "constant"] = "constant"
    """The learning rate after the warm-up; constant is the paper's."""
    weight_decay: float = Field(0.0, ge=0.0)
    """AdamW's weight decay. Not in the paper: 0 is SiT's and LightningDiT's."""
    ema_decay: float | None = Field(0.9999, gt=0.0, lt=1.0)
    """Decay of the moving average of the weights, which is shorter in the first steps; null keeps
    none. Not in the paper: 0.9999 is SiT's and LightningDiT's."""


class GeneratorSection(Section):
    """The generator of latents: the network and its training."""

    kind: Literal["dit", "mmdit", "starflow"] = "dit"
    """dit: a diffusion transformer with flow matching (LightningDiT, or SiT by its settings).
    mmdit: one whose condition is the image's caption, by the encoder of the section `text`.
    starflow: a normalizing flow. The paper has all three."""
    size: str = "XL"
    """Width, depth and heads by name: S, B, L or XL of dit and mmdit, S, B, M, L or XL of starflow.
    XL is the paper's of dit and starflow, L of mmdit (XL at 384 px)."""
    width: int | None = Field(None, gt=0)
    """Channels of a token; the size's without it."""
    depth: int | None = Field(None, gt=0)
    """dit, mmdit: transformer blocks; the size's without it."""
    num_heads: int | None = Field(None, gt=0)
    """dit, mmdit: attention heads, which divide the width; the size's without it."""
    layers: list[PositiveInt] | None = Field(None, min_length=1)
    """starflow: layers of each block from the data to the noise; the size's without it."""
    num_classes: int = Field(1000, gt=0)
    """dit, starflow: classes of the labels, which are 0 to num_classes - 1; ImageNet's."""
    label_dropout: float = Field(0.1, ge=0.0, lt=1.0)
    """dit, starflow: share of labels that training replaces by the null class, for guidance. Not in
    the paper: 0.1 is DiT's. mmdit has text.dropout."""
    latents: Literal["sample", "mode"] = "mode"
    """Train on samples of the posterior (the store needs logvar) or on its mode; not in the
    paper."""
    flip: bool = True
    """Mirror half of the images, where the store has mean_flip; not in the paper."""
    patch_size: int = Field(1, gt=0)
    """dit, mmdit: latent cells on the side of a token; 1 gives the paper's parameter count."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """dit: the MLP; swiglu is LightningDiT's, gelu SiT's."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """dit: the normalization; rmsnorm is LightningDiT's, layernorm SiT's."""
    rope: bool = True
    """dit, mmdit: rotary positions of the latents' tokens beside the fixed ones; true is
    LightningDiT's, false SiT's and SD3's. Not in the paper for mmdit."""
    qk_norm: bool = False
    """dit, mmdit: RMSNorm on queries and keys. Not in the paper: SiT and LightningDiT-XL have
    none."""
    timesteps: Literal["uniform", "lognormal"] = "uniform"
    """dit, mmdit: distribution of training times. Not in the paper, which points to "the original
    works": uniform is SiT's, lognormal LightningDiT's."""
    shift: float = Field(1.0, gt=0.0)
    """dit, mmdit: timestep shift α in training, t' = αt / (1 + (α - 1)t) with t = 1 the noise; 1 is
    none. The paper's 0.4 counts from the data and is 2.5 here."""
    cosine_weight: float = Field(0.0, ge=0.0)
    """dit, mmdit: weight of LightningDiT's cosine term beside the squared error; not in the
    paper."""
    noise_std: float = Field(0.3, ge=0.0)
    """starflow: standard deviation of the noise on normalized latents. Not in the paper for FAE:
    0.3 is STARFlow's for SD-VAE."""
    checkpoint_activations: Execution[bool] = False
    """Compute activations again in the backward pass instead of keeping them: less memory, slower
    steps."""
    cache: Execution[OutputPath[str | None]] = None
    """Folder on each host for whole shards of a store on S3; without it each worker fetches the
    rows that it needs."""
    training: GeneratorTraining = GeneratorTraining()
    start_from: InputPath[str | None] = None
    """A trained generator of this shape (.safetensors) whose weights and latent statistics the
    training starts with; its autoencoder and text encoder must be those of the store."""
    checkpoint: HashedPath[str | None] = None
    """A trained generator (.safetensors) that sampling draws from; `fae run` then trains none."""
