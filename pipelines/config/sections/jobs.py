"""Sections of the jobs that use trained networks, and of what accompanies every job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, model_validator

from .base import Execution, InputPath, OutputPath, Place, Precision, Secret, Section
from .pool import ActorPoolSection, DecodingPoolSection


class GuidanceSection(Section):
    """Classifier-free guidance in an interval of times, where t = 1 is the noise."""

    start: float = Field(ge=0.0, le=1.0)
    """Latest time of the interval, included."""
    end: float = Field(ge=0.0, le=1.0)
    """Earliest time of the interval, excluded."""
    scale: float = Field(ge=0.0)
    """Scale of the guidance: 1 is none, below 1 the velocity is drawn towards the unconditional
    one."""


PROTOCOLS: dict[str, dict[str, Any]] = {
    "fae": {},
    "sit": {
        "sampler": "sde",
        "num_steps": 250,
        "shift": 1.0,
        "diffusion_scale": 2.0,
        "last_step": 0.04,
        "guidance_channels": 3,
    },
    "lightningdit": {
        "sampler": "ode",
        "num_steps": 249,
        "shift": 1 / 0.3,
        "guidance": [{"start": 0.875, "end": 0.0, "scale": 6.7}],
        "guidance_channels": 3,
    },
    "rae": {"sampler": "ode", "num_steps": 49, "shift": "dimension"},
}
"""Keys of `SampleSection` as the code of each project sets them. Its ODEs have one step less than
they are said to have: N points of time are N - 1 steps."""


class SampleSection(ActorPoolSection):
    """`fae sample`: images from the trained generator."""

    protocol: Execution[Literal["fae", "sit", "lightningdit", "rae"]] = "fae"
    """dit, mmdit: whose code the defaults of sampler, num_steps, shift, guidance,
    guidance_channels, diffusion_scale and last_step follow; any of them that is given replaces its
    value. fae is what the papers say. Which one FAE's authors used is not in the paper."""
    num_images: int = Field(50_000, gt=0)
    """Images to draw; 50,000 is the field's number for FID, and the paper's."""
    classes: list[int | str] | None = None
    """Image i is of class classes[i % len(classes)]; all classes in turn without it. A class is
    given by its number, or by its name where the images had class names. A generator of kind mmdit
    has `prompts` instead, in turn as well."""
    sampler: Literal["ode", "heun", "sde"] = "ode"
    """dit, mmdit: Euler's method for the ODE, Heun's, whose steps cost two of Euler's (not in the
    paper), or Euler-Maruyama for the SDE. The paper has the ODE with guidance and the SDE
    without."""
    num_steps: int = Field(250, gt=0)
    """dit, mmdit: steps of the sampler; the paper's."""
    shift: PositiveFloat | Literal["dimension"] = 1.0
    """dit, mmdit: timestep shift in sampling, as `generator.shift` in training; the paper shifts
    both alike. dimension is RAE's rule, the root of a latent's values over 4096."""
    guidance: list[GuidanceSection] | Literal["none", "paper", "paper-text"] = "none"
    """dit, mmdit: scales by interval of t, as {start, end, scale}. `paper` is its three-part
    schedule for classes, `paper-text` its 1.5 from t = 0.9 to 0 for text."""
    guidance_channels: int | None = Field(None, gt=0)
    """dit, mmdit: guide only so many first channels of a latent, all of them without it. SiT's and
    LightningDiT's code guides three."""
    guide: InputPath[str | None] = None
    """dit, mmdit: a weaker generator of the same latents, smaller or trained for fewer steps.
    Guidance then leads away from its velocity of the same class or text, instead of that without
    one (autoguidance, arXiv 2406.02507). Not in the paper."""
    diffusion_scale: float = Field(1.0, ge=0.0)
    """sde: the diffusion coefficient is w = diffusion_scale·σ. The papers write w = σ; SiT's code
    walks with twice that."""
    last_step: float | None = Field(None, gt=0.0, lt=1.0)
    """sde: length of the last step, which adds no noise, before the shift; as long as the others
    without it. SiT's code has 0.04."""
    flow_guidance: float = Field(0.0, ge=0.0)
    """starflow: ω of eq. 9 in arXiv 2506.06276; 0 is none, 3 is in that paper's figures."""
    denoise: bool = False
    """starflow: Tweedie's step after sampling. A decoder finetuned on noisy latents does better."""
    formats: Execution[list[Literal["png", "npz", "geneval"]]] = ["png", "npz"]
    """Written beside the Parquet shards: png/CLASS/INDEX.png (of prompts png/INDEX.png), and
    samples.npz with arr_0 uint8 [n, S, S, 3]. geneval is the layout of GenEval's evaluation:
    geneval/PROMPT/metadata.jsonl and geneval/PROMPT/samples/NUMBER.png."""
    shard_size: int = Field(64, gt=0)
    """Images of one Parquet shard: the unit of work, of retry and of resume. It limits the batches,
    and so decides the last bits of an image."""
    batch_size: int = Field(64, gt=0)
    """Images that the device draws at once. Another size changes the last bits of an image."""
    precision: Precision = "fp32"
    """Autocast dtype of the generator's network; state and flow inversion are float32 always. Not
    in the paper."""
    compile: Execution[bool] = False
    """dit, mmdit: torch.compile the network, for one batch size; images stay equal to rounding."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_protocol(cls, values: Any) -> Any:
        """The protocol's values in the place of those that are not given."""
        if not isinstance(values, Mapping):
            return values
        return {**PROTOCOLS.get(str(values.get("protocol")), {}), **values}


class PrecomputeSection(DecodingPoolSection):
    """`fae precompute`: images to a latent store."""

    shard_size: int = Field(512, gt=0)
    """Images of one Parquet shard: the unit of work, of retry and of resume."""
    batch_size: Execution[int] = Field(128, gt=0)
    """Images that an actor's device encodes at once, as parts of a shard."""
    columns: list[Literal["mean", "logvar", "mean_flip", "logvar_flip"]] = Field(
        ["mean"], min_length=1
    )
    """What a row stores, each float16 [C, H, W]; `_flip` is of the mirrored image."""
    precision: Precision = "bf16"
    """Autocast dtype of backbone and encoder; not in the paper."""
    compile: Execution[bool] = False
    """torch.compile backbone and encoder, for one batch size: minutes at the start of an actor.
    Latents stay equal to rounding."""
    threads_per_actor: Execution[int | None] = Field(None, gt=0)
    """Torch threads of a CPU actor; without it all the cores of its node, which the kernel shares
    out between actors and decoding."""


class EvaluateSection(DecodingPoolSection):
    """`fae evaluate`: scores of a set of images against a reference."""

    images: InputPath[str | None] = None
    """What is scored: a folder, Parquet, WebDataset or list, an .npz with arr_0, or the output of
    `fae sample`."""
    reference: InputPath[str | None] = None
    """What it is compared with: the same kinds; ADM's reference .npz (arr_0, mu, sigma, mu_s,
    sigma_s); or statistics that `fae evaluate` saved. Columns of Parquet and lists are the data
    section's for both."""
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
            "clip_score",
            "retrieval",
            "retrieval_rebuilt",
        ]
    ] = ["frechet_backbone"]
    """Scores to compute. frechet_backbone downloads nothing. rfid, reconstruction (PSNR, SSIM) and
    lpips need pairs of equal key. clip_score and retrieval (image to text and back, top-1) need
    captioned images and `towers`; retrieval_rebuilt needs autoencoder.checkpoint and a backbone
    that is the towers' own image tower."""
    towers: InputPath[str | None] = None
    """Local folder of a CLIP or SigLIP of transformers: config.json, safetensors, tokenizer and
    image processor."""
    output: OutputPath[str | None] = None
    """Folder or s3:// prefix for scores.json and the statistics of both sets; the same command
    again returns them."""
    limit: int | None = Field(None, gt=0)
    """Use only the first so many images of each set in key order; all of them without it."""
    backbone_token: Literal["class", "mean"] = "class"
    """Feature of frechet_backbone: the class token, as in FD-DINOv2 (arXiv 2306.04675), or the mean
    of the patches."""
    features: Literal["inception", "backbone"] = "inception"
    """Features of kid and precision_recall: Inception's pool as in ADM's evaluator and
    torch-fidelity, or the backbone's."""
    inception_weights: InputPath[str | None] = None
    """Inception-v3 in torch-fidelity's layout (.pth, .safetensors); without it
    $FAE_INCEPTION_WEIGHTS, else torch-fidelity's download."""
    num_neighbors: int = Field(3, gt=0)
    """precision_recall: k of the manifolds; Kynkäänniemi et al.'s and ADM's."""
    kid_subsets: int = Field(100, gt=0)
    """kid: subsets whose distances are averaged; torch-fidelity's."""
    kid_subset_size: int = Field(1000, gt=1)
    """kid: images of a subset; torch-fidelity's."""
    inception_splits: int = Field(10, gt=0)
    """inception_score: parts whose scores are averaged; Salimans et al.'s, and ADM's for 50,000
    images."""
    seed: int = 2020
    """Seed of KID's subsets and of the order before the Inception Score's parts;
    torch-fidelity's."""
    chunk_size: Execution[int] = Field(512, gt=0)
    """Images that one task decodes and one actor summarizes."""
    batch_size: Execution[int] = Field(64, gt=0)
    """Images that an actor's device holds at once; ADM's and torch-fidelity's."""
    max_error_rate: Execution[float] = Field(0.0, ge=0.0, le=1.0)
    """A larger share of images that cannot be decoded ends the job; fewer are left out and
    counted."""


class ProbeSection(DecodingPoolSection):
    """`fae probe`: how much of the features' information latents and rebuilt features keep. The
    paper probes with DINOv2's ready-made head and gives only the 16 pairs; the other settings are
    this project's."""

    output: OutputPath[str | None] = None
    """Folder or s3:// prefix for probe.json and the figures; without it the numbers are only
    returned."""
    test_fraction: float = Field(0.2, gt=0.0, lt=1.0)
    """Share of the images that test, chosen by the hash of their key; the others train the
    probes."""
    train_limit: int | None = Field(20_000, gt=0)
    """At most so many training images, in the order of their keys' hashes; 20,000 are enough for a
    stable head in minutes."""
    test_limit: int | None = Field(5_000, gt=0)
    """At most so many test images; 5,000 give 95 % intervals of ±1.4 points or less."""
    pooling: Literal["mean", "max"] = "mean"
    """How an image's patch tokens become one vector. The mean stands for the class token, which the
    autoencoder does not reconstruct."""
    num_neighbors: int = Field(20, gt=0)
    """k of k-NN, by cosine; DINO's."""
    regularization: list[PositiveFloat] = Field([0.01, 0.1, 1.0, 10.0], min_length=1)
    """scikit-learn's C of the linear probe, where smaller is stronger; the best on a fifth of the
    training images is taken."""
    max_iterations: int = Field(1000, gt=0)
    """Iterations of the linear probe's solver at most; on standardized features it converges well
    before."""
    num_image_pairs: int = Field(64, ge=0)
    """Pairs of test images of one class whose patches are matched; 0 skips matching."""
    num_pairs: int = Field(16, gt=0)
    """Matched patches that the figure draws between two images; the paper's."""
    num_clusters: int = Field(3, gt=1)
    """K of the K-means that separates the object's patches; with 2 they are mixed with what is next
    to them."""
    figure_rows: int = Field(4, gt=0)
    """Images or pairs in a figure."""
    batch_size: int = Field(32, gt=1)
    """Images that an actor holds at once: the unit of work. Only pooled features leave it."""
    precision: Precision = "fp32"
    """Autocast dtype of the networks; fp32, because a probe compares small differences."""


StageName = Literal[
    "autoencoder",
    "pixel-decoder",
    "latents",
    "text-states",
    "generator",
    "finetune",
    "samples",
    "evaluation",
    "probe",
    "report",
]


class ChainSection(Section):
    """Which stages `fae run` and a trial of `fae tune` go through. Trials share the stages in which
    their recipes agree."""

    first: Execution[StageName | None] = None
    """Start at this stage; the results of earlier ones must be there. `fae run --from`."""
    until: Execution[StageName | None] = None
    """Stop after this stage, leaving out what it does not need. `fae run --until`."""
    finetune: bool = True
    """Finetune the pixel decoder on reconstructed features, as the paper does; without it samples
    are decoded with its first stage."""
    finetune_steps: int | None = Field(None, gt=0)
    """Steps of the finetuning; as many as the first stage's without it. The paper does not split
    its million steps."""
    latents_limit: int | None = Field(None, gt=0)
    """Encode only the first so many images in key order, a subset for short generator trainings;
    all of them without it."""
    probe: bool = False
    """Probe the latents too; needs labels."""


class TrackingSection(Section):
    """Where runs are logged with MLflow. A tracking server that fails never stops a run."""

    experiment: Execution[str] = "fae"
    """MLflow's experiment."""
    uri: Execution[Secret[Annotated[str | None, Place("output", False, ("databricks",))]]] = None
    """MLflow's tracking server; without it $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db."""
    enabled: Execution[bool] = True
    """Whether anything is logged to MLflow."""
