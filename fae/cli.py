"""The front door: `fae COMMAND`. It wires, it decides nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from fae.pipelines.config import Recipe

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    help="Feature Auto-Encoders on Ray: train on frozen features, precompute latents in bulk, generate from them.",
)
train_app = typer.Typer(
    no_args_is_help=True, help="Train a model with Ray Train; the same command again resumes."
)
app.add_typer(train_app, name="train")

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name or a YAML path.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, dotted: autoencoder.latent_dim=48"),
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the merged recipe and stop.")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the memory that it will need, by process, and stop."),
]


def _loaded(recipe: str, overrides: list[str] | None, print_config: bool) -> Recipe:
    """The merged recipe; with `print_config` it is printed and the command ends."""
    from fae.pipelines.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if print_config:
        typer.echo(loaded.to_yaml(), nl=False)
        raise typer.Exit
    return loaded


def _print_memory(recipe: Recipe, job: str) -> NoReturn:
    """Print what `job` will need, and end the command."""
    from fae.pipelines.doctor import memory_of, text

    typer.echo(text(memory_of(recipe, job)))
    raise typer.Exit


@train_app.command("autoencoder")
def train_autoencoder_command(
    recipe: RecipeName,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
    dry_run: DryRun = False,
) -> None:
    """Train a FAE on the images of data.path; writes STORAGE/RUN/autoencoder.safetensors.

    Example: fae train autoencoder photos-dinov2s data.path=photos run=first storage=runs
    """
    loaded = _loaded(recipe, overrides, print_config)
    if dry_run:
        _print_memory(loaded, "autoencoder")
    from fae.pipelines.training import train_autoencoder

    result = train_autoencoder(loaded)
    typer.echo(f"autoencoder: {result.checkpoint}")


@app.command()
def precompute(
    recipe: RecipeName,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
    dry_run: DryRun = False,
) -> None:
    """Encode every image of data.path into the latent store at output; the same command again resumes.

    Example: fae precompute photos-dinov2s data.path=photos autoencoder.checkpoint=runs/first/autoencoder.safetensors output=latents
    """
    loaded = _loaded(recipe, overrides, print_config)
    if dry_run:
        _print_memory(loaded, "precompute")
    from fae.pipelines.latents import precompute as run_precompute

    manifest = run_precompute(loaded)
    typer.echo(f"{loaded.output}: {manifest['stored']} latents, {manifest['errors']} errors")


@train_app.command("pixel-decoder")
def train_pixel_decoder_command(
    recipe: RecipeName,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
    dry_run: DryRun = False,
) -> None:
    """Train a pixel decoder on the images of data.path; writes STORAGE/RUN/pixel_decoder.safetensors.

    The first stage needs no autoencoder. The second starts from its result:

    fae train pixel-decoder photos-dinov2s data.path=photos run=tuned pixel_decoder.stage=finetune
    pixel_decoder.start_from=runs/first/pixel_decoder.safetensors autoencoder.checkpoint=runs/fae/autoencoder.safetensors
    """
    loaded = _loaded(recipe, overrides, print_config)
    if dry_run:
        _print_memory(loaded, "pixel_decoder")
    from fae.pipelines.training import train_pixel_decoder

    result = train_pixel_decoder(loaded)
    typer.echo(f"pixel decoder: {result.checkpoint}")


@train_app.command("generator")
def train_generator_command(
    recipe: RecipeName,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
    dry_run: DryRun = False,
) -> None:
    """Train a diffusion transformer or STARFlow on the store `latents`; writes STORAGE/RUN/generator.safetensors.

    Example: fae train generator photos-dinov2s latents=latents run=dit generator.size=S generator.num_classes=10
    """
    loaded = _loaded(recipe, overrides, print_config)
    if dry_run:
        _print_memory(loaded, "generator")
    from fae.pipelines.training import train_generator

    result = train_generator(loaded)
    typer.echo(f"generator: {result.checkpoint}")


@app.command()
def sample(
    recipe: RecipeName,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
    dry_run: DryRun = False,
    grid: Annotated[
        str | None, typer.Option(help="Write one PNG for a look, classes in rows, and stop.")
    ] = None,
    scales: Annotated[
        str, typer.Option(help="With --grid: guidance scales for its columns, like 1,2,4.")
    ] = "",
) -> None:
    """LatentSampler images with a trained generator into output: Parquet shards, PNG by class, samples.npz; resumable.

    Example: fae sample photos-dinov2s generator.checkpoint=… autoencoder.checkpoint=… pixel_decoder.checkpoint=… output=samples
    """
    loaded = _loaded(recipe, overrides, print_config)
    if dry_run:
        _print_memory(loaded, "sample")
    from fae.pipelines.sampling import draw_grid
    from fae.pipelines.sampling import sample as run_sample

    if grid:
        try:
            columns = tuple(float(scale) for scale in scales.split(",") if scale)
        except ValueError:
            raise typer.BadParameter(f"{scales!r}: numbers with commas between them.") from None
        draw_grid(loaded, grid, scales=columns)
        typer.echo(f"grid: {grid}")
        return
    manifest = run_sample(loaded)
    typer.echo(f"{loaded.output}: {manifest['stored']} images")


@app.command()
def probe(
    recipe: RecipeName, overrides: Overrides = None, print_config: PrintConfig = False
) -> None:
    """Ask what reconstructed features and latents still know: k-NN, linear probe, patch similarity and matching.

    Example: fae probe photos-dinov2s data.path=photos autoencoder.checkpoint=runs/first/autoencoder.safetensors probe.output=probe
    """
    loaded = _loaded(recipe, overrides, print_config)
    from fae.pipelines.evaluation import probe as run_probe
    from fae.pipelines.evaluation import summary

    typer.echo(summary(run_probe(loaded)))


@app.command()
def evaluate(
    recipe: RecipeName, overrides: Overrides = None, print_config: PrintConfig = False
) -> None:
    """Score evaluate.images against evaluate.reference: Fréchet distances, precision and recall, KID, reconstruction.

    Needs no download: fae evaluate photos-dinov2s evaluate.images=samples evaluate.reference=photos evaluate.output=scores

    As ADM: evaluate.scores=[fid,sfid,inception_score,precision_recall] evaluate.reference=VIRTUAL_imagenet256_labeled.npz

    Of reconstructions, paired by key: evaluate.scores=[rfid,reconstruction] evaluate.reference=originals
    """
    loaded = _loaded(recipe, overrides, print_config)
    from fae.pipelines.evaluation import evaluate as run_evaluate

    for name, value in run_evaluate(loaded).items():
        typer.echo(f"{name}: {value:.6g}")


@app.command()
def export(
    uri: Annotated[str, typer.Argument(help="A finished latent store.")],
    output: Annotated[str, typer.Option(help="An empty folder or s3:// prefix.")],
    layout: Annotated[
        str, typer.Option("--format", help="lightningdit, webdataset or npy.")
    ] = "lightningdit",
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
) -> None:
    """Write a latent store in another trainer's layout.

    Example: fae export latents --format lightningdit --output for-lightningdit
    """
    from fae.pipelines.latents import export as run_export

    written = run_export(uri, layout, output, dtype)
    typer.echo(f"{output}: {written['rows']} latents in {written['files']} files")


@app.command()
def inspect(
    uri: Annotated[str, typer.Argument(help="A latent store or an autoencoder checkpoint.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Re-read every shard against the manifest.")
    ] = False,
    figure: Annotated[
        str | None, typer.Option(help="Write PCA maps of some latents to this PNG.")
    ] = None,
) -> None:
    """Say what a latent store or a checkpoint holds."""
    from fae.pipelines.latents import inspect as run_inspect

    if not run_inspect(uri, verify=verify, figure=figure):
        raise typer.Exit(1)


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the stages, what exists, what each will write.")
    ] = False,
    first: Annotated[
        str | None, typer.Option("--from", help="Start at this stage; earlier ones must be there.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
) -> None:
    """The whole chain, from images to scored samples and one page; what exists is skipped, the same command resumes.

    Stages: autoencoder, pixel-decoder, latents, generator, finetune, samples, evaluation, probe, report.

    Example: fae run fashion-dinov2s data.path=fashion/train.parquet evaluate.reference=fashion/test.parquet storage=runs --dry-run
    """
    cut = [f"chain.{key}={value}" for key, value in (("first", first), ("until", until)) if value]
    loaded = _loaded(recipe, [*(overrides or []), *cut], print_config)
    from fae.pipelines.chain import print_plan, run_chain

    if dry_run:
        print_plan(loaded)
        return
    finished = run_chain(loaded)
    typer.echo(f"finished: {', '.join(finished)}")


@app.command()
def tune(
    recipe: Annotated[
        str, typer.Argument(metavar="[report] RECIPE", help="A recipe with a `tune` section.")
    ],
    overrides: Overrides = None,
    print_config: PrintConfig = False,
) -> None:
    """Search recipe keys with Ray Tune; trials share stages, the same command goes on. `fae tune report RECIPE` writes the page again.

    Example: fae tune sweep-fashion data.path=fashion/train.parquet evaluate.reference=fashion/test.parquet storage=runs

    Other spaces: tune.name=kl tune.algorithm=optuna tune.space.autoencoder.kl_weight.loguniform=[1e-8,1e-4]
    """
    values = list(overrides or [])
    report_only = recipe == "report"
    if report_only:
        if not values or "=" in values[0]:
            raise typer.BadParameter("fae tune report RECIPE [KEY=VALUE]...")
        recipe = values.pop(0)
    loaded = _loaded(recipe, values, print_config)
    from fae.tune import report, search

    numbers = (report if report_only else search)(loaded)
    typer.echo(f"{numbers['finished']} of {numbers['trials']} trials finished; {numbers['report']}")


@app.command()
def demo(
    output: Annotated[
        str, typer.Option(help="Folder for everything that the demo writes.")
    ] = "fae-demo",
) -> None:
    """The whole chain, small: from photographs to samples, offline, in ten minutes on two cores."""
    from fae.pipelines.chain import run_demo

    run_demo(output)


@app.command()
def submit(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND RECIPE [KEY=VALUE]...",
            help="As after `fae`: precompute, train generator, …",
        ),
    ],
    address: Annotated[
        str | None,
        typer.Option(help="Job server, http://HEAD:8265; RAY_API_SERVER_ADDRESS without it."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow/--no-wait", help="Show the log and end with the job's status.")
    ] = True,
    env: Annotated[
        list[str] | None,
        typer.Option(help="One more variable of this shell for the job; secrets are refused."),
    ] = None,
    working_dir: Annotated[str, typer.Option(help="The code and recipes that are sent.")] = ".",
    max_size: Annotated[float, typer.Option(help="Largest working tree [MB].")] = 50.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent.")] = False,
    backend: Annotated[str, typer.Option(help="ray (a job server) or kuberay (a RayJob).")] = "ray",
    image: Annotated[str | None, typer.Option(help="kuberay: the pods' image.")] = None,
    output: Annotated[
        str | None, typer.Option(help="kuberay: file for the YAML; standard output without it.")
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="kuberay: kubectl apply it.")] = False,
) -> None:
    """Run a command as a job of a Ray cluster: once, however often it is submitted; the exit status is the job's.

    Example: fae submit precompute imagenet256-dinov2g data.path=s3://b/imagenet autoencoder.checkpoint=s3://b/fae.safetensors
    output=s3://b/latents --address http://head:8265

    With --backend kuberay the RayJob goes to standard output: fae submit … --backend kuberay --image REGISTRY/fae-ray:0.1.0 --apply
    """
    from fae.cluster.command import Command

    command = Command.parse(words, job_commands())
    if backend == "kuberay":
        from fae.cluster import kuberay

        document, remarks = kuberay.ray_job(command, env, image)
        for remark in remarks:
            typer.echo(f"note: {remark}", err=True)
        if output:
            Path(output).write_text(document)
        if apply and not dry_run:
            raise typer.Exit(kuberay.apply(document))
        if not output:
            typer.echo(document, nl=False)
        return
    if backend != "ray":
        raise typer.BadParameter(f"--backend {backend}: ray or kuberay.")
    from fae.cluster import submit

    submission = submit.prepare(command, working_dir, env, int(max_size * 1e6))
    if dry_run:
        typer.echo(submission.describe())
        return
    raise typer.Exit(submit.submit(submission, address, follow, typer.echo))


@app.command()
def doctor(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE [KEY=VALUE]...] [s3://BUCKET/PREFIX]...",
            help="What it shall be good for; nothing: the cluster alone.",
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray: HOST:6379 or auto, from inside the cluster; RAY_ADDRESS without it."
        ),
    ] = None,
    fix: Annotated[
        bool,
        typer.Option("--fix", help="Add the bucket's rule that aborts incomplete uploads."),
    ] = False,
) -> None:
    """Is this cluster, its GPUs, this bucket, this tracking server usable? Each line ok, warning or problem, and what to do.

    Example: fae doctor imagenet256-dinov2g precompute.num_actors=8 s3://bucket/latents

    From outside a cluster: fae submit doctor RECIPE … --address http://head:8265
    """
    from fae.pipelines.doctor import doctor as run_doctor

    if not run_doctor(words or [], address=address, fix=fix):
        raise typer.Exit(1)


def job_commands(group: typer.Typer = app, prefix: str = "") -> list[str]:
    """The commands that `fae submit` takes: those with a RECIPE, and doctor."""
    names = []
    for command in group.registered_commands:
        if callback := command.callback:
            name = prefix + (command.name or callback.__name__)
            if "recipe" in callback.__annotations__ or name == "doctor":
                names.append(name)
    for inner in group.registered_groups:
        if inner.typer_instance:
            names += job_commands(inner.typer_instance, f"{prefix}{inner.name} ")
    return names


def main() -> None:
    """Run the command; an error made for the user ends with its message alone and exit status 2."""
    from fae.pipelines.storage import redact
    from fae_core.errors import UserError

    try:
        app()
    except UserError as error:
        print(f"fae: {redact(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nfae: stopped; the same command resumes.", file=sys.stderr)
        sys.exit(130)
