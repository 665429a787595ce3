"""The front door: help that teaches, recipes that are printed, mistakes that are explained."""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import typer
from typer.core import TyperCommand, TyperGroup
from typer.testing import CliRunner

from fae.cli import app, main
from fae.pipelines.config.recipe import load_recipe, recipe_names


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "precompute"),
        (["precompute", "--help"], "autoencoder.checkpoint="),
        (["train", "autoencoder", "--help"], "run=first"),
        (["inspect", "--help"], "--verify"),
        (["demo", "--help"], "--output"),
        (["probe", "--help"], "probe.output="),
        (["evaluate", "--help"], "evaluate.reference="),
        (["submit", "--help"], "output=s3://b/latents"),
        (["doctor", "--help"], "--fix"),
        (["run", "--help"], "--dry-run"),
        (["tune", "--help"], "tune.algorithm=optuna"),
        (["sample", "--help"], "--scales"),
        (["export", "--help"], "--format lightningdit"),
        (["import", "--help"], "rae"),
        (["import", "rae", "--help"], "pixel_decoder.start_from=decoder.safetensors"),
        (["import", "lightningdit", "--help"], "--stats for-lightningdit/latents_stats.pt"),
        (["import", "sit", "--help"], "sample.protocol=sit"),
        (["recipes", "--help"], "--print-config"),
        (["explain", "--help"], "fae explain autoencoder.latent_dim"),
    ],
)
def test_help_teaches(arguments, word):
    assert word in CliRunner().invoke(app, arguments).output


def lines_of(*arguments: str) -> list[str]:
    """The lines that a command prints, without its indentation."""
    result = CliRunner().invoke(app, arguments, prog_name="fae")
    assert result.exit_code == 0, result.output
    return [line.strip() for line in result.output.splitlines()]


def commands(group: TyperGroup, *before: str) -> Iterator[tuple[list[str], TyperCommand]]:
    """Every command with its words."""
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from commands(command, *before, name)
        else:
            yield [*before, name], command


EVERY_COMMAND = list(commands(typer.main.get_command(app)))


@pytest.mark.parametrize(("words", "command"), EVERY_COMMAND, ids=str)
def test_every_command_has_a_short_summary_and_an_example_on_a_line_of_its_own(words, command):
    listed = next(
        line for line in lines_of(*words[:-1], "--help") if line.startswith(f"{words[-1]} ")
    )
    assert listed.endswith(".") and "..." not in listed
    lines = lines_of(*words, "--help")
    assert any(line.startswith(f"fae {' '.join(words)}") for line in lines), lines


@pytest.mark.parametrize(("words", "command"), EVERY_COMMAND, ids=str)
def test_a_command_with_a_recipe_can_print_it(words, command):
    named = {parameter.name for parameter in command.params}
    assert ("recipe" in named) == ("print_config" in named)


def test_help_says_that_commands_resume():
    for words in ([], ["precompute", "--help"], ["train", "generator", "--help"]):
        text = " ".join(CliRunner().invoke(app, words).output.split())
        assert "is killed, run it again: it resumes." in text


def test_the_version_is_the_packages():
    assert lines_of("--version") == [f"fae {version('fae-ray')}"]


def test_recipes_are_listed_with_what_they_need():
    lines = lines_of("recipes")
    assert [line for line in lines if line in recipe_names()] == recipe_names()
    shipped = [line for line in lines if line.startswith("shipped:")]
    assert shipped and len(lines) == 3 * len(recipe_names()) + 2 * len(shipped)
    assert "8 GPUs" in lines[lines.index("imagenet256-dinov2g") + 2]


def test_a_key_is_explained_with_its_value_in_a_recipe():
    text = " ".join(lines_of("explain", "autoencoder.latent_dim"))
    assert "integer above 0; default 32" in text and "Channels of a latent" in text
    text = " ".join(
        lines_of("explain", "autoencoder.latent_dim", "photos-dinov2s", "autoencoder.latent_dim=48")
    )
    assert "Here it is 48: an override." in text
    assert any(line.startswith("data.path:") for line in lines_of("explain", "data"))


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("fae prec", "precompute"),
        ("fae precompute pho", "photos-dinov2s"),
        ("fae train gen", "generator"),
        ("fae tune sweep", "sweep-fashion"),
        ("fae explain data.pa", "data.path"),
        ("fae precompute photos-dinov2s --dry", "--dry-run"),
    ],
)
def test_the_shell_completes_commands_recipes_keys_and_options(words, offered):
    shell = {"_FAE_COMPLETE": "complete_bash", "COMP_WORDS": words}
    shell["COMP_CWORD"] = str(len(words.split()) - 1)
    result = CliRunner().invoke(app, [], prog_name="fae", env=shell)
    assert offered in result.output.splitlines()
    assert any(line.startswith("--install-completion") for line in lines_of("--help"))


@pytest.mark.parametrize("arguments", [["--help"], ["precompute", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    heavy = ("torch", "ray", "boto3", "mlflow", "numpy", "pyarrow", "omegaconf", "rich")
    code = (
        "import sys\nfrom fae.cli import main\n"
        "try:\n    main()\nexcept SystemExit as ended:\n"
        f"    print([ended.code, *(name for name in {heavy} if name in sys.modules)])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[0]"


@pytest.mark.parametrize("name", recipe_names())
def test_what_is_printed_is_the_recipe_again(name, tmp_path):
    result = CliRunner().invoke(app, ["precompute", name, "seed=7", "--print-config"])
    (tmp_path / "printed.yaml").write_text(result.output)
    assert load_recipe(str(tmp_path / "printed.yaml")) == load_recipe(name, ["seed=7"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["precompte", "photos-dinov2s"], "Did you mean 'precompute'"),
        (["train", "genrator"], "Did you mean 'generator'?"),
        (["precompute", "photos-dinov2s", "--dryrun"], "--dry-run"),
        (["precompute", "photos-dinov2"], "Did you mean 'photos-dinov2s'?"),
        (["explain", "autoencoder.latent_dims"], "Did you mean 'autoencoder.latent_dim'?"),
        (["explain", "latent_dim"], "Did you mean 'autoencoder.latent_dim'?"),
        (["explain", "data.path", "data.path=x"], "name the recipe first"),
        (["tune", "report", "seed=1"], "fae tune report RECIPE"),
        (["precompute", "photos-dinov2s", "data.pth=x"], "Did you mean 'data.path'?"),
        (
            ["precompute", "photos-dinov2s", "autoencoder.latent_dim=none"],
            "autoencoder.latent_dim: given 'none'",
        ),
        (
            [
                "precompute",
                "photos-dinov2s",
                "data.path=/nowhere",
                "output=x",
                "autoencoder.checkpoint=y",
            ],
            "/nowhere",
        ),
        (["train", "autoencoder", "photos-dinov2s"], "run=NAME"),
        (["probe", "photos-dinov2s", "data.path=x"], "labelled images"),
        (["run", "photos-dinov2s", "--until", "sampels"], "chain.until: given 'sampels'"),
        (
            ["train", "generator", "photos-dinov2s", "generator.training.compile=maybe"],
            "training.compile: given 'maybe'; Input should be 'auto' or a valid boolean.\n",
        ),
        (["tune", "sweep-fashion", "tune.space.sed.grid=[1]"], "Did you mean 'seed'?"),
        (["inspect", "/nowhere"], "holds no latent store"),
    ],
)
def test_a_mistake_is_explained(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fae", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_mistake_has_no_traceback():
    arguments = ["precompute", "photos-dinov2"]
    result = subprocess.run(
        [sys.executable, "-m", "fae", *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and "Did you mean" in result.stderr
    assert "Traceback" not in result.stderr


def test_plan_prints_the_account_of_a_source(tmp_path):
    for name in ("cat/1.jpg", "dog/2.jpg", "dog/.hidden.jpg", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    words = ["plan", "photos-dinov2s", f"data.path={tmp_path}"]
    lines = CliRunner().invoke(app, words).output.splitlines()
    assert lines[1] == "files     4 listed = 2 read + 2 skipped"
    assert "labels    2 of 2 images, 2 classes (cat … dog) from class folders" in lines
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
    assert (found["num_images"], found["class_names"]) == (2, ["cat", "dog"])
    missing = CliRunner().invoke(app, ["plan", "photos-dinov2s", "data.path=/nowhere/at/all"])
    assert "does not exist" in str(missing.exception)


@pytest.mark.parametrize(
    ("words", "job", "result", "ending"),
    [
        (
            "train autoencoder photos-dinov2s data.path=photos",
            "training.train_autoencoder",
            SimpleNamespace(checkpoint="runs/a/autoencoder.safetensors"),
            "next: fae precompute RECIPE data.path=photos "
            "autoencoder.checkpoint=runs/a/autoencoder.safetensors output=latents",
        ),
        (
            "precompute photos-dinov2s output=latents",
            "latents.precompute",
            {"stored": 3, "errors": 0},
            "latents: 3 latents, 0 errors   next: fae train generator RECIPE latents=latents "
            "run=generator",
        ),
        (
            "run photos-dinov2s storage=runs",
            "chain.run_chain",
            {"autoencoder": {}, "report": {}},
            "finished: autoencoder, report; in runs   next: fae publish runs --output published",
        ),
    ],
)
def test_the_last_line_says_where_the_result_is_and_what_comes_next(
    words, job, result, ending, monkeypatch
):
    monkeypatch.setattr(f"fae.pipelines.{job}", lambda recipe: result)
    assert lines_of(*words.split())[-1].endswith(ending)
