"""The front door: help that teaches, recipes that are printed, mistakes that are explained."""

import subprocess
import sys

import pytest
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
    ],
)
def test_help_teaches(arguments, word):
    assert word in CliRunner().invoke(app, arguments).output


@pytest.mark.parametrize("name", recipe_names())
def test_what_is_printed_is_the_recipe_again(name, tmp_path):
    result = CliRunner().invoke(app, ["precompute", name, "seed=7", "--print-config"])
    (tmp_path / "printed.yaml").write_text(result.output)
    assert load_recipe(str(tmp_path / "printed.yaml")) == load_recipe(name, ["seed=7"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["precompute", "photos-dinov2"], "Did you mean 'photos-dinov2s'?"),
        (["precompute", "photos-dinov2s", "data.pth=x"], "Did you mean 'data.path'?"),
        (["precompute", "photos-dinov2s", "autoencoder.latent_dim=none"], "autoencoder.latent_dim: given 'none'"),
        (["precompute", "photos-dinov2s", "data.path=/nowhere", "output=x", "autoencoder.checkpoint=y"], "/nowhere"),
        (["train", "autoencoder", "photos-dinov2s"], "run=NAME"),
        (["probe", "photos-dinov2s", "data.path=x"], "labelled images"),
        (["run", "photos-dinov2s", "--until", "sampels"], "chain.until: given 'sampels'"),
        (["tune", "sweep-fashion", "tune.space.sed.grid=[1]"], "Did you mean 'seed'?"),
        (["inspect", "/nowhere"], "holds no latent store"),
    ],
)  # fmt: skip
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
