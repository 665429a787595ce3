"""`import fae` in a notebook: the images, latents and samples of the jobs, without Ray, boto3 or
MLflow."""

import dataclasses
import io
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageCms
from safetensors.torch import save_file

import fae
from fae.pipelines.config.recipe import Recipe, RecipeError, load_recipe
from fae.pipelines.data.crops import ImageError, center_crop, decode_image
from fae.pipelines.data.records import ImageRecord
from fae.pipelines.latents.encoder import LatentEncoder
from fae.pipelines.latents.manifest import commit
from fae.pipelines.latents.plan import ensure_plan
from fae.pipelines.latents.shards import write_shard
from fae.pipelines.networks.loading import backbone_fingerprints, backbone_of
from fae.pipelines.networks.untrained import build_autoencoder
from fae.pipelines.sampling.image_sampler import ImageSampler
from fae.pipelines.storage import paths
from fae_core import checkpoint
from fae_core.checkpoint import CheckpointError
from fae_core.generators.dit import DiT, DiTConfig
from fae_core.generators.starflow import StarFlow, StarFlowConfig
from fae_core.pixel_decoder import PixelDecoder, PixelDecoderConfig
from fae_core.weights import WeightsError
from tests.fake_gpu import GPU, FakeGPU
from tests.tiny import ROOT, SMALLEST_BACKBONE, TINY

HEAVY = ("torch", "ray", "boto3", "botocore", "mlflow", "timm", "PIL", "pyarrow", "omegaconf")


def run_recipe(*more: str) -> Recipe:
    fixed = ["precompute.precision=fp32"]
    return load_recipe("photos-dinov2s", [*TINY, *SMALLEST_BACKBONE, *fixed, *more])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Run folders of untrained networks: autoencoder, decoder, dit and flow; `foreign` is a decoder
    of another backbone."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = run_recipe()
    backbone = backbone_of(recipe)
    marks = backbone_fingerprints(recipe, backbone)
    torch.manual_seed(0)
    autoencoder = build_autoencoder(recipe.autoencoder, backbone.spec)
    shape = PixelDecoderConfig(backbone.dim, backbone.grid, 32, width=32, depth=1, num_heads=2)
    sha256 = checkpoint.save(folder / "fae/autoencoder.safetensors", autoencoder, marks)
    (folder / "fae/recipe.yaml").write_text(recipe.to_yaml())
    decoder = PixelDecoder(shape)
    torch.nn.init.normal_(decoder.output.weight, std=0.2)
    checkpoint.save(folder / "decoder/pixel_decoder.safetensors", decoder, marks)
    checkpoint.save(
        folder / "foreign/pixel_decoder.safetensors", decoder, {**marks, "backbone": "other:0"}
    )
    made_with = {"autoencoder": sha256, "latents": "0"}
    latents = (recipe.autoencoder.latent_dim, backbone.grid)
    for name, model in (
        (
            "dit",
            DiT(DiTConfig.preset("S", *latents, num_classes=3, width=32, depth=1, num_heads=2)),
        ),
        (
            "flow",
            StarFlow(StarFlowConfig.preset("S", *latents, num_classes=3, width=64, layers=(1, 1))),
        ),
    ):
        for parameter in model.parameters():  # zeroed outputs would draw the noise itself
            torch.nn.init.normal_(parameter, std=0.1)
        checkpoint.save(folder / name / "generator.safetensors", model, made_with)
    return folder


@pytest.fixture(scope="module")
def model(runs) -> fae.FeatureAutoencoder:
    return fae.FeatureAutoencoder.from_pretrained(runs / "fae", pixel_decoder=runs / "decoder")


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    """Encoded images of several modes and sizes; one is to be turned upright."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (70, 90, 4), np.uint8)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    images = {
        "rgb.png": (Image.fromarray(pixels[..., :3]), {}),
        "small.png": (Image.fromarray(pixels[:20, :24, :3]), {}),
        "rotated.jpg": (Image.fromarray(pixels[..., :3]), {"exif": rotated}),
        "transparent.png": (Image.fromarray(pixels), {}),
        "grey.png": (Image.fromarray(pixels[..., 0]), {}),
        "16-bit.png": (Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), {}),
        "palette.gif": (Image.fromarray(pixels[..., :3]).quantize(16), {}),
    }
    encoded = {}
    for name, (image, options) in images.items():
        buffer = io.BytesIO()
        image.save(buffer, {"jpg": "JPEG"}.get(name[-3:], name[-3:].upper()), **options)
        encoded[name] = buffer.getvalue()
    return encoded


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_fae_imports_nothing_heavy():
    assert python(f"import sys, fae; print([m for m in {HEAVY} if m in sys.modules])") == "[]\n"
    assert set(fae.__all__) <= set(dir(fae))


def test_the_version_is_the_packages():
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert fae.__version__ == stated


@pytest.mark.integration
def test_local_networks_are_used_without_ray_boto3_or_mlflow(runs, write_store, tmp_path):
    write_store(tmp_path / "store")
    code = f"""
import sys
import numpy as np
import fae
decoder = {str(runs / "decoder")!r}
model = fae.FeatureAutoencoder.from_pretrained({str(runs / "fae")!r}, pixel_decoder=decoder)
latents = model.encode_images(np.zeros((2, 40, 50, 3), np.uint8))
model.decode_images(latents)
fae.sample({str(runs / "dit")!r}, model, labels=[0], num_steps=1)
fae.LatentStore.open({str(tmp_path / "store")!r}).read_shard(0)
print([m for m in ("ray", "boto3", "botocore", "mlflow") if m in sys.modules])
"""
    assert python(code) == "[]\n"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_latents_are_those_that_precompute_stores(runs, pictures, precision):
    path = runs / "fae/autoencoder.safetensors"
    encoder = LatentEncoder.of(
        run_recipe(f"autoencoder.checkpoint={path}", f"precompute.precision={precision}")
    )
    crops = np.stack([decode_image(data, 32, 10**6) for data in pictures.values()])
    stored = encoder.encode(crops, batch_size=3)["mean"]
    model = fae.FeatureAutoencoder.from_pretrained(path, precision=precision)
    images = [Image.open(io.BytesIO(data)) for data in pictures.values()]
    latents = model.encode_images(images, batch_size=3)
    assert latents.dtype == torch.float32
    np.testing.assert_array_equal(latents.half().numpy(), stored)


def test_crops_are_those_of_the_runs_recipe(runs, pictures, tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red_is_green = srgb.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ")
    image = Image.open(io.BytesIO(pictures["rgb.png"]))
    image.info["icc_profile"] = red_is_green.replace(b"????", b"gXYZ")
    shutil.copytree(runs / "fae", tmp_path, dirs_exist_ok=True)
    settings = ("data.decoder=fast", "data.color_profile=srgb", "data.max_pixels=110000")
    (tmp_path / "recipe.yaml").write_text(run_recipe(*settings).to_yaml())
    model = fae.FeatureAutoencoder.from_pretrained(tmp_path)
    plain = fae.FeatureAutoencoder.from_pretrained(runs / "fae")
    latents = model.encode_images(image)
    for decoder, colors in (("fast", "srgb"), ("exact", "srgb"), ("fast", "ignore")):
        crop = center_crop(image, 32, 10**6, decoder, colors)
        same = torch.equal(latents, plain.encode_images(crop))
        assert same == ((decoder, colors) == ("fast", "srgb"))
    strip = Image.new("RGB", (2200, 20))
    assert len(plain.encode_images(strip)) == 1
    with pytest.raises(ImageError, match="too long a strip"):
        model.encode_images(strip)


def test_the_precision_is_that_of_the_runs_recipe(runs):
    assert fae.FeatureAutoencoder.from_pretrained(runs / "fae").precision == "fp32"
    with pytest.raises(RecipeError, match="precompute.precision: given 'fp16'"):
        fae.FeatureAutoencoder.from_pretrained(runs / "fae", precision="fp16")


def test_images_are_given_in_several_ways(model, pictures):
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures.values()][:1] * 2
    array = np.stack([np.asarray(image) for image in images])
    latents = model.encode_images(images)
    assert latents.shape == (2, *model.latent_shape)
    for same in (array, list(array), [images[0], array[1]]):
        assert torch.equal(model.encode_images(same), latents)
    for one in (images[0], array[0]):
        torch.testing.assert_close(model.encode_images(one), latents[:1])
    features = model.features(images)
    assert features.shape == (2, 4, 64)
    assert model.decode_features(latents).shape == features.shape


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), ValueError, r"uint8 arrays \[H, W, 3\].*float32"),
        (np.zeros((8, 8), np.uint8), ValueError, "uint8"),
        ([], ValueError, "no images"),
        (Image.fromarray(np.zeros((8, 8), np.float32)), ImageError, "float pixels"),
    ],
)
def test_what_is_no_image_is_refused(model, images, error, message):
    with pytest.raises(error, match=message):
        model.encode_images(images)


def test_pillows_limit_on_pixels_stays_the_users():
    code = """
from PIL import Image
limit = Image.MAX_IMAGE_PIXELS
from fae.pipelines.data.crops import center_crop
print(limit == Image.MAX_IMAGE_PIXELS)
"""
    assert python(code) == "True\n"


def test_latents_are_decoded_from_tensors_and_from_what_a_store_holds(model, pictures):
    latents = model.encode_images([Image.open(io.BytesIO(data)) for data in pictures.values()])
    images = model.decode_images(latents, batch_size=2)
    assert images.shape == (len(pictures), 32, 32, 3) and images.dtype == np.uint8
    assert images.std() > 5
    stored = latents.half().numpy()
    assert np.array_equal(model.decode_images(stored), model.decode_images(latents.half().float()))
    with pytest.raises(ValueError, match=r"Expected latents \[N, 8, 2, 2\], not \[7, 4, 2, 2\]"):
        model.decode_images(latents[:, :4])


def test_results_of_a_gpu_are_on_the_cpu(runs):
    gpu = FakeGPU()
    model = fae.FeatureAutoencoder.from_pretrained(
        runs / "fae", pixel_decoder=runs / "decoder", precision="bf16"
    )
    for network in (model.backbone, model.autoencoder, model.pixel_decoder):
        gpu.place(network)
    model.device = GPU
    with gpu.running():
        latents = model.encode_images(np.zeros((5, 40, 50, 3), np.uint8), batch_size=2)
        features = model.decode_features(latents)
        images = model.decoder(latents.to(GPU))  # a fake has no values for decode_images' array
    assert (latents.device, features.device) == (torch.device("cpu"),) * 2
    assert latents.shape == (5, *model.latent_shape) and latents.dtype == torch.float32
    assert images.device == GPU and images.shape == (5, 32, 32, 3)


def test_without_a_pixel_decoder_images_cannot_be_decoded(runs):
    model = fae.FeatureAutoencoder.from_pretrained(runs / "fae")
    with pytest.raises(CheckpointError, match="pixel_decoder="):
        model.decode_images(torch.zeros(1, *model.latent_shape))


def test_a_pixel_decoder_of_another_backbone_is_refused(runs):
    with pytest.raises(CheckpointError, match="trained with backbone other:0"):
        fae.FeatureAutoencoder.from_pretrained(runs / "fae", pixel_decoder=runs / "foreign")


def test_other_weights_of_the_backbone_are_refused_with_both_hashes(runs, tmp_path):
    torch.manual_seed(1)
    save_file(
        timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "other.safetensors"
    )
    trained_on = fae.load(runs / "fae").fingerprints["backbone"].rpartition(":")[2]
    with pytest.raises(CheckpointError, match=trained_on) as raised:
        fae.FeatureAutoencoder.from_pretrained(
            runs / "fae", backbone_weights=str(tmp_path / "other.safetensors")
        )
    assert "other.safetensors' have" in str(raised.value)
    assert "backbone_weights=" in str(raised.value)


def test_weights_that_are_not_there_are_asked_for(runs):
    with pytest.raises(WeightsError, match="needs the backbone test_vit.*backbone_weights=…"):
        fae.FeatureAutoencoder.from_pretrained(runs / "fae", backbone_weights="/nowhere")


def test_any_checkpoint_is_loaded_from_a_file_or_its_run_folder(runs, root):
    kinds = {"fae": "autoencoder", "decoder": "pixel_decoder", "dit": "dit", "flow": "starflow"}
    for name, kind in kinds.items():
        (file,) = (runs / name).glob("*.safetensors")
        uri = paths.join(root, "runs", name)
        paths.write_bytes(paths.join(uri, file.name), file.read_bytes())
        loaded = fae.load(uri)
        assert loaded.kind == kind
        assert loaded.weights_sha256 == fae.load(file).weights_sha256
    with pytest.raises(CheckpointError, match="the folder of a finished run"):
        fae.load(paths.join(root, "none"))


def test_an_autoencoder_on_s3_is_used_as_a_local_one(runs, root, model):
    for file in (runs / "fae").iterdir():
        paths.write_bytes(paths.join(root, "run", file.name), file.read_bytes())
    image = np.full((32, 32, 3), 90, np.uint8)
    there = fae.FeatureAutoencoder.from_pretrained(paths.join(root, "run"))
    assert torch.equal(there.encode_images(image), model.encode_images(image))


@pytest.mark.parametrize(
    ("generator", "arguments", "settings"),
    [
        ("dit", {}, []),
        ("dit", {"guidance": 2.0}, ["sample.guidance=[{start: 1.0, end: 0.0, scale: 2.0}]"]),
        (
            "dit",
            {"guidance": "paper", "sampler": "sde"},
            ["sample.guidance=paper", "sample.sampler=sde"],
        ),
        (
            "flow",
            {"guidance": 1.5, "denoise": True},
            ["sample.flow_guidance=1.5", "sample.denoise=true"],
        ),
    ],
)
def test_samples_are_those_of_fae_sample(runs, model, generator, arguments, settings):
    recipe = run_recipe(
        "seed=5", "sample.num_steps=3", "sample.batch_size=4", *settings,
        f"generator.checkpoint={runs / generator / 'generator.safetensors'}",
        f"autoencoder.checkpoint={runs / 'fae/autoencoder.safetensors'}",
        f"pixel_decoder.checkpoint={runs / 'decoder/pixel_decoder.safetensors'}",
    )  # fmt: skip
    sampler = ImageSampler(recipe)
    indices = list(range(6))
    labels = sampler.labels(indices)
    expected = sampler(indices, labels)
    arguments = {"seed": 5, "num_steps": 3, "batch_size": 4, **arguments}
    drawn = fae.sample(runs / generator, runs / "fae", runs / "decoder", labels=labels, **arguments)
    assert np.array_equal(drawn, expected) and expected.std() > 5
    again = fae.sample(
        fae.load(runs / generator), model, labels=labels[4:], indices=[4, 5], **arguments
    )
    assert np.array_equal(again, expected[4:])


def test_mistakes_of_sampling_are_explained(runs, model):
    dit = fae.load(runs / "dit")
    with pytest.raises(ValueError, match="Label 3 is none of the generator's 3 classes"):
        fae.sample(dit, model, labels=[0, 3])
    with pytest.raises(ValueError, match="one label for each image"):
        fae.sample(dit, model, labels=[0], indices=[0, 1])
    with pytest.raises(RecipeError, match=r"Did you mean 'sample\.sampler'"):
        fae.sample(dit, model, labels=[0], samplr="sde")
    with pytest.raises(ValueError, match="STARFlow takes one scale"):
        fae.sample(runs / "flow", model, labels=[0], guidance="paper")
    with pytest.raises(CheckpointError, match="needs a pixel decoder"):
        fae.sample(dit, runs / "fae", labels=[0])
    with pytest.raises(CheckpointError, match="needed is dit or mmdit or starflow"):
        fae.sample(fae.load(runs / "fae"), model, labels=[0])


def test_a_class_is_given_by_its_number_or_its_name(runs, model):
    loaded = fae.load(runs / "dit")
    assert loaded.class_names == ()
    named = dataclasses.replace(loaded, class_names=("cat", "dog", "horse"))
    by_name = fae.sample(named, model, labels=["horse", 0], num_steps=2)
    assert np.array_equal(by_name, fae.sample(loaded, model, labels=[2, "0"], num_steps=2))
    with pytest.raises(ValueError, match=r"Label 'hrse' is none .*\(cat … horse\).* mean 'horse'"):
        fae.sample(named, model, labels=["hrse"])
    with pytest.raises(ValueError, match="this generator's classes have none"):
        fae.sample(loaded, model, labels=["cat"])


def test_a_generator_of_another_autoencoder_is_refused(runs, model, tmp_path):
    dit = fae.load(runs / "dit")
    path = tmp_path / "generator.safetensors"
    checkpoint.save(path, dit.module, {**dit.fingerprints, "autoencoder": "f" * 64})
    with pytest.raises(CheckpointError, match="is not the autoencoder of these latents"):
        fae.sample(path, model, labels=[0])


def test_a_latent_store_is_opened_through_the_door(write_store, tmp_path):
    write_store(tmp_path)
    assert len(fae.LatentStore.open(str(tmp_path))) == 20


@pytest.fixture
def trained_folder(tmp_path) -> Path:
    """A folder with what docs/python.md uses: untrained networks for DINOv2-S, and a store of four
    latents."""
    recipe = load_recipe("photos-dinov2s", ["autoencoder.decoder.depth=1"])
    backbone = backbone_of(recipe)
    marks = backbone_fingerprints(recipe, backbone)
    torch.manual_seed(0)
    autoencoder = build_autoencoder(recipe.autoencoder, backbone.spec)
    sha256 = checkpoint.save(tmp_path / "runs/first/autoencoder.safetensors", autoencoder, marks)
    (tmp_path / "runs/first/recipe.yaml").write_text(recipe.to_yaml())
    shape = PixelDecoderConfig(backbone.dim, backbone.grid, 256, width=64, depth=1, num_heads=2)
    checkpoint.save(tmp_path / "runs/decoder/pixel_decoder.safetensors", PixelDecoder(shape), marks)
    dit = DiT(
        DiTConfig.preset("S", 32, backbone.grid, num_classes=3, width=32, depth=1, num_heads=2)
    )
    made_with = {"autoencoder": sha256, "latents": "0"}
    checkpoint.save(tmp_path / "runs/dit/generator.safetensors", dit, made_with)
    store = str(tmp_path / "latents")
    plan = ensure_plan(store, [ImageRecord(f"{i}", f"/x/{i}") for i in range(4)], 4, {})
    latents = {"mean": np.random.default_rng(0).normal(size=(4, 32, 16, 16)).astype(np.float16)}
    write_shard(store, 0, plan.shard(0), list(range(4)), latents, [], plan.fingerprint)
    commit(store, plan, {})
    return tmp_path


def test_the_page_about_python_runs(trained_folder, monkeypatch):
    monkeypatch.chdir(trained_folder)
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs/python.md").read_text(), re.M | re.S
    )
    assert len(blocks) >= 6
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)
    assert Image.open("rebuilt.png").size == (256, 256)
    assert namespace["pictures"].shape == (2, 256, 256, 3)
    assert namespace["checkpoint"].kind == "dit"
