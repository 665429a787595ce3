"""A store of token states: what `fae precompute-text` writes, that it is sound, and its join with
the latents by row."""

from __future__ import annotations

import functools
import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fae.cli import app
from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.data.records import ImageRecord
from fae.pipelines.doctor import expected_text, speed
from fae.pipelines.latents import precompute_text_job
from fae.pipelines.latents.filling import TooManyErrors
from fae.pipelines.latents.inspection import inspect
from fae.pipelines.latents.manifest import commit
from fae.pipelines.latents.plan import ensure_plan
from fae.pipelines.latents.precompute_text_job import precompute_text
from fae.pipelines.latents.reader import LatentStore
from fae.pipelines.latents.shards import write_shard
from fae.pipelines.latents.text_store import TextStore
from fae.pipelines.latents.verify import verify_store
from fae.pipelines.status.folders import status_of
from fae.pipelines.storage.claims import StoreError, StoreMismatch
from fae_core.text import CaptionTokenizer, TextSpec, load_text_encoder
from tests.here import leave_ray_out
from tests.tiny import save_text_encoder

LENGTH = 6
CAPTIONS = {
    0: ("a red cat", None),
    1: ("a small blue dog", ("a small blue dog", "house", "a big cat a red dog a red house")),
    2: ("zebra", None),
    **{row: (f"a {'red' if row % 2 else 'green'} house", None) for row in range(3, 20)},
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save_text_encoder(tmp_path_factory.mktemp("text") / "encoder")


@pytest.fixture(scope="module")
def latents(write_store, tmp_path_factory) -> LatentStore:
    return write_store(tmp_path_factory.mktemp("latents"), ("mean",), False, CAPTIONS)


@pytest.fixture(scope="module")
def made(latents, encoder, tmp_path_factory) -> TextStore:
    with pytest.MonkeyPatch.context() as patch:
        leave_ray_out(patch)
        return make(latents.uri, encoder, tmp_path_factory.mktemp("states"))


def make(latents: str, encoder: Path, output: Path, *more: str) -> TextStore:
    values = [
        f"latents={latents}", f"output={output}", f"text.weights={encoder}",
        f"text.max_length={LENGTH}", "precompute.precision=fp32", "precompute.batch_size=5",
        "precompute.threads_per_actor=1", *more,
    ]  # fmt: skip
    precompute_text(load_recipe("photos-dinov2s", values), show_progress=False)
    return TextStore.open(str(output))


@functools.cache
def states_of(encoder: Path, caption: str) -> np.ndarray:
    """Of one caption, by the encoder itself, without padding."""
    spec = TextSpec(weights=str(encoder), max_length=LENGTH)
    ids, mask = CaptionTokenizer(spec)([caption])
    return load_text_encoder(spec)(ids, mask)[mask].half().numpy()


def write_latents(folder: Path, captions: list[str | None], lost: tuple[int, ...] = ()) -> str:
    """A latent store of these images in shards of 4, without latents for the images `lost`."""
    records = [ImageRecord(f"{i:03d}", f"/x/{i}", None, text) for i, text in enumerate(captions)]
    plan = ensure_plan(str(folder), records, 4, {"autoencoder weights": "abc"})
    for shard in range(plan.num_shards):
        rows = plan.shard(shard)
        kept = [i for i, row in enumerate(rows) if int(row.key) not in lost]
        errors = [
            {"key": row.key, "stage": "decode", "message": "no image"}
            for row in rows
            if int(row.key) in lost
        ]
        marks = np.array([int(rows[i].key) for i in kept], np.float16)
        values = {"mean": np.broadcast_to(marks[:, None, None, None], (len(kept), 1, 1, 1))}
        write_shard(str(folder), shard, rows, kept, values, errors, plan.fingerprint)
    commit(str(folder), plan, {})
    return str(folder)


def test_every_caption_has_the_states_of_its_own_tokens_without_padding(made, latents, encoder):
    assert made.manifest["stored"] == made.manifest["planned"] == 20
    assert made.manifest["columns"] == ["states"] and made.state_dim == 16
    several = [all_of or (one,) for one, all_of in CAPTIONS.values()]
    lengths = [len(states_of(encoder, text)) for texts in several for text in texts]
    assert made.manifest["tokens"] == sum(lengths) and max(lengths) == LENGTH
    assert np.array_equal(made.empty, states_of(encoder, ""))
    seen: dict[int, set[str]] = {row: set() for row in CAPTIONS}
    for batch in islice(latents.reader(10, 3, captions=True, text=made), 40):
        for row, caption, states in zip(batch.rows, batch.captions, batch.states, strict=True):
            assert np.array_equal(states, states_of(encoder, caption)), caption
            seen[int(row)].add(caption)
    assert seen == {row: set(all_of or (one,)) for row, (one, all_of) in CAPTIONS.items()}


def test_workers_and_a_later_start_read_the_same_states(made, latents):
    whole = list(islice(latents.reader(10, 3, text=made), 6))
    for rank in range(2):
        part = next(latents.reader(10, 3, rank, 2, start_step=5, text=made))
        expected = whole[5].states[5 * rank : 5 * rank + 5]
        assert all(map(np.array_equal, part.states, expected))


def test_the_store_is_verified_and_described(made, capsys, tmp_path):
    assert verify_store(made.uri) == []
    assert inspect(made.uri, verify=True)
    said = capsys.readouterr().out
    assert "token states" in said and "text encoder" in said and "x float16" in said
    status = status_of(made.uri)
    assert (status.kind, status.state, status.done) == ("token states", "finished", 3)
    damaged = tmp_path / "damaged"
    shutil.copytree(made.uri, damaged)
    shard = damaged / "shards" / "00000001.parquet"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    assert verify_store(str(damaged))[0].startswith("shards/00000001.parquet has the right size")
    with pytest.raises(StoreError, match="not from token states"):
        inspect(made.uri, figure=str(tmp_path / "figure.png"))


def test_a_stopped_job_resumes_to_the_same_bytes(made, latents, encoder, tmp_path, monkeypatch):
    leave_ray_out(monkeypatch)
    again = tmp_path / "again"
    shutil.copytree(made.uri, again)
    (again / "manifest.json").unlink()
    (again / "shards" / "00000001.parquet").unlink()
    encoded = []
    call = precompute_text_job.EncodeCaptions.__call__
    monkeypatch.setattr(
        precompute_text_job.EncodeCaptions,
        "__call__",
        lambda self, batch: encoded.append(int(batch["shard"][0])) or call(self, batch),
    )
    make(latents.uri, encoder, again)
    assert encoded == [1]
    for path in sorted(Path(made.uri).rglob("*.parquet")):
        assert (again / path.relative_to(made.uri)).read_bytes() == path.read_bytes()
    manifests = [json.loads((Path(uri) / "manifest.json").read_text()) for uri in (made.uri, again)]
    for manifest in manifests:
        del manifest["run"]
    assert manifests[0] == manifests[1]


def test_a_store_of_another_encoder_length_or_precision_is_not_written_over(
    made, latents, encoder, tmp_path, monkeypatch
):
    leave_ray_out(monkeypatch)
    output = Path(made.uri)
    other = save_text_encoder(tmp_path / "other", seed=1)
    with pytest.raises(StoreMismatch, match=r"text encoder: \w{64} there, \w{64} now"):
        make(latents.uri, other, output)
    with pytest.raises(StoreMismatch, match=r"text settings: .*6.* there, .*5.* now"):
        make(latents.uri, encoder, output, "text.max_length=5")
    with pytest.raises(StoreMismatch, match="precision: fp32 there, bf16 now"):
        make(latents.uri, encoder, output, "precompute.precision=bf16")
    with pytest.raises(StoreMismatch, match="format: fae-latents-1 there, fae-text-states-1 now"):
        make(latents.uri, encoder, Path(latents.uri))
    with pytest.raises(StoreError, match="a store of token states, not of latents"):
        make(made.uri, encoder, tmp_path / "new")
    with pytest.raises(StoreError, match=r"holds no latent store \(no plan.parquet\)"):
        make(str(tmp_path), encoder, tmp_path / "new")
    with pytest.raises(StoreError, match="not of format fae-latents-1, but fae-text-states-1"):
        LatentStore.open(made.uri)


def test_states_of_other_captions_or_shards_are_refused(made, write_store, tmp_path):
    changed = {**CAPTIONS, 7: ("another", None)}
    other = write_store(tmp_path / "other", ("mean",), False, changed)
    with pytest.raises(
        StoreError, match=r"do not belong .*'007' with .*'another'.*precompute-text"
    ):
        other.reader(10, 0, text=made)
    # Of the same captions under other labels it is the same text.
    labelled = write_store(tmp_path / "labelled", ("mean",), True, CAPTIONS)
    assert len(next(labelled.reader(10, 0, text=made)).states) == 10
    few = LatentStore.open(write_latents(tmp_path / "few", ["a red cat"] * 6))
    with pytest.raises(StoreError, match="shards of 8 images, and of 4"):
        few.reader(2, 0, text=made)


def test_images_without_latents_and_images_without_captions_do_not_shift_the_rows(
    encoder, tmp_path, monkeypatch
):
    leave_ray_out(monkeypatch)
    captions = ["a cat", "a red cat", None, "dog", "", "a small house", "big dog", "house"]
    uri = write_latents(tmp_path / "latents", captions, lost=(1, 2, 4))
    latents = LatentStore.open(uri)
    with pytest.raises(TooManyErrors, match=r"1 of 8 (.|\n)*  002 \[caption\] it has no cap"):
        make(uri, encoder, tmp_path / "states")
    text = make(uri, encoder, tmp_path / "states", "precompute.max_error_rate=0.5")
    assert (text.manifest["stored"], text.manifest["errors"]) == (6, 2)
    assert verify_store(text.uri) == []
    batch = next(latents.reader(5, 0, text=text))
    for latent, states in zip(batch.latents["mean"], batch.states, strict=True):
        assert np.array_equal(states, states_of(encoder, captions[int(latent.item())]))
    whole = LatentStore.open(write_latents(tmp_path / "whole", captions, lost=(2,)))
    with pytest.raises(StoreError, match=r"1 images have latents and no states.*'004'"):
        whole.reader(5, 0, text=text)


def test_states_are_encoded_in_the_dtype_that_the_recipe_says(
    latents, encoder, tmp_path, monkeypatch
):
    leave_ray_out(monkeypatch)
    low = make(latents.uri, encoder, tmp_path / "low", "precompute.precision=bf16")
    spec = TextSpec(weights=str(encoder), max_length=LENGTH)
    ids, mask = CaptionTokenizer(spec)([""])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = load_text_encoder(spec)(ids, mask)[mask].half().numpy()
    assert low.precision == "bf16" and np.array_equal(low.empty, expected)


def test_a_dry_run_counts_what_the_store_will_hold(made, latents, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "PROBE_SECONDS", 0.01)
    words = [
        "photos-dinov2s", f"latents={latents.uri}", f"output={tmp_path / 'states'}",
        f"text.weights={encoder}", f"text.max_length={LENGTH}", "precompute.threads_per_actor=1",
        "precompute.precision=fp32",
    ]  # fmt: skip
    result = CliRunner().invoke(app, ["precompute-text", *words, "--probe"])
    assert result.exit_code == 0, result.output
    lines, tokens = result.output.splitlines(), made.manifest["tokens"]
    captions = sum(len(several or (one,)) for one, several in CAPTIONS.values())
    expected = f"store: 20 rows, {captions} captions of {tokens / captions:.1f} tokens on average"
    assert lines[0].startswith(expected)
    assert expected_text(load_recipe(words[0], words[1:])).num_bytes == tokens * 2 * made.state_dim
    assert "nothing was run" in lines[1] and any("actor, host" in line for line in lines)
    assert lines[-1].startswith("captions of 20 images: about ")
    assert not (tmp_path / "states").exists()
