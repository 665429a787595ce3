"""Small and unusual sets, and settings that cannot be: each command ends with status 2 and one
message, before Ray starts and without a traceback."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fae.cli import main
from fae.pipelines.data.account import Account
from fae.pipelines.data.records import ImageRecord
from fae.pipelines.latents.manifest import commit
from fae.pipelines.latents.plan import ensure_plan
from fae.pipelines.latents.shards import write_shard
from fae_core import checkpoint
from fae_core.generators.dit import DiT, DiTConfig
from tests.tiny import SMALLEST_BACKBONE, TINY, save_decoders

SHAPE = (4, 3, 3)
CLASSES = ("cat", "dog", "horse")


def write_images(folder: Path, names: list[str], content: bytes | None = None) -> Path:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (9, 100, 50)).save(buffer, "JPEG")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(buffer.getvalue() if content is None else content)
    return folder


def write_store(folder: Path, labels: list[int | None], kept: bool = True, *columns: str) -> Path:
    """A finished store with an image for each label; `kept` says whether they could be encoded."""
    records = [ImageRecord(f"{i:03d}", f"/x/{i}", label) for i, label in enumerate(labels)]
    account = Account("photos", class_names=list(CLASSES)).to_dict()
    plan = ensure_plan(str(folder), records, 8, {"autoencoder weights": "abc"}, account)
    for shard in range(plan.num_shards):
        rows = plan.shard(shard)
        places = list(range(len(rows))) if kept else []
        values = np.ones((len(places), *SHAPE), np.float16)
        errors = [{"key": r.key, "stage": "decode", "message": "x"} for r in rows if not kept]
        latents = dict.fromkeys(columns or ("mean",), values)
        write_shard(str(folder), shard, rows, places, latents, errors, plan.fingerprint)
    commit(str(folder), plan, {"seconds": 1.0, "shards_encoded": plan.num_shards})
    return folder


def write_networks(folder: Path) -> None:
    """Untrained networks that sample together; the generator knows the names of its classes."""
    sha256 = save_decoders(folder, SHAPE, 12)
    config = DiTConfig(SHAPE[0], SHAPE[1:], width=32, depth=1, num_heads=2, num_classes=3)
    generator, marks = DiT(config), {"autoencoder": sha256}
    checkpoint.save(folder / "generator.safetensors", generator, marks, CLASSES)
    checkpoint.save(folder / "nameless.safetensors", generator, marks)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sets by name, and the folder itself as `here`."""
    here = tmp_path_factory.mktemp("sets")
    write_images(here / "one", ["0.jpg"])
    write_images(here / "flat", [f"{i}.jpg" for i in range(6)])
    write_images(here / "one_class", [f"cat/{i}.jpg" for i in range(40)])
    write_images(here / "classes", [f"{name}/{i}.jpg" for name in CLASSES for i in range(8)])
    write_images(here / "some_labels", [*(f"{name}/0.jpg" for name in CLASSES), "stray.jpg"])
    write_images(here / "notes", ["a.txt", ".hidden.jpg"])
    write_images(here / "broken", ["a.parquet"], b"no parquet")
    (here / "empty").mkdir()
    (here / "mixed.csv").write_text("uri,label\na.jpg,3\nb.jpg,cat\n")
    twice = pa.table({"image": [b"x", b"y"], "id": ["same", "same"]})
    pq.write_table(twice, here / "twice.parquet")
    pq.write_table(pa.table({"image": ["text"]}), here / "strings.parquet")
    np.savez(here / "none.npz", arr_0=np.zeros((0, 32, 32, 3), np.uint8))
    write_store(here / "no_latents", [0, 1, 2], False)
    write_store(here / "three", [0, 1, 2])
    write_store(here / "unlabelled", [0, None, 2])
    write_store(here / "negative", [0, -3, 2])
    write_store(here / "variances", [0, 1, 2], True, "logvar")
    write_networks(here)
    return {"here": here, **{path.name: path for path in here.iterdir()}}


RECIPE = ["photos-dinov2s", *TINY, *SMALLEST_BACKBONE]
AUTOENCODER = ["train", "autoencoder", *RECIPE, "run=r", "storage={here}/runs"]
PIXELS = ["train", "pixel-decoder", *RECIPE, "run=r", "storage={here}/runs"]
PIXELS += ["pixel_decoder.losses.perceptual=none"]
GENERATOR = ["train", "generator", *RECIPE, "run=r", "storage={here}/runs", "generator.size=S"]
GENERATOR += ["generator.num_classes=3"]
PRECOMPUTE = ["precompute", *RECIPE, "output={here}/latents"]
PRECOMPUTE += ["autoencoder.checkpoint={here}/autoencoder.safetensors"]
SAMPLE = ["sample", *RECIPE, "output={here}/samples", "image_size=12"]
SAMPLE += [f"{n}.checkpoint={{here}}/{n}.safetensors" for n in ("autoencoder", "pixel_decoder")]
NAMED = "generator.checkpoint={here}/generator.safetensors"
NAMELESS = "generator.checkpoint={here}/nameless.safetensors"
EVALUATE = ["evaluate", *RECIPE, "evaluate.reference={flat}"]
PROBE = ["probe", *RECIPE, "autoencoder.checkpoint={here}/autoencoder.safetensors"]
RUN = ["run", *RECIPE, "storage={here}/runs", "data.path={classes}", "generator.size=S"]
TUNE = ["tune", "sweep-fashion", "storage={here}/runs", "data.path={classes}"]
TUNE += ["data.key_column=null", "generator.num_classes=3", "evaluate.reference={flat}"]
FLAT = "data.path={flat}"

MISTAKES = [
    (["plan", *RECIPE, "data.path={empty}"], "holds no files"),
    (["plan", *RECIPE, "data.path={notes}"], "holds no images"),
    (["plan", *RECIPE, "data.path={here}/mixed.csv"], "some labels are numbers"),
    (["plan", *RECIPE, "data.path={here}/twice.parquet", "data.key_column=id"], "occurs twice"),
    (["plan", *RECIPE, "data.path={here}/strings.parquet"], "is string"),
    (["plan", *RECIPE, FLAT, "data.format=webdataset"], "holds no images"),
    ([*PRECOMPUTE, "data.path={empty}"], "holds no files"),
    ([*PRECOMPUTE, "data.path={broken}"], "is not readable Parquet"),
    ([*PRECOMPUTE, FLAT], "was trained with"),
    ([*PRECOMPUTE, FLAT, "autoencoder.checkpoint={here}/gone.safetensors"], "No checkpoint at"),
    ([*PRECOMPUTE, FLAT, "autoencoder.checkpoint={here}/generator.safetensors"], "holds a dit"),
    ([*PRECOMPUTE, FLAT, "precompute.columns=[]"], "precompute.columns: given []"),
    ([*PRECOMPUTE, FLAT, "backbone.image_size=33"], "33"),
    (["inspect", "{flat}"], "holds no latent store"),
    (["inspect", "{no_latents}", "--figure", "{here}/x.png"], "stores no latents"),
    ([*AUTOENCODER, "data.path={empty}"], "holds no files"),
    ([*AUTOENCODER, "data.path={one}", "data.validation_fraction=0.999999"], "All 1 images fall"),
    ([*AUTOENCODER, FLAT, "autoencoder.decoder.num_heads=5"], "not divisible by 5 heads"),
    ([*AUTOENCODER, FLAT, "autoencoder.decoder.num_heads=32"], "divisible by 4, not 2"),
    (
        [*AUTOENCODER, FLAT, "autoencoder.encoder.kind=transformer",
         "autoencoder.encoder.num_heads=7"],
        "not divisible by 7 heads",
    ),
    (
        [*AUTOENCODER, FLAT, "autoencoder.training.batch_size=6",
         "autoencoder.training.num_workers=4"],
        "batch_size=6 is not divisible",
    ),
    ([*AUTOENCODER, FLAT, "backbone.image_size=33"], "33"),
    ([*AUTOENCODER, FLAT, "backbone.name=no_such_vit"], "no_such_vit"),
    ([*AUTOENCODER, FLAT, "backbone.layers=99"], "backbone.layers=99: test_vit has 6 blocks"),
    ([*PIXELS, FLAT, "backbone.layers=99"], "backbone.layers=99: test_vit has 6 blocks"),
    ([*PIXELS, FLAT, "pixel_decoder.num_heads=5"], "not divisible by 5 heads"),
    ([*PIXELS, FLAT, "pixel_decoder.width=90", "pixel_decoder.num_heads=2"], "divisible by 4"),
    ([*PIXELS, FLAT, "image_size=31"], "a square grid that divides the image"),
    ([*PIXELS, FLAT, "image_size=8"], "window is 11 px"),
    ([*PIXELS, FLAT, "pixel_decoder.training.accumulation=7"], "is not divisible"),
    ([*PIXELS, "data.path={one}", "data.validation_fraction=0.999999"], "All 1 images fall"),
    ([*GENERATOR, "latents={no_latents}"], "none of its 3 images could be encoded"),
    ([*GENERATOR, "latents={flat}"], "there is no store"),
    (
        [*GENERATOR, "latents={three}", "generator.num_classes=2"],
        "the label of '002' is 2 (horse), and generator.num_classes is 2",
    ),
    ([*GENERATOR, "latents={unlabelled}"], "1 of 3 images have no label"),
    ([*GENERATOR, "latents={negative}"], "is -3. Number the classes from 0"),
    ([*GENERATOR, "latents={variances}"], "needs mean too"),
    ([*GENERATOR, "latents={three}", "generator.latents=sample"], "needs logvar too"),
    ([*GENERATOR, "latents={three}", "generator.patch_size=2"], "into patches of 2"),
    ([*GENERATOR, "latents={three}", "generator.num_heads=7"], "not divisible by 7 heads"),
    ([*GENERATOR, "latents={three}", "generator.width=50"], "50"),
    (
        [*GENERATOR, "latents={three}", "generator.kind=starflow", "generator.width=50"],
        "width 50 is not a multiple of",
    ),
    ([*GENERATOR, "latents={three}", "generator.layers=[]"], "generator.layers: given []"),
    ([*GENERATOR, "latents={three}", "generator.layers=[2,0]"], "generator.layers.1: given 0"),
    ([*GENERATOR, "latents={three}", "generator.training.num_workers=3"], "is not divisible"),
    ([*SAMPLE, NAMED, "sample.classes=[hrose]"], "Did you mean 'horse'?"),
    ([*SAMPLE, NAMED, "sample.classes=[1,3]"], "3 is none of the generator's 3 classes (cat … "),
    ([*SAMPLE, NAMED, "sample.classes=[-1]"], "-1 is none of the generator's 3 classes"),
    ([*SAMPLE, NAMELESS, "sample.classes=[cat]"], "classes have none. Give numbers from 0 to 2"),
    ([*SAMPLE, NAMED, "sample.classes=[cta]", "--grid", "{here}/grid.png"], "mean 'cat'?"),
    ([*SAMPLE, "generator.checkpoint={here}/pixel_decoder.safetensors"], "holds a pixel_decoder"),
    ([*EVALUATE, "evaluate.images={one}"], "has 1 image"),
    ([*EVALUATE, "evaluate.images={empty}"], "evaluate.images"),
    ([*EVALUATE, "evaluate.images={none.npz}"], "arr_0 is empty"),
    ([*EVALUATE, "evaluate.images={flat}", "evaluate.scores=[kid]"], "kid_subset_size=1000"),
    (
        [*EVALUATE, "evaluate.images={one}", "evaluate.scores=[precision_recall]"],
        "evaluate.num_neighbors=3 needs more",
    ),
    (
        [*EVALUATE, "evaluate.images={flat}", "evaluate.scores=[inception_score]"],
        "fewer than evaluate.inception_splits=10",
    ),
    ([*EVALUATE, "evaluate.images={one}", "evaluate.scores=[rfid]"], "of 1 images in"),
    (
        [*EVALUATE, "evaluate.images={flat}", "evaluate.scores=[reconstruction]", "image_size=8"],
        "SSIM's window is 11 px",
    ),
    ([*PROBE, "data.path={one}"], "1 of 1 images"),
    ([*PROBE, "data.path={some_labels}"], "1 of 4 images"),
    ([*PROBE, "data.path={one_class}"], "are of one class"),
    ([*PROBE, "data.path={classes}", "probe.num_neighbors=24"], "needs as many training images"),
    ([*RUN, "generator.num_classes=2"], "is 2 (horse), and generator.num_classes is 2"),
    ([*RUN, "generator.num_classes=3", "sample.classes=[hose]"], "Did you mean 'horse'?"),
    ([*RUN, "generator.num_classes=3", "sample.classes=[3]"], "stage samples cannot run"),
    ([*RUN, "generator.num_classes=3", "generator.num_heads=7"], "stage generator cannot run"),
    ([*RUN, "generator.num_classes=3", "image_size=31"], "stage pixel-decoder cannot run"),
    (
        [*RUN, "generator.num_classes=3", "autoencoder.training.accumulation=7"],
        "stage autoencoder cannot run",
    ),
    ([*RUN, "data.path={empty}"], "holds no files"),
    ([*TUNE, "generator.num_classes=2"], "is 2, and generator.num_classes is 2"),
    ([*TUNE, "autoencoder.decoder.num_heads=5"], "stage autoencoder cannot run"),
    ([*TUNE, "autoencoder.training.num_workers=7"], "stage autoencoder cannot run"),
    ([*TUNE, "data.path={empty}"], "holds no files"),
    ([*TUNE, "tune.space.autoencoder.decoder.num_heads.grid=[6,5]"], "not divisible by 5 heads"),
    (["export", "{no_latents}", "--output", "{here}/o", "--format", "npy"], "nothing to export"),
    (["export", "{unlabelled}", "--output", "{here}/o", "--format", "npy"], "has no label"),
    (["export", "{variances}", "--output", "{here}/o", "--format", "npy"], "has no mean"),
    (
        ["export", "{three}", "--output", "{here}/o", "--format", "lightningdit"],
        "has no mean_flip",
    ),
    (["export", "{three}", "--output", "{flat}", "--format", "npy"], "is not empty"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"), MISTAKES, ids=[f"{w[0]}-{m[:30]}" for w, m in MISTAKES]
)
def test_a_command_ends_with_one_message_before_any_work(
    words: list[str],
    message: str,
    places: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", refuse)
    named = [word.replace("{none.npz}", str(places["none.npz"])) for word in words]
    monkeypatch.setattr(sys, "argv", ["fae", *(word.format_map(places) for word in named)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    first = next(index for index, line in enumerate(said) if line.startswith("fae: "))
    assert message in "\n".join(said[first:])
    # Only the parts of a list may follow, each on an indented line of its own.
    assert all(line.startswith("  ") for line in said[first + 1 :]), said
    assert not list(places["here"].glob("runs/*/checkpoints"))
