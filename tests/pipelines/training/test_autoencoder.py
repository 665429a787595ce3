"""The autoencoder's trainer: split, refusals, and with real Ray a SIGKILL that changes no bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from fae.pipelines.config.recipe import RecipeError, load_recipe
from fae.pipelines.data.records import ImageRecord, SourceError, split_records
from fae.pipelines.storage import paths
from fae.pipelines.training import run_folder
from fae.pipelines.training.autoencoder import train_autoencoder
from fae.pipelines.training.metrics_log import read_metrics_log
from fae.pipelines.training.run_folder import claim_networks, claim_run, settle_precision
from fae_core import checkpoint
from tests.tiny import ROOT, wait_for_checkpoint

SECTIONS = ("data", "backbone", "autoencoder")


def test_the_split_depends_on_the_key_alone():
    records = [ImageRecord(f"image {i}", f"/x/{i}") for i in range(2000)]
    training, validation = split_records(records, 0.1)
    assert len(training) + len(validation) == 2000 and 140 < len(validation) < 260
    again = split_records(list(reversed(records[:1000])), 0.1)[1]
    assert {r.key for r in again} == {r.key for r in validation} & {r.key for r in records[:1000]}
    assert split_records(records, 0.0)[1] == []
    with pytest.raises(SourceError, match="validation_fraction"):
        split_records(records[:1], 1.0 - 1e-12)


def test_a_run_of_another_recipe_is_refused_and_names_the_keys(tmp_path):
    uri = str(tmp_path / "r")
    claim_run(load_recipe("photos-dinov2s", ["run=r"]), uri, SECTIONS)
    claim_run(
        load_recipe(
            "photos-dinov2s",
            ["run=r", "autoencoder.training.num_workers=2", "autoencoder.training.log_every=3"],
        ),
        uri,
        SECTIONS,
    )
    with pytest.raises(RecipeError, match=r"autoencoder.latent_dim: 32 there, 48 now") as error:
        claim_run(
            load_recipe("photos-dinov2s", ["run=r", "autoencoder.latent_dim=48"]), uri, SECTIONS
        )
    assert "steps" not in str(error.value)


def test_a_resumed_run_keeps_the_precision_that_it_began_with(tmp_path, capsys):
    uri, key = str(tmp_path / "r"), "autoencoder.training.precision"
    recipe = load_recipe("photos-dinov2s", ["run=r"])
    assert recipe.autoencoder.training.precision == "auto"
    begun = settle_precision(recipe, "autoencoder", uri)
    other = {"fp32": "bf16", "bf16": "fp32"}[begun.autoencoder.training.precision]
    claim_run(load_recipe("photos-dinov2s", ["run=r", f"{key}={other}"]), uri, SECTIONS)
    resumed = settle_precision(recipe, "autoencoder", uri)
    assert resumed.autoencoder.training.precision == other
    assert f"{key}=auto: {other}" in capsys.readouterr().out
    claim_run(resumed, uri, SECTIONS)


def test_a_run_needs_a_name():
    with pytest.raises(RecipeError, match="run=NAME"):
        train_autoencoder(load_recipe("photos-dinov2s"))


def test_a_finished_run_returns_at_once(tmp_path):
    fixed = ["run=r", f"storage={tmp_path}", "autoencoder.training.precision=fp32"]
    recipe = load_recipe("photos-dinov2s", fixed)
    claim_run(recipe, paths.join(str(tmp_path), "r"), SECTIONS)
    paths.write_bytes(f"{tmp_path}/r/result.json", b'{"mse": 0.5}')
    result = train_autoencoder(recipe)
    assert result.metrics == {"mse": 0.5} and result.checkpoint.endswith(
        "r/autoencoder.safetensors"
    )


def test_images_that_cannot_train_claim_no_run_and_the_same_name_trains_others(
    tmp_path, monkeypatch
):
    told = []
    monkeypatch.setattr(
        "fae.pipelines.training.autoencoder.launch", lambda *given: told.append(given)
    )
    (tmp_path / "images" / "cat").mkdir(parents=True)
    for name in ("cat/a.jpg", "notes.md"):
        (tmp_path / "images" / name).write_bytes(b"x")
    places = ["run=r", f"storage={tmp_path}/runs", f"data.path={tmp_path}/images"]
    heads = ["autoencoder.encoder.num_heads=6", "autoencoder.decoder.num_heads=6"]

    def train(*more: str) -> None:
        train_autoencoder(load_recipe("photos-dinov2s", [*places, *heads, *more]))

    with pytest.raises(SourceError, match="All 1 images fall into the validation split"):
        train("data.validation_fraction=0.999999")
    with pytest.raises(RecipeError, match="not divisible by 5 heads"):
        train("autoencoder.decoder.num_heads=5")
    assert not (tmp_path / "runs").exists()
    with pytest.raises(AssertionError):  # nothing was launched, so there is no result
        train("data.validation_fraction=0")
    account = told[0][-1]
    assert (account.num_files, account.num_skipped, account.class_names) == (2, 1, ["cat"])
    assert run_folder.read_account(f"{tmp_path}/runs/r") == account
    assert [record.key for record in run_folder.read_plan(f"{tmp_path}/runs/r")] == ["cat/a.jpg"]


def test_a_worker_with_other_weights_than_the_run_began_with_is_refused(tmp_path):
    began = {"backbone": "vit@224:aa", "image_size": "256"}
    claim_networks(str(tmp_path), began)
    claim_networks(str(tmp_path), dict(began))
    with pytest.raises(RecipeError, match=r"backbone: vit@224:aa there, vit@224:bb now\n") as error:
        claim_networks(str(tmp_path), {**began, "backbone": "vit@224:bb"})
    assert "image_size" not in str(error.value)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    import skimage.data

    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        picture = Image.fromarray(getattr(skimage.data, name)())
        for index in range(6):
            left = index * 20
            picture.crop((left, 0, left + 280, 280)).save(folder / f"{name} {index}.png")
    (folder / "damaged.jpg").write_bytes(b"no image")
    return folder


def settings(photographs: Path, storage_folder: Path, *overrides: str) -> list[str]:
    return [
        "run=test", f"storage={storage_folder}", f"data.path={photographs}",
        "data.validation_fraction=0.2", "image_size=112", "tracking.enabled=false",
        "backbone.name=vit_tiny_patch16_224", "backbone.weights=random", "backbone.image_size=112",
        "autoencoder.latent_dim=8", "autoencoder.encoder.num_heads=3",
        "autoencoder.encoder.head_dim=32", "autoencoder.decoder.num_heads=3",
        "autoencoder.decoder.depth=1", "autoencoder.statistics_images=8",
        "autoencoder.training.steps=8", "autoencoder.training.batch_size=8",
        "autoencoder.training.accumulation=2", "autoencoder.training.warmup_steps=2",
        "autoencoder.training.log_every=1", "autoencoder.training.checkpoint_every=2",
        "autoencoder.training.validate_every=4", "autoencoder.training.ema_decay=0.9",
        "autoencoder.training.precision=fp32", *overrides,
    ]  # fmt: skip


def command(photographs: Path, storage_folder: Path) -> list[str]:
    module = [sys.executable, "-m", "fae", "train", "autoencoder", "photos-dinov2s"]
    return [*module, *settings(photographs, storage_folder)]


def start(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(arguments: list[str]) -> str:
    process = start(arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def weights(folder: Path) -> dict[str, np.ndarray]:
    module = checkpoint.load(folder / "test" / "autoencoder.safetensors").module
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


@pytest.fixture(scope="module")
def local_ray():
    import ray

    from fae.pipelines.runtime.session import start_ray

    start_ray(num_cpus=2)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def uninterrupted(photographs, local_ray, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train_autoencoder(load_recipe("photos-dinov2s", settings(photographs, folder)))
    return folder


@pytest.mark.integration
def test_a_killed_run_ends_with_the_same_parameters_bit_for_bit(
    photographs, uninterrupted, tmp_path, capfd
):
    process = start(command(photographs, tmp_path))
    wait_for_checkpoint(process, tmp_path / "test")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "test" / "result.json").exists()
    train_autoencoder(load_recipe("photos-dinov2s", settings(photographs, tmp_path)))
    output = "".join(capfd.readouterr())
    assert "resumed at step" in output and "step 8/8" in output and "data_wait_share" in output
    expected, actual = weights(uninterrupted), weights(tmp_path)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert np.array_equal(value, actual[name]), name


@pytest.mark.faults
@pytest.mark.integration
def test_a_killed_worker_is_replaced_by_the_same_command_and_changes_no_bit(
    photographs, uninterrupted, tmp_path
):
    process = start(command(photographs, tmp_path))
    wait_for_checkpoint(process, tmp_path / "test")
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in family if "RayTrainWorker" in " ".join(child.cmdline())]
    assert workers
    workers[0].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert (
        "resume from the newest checkpoint (1 of 3 times)" in output and "resumed at step" in output
    )
    for name, value in weights(uninterrupted).items():
        assert np.array_equal(value, weights(tmp_path)[name]), name


@pytest.mark.faults
@pytest.mark.integration
def test_a_checkpoint_on_a_full_disk_ends_the_run_with_its_name_and_with_room_it_resumes(
    photographs, uninterrupted, tmp_path, capfd
):
    size = max(file.stat().st_size for file in (uninterrupted / "test" / "checkpoints").iterdir())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.7 * size)}", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        output, _ = (process := start(command(photographs, tmp_path))).communicate(timeout=300)
        said = [line for line in output.splitlines() if line.startswith("fae: ")]
        assert process.returncode == 2 and said == [
            f"fae: Cannot write {tmp_path}/test/checkpoints/step_000000006.pt: no space left "
            "there. Free some, then run the same command again: it resumes."
        ], output
        kept = {file.name for file in (tmp_path / "test" / "checkpoints").iterdir()}
        assert kept == {"step_000000002.pt", "step_000000004.pt"}
        subprocess.run(["mount", "-o", f"remount,size={6 * size}", str(tmp_path)], check=True)
        capfd.readouterr()
        train_autoencoder(load_recipe("photos-dinov2s", settings(photographs, tmp_path)))
        assert "resumed at step 4 " in "".join(capfd.readouterr())
        for name, value in weights(uninterrupted).items():
            assert np.array_equal(value, weights(tmp_path)[name]), name
        steps = [step for step, _ in read_metrics_log(f"{tmp_path}/test")["train/loss"]]
        assert steps == list(range(1, 9))
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.integration
def test_the_run_folder_tells_what_was_done(uninterrupted):
    folder = uninterrupted / "test"
    metrics = json.loads((folder / "result.json").read_text())
    assert {"mse", "cosine", "kl", "active_channels"} <= metrics.keys() and 0 < metrics["mse"] < 10
    loaded = checkpoint.load(folder / "autoencoder.safetensors")
    assert loaded.fingerprints["backbone"].startswith("vit_tiny_patch16_224@112:")
    bad = [
        json.loads(line) for line in (folder / "bad_images-00000.jsonl").read_text().splitlines()
    ]
    assert [error["key"] for error in bad] == ["damaged.jpg"]
    assert len(list((folder / "checkpoints").iterdir())) == 2


@pytest.mark.integration
def test_two_workers_match_one(photographs, uninterrupted, tmp_path):
    two = ("autoencoder.training.num_workers=2", "autoencoder.training.cpus_per_worker=0.5")
    train_autoencoder(load_recipe("photos-dinov2s", settings(photographs, tmp_path, *two)))
    expected, actual = weights(uninterrupted), weights(tmp_path)
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-3, atol=2e-4, err_msg=name)
