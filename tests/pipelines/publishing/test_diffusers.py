"""`fae publish --diffusers`: the real diffusers loads the folder, and draws what `fae sample` does.

diffusers is imported in the tests alone: its import costs as much as torch's, twice.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fae
from fae.cli import app
from fae.pipelines.publishing import PublishError, publish, push
from fae_core.draws import normal_draws
from tests.fake_gpu import GPU, FakeGPU
from tests.hub_server import HubServer

ROOT = Path(__file__).parents[3]
MODEL = "somebody/small-fae"


@pytest.fixture(scope="session")
def published(runs, tmp_path_factory) -> Path:
    """A folder with generator that `fae publish --diffusers` wrote."""
    output = tmp_path_factory.mktemp("published") / "small-fae"
    places = [str(runs / name) for name in ("fae", "decoder", "dit")]
    result = CliRunner().invoke(app, ["publish", *places, "--output", str(output), "--diffusers"])
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture(autouse=True)
def modules_cache(tmp_path_factory, monkeypatch):
    """diffusers copies a folder's Python files to its own cache."""
    cache = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", cache)
    yield
    sys.path[:] = [path for path in sys.path if path != cache]


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)


def of_diffusers(images: np.ndarray) -> torch.Tensor:
    """Images as diffusers' autoencoders take them."""
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1.0


def assert_encodes_and_decodes_as_fae(autoencoder, folder: Path, images: np.ndarray) -> None:
    ours = fae.FeatureAutoencoder.from_pretrained(folder, precision="fp32")
    with torch.no_grad():
        latent_dist = autoencoder.encode(of_diffusers(images)).latent_dist
        latents = latent_dist.mode()
        sample = autoencoder.decode(latents).sample
    assert type(latent_dist).__module__.startswith("diffusers.")
    torch.testing.assert_close(latents, ours.encode_images(images), atol=1e-5, rtol=1e-5)
    pixels = ((sample / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    wanted = ours.decode_images(latents).astype(int)
    assert wanted.std() > 10  # not one colour
    assert np.abs(pixels - wanted).max() <= 1


@pytest.mark.parametrize("names", [("fae", "decoder"), ("fae", "decoder", "dit")], ids=str)
def test_the_folder_is_an_autoencoder_of_diffusers(runs, tmp_path, images, names):
    from diffusers import AutoModel

    folder = tmp_path / "published"
    account = publish([str(runs / name) for name in names], str(folder), diffusers=True)
    assert {"autoencoder_fae.py", "vae/diffusion_pytorch_model.safetensors"} <= set(
        account["files"]
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModel.from_pretrained(str(folder))
    for place in (folder, folder / "vae"):
        autoencoder = AutoModel.from_pretrained(str(place), trust_remote_code=True)
        assert_encodes_and_decodes_as_fae(autoencoder, folder, images)
    assert not any(name.startswith("_backbone") for name in autoencoder.state_dict())
    code = (folder / "autoencoder_fae.py").read_text()
    assert len(code.splitlines()) < 12 and "fae-ray[diffusers]" in code


def test_the_installed_class_loads_saves_and_computes_in_bfloat16(published, tmp_path, images):
    from fae_core.diffusers import AutoencoderFAE

    autoencoder = AutoencoderFAE.from_pretrained(published, subfolder="vae")
    assert_encodes_and_decodes_as_fae(autoencoder, published, images)
    autoencoder.save_pretrained(tmp_path / "saved")
    again = AutoencoderFAE.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    with torch.no_grad():
        x = of_diffusers(images)
        latents = again.encode(x.bfloat16()).latent_dist.mode()
        torch.testing.assert_close(
            latents, autoencoder.encode(x).latent_dist.mode(), atol=0.05, rtol=0.05
        )
        assert again(x.bfloat16()).sample.shape == x.shape


def test_offloading_brings_the_autoencoder_back_before_it_encodes_and_decodes(
    published, images, monkeypatch
):
    from fae_core.diffusers import autoencoder

    # Its hooks are diffusers', which leaves them out where accelerate is not installed.
    place = "diffusers.utils.accelerate_utils"
    monkeypatch.setattr(f"{place}.is_accelerate_available", lambda: True)
    monkeypatch.setattr(f"{place}.accelerate", SimpleNamespace(__version__="1.0.0"), raising=False)
    spec = importlib.util.spec_from_file_location("with_accelerate", autoencoder.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    vae = module.AutoencoderFAE.from_pretrained(published, subfolder="vae")
    moved = []
    vae._hf_hook = SimpleNamespace(pre_forward=moved.append)
    latents = vae.encode(of_diffusers(images)).latent_dist.mode()
    assert moved == [vae]
    vae.decode(latents)
    assert moved == [vae, vae]


def test_other_weights_of_the_backbone_are_refused(published, images):
    from fae_core.checkpoint import CheckpointError
    from fae_core.diffusers import AutoencoderFAE

    autoencoder = AutoencoderFAE.from_pretrained(
        published, subfolder="vae", backbone_sha256="0" * 64
    )
    with pytest.raises(CheckpointError, match="weights of the SHA-256 0000.*backbone_weights"):
        autoencoder.encode(of_diffusers(images))


@pytest.mark.parametrize(
    ("guidance", "shift"), [(1.0, 1.0), (1.5, 2.5), ("paper", 1.0)], ids=lambda value: str(value)
)
def test_the_pipeline_draws_the_images_of_fae_sample(published, guidance, shift):
    from fae_core.diffusers import FAEPipeline

    wanted = fae.sample(
        published,
        fae.FeatureAutoencoder.from_pretrained(published),
        labels=[0, 1, 2, 0],
        seed=3,
        num_steps=10,
        guidance="none" if guidance == 1.0 else guidance,
        shift=shift,
    )
    pipeline = FAEPipeline.from_pretrained(published)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    pipeline.scheduler.set_shift(shift)
    noise = normal_draws(3, "image", 0, [0, 1, 2, 3], (8, 2, 2))
    drawn = pipeline(
        [0, 1, 2, 0], num_inference_steps=10, guidance_scale=guidance, latents=noise
    ).images
    drawn = np.stack([np.asarray(image) for image in drawn]).astype(int)
    assert wanted.std() > 10 and np.abs(wanted[0].astype(int) - wanted[3]).max() > 10
    assert np.abs(drawn - wanted).max() <= 1


def test_the_pipeline_does_not_wait_for_the_gpu_in_its_steps(published, monkeypatch):
    from fae_core.diffusers import FAEPipeline

    gpu, pipeline = FakeGPU(), FAEPipeline.from_pretrained(published)
    pipeline.set_progress_bar_config(disable=True)
    for network in (pipeline.transformer, pipeline.vae):
        gpu.place(network)
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(sigmas=[1.0, 0.5])

    def placed(sigmas: list[float], device: str) -> None:
        for name in ("timesteps", "sigmas"):
            setattr(scheduler, name, gpu.mode.from_tensor(getattr(scheduler, name)).to(device))

    monkeypatch.setattr(scheduler, "set_timesteps", placed)
    monkeypatch.setattr(scheduler, "index_for_timestep", lambda *_: 0)
    noise = gpu.tensor(torch.zeros(2, 8, 2, 2))
    with gpu.running() as waits:
        images = pipeline([0, 1], 2, latents=noise, output_type="pt").images
    assert images.device == GPU
    assert set(waits.operations) == {"copy to cuda"}  # of labels and statistics


def test_the_pipeline_loads_with_the_folder_s_own_code_and_from_the_hub(
    published, tmp_path, hub: HubServer, monkeypatch
):
    from diffusers import AutoModel, DiffusionPipeline

    # diffusers names no endpoint; huggingface_hub has read HF_ENDPOINT when it was imported.
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = "{endpoint}/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        template.replace("{endpoint}", hub.url),
    )
    push(published, MODEL)
    noise = normal_draws(0, "image", 0, [0], (8, 2, 2))
    drawn = []
    for place in (published, MODEL):
        with pytest.raises(ValueError, match="trust_remote_code"):
            DiffusionPipeline.from_pretrained(place)
        pipeline = DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
        pipeline.set_progress_bar_config(disable=True)
        drawn.append(pipeline([1], 2, latents=noise, output_type="np").images)
    assert np.array_equal(*drawn)
    autoencoder = AutoModel.from_pretrained(MODEL, trust_remote_code=True)
    assert autoencoder.config.latents_std == pipeline.vae.config.latents_std

    pipeline.save_pretrained(tmp_path / "saved")
    from fae_core.diffusers import FAEPipeline

    again = FAEPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(again([1], 2, latents=noise, output_type="np").images, drawn[0])


def test_a_pipeline_without_a_null_class_is_not_guided(published):
    from fae_core.diffusers import FAEPipeline, FAETransformer2DModel

    config = json.loads((published / "transformer" / "config.json").read_text())["dit_config"]
    transformer = FAETransformer2DModel({**config, "label_dropout": 0.0})
    pipeline = FAEPipeline.from_pretrained(published, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    for scale in (1.5, "paper"):
        with pytest.raises(ValueError, match="label_dropout=0"):
            pipeline([0], 1, guidance_scale=scale)
    assert len(pipeline([0], 1).images) == 1


def test_labels_and_noise_of_a_pipeline_are_checked(published):
    from fae_core.diffusers import FAEPipeline

    pipeline = FAEPipeline.from_pretrained(published)
    pipeline.set_progress_bar_config(disable=True)
    for label in (3, -1, "goldfish"):
        with pytest.raises(ValueError, match=f"{label!r} is none of the generator's 3 classes"):
            pipeline([label], 1)
    with pytest.raises(ValueError, match=r"Expected latents \[1, 8, 2, 2\], not \[2, 8, 2, 2\]"):
        pipeline([0], 1, latents=torch.zeros(2, 8, 2, 2))
    same = [
        pipeline([0], 1, generator=torch.Generator().manual_seed(1), output_type="latent").images
        for _ in range(2)
    ]
    assert torch.equal(*same)


def test_a_folder_that_diffusers_cannot_load_is_refused(runs, tmp_path, monkeypatch):
    output = str(tmp_path / "published")
    with pytest.raises(PublishError, match="is a starflow, which diffusers' schedulers do not"):
        publish([str(runs / n) for n in ("fae", "decoder", "flow")], output, diffusers=True)
    with pytest.raises(PublishError, match="Name the run of the pixel decoder too"):
        publish([str(runs / "fae")], output, diffusers=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PublishError, match=r"pip install 'fae-ray\[diffusers\]'"):
        publish([str(runs / "fae"), str(runs / "decoder")], output, diffusers=True)
    assert not Path(output).exists()


def test_the_card_says_how_diffusers_loads_the_folder(published):
    card = (published / "README.md").read_text()
    assert "DiffusionPipeline.from_pretrained" in card and "- diffusers" in card
    files = json.loads((published / "fae.json").read_text())["files"]
    assert {"model_index.json", "pipeline.py", "scheduler/scheduler_config.json"} <= set(files)


def test_the_page_about_interchange_runs(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(published, "published")
    page = (ROOT / "docs/interchange.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    namespace: dict[str, object] = {}
    for block in (block for block in blocks if "diffusers" in block or "pipeline" in block):
        exec(block, namespace)
    assert Path("sample.png").is_file()
    assert namespace["rebuilt"].shape == namespace["x"].shape
    drawn = np.asarray(namespace["image"]).astype(int)
    model = fae.FeatureAutoencoder.from_pretrained("published")
    wanted = fae.sample("published", model, labels=[1], seed=3, num_steps=10)
    assert np.abs(drawn - wanted[0]).max() <= 8  # its autoencoder computes in bfloat16
