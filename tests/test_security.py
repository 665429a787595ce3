"""Nothing from a store, checkpoint, tar, Parquet file or recipe is executed, no plan reaches
outside its source, and no secret is written anywhere: a marker stands in every variable, the chain
runs, and everything that it wrote is searched."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fae.pipelines.config.recipe import RecipeError, load_recipe
from fae.pipelines.config.sections import DataSection
from fae.pipelines.data.crops import ImageError
from fae.pipelines.data.reading import read_records
from fae.pipelines.data.records import ImageRecord, SourceError
from fae.pipelines.data.sources import list_images
from fae.pipelines.latents.plan import open_plan
from fae.pipelines.latents.reader import LatentStore
from fae.pipelines.latents.shards import read_errors
from fae.pipelines.latents.verify import verify_store
from fae.pipelines.storage import paths
from fae.pipelines.storage.secrets import redact
from fae_core import checkpoint
from fae_core.checkpoint import CheckpointError
from fae_core.errors import UserError
from tests.tiny import ROOT


class Bomb:
    """Unpickled, it makes the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def exploded(tmp_path: Path) -> Path:
    return tmp_path / "exploded"


@pytest.fixture
def bomb(exploded: Path) -> bytes:
    """The pickle bomb; it works, as is shown first."""
    data = pickle.dumps(Bomb(exploded))
    pickle.loads(data)
    assert exploded.is_dir()
    exploded.rmdir()
    return data


def pickled_objects(bomb: bytes) -> pa.Array:
    """A column of the type that Ray Data has for Python objects, which unpickles a value that is
    looked at."""
    from ray.data.extensions import ArrowPythonObjectType

    values = pa.array([bomb, bomb], pa.large_binary())
    return pa.ExtensionArray.from_storage(ArrowPythonObjectType(), values)


# Bombs


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_a_checkpoint_is_never_unpickled(
    tmp_path: Path, exploded: Path, bomb: bytes, name: str
) -> None:
    (tmp_path / name).write_bytes(bomb)
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / name)
    assert not exploded.exists()


@pytest.mark.parametrize("name", ["plan.parquet", "manifest.json", "shards/00000000.parquet"])
def test_a_pickle_in_a_stores_place_is_refused(
    tmp_path: Path, exploded: Path, bomb: bytes, write_store, name: str
) -> None:
    write_store(tmp_path / "store")
    (tmp_path / "store" / name).write_bytes(bomb)
    try:
        store = LatentStore.open(str(tmp_path / "store"))
        assert verify_store(store.uri)
        store.read_shard(0)
    except (UserError, pa.ArrowException):
        pass
    else:
        assert name == "plan.parquet", "a reader does not need the plan"
    assert not exploded.exists()


@pytest.mark.parametrize(
    "name", ["plan.parquet", "shards/00000000.parquet", "errors/00000002.parquet"]
)
def test_pickled_values_in_a_stores_columns_are_not_looked_at(
    tmp_path: Path, exploded: Path, bomb: bytes, write_store, name: str
) -> None:
    uri = write_store(tmp_path / "store").uri
    path = Path(uri) / name
    path.parent.mkdir(exist_ok=True)
    sound = pq.read_table(path) if path.exists() else pa.table({})
    columns = {name: sound[name][:2] for name in sound.column_names}
    objects = pickled_objects(bomb)
    columns |= dict.fromkeys(("key", "uri", "caption", "stage", "message"), objects)
    pq.write_table(pa.table(columns).replace_schema_metadata(sound.schema.metadata), path)
    with pytest.raises((UserError, pa.ArrowException, UnicodeDecodeError)):
        open_plan(uri).shard(0)
        LatentStore.open(uri).read_shard(0)
        list(read_errors(uri))
    with contextlib.suppress(UserError, pa.ArrowException, UnicodeDecodeError):
        verify_store(uri)
    assert not exploded.exists()


def test_pickled_values_in_a_source_are_refused(
    tmp_path: Path, exploded: Path, bomb: bytes
) -> None:
    objects = pickled_objects(bomb)
    pq.write_table(pa.table({"image": [b"x", b"y"], "caption": objects}), tmp_path / "c.parquet")
    with pytest.raises(SourceError, match="'caption' is of the extension type"):
        list_images(DataSection(path=str(tmp_path / "c.parquet")))
    nested = pa.StructArray.from_arrays([objects], ["bytes"])
    for column in (objects, nested):
        pq.write_table(pa.table({"image": column}), tmp_path / "i.parquet")
        data = DataSection(path=str(tmp_path / "i.parquet"))
        with pytest.raises(SourceError, match="'image' is of the extension type"):
            list_images(data)
        planned = [ImageRecord("0", f"{data.path}#row=0"), ImageRecord("1", f"{data.path}#row=1")]
        assert all(isinstance(blob, Exception) for blob in read_records(planned, data))
    assert not exploded.exists()


def test_members_of_a_tar_are_read_and_never_unpacked(
    tmp_path: Path, exploded: Path, bomb: bytes
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    outside = tmp_path / "outside.jpg"
    with tarfile.open(source / "s.tar", "w") as tar:
        for name in ("../outside.jpg", str(outside), "a.pkl", "a.pyd", "b.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(bomb)
            tar.addfile(info, io.BytesIO(bomb))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    data = DataSection(path=str(source))
    records = list_images(data)
    assert all(record.uri.startswith(f"{source}/s.tar#offset=") for record in records)
    assert len(records) == 3 and read_records(records, data) == [bomb] * 3
    assert not exploded.exists() and not outside.exists()
    assert [path.name for path in source.iterdir()] == ["s.tar"]


@pytest.mark.parametrize(
    "text",
    [
        "run: !!python/object/apply:os.mkdir ['{path}']",
        "run: !!python/object/new:os.mkdir ['{path}']",
        "!!python/object/apply:os.mkdir ['{path}']",
        "run: !anything x",
    ],
)
def test_a_recipe_with_yaml_tags_is_refused(tmp_path: Path, exploded: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text.format(path=exploded))
    with pytest.raises(RecipeError):
        load_recipe(str(path))
    assert not exploded.exists()


def test_a_recipe_does_not_read_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "marker-secret")
    path = tmp_path / "recipe.yaml"
    path.write_text("run: ${oc.env:AWS_SECRET_ACCESS_KEY}")
    assert "marker-secret" not in load_recipe(str(path)).to_yaml()


# Paths


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"inside")
    (tmp_path / "secret.jpg").write_bytes(b"outside")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "up").symlink_to(tmp_path)
    return folder


@pytest.mark.parametrize(
    "given", ["../secret.jpg", "link.jpg", "up/secret.jpg", "{outside}", "file://{outside}"]
)
def test_a_path_inside_a_parquet_cell_cannot_leave_the_folder(source: Path, given: str) -> None:
    path = given.format(outside=source.parent / "secret.jpg")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [{"bytes": None, "path": path}, {"bytes": None, "path": "a.jpg"}]
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), source / "x.parquet")
    data = DataSection(path=str(source / "x.parquet"))
    first, second = read_records(list_images(data), data)
    assert isinstance(first, SourceError) and "leaves" in str(first)
    assert second == b"inside"


@pytest.mark.parametrize("given", ["../secret.jpg", "link.jpg", "up/secret.jpg"])
def test_a_relative_path_in_a_list_cannot_leave_its_folder(source: Path, given: str) -> None:
    (source / "list.csv").write_text(f"uri\n{given}\n")
    with pytest.raises(SourceError, match="leaves"):
        list_images(DataSection(path=str(source / "list.csv")))


@pytest.mark.parametrize(
    "uri",
    ["{outside}", "{source}/../secret.jpg", "{outside}#row=0", "{outside}#offset=0&size=4",
     "{source}#x/../../secret.jpg", "s3://other/secret.jpg"],
)  # fmt: skip
def test_a_plan_that_was_tampered_with_reads_nothing_outside_its_source(
    source: Path, uri: str
) -> None:
    address = uri.format(outside=source.parent / "secret.jpg", source=source)
    data = DataSection(path=str(source))
    inside = ImageRecord("a", str(source / "a.jpg"))
    blobs = read_records([ImageRecord("k", address), inside], data)
    assert isinstance(blobs[0], ImageError) and "outside data.path" in str(blobs[0])
    assert blobs[1] == b"inside"


# Secrets

MARKER = "marker-5eCr3t"
SECRETS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": f"{MARKER}-aws",
    "AWS_SESSION_TOKEN": f"{MARKER}-session",
    "MLFLOW_TRACKING_URI": f"http://user:{MARKER}-mlflow@127.0.0.1:9",
    "MLFLOW_TRACKING_PASSWORD": f"{MARKER}-password",
    "MLFLOW_TRACKING_TOKEN": f"{MARKER}-token",
    "HF_TOKEN": f"{MARKER}-hub",
}


def test_redaction_takes_secrets_and_leaves_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SOME_TOKEN_FILE", "/run/secrets/file")
    text = " ".join([*SECRETS.values(), "s3://bucket/a@b", "me@home", "/run/secrets/file"])
    hidden = redact(text)
    assert MARKER not in hidden
    assert hidden.endswith("s3://bucket/a@b me@home /run/secrets/file") and "testing" in hidden
    assert "http://***@127.0.0.1:9" in hidden


def test_a_printed_recipe_holds_no_password() -> None:
    uri = f"tracking.uri=https://user:{MARKER}@mlflow.example/x"
    command = [sys.executable, "-m", "fae", "precompute", "photos-dinov2s", uri]
    for more, status in (
        (["--print-config"], 0),
        (["trackin.uri=1"], 2),
        ([uri.replace(".uri", ".enabled")], 2),
    ):
        done = subprocess.run(
            [*command, *more], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stderr
        assert MARKER not in done.stdout + done.stderr
    assert (
        "https://***@mlflow.example/x"
        in subprocess.run(
            [*command, "--print-config"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    )


CHAIN = """
import sys
from fae.cli import main
from fae.pipelines.config import load_recipe
from fae.pipelines.latents import precompute
from fae.pipelines.training import train_autoencoder
values = sys.argv[1:]
trained = train_autoencoder(load_recipe("photos-dinov2s", values))
values.append("autoencoder.checkpoint=" + trained.checkpoint)
precompute(load_recipe("photos-dinov2s", values))
unreachable = ["data.path=s3://none/x", "output=x"]
sys.argv = ["fae", "precompute", "photos-dinov2s", *values, *unreachable]
main()
"""


@pytest.mark.integration
def test_no_secret_is_in_anything_that_the_chain_writes(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for index in range(16):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")
    ray_folder = tempfile.mkdtemp(prefix="fae-", dir="/tmp")  # sockets want a short path
    values = [
        f"data.path={images}",
        "run=r",
        f"storage={tmp_path}/runs",
        f"output={tmp_path}/latents",
        "image_size=32",
        "backbone.name=vit_tiny_patch16_224",
        "backbone.weights=random",
        "backbone.image_size=32",
        "autoencoder.latent_dim=8",
        "autoencoder.encoder.num_heads=3",
        "autoencoder.encoder.head_dim=32",
        "autoencoder.decoder.num_heads=3",
        "autoencoder.decoder.depth=1",
        "autoencoder.training.steps=2",
        "autoencoder.training.batch_size=4",
        "autoencoder.statistics_images=8",
        "precompute.shard_size=8",
        f"tracking.uri=http://user:{MARKER}-recipe@127.0.0.1:9",
    ]
    environment = {
        **{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        **SECRETS,
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "FAE_S3_PATIENCE": "0.5",
        "RAY_TMPDIR": ray_folder,
        "PYTHONPATH": str(ROOT),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", CHAIN, *values],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 2 and "no connection" in done.stderr, done.stderr
        assert "Tracking failed, training goes on" in done.stdout + done.stderr
        assert json.loads((tmp_path / "latents" / "manifest.json").read_text())["stored"] == 16
        assert MARKER not in done.stdout + done.stderr
        written = [
            p for folder in (tmp_path, Path(ray_folder)) for p in folder.rglob("*") if p.is_file()
        ]
        assert len(written) > 30
        leaks = [str(path) for path in written if MARKER.encode() in path.read_bytes()]
        assert leaks == []
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)


def test_storage_errors_of_every_operation_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("FAE_S3_PATIENCE", "0")
    for operation in (
        paths.read_bytes,
        paths.open_input,
        paths.exists,
        paths.delete,
        lambda uri: paths.write_bytes(uri, b""),
        lambda uri: paths.write_once(uri, b""),
        lambda uri: list(paths.list_files(uri)),
    ):
        with pytest.raises(paths.StorageError, match="bucket 'b'.*key 'k'") as raised:
            operation("s3://b/k")
        assert MARKER not in str(raised.value)
