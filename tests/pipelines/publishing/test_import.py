"""Networks of others, with random weights: what `fae import` writes computes the same."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from diffusers import AutoencoderRAE
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import fae
from fae.cli import app
from fae.pipelines.config import RecipeError, load_recipe
from fae.pipelines.networks import backbone_of
from fae.pipelines.training.pixel_decoder import starting_model
from fae_core.backbone import load_backbone
from fae_core.checkpoint import CheckpointError
from fae_core.foreign.tensors import ForeignError
from fae_core.pixel_decoder import PixelDecoder, PixelDecoderConfig
from tests.foreign_networks import CHANNELS, CLASSES, HEADS, SIDE, random_tensors, theirs
from tests.tiny import ROOT, save_decoders

BACKBONE = "test_vit"
RAE_NAMES = {
    "attention.to_q": "attention.attention.query",
    "attention.to_k": "attention.attention.key",
    "attention.to_v": "attention.attention.value",
    "attention.to_out.0": "attention.output.dense",
}
"""diffusers' names of a layer's attention -> those of RAE's repository."""


def run(*words: object) -> str:
    """What `fae import` prints; a mistake is raised."""
    result = CliRunner().invoke(app, ["import", *map(str, words)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random backbone whose last norm does something."""
    torch.manual_seed(0)
    state = timm.create_model(BACKBONE, num_classes=0).state_dict()
    state["norm.weight"] = torch.randn(64).abs() + 0.2
    state["norm.bias"] = torch.randn(64)
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def rae() -> AutoencoderRAE:
    """A small autoencoder of random weights."""
    torch.manual_seed(1)
    model = AutoencoderRAE(
        encoder_hidden_size=64,
        encoder_patch_size=16,
        encoder_num_hidden_layers=1,
        encoder_input_size=64,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=41,
        patch_size=8,
        latents_mean=torch.randn(64, 1, 1),
        latents_std=torch.rand(64, 1, 1) + 0.5,
    )
    for parameter in model.decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def own_tensors(rae: AutoencoderRAE) -> dict[str, Tensor]:
    """The decoder as RAE's own files have it."""
    tensors = {**rae.decoder.state_dict(), "decoder_pos_embed": rae.decoder.decoder_pos_embed}
    for old, name in RAE_NAMES.items():
        tensors = {key.replace(old, name): tensor for key, tensor in tensors.items()}
    return tensors


@pytest.fixture(scope="module")
def folder(rae: AutoencoderRAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The autoencoder as diffusers saves it."""
    path = tmp_path_factory.mktemp("rae")
    rae.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def decoded(rae: AutoencoderRAE, weights: Path) -> tuple[Tensor, Tensor]:
    """Features as the backbone here has them, and the images that RAE decodes from its own."""
    norm = load_backbone(BACKBONE, str(weights), 64).model.norm
    normalized = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(2))
    latents = rae._normalize_latents(normalized.transpose(1, 2).unflatten(2, (4, 4)))
    with torch.no_grad():
        return normalized * norm.weight + norm.bias, rae.decode(latents).sample


def test_an_autoencoder_rae_of_diffusers_gives_the_same_images(
    folder: Path, decoded: tuple[Tensor, Tensor], weights: Path, tmp_path: Path
) -> None:
    output = tmp_path / "decoder.safetensors"
    options = ("--backbone", BACKBONE, "--backbone-weights", weights)
    printed = run("rae", folder, *options, "--output", output)
    loaded = fae.load(output)
    features, images = decoded
    with torch.no_grad():
        ours = loaded.module(features)
    assert images.std() > 0.1 and (ours - images).abs().max() < 1e-4
    # It fits the recipe that is printed, on the backbone whose features it decodes.
    keys = [word for word in printed.split() if word.startswith("pixel_decoder.")]
    start = ["pixel_decoder.stage=finetune", f"pixel_decoder.start_from={output}"]
    frozen = [f"backbone.name={BACKBONE}", f"backbone.weights={weights}", "backbone.image_size=64"]
    recipe = load_recipe("photos-dinov2s", [*keys, *start, *frozen, "image_size=32"])
    model = starting_model(recipe, backbone_of(recipe), torch.zeros(64), torch.ones(64))
    assert model.training and model.config.class_token
    with torch.no_grad():
        assert torch.equal(model(features), ours)


@pytest.mark.parametrize("wrapped", [False, True])
def test_raes_own_files_give_the_same_images(
    rae: AutoencoderRAE,
    decoded: tuple[Tensor, Tensor],
    weights: Path,
    tmp_path: Path,
    wrapped: bool,
) -> None:
    tensors: dict = own_tensors(rae)
    if wrapped:  # a checkpoint of its training
        ema = {f"module.decoder.{key}": tensor for key, tensor in tensors.items()}
        tensors = {"model": {"module.decoder.other": torch.zeros(1)}, "ema": ema, "step": 3}
    torch.save(tensors, tmp_path / "model.pt")
    output = tmp_path / "decoder.safetensors"
    options = ("--backbone", BACKBONE, "--backbone-weights", weights, "--num-heads", 4)
    run("rae", tmp_path / "model.pt", *options, "--output", output)
    features, images = decoded
    images = (images - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    images = images * 0.5 + 0.5  # this backbone's own normalization
    with torch.no_grad():
        assert (fae.load(output).module(features) - images).abs().max() < 1e-4


IMAGENET_MEAN = [[[0.485]], [[0.456]], [[0.406]]]
IMAGENET_STD = [[[0.229]], [[0.224]], [[0.225]]]


def test_the_commands_of_the_page_work(
    rae: AutoencoderRAE,
    folder: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With small networks in the place of the published ones."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08")
    torch.save(own_tensors(rae), "model.pt")
    small = ["--backbone", BACKBONE, "--backbone-weights", weights, "--num-heads", 4]
    page = (ROOT / "docs" / "interchange.md").read_text()
    commands = re.findall("^fae import .*$", page.replace("\\\n", " "), re.M)
    assert [command.split()[2] for command in commands] == ["rae", "rae", "lightningdit", "sit"]
    for number, command in enumerate(commands[:2]):
        words = command.split()[2:]
        run(*words, *small, "--output", f"{number}.safetensors")
    first, second = (fae.load(tmp_path / f"{number}.safetensors") for number in range(2))
    assert first.module.config.grid == second.module.config.grid == (4, 4)
    (tmp_path / "for-lightningdit").mkdir()
    statistics = {"mean": torch.zeros(CHANNELS), "std": torch.ones(CHANNELS)}
    torch.save(statistics, "for-lightningdit/latents_stats.pt")
    save_decoders(tmp_path, (CHANNELS, SIDE, SIDE), 32)
    (tmp_path / "autoencoder.safetensors").rename("fae.safetensors")
    torch.save({"ema": random_tensors()}, "0080000.pt")
    torch.save(random_tensors(modern=False), "SiT-XL-2-256.pt")
    for command in commands[2:]:
        run(*command.split()[2:], "--num-heads", HEADS)
        assert fae.load(tmp_path / "generator.safetensors").kind == "dit"


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, [], "Give --backbone"),
        ({}, ["--backbone", "vit_tiny_patch16_224", "--num-heads", "4"],
         "features of 64 channels"),
        ({}, ["--backbone", BACKBONE], "Give --num-heads"),
        ({"extra.weight": 1}, ["--backbone", BACKBONE, "--num-heads", "4"], "extra.weight"),
        ({"decoder_norm.weight": None}, ["--backbone", BACKBONE, "--num-heads", "4"],
         "no tensor decoder_norm.weight"),
        ({"decoder_embed.weight": None}, ["--backbone", BACKBONE], "no decoder of RAE"),
    ],
)  # fmt: skip
def test_what_is_no_decoder_of_this_backbone_is_refused_in_words(
    rae: AutoencoderRAE, tmp_path: Path, change: dict, options: list, message: str
) -> None:
    tensors = dict(rae.decoder.state_dict())
    tensors |= {name: torch.zeros(1) for name in change}
    for name in [n for n, value in change.items() if value is None]:
        del tensors[name]
    torch.save(tensors, tmp_path / "model.pt")
    if options:
        options = [*options, "--backbone-weights", "random"]
    with pytest.raises(ForeignError, match=message):
        run("rae", tmp_path / "model.pt", *options, "--output", tmp_path / "d.safetensors")
    assert not (tmp_path / "d.safetensors").exists()


def test_other_models_and_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(ForeignError, match="AutoencoderKL"):
        run("rae", tmp_path, "--output", tmp_path / "d.safetensors")
    for text, words in (
        ("[1]", "no configuration"),
        ("{", "no configuration"),
        ('{"_class_name": "AutoencoderRAE"}', "no number for decoder_num_attention_heads"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ForeignError, match=words):
            run("rae", tmp_path, "--output", tmp_path / "d.safetensors")
    torch.save(
        {"model": PixelDecoder(PixelDecoderConfig(4, (2, 2), 16, 8, 1, 2))}, tmp_path / "p.pt"
    )
    with pytest.raises(ForeignError, match="not executed"):
        run("rae", tmp_path / "p.pt", "--output", tmp_path / "d.safetensors")
    with pytest.raises(ForeignError, match=r"\.safetensors file"):
        run("rae", tmp_path / "p.pt", "--output", tmp_path / "decoder.pt")


def test_a_checkpoint_of_sits_training_becomes_a_generator(tmp_path: Path) -> None:
    tensors = random_tensors(modern=False, patch=2, variances=True)
    training = {
        "model": {name: torch.zeros_like(tensor) for name, tensor in tensors.items()},
        "ema": {f"module.{name}": tensor for name, tensor in tensors.items()},
        "opt": {"state": {}},
        "args": argparse.Namespace(model="SiT-XL/2"),
    }
    torch.save(training, tmp_path / "0400000.pt")
    output = tmp_path / "generator.safetensors"
    printed = run("sit", tmp_path / "0400000.pt", "--num-heads", HEADS, "--output", output)
    assert "5 classes, latents 3×4×4" in printed
    loaded = fae.load(output)
    x, t, y = torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.9]), torch.tensor([1, 5])
    with torch.no_grad():
        expected = -theirs(tensors, x, 1 - t, y, patch=2)
        assert (loaded.module(x, t, y) - expected).abs().max() < 1e-4
    assert torch.allclose(loaded.module.denormalize(x), x / 0.18215)


def test_a_generator_of_lightningdit_on_latents_of_ours_draws_images(tmp_path: Path) -> None:
    save_decoders(tmp_path, (CHANNELS, SIDE, SIDE), 32)
    networks = [tmp_path / f"{name}.safetensors" for name in ("autoencoder", "pixel_decoder")]
    torch.save({"ema": random_tensors()}, tmp_path / "80000.pt")
    stats = {"mean": torch.randn(1, CHANNELS, 1, 1), "std": torch.rand(1, CHANNELS, 1, 1) + 0.5}
    torch.save(stats, tmp_path / "latents_stats.pt")
    output = tmp_path / "generator.safetensors"
    words = ("lightningdit", tmp_path / "80000.pt", "--output", output)
    with pytest.raises(ForeignError, match="--stats latents_stats.pt"):
        run(*words)
    words = (*words, "--stats", tmp_path / "latents_stats.pt")
    run(*words, "--multiplier", 0.5)
    x = torch.randn(2, CHANNELS, SIDE, SIDE)
    raw = x * stats["std"] / 0.5 + stats["mean"]
    assert torch.allclose(fae.load(output).module.denormalize(x), raw, atol=1e-6)
    with pytest.raises(CheckpointError, match="none of this project.*--autoencoder"):
        fae.sample(output, *networks, labels=[0], num_steps=2)
    run(*words, "--autoencoder", networks[0])
    images = fae.sample(output, *networks, labels=[0, 4], num_steps=2, protocol="lightningdit")
    assert images.shape == (2, 32, 32, 3)
    save_decoders(tmp_path / "other", (4, SIDE, SIDE), 32)
    with pytest.raises(ForeignError, match="latents of 3 channels"):
        run(*words, "--autoencoder", tmp_path / "other" / "autoencoder.safetensors")


def test_a_generator_without_a_null_class_is_not_guided(tmp_path: Path) -> None:
    save_decoders(tmp_path, (CHANNELS, SIDE, SIDE), 32)
    networks = [tmp_path / f"{name}.safetensors" for name in ("autoencoder", "pixel_decoder")]
    torch.save(random_tensors(null_class=False), tmp_path / "g.pt")
    output = tmp_path / "generator.safetensors"
    options = ("--num-classes", CLASSES, "--multiplier", 1, "--autoencoder", networks[0])
    assert "without guidance" in run(
        "lightningdit", tmp_path / "g.pt", *options, "--output", output
    )
    assert len(fae.sample(output, *networks, labels=[4], num_steps=2)) == 1
    with pytest.raises(RecipeError, match="label_dropout=0"):
        fae.sample(output, *networks, labels=[4], num_steps=2, guidance=2.0)
