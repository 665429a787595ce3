"""`fae publish`: what the folder holds, and that everybody loads the same networks from it.

The Hub is a server on loopback, and its client is huggingface_hub's own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import fae
from fae.cli import app
from fae.pipelines.config import load_recipe
from fae.pipelines.networks.loading import autoencoder_of, backbone_of
from fae.pipelines.publishing import PublishError, publish, push
from fae.pipelines.storage import paths
from fae.pipelines.storage.paths import StorageError
from fae_core import checkpoint
from fae_core.checkpoint import CheckpointError
from fae_core.pixel_decoder import PixelDecoder, PixelDecoderConfig
from tests.fault_proxy import FaultProxy
from tests.hub_server import TOKEN, HubServer
from tests.tiny import SMALLEST_BACKBONE, TINY

MODEL = "somebody/small-fae"


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["fae"], {"autoencoder.safetensors"}),
        (["decoder"], {"pixel_decoder.safetensors"}),
        (["dit"], {"generator.safetensors"}),
        (["flow"], {"generator.safetensors"}),
        (
            ["fae", "decoder", "dit", "store", "scores"],
            {"autoencoder.safetensors", "pixel_decoder.safetensors", "generator.safetensors"},
        ),
    ],
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, list) else "",
)
def test_a_folder_accounts_for_every_file_and_names_what_it_was_trained_with(
    runs, tmp_path, names, files
):
    output = tmp_path / "published"
    account = publish([str(runs / name) for name in names], str(output))
    assert json.loads((output / "fae.json").read_text()) == account
    there = {p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()}
    assert there == {*account["files"], "fae.json"}
    assert files | {"README.md", "config.json", "recipe.yaml"} <= there
    for name, entry in account["files"].items():
        path = output / name
        assert entry == {"size": path.stat().st_size, "sha256": sha256_of(path)}
    for network in account["networks"].values():
        loaded = fae.load(output / network["file"])
        assert network["weights_sha256"] == loaded.weights_sha256
        assert network["trained_with"] == loaded.fingerprints
        assert network["num_parameters"] == sum(p.numel() for p in loaded.module.parameters())
    assert {"fae-ray", "torch", "timm", "python"} <= set(account["versions"])
    if "dit" in names:
        assert account["latents"]["std"] == [i / 4 for i in range(1, 9)]


def test_the_latent_statistics_of_an_autoencoder_are_those_of_a_store(runs, tmp_path):
    account = publish([str(runs / "fae"), str(runs / "store")], str(tmp_path / "published"))
    stats = fae.LatentStore.open(str(runs / "store")).stats
    assert account["latents"]["mean"] == pytest.approx(np.asarray(stats.mean))
    assert account["latents"]["shape"] == [8, 2, 2]


def test_the_card_says_licences_data_scores_with_commands_pictures_and_how_to_load(runs, tmp_path):
    places = [str(runs / name) for name in ("fae", "decoder", "dit", "store", "scores")]
    publish(places, str(tmp_path / "published"), "mit", name=MODEL)
    card = (tmp_path / "published/README.md").read_text()
    about = front_matter(card)
    assert (about["license"], about["base_model"]) == ("mit", "timm/test_vit.r160_in1k")
    assert "arxiv:2512.07829" in about["tags"]
    assert "These weights: mit." in card and "have the licence: apache-2.0" in card
    assert "autoencoder: 2 images planned for training" in card
    assert "4 images planned = 4 stored + 0 errors" in card
    assert "| frechet_backbone | 12.5 |" in card and "| mse | 0.25 |" in card
    assert "evaluate.scores=[frechet_backbone]" in card
    assert "fae train autoencoder recipe.yaml data.path=IMAGES run=NAME" in card
    for name in ("autoencoder", "pixel_decoder", "generator"):
        assert f"(pictures/{name}.png)" in card
        assert (tmp_path / f"published/pictures/{name}.png").is_file()
    assert f'from_pretrained("{MODEL}")' in card
    assert sha256_of(runs / "fae/autoencoder.safetensors") in card


def test_recipes_are_published_without_passwords_and_private_places(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "secret place")
    publish([str(runs / "fae"), str(runs / "dit")], str(tmp_path / "published"))
    for path in (tmp_path / "published").rglob("*"):
        if path.suffix in (".yaml", ".json", ".md"):
            text = path.read_text()
            for private in ("somebody/secret", "secret place", "password", "private-bucket"):
                assert private not in text, path
    recipe = yaml.safe_load((tmp_path / "published/recipe.yaml").read_text())
    assert recipe["data"]["path"] == "photos" and "tracking" not in recipe
    assert (tmp_path / "published/recipe-generator.yaml").is_file()
    load_recipe(str(tmp_path / "published/recipe.yaml"), [])


def test_the_results_of_a_chain_are_published_from_its_folder(runs, tmp_path):
    chain = tmp_path / "chain"
    stages = {
        "autoencoder-aaa": ("fae", {}),
        "pixel-decoder-bbb": ("foreign", {}),
        "finetune-ccc": ("decoder", {}),
        "latents-ddd": ("store", {}),
        "generator-eee": ("dit", {}),
        "evaluation-fff": ("scores", {}),
    }
    upstream = dict(name.rsplit("-", 1) for name in stages)
    for name, (source, parts) in stages.items():
        if source != "foreign":
            (chain / name).mkdir(parents=True)
            for file in (runs / source).rglob("*"):
                if file.is_file():
                    place = chain / name / file.relative_to(runs / source)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(file.read_bytes())
        else:
            (chain / name).mkdir()
            (chain / name / "pixel_decoder.safetensors").write_bytes(b"the noisy stage's")
        (chain / name / "stage.json").write_text(json.dumps({"parts": parts}))
    report = chain / "report-000"
    report.mkdir()
    (report / "stage.json").write_text(json.dumps({"parts": {"image_size": 32, **upstream}}))
    (report / "recipe.yaml").write_text((runs / "fae/recipe.yaml").read_text())
    account = publish([str(chain)], str(tmp_path / "published"))
    assert set(account["networks"]) == {"autoencoder", "pixel_decoder", "generator"}
    finetuned = fae.load(runs / "decoder").weights_sha256
    assert account["networks"]["pixel_decoder"]["weights_sha256"] == finetuned
    assert "frechet_backbone" in (tmp_path / "published/README.md").read_text()

    (chain / "report-111").mkdir()
    (chain / "report-111/stage.json").write_text('{"parts": {}}')
    with pytest.raises(PublishError, match="results of 2 chains.*report-000.*report-111"):
        publish([str(chain)], str(tmp_path / "again"))
    named = publish([str(report)], str(tmp_path / "again"))
    assert named["networks"] == account["networks"]


def test_what_is_published_again_keeps_the_recipe_of_each_network(runs, tmp_path):
    changed = (runs / "dit/recipe.yaml").read_text().replace("seed: 0", "seed: 7", 1)
    dit = tmp_path / "dit"
    shutil.copytree(runs / "dit", dit)
    (dit / "recipe.yaml").write_text(changed)
    first, again = tmp_path / "first", tmp_path / "again"
    publish([str(runs / "fae"), str(dit)], str(first))
    card = (first / "README.md").read_text()
    assert "fae train autoencoder recipe.yaml data.path" in card
    assert "fae train generator recipe-generator.yaml latents" in card
    publish([str(first)], str(again))
    assert "seed: 7" in (first / "recipe-generator.yaml").read_text()
    for name in ("recipe.yaml", "recipe-generator.yaml"):
        assert (again / name).read_text() == (first / name).read_text()


def test_the_card_of_networks_without_their_autoencoder_loads_each(runs, tmp_path):
    output = tmp_path / "published"
    publish([str(runs / "decoder"), str(runs / "dit")], str(output), name=MODEL)
    card = (output / "README.md").read_text()
    for name in ("pixel_decoder", "generator"):
        assert f'{name} = fae.load("hf://{MODEL}/{name}.safetensors").module' in card


def test_networks_of_any_size_are_published_to_s3(limited_s3: FaultProxy, tmp_path):
    decoder = PixelDecoder(PixelDecoderConfig(8, (2, 2), 32, width=256, depth=2, num_heads=2))
    file = tmp_path / "pixel_decoder.safetensors"
    checkpoint.save(file, decoder, {"backbone": "test_vit:0", "image_size": "32"})
    assert file.stat().st_size > limited_s3.put_limit  # a single PUT is refused
    publish([str(file)], "s3://large/published")
    loaded = fae.load("s3://large/published/pixel_decoder.safetensors")
    assert loaded.weights_sha256 == fae.load(file).weights_sha256


def test_networks_that_do_not_belong_together_are_refused(runs, tmp_path):
    dit = fae.load(runs / "dit")
    other = tmp_path / "generator.safetensors"
    checkpoint.save(other, dit.module, {**dit.fingerprints, "autoencoder": "f" * 64})
    output = str(tmp_path / "published")
    with pytest.raises(CheckpointError, match="was trained with autoencoder ffff"):
        publish([str(runs / "fae"), str(other)], output)
    with pytest.raises(PublishError, match="are a generator; a folder holds one"):
        publish([str(runs / "flow"), str(other)], output)
    with pytest.raises(PublishError, match="holds nothing to publish"):
        publish([str(tmp_path / "none")], output)
    assert not Path(output).exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(PublishError, match="not empty"):
        publish([str(runs / "fae")], str(tmp_path / "full"))


def test_a_published_folder_is_loaded_by_its_path_or_s3_address(runs, root):
    place = paths.join(root, "published")
    publish([str(runs / name) for name in ("fae", "decoder", "dit")], place)
    assert_same_networks(place, runs)


def assert_same_networks(place: str, runs: Path) -> None:
    """What is loaded from `place` encodes, decodes and samples as the runs' networks do."""
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    published = fae.FeatureAutoencoder.from_pretrained(place)
    trained = fae.FeatureAutoencoder.from_pretrained(runs / "fae", pixel_decoder=runs / "decoder")
    latents = published.encode_images(image)
    assert torch.equal(latents, trained.encode_images(image))
    assert np.array_equal(published.decode_images(latents), trained.decode_images(latents))
    drawn = fae.sample(place, published, labels=[0, 1], num_steps=2)
    assert np.array_equal(drawn, fae.sample(runs / "dit", trained, labels=[0, 1], num_steps=2))


@pytest.mark.integration
def test_a_pushed_model_is_loaded_by_its_name_on_the_hub(runs, tmp_path, hub: HubServer):
    output = tmp_path / "published"
    command = ["publish", *(str(runs / name) for name in ("fae", "decoder", "dit"))]
    result = CliRunner().invoke(
        app, [*command, "--output", str(output), "--push", MODEL, "--private"]
    )
    assert result.exit_code == 0, result.output
    assert TOKEN not in result.output and f"{hub.url}/{MODEL}/commit/" in result.output
    files = hub.repositories[f"models/{MODEL}"]
    assert files == {
        p.relative_to(output).as_posix(): p.read_bytes() for p in output.rglob("*") if p.is_file()
    }
    assert f"models/{MODEL}" in hub.private
    for place in (MODEL, f"hf://{MODEL}", f"hf://{MODEL}@main"):
        assert_same_networks(place, runs)
    one_file = f"hf://{MODEL}/generator.safetensors"
    assert fae.load(one_file).weights_sha256 == fae.load(runs / "dit").weights_sha256
    recipe = load_recipe(
        "photos-dinov2s",
        [*TINY, *SMALLEST_BACKBONE, f"autoencoder.checkpoint=hf://{MODEL}"],
    )
    loaded = autoencoder_of(recipe, backbone_of(recipe))
    assert loaded.weights_sha256 == fae.load(runs / "fae").weights_sha256
    downloads = [
        p for m, p, _ in hub.requests if m == "GET" and p.endswith("/autoencoder.safetensors")
    ]
    assert len(downloads) == 1  # later ones come from the cache


def test_a_changed_folder_and_a_refused_token_are_not_pushed(
    runs, tmp_path, hub: HubServer, monkeypatch
):
    output = tmp_path / "published"
    publish([str(runs / "fae")], str(output))
    monkeypatch.setenv("HF_TOKEN", "hf_this_token_may_not_write")
    with pytest.raises(StorageError, match=r"access denied \(401\).*HF_TOKEN") as raised:
        push(output, MODEL)
    assert "may_not_write" not in str(raised.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (output / "recipe.yaml").write_text("{}")
    with pytest.raises(PublishError, match="recipe.yaml differ from fae.json"):
        push(output, MODEL)
    (output / "fae.json").write_text("{}")
    with pytest.raises(PublishError, match="fae.json is damaged"):
        push(output, MODEL)
    assert hub.repositories == {}


def test_files_that_were_never_published_are_not_pushed(runs, tmp_path, hub: HubServer):
    output = tmp_path / "published"
    publish([str(runs / "fae")], str(output))
    for name in (".env", ".ipynb_checkpoints/notes.txt", "pictures/[a-z]*.png"):
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("private")
        with pytest.raises(PublishError, match="not in fae.json, and nothing was sent") as raised:
            push(output, MODEL)
        assert name in str(raised.value)
        (output / name).unlink()
    assert hub.repositories == {}
    push(output, MODEL)
    files = {p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()}
    assert set(hub.repositories[f"models/{MODEL}"]) == files


def test_private_weights_are_not_sent_to_a_public_repository(runs, tmp_path, hub: HubServer):
    output = tmp_path / "published"
    publish([str(runs / "fae")], str(output))
    hub.add(f"models/{MODEL}", {})
    with pytest.raises(StorageError, match="is a public repository, and nothing was sent"):
        push(output, MODEL, private=True)
    assert hub.repositories[f"models/{MODEL}"] == {}
    for _ in range(2):
        push(output, f"{MODEL}-2", private=True)
    assert f"models/{MODEL}-2" in hub.private


def test_a_name_that_is_nowhere_is_explained(hub: HubServer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="runs/frist: no such file or folder here, and .*Hub"):
        fae.load("runs/frist")
    with pytest.raises(StorageError, match="only `fae publish --push` writes there"):
        paths.write_bytes("hf://somebody/model/file", b"")
    assert all("huggingface.co" not in path for _, path, _ in hub.requests)


def test_half_of_the_bytes_hold_networks_that_belong_together(runs, tmp_path):
    places = [str(runs / name) for name in ("fae", "decoder")]
    whole, half = (publish(places, str(tmp_path / n), half=n == "half") for n in ("whole", "half"))
    for name in ("autoencoder", "pixel_decoder"):
        file = f"{name}.safetensors"
        assert half["files"][file]["size"] < 0.55 * whole["files"][file]["size"]
        a, b = (checkpoint.load(tmp_path / n / file) for n in ("whole", "half"))
        assert b.weights_sha256 == half["networks"][name]["weights_sha256"] != a.weights_sha256
        assert a.fingerprints == b.fingerprints
        for key, tensor in b.module.state_dict().items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, a.module.state_dict()[key], rtol=1e-3, atol=1e-6)
    again = publish([str(tmp_path / "half")], str(tmp_path / "again"), half=True)
    assert again["networks"]["autoencoder"] | {"num_images": 0} == (
        half["networks"]["autoencoder"] | {"num_images": 0, "metrics": {}}
    )
    # A generator of the whole autoencoder's latents does not decode with the rounded one.
    with pytest.raises(CheckpointError, match="was trained with autoencoder"):
        publish([*places, str(runs / "dit")], str(tmp_path / "mixed"), half=True)
