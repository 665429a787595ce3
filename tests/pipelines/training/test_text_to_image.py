"""A generator of text: what it trains on, that it resumes, and the encoder that belongs to it."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fae.pipelines.config.recipe import RecipeError, load_recipe
from fae.pipelines.config.sections import GeneratorSection, GeneratorTraining, TextSection
from fae.pipelines.doctor.memory import training_memory
from fae.pipelines.latents.precompute_text_job import precompute_text
from fae.pipelines.latents.reader import LatentStore
from fae.pipelines.networks.text_encoder import CaptionEncoder
from fae.pipelines.networks.untrained import build_generator
from fae.pipelines.storage.claims import StoreError
from fae.pipelines.training.captions import CaptionFeed, check_captions, encoded_once
from fae.pipelines.training.generator import generator_job, train_generator
from fae.pipelines.training.latent_feed import blank_latents, latent_feed
from fae_core import checkpoint
from fae_core.generators.mmdit import MMDiT
from fae_core.text import CaptionTokenizer, TextSpec, load_text_encoder
from fae_core.weights import WeightsError
from tests.here import leave_ray_out, train_here
from tests.tiny import save_text_encoder

CPU = torch.device("cpu")
WORDS = ("cat", "dog", "house")
COLORS = ("red", "green", "blue")
LENGTH = 6


def caption(row: int) -> str:
    return f"a {COLORS[row % 3]} {WORDS[row // 3 % 3]}"


def captions_of(row: int) -> tuple[str, tuple[str, ...] | None]:
    """Every fourth image has two."""
    return caption(row), (caption(row), "small house") if row % 4 == 0 else None


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save_text_encoder(tmp_path_factory.mktemp("text") / "encoder")


@pytest.fixture(scope="module")
def store(write_store, tmp_path_factory) -> LatentStore:
    captions = {row: captions_of(row) for row in range(20)}
    return write_store(tmp_path_factory.mktemp("store"), ("mean",), False, captions)


def tokenizer(encoder: Path) -> CaptionTokenizer:
    return CaptionTokenizer(TextSpec(weights=str(encoder), max_length=LENGTH))


def overrides(store: LatentStore, encoder: Path, folder: Path, *more: str) -> list[str]:
    return [
        "run=test", f"storage={folder}", f"latents={store.uri}", "generator.kind=mmdit",
        "generator.width=32", "generator.depth=2", "generator.num_heads=2", "generator.size=S",
        "generator.training.steps=6", "generator.training.batch_size=8",
        "generator.training.precision=fp32", "generator.training.learning_rate=1e-3",
        "generator.training.accumulation=2", "generator.training.log_every=2",
        "generator.training.checkpoint_every=2", "generator.training.validate_every=4",
        "generator.training.ema_decay=0.9", "generator.training.threads_per_worker=1",
        "sample.num_steps=2", "tracking.enabled=false", f"text.weights={encoder}",
        f"text.max_length={LENGTH}", *more,
    ]  # fmt: skip


def take(store, encoder, num, dropout=0.0, start=0, rank=0, world_size=1):
    section = GeneratorSection(
        kind="mmdit", training=GeneratorTraining(batch_size=10, accumulation=1)
    )
    captions = CaptionFeed(tokenizer(encoder), dropout)
    feed = latent_feed(store, section, 3, captions)(start, rank, world_size, CPU)
    return [next(feed) for _ in range(num)]


def test_latents_come_with_the_tokens_of_their_own_captions(store, encoder):
    batches = take(store, encoder, 4)
    rows = torch.cat([b["latents"][:, 0, 0, 0].round() for b in batches]).int().tolist()
    assert sorted(rows) == sorted(2 * list(range(20)))
    words = tokenizer(encoder)
    drawn = set()
    for batch in batches:
        assert "labels" not in batch.tensors
        assert batch["tokens"].shape == (10, LENGTH) == batch["mask"].shape
    tokens = torch.cat([b["tokens"] for b in batches])
    for row, found in zip(rows, tokens, strict=True):
        one, several = captions_of(row)
        possible, _ = words(several or [one])
        hits = [torch.equal(found, p) for p in possible]
        assert any(hits)
        if several:
            drawn.add(hits.index(True))
    assert drawn == {0, 1}


def test_workers_share_out_the_same_captions_and_drops(store, encoder):
    (whole,) = take(store, encoder, 1, 0.5, start=7)
    parts = [take(store, encoder, 1, 0.5, 7, rank, 2)[0] for rank in range(2)]
    for name in ("tokens", "mask", "latents"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name]), name


def test_dropped_captions_are_the_empty_one(store, encoder):
    mask = torch.cat([b["mask"] for b in take(store, encoder, 40, 0.25)])
    empty = mask.sum(1) == 1
    assert 0.18 < empty.float().mean() < 0.32
    assert not (torch.cat([b["mask"] for b in take(store, encoder, 4)]).sum(1) == 1).any()


def test_a_batch_is_as_long_as_its_longest_caption_which_changes_no_loss(encoder):
    spec = TextSpec(weights=str(encoder), max_length=30)
    feed = CaptionFeed(CaptionTokenizer(spec), 0.0)
    short = feed.tensors(["a red cat", "", None], torch.ones(3))
    assert short["tokens"].shape == short["mask"].shape == (3, 16)
    assert feed.tensors(["a red cat " * 5, "a"], torch.ones(2))["mask"].shape == (2, 16)
    assert feed.tensors(["a red cat " * 20], torch.ones(1))["mask"].shape == (1, 30)
    section = GeneratorSection(kind="mmdit", width=32, depth=2, num_heads=2, size="S")
    text = TextSection(weights=str(encoder), max_length=30)
    torch.manual_seed(0)
    model = build_generator(section, (2, 3, 3), text)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    job = generator_job(section, model, load_text_encoder(spec))
    blank = blank_latents(3, (2, 3, 3), 30)
    tokens, mask = feed.tokenizer(["a red cat", "", None])
    noise = {"noise": torch.randn(3, 2, 3, 3)}
    losses = [
        job.loss(model, replace(blank, tensors={**blank.tensors, **noise, **captions}))["loss"]
        for captions in (short, {"tokens": tokens, "mask": mask})
    ]
    torch.testing.assert_close(*losses)


def test_captions_are_counted_and_a_missing_one_is_named_before_a_run_is_claimed(
    write_store, store, encoder, tmp_path, monkeypatch
):
    said = check_captions(store, CaptionTokenizer(TextSpec(weights=str(encoder), max_length=3)))
    assert "25 in all, 20 longer than 3 tokens (cut), 0 with words" in said
    captions = {row: captions_of(row) for row in range(20) if row != 11}
    some = write_store(tmp_path / "some", ("mean",), False, captions)
    train_here(monkeypatch)
    recipe = load_recipe("photos-dinov2s", overrides(some, encoder, tmp_path))
    with pytest.raises(StoreError, match=r"1 of 20 images .* no caption.*'011'"):
        train_generator(recipe)
    assert not (tmp_path / "test").exists()


def test_an_encoder_of_pickles_is_refused_before_a_run_is_claimed(store, encoder, tmp_path):
    pickled = tmp_path / "pickled"
    shutil.copytree(encoder, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    recipe = load_recipe("photos-dinov2s", overrides(store, pickled, tmp_path))
    with pytest.raises(WeightsError, match="a pickle, which can run code"):
        train_generator(recipe)
    assert not (tmp_path / "test").exists()


def test_a_template_without_a_place_for_the_caption_is_refused():
    with pytest.raises(RecipeError, match="no {}"):
        load_recipe("photos-dinov2s", ["text.template=a picture"])


@pytest.fixture(scope="module")
def trained(store, encoder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        train_here(patch)
        train_generator(load_recipe("photos-dinov2s", overrides(store, encoder, folder)))
    return folder / "test"


@pytest.mark.integration
def test_a_run_that_was_stopped_ends_at_the_same_bits(
    trained, store, encoder, tmp_path, monkeypatch
):
    train_here(monkeypatch)
    recipe = load_recipe("photos-dinov2s", overrides(store, encoder, tmp_path))
    shutil.copytree(trained, tmp_path / "test")
    for name in ("result.json", "generator.safetensors", "checkpoints/step_000000006.pt"):
        (tmp_path / "test" / name).unlink()
    train_generator(recipe)
    assert_same_network(trained, tmp_path / "test")


@pytest.fixture(scope="module")
def states(store, encoder, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("states"))
    with pytest.MonkeyPatch.context() as patch:
        leave_ray_out(patch)
        values = [f"latents={store.uri}", f"output={folder}", "precompute.precision=fp32"]
        values += [f"text.weights={encoder}", f"text.max_length={LENGTH}"]
        precompute_text(load_recipe("photos-dinov2s", values), show_progress=False)
    return folder


@pytest.mark.integration
def test_training_on_stored_states_ends_at_the_same_bits_and_loads_no_encoder(
    states, store, encoder, tmp_path, monkeypatch
):
    """Also where it goes on from a run that began with the encoder itself."""
    train_here(monkeypatch)
    values = overrides(store, encoder, tmp_path, f"text.states={states}", "text.dropout=0.5")
    begun = load_recipe("photos-dinov2s", overrides(store, encoder, tmp_path, "text.dropout=0.5"))
    train_generator(begun)
    expected = (tmp_path / "test").rename(tmp_path / "online")
    with monkeypatch.context() as patch:
        for_worker = "fae.pipelines.networks.text_encoder.CaptionEncoder.to"
        patch.setattr(for_worker, lambda *_: pytest.fail("a worker loads the encoder"))
        train_generator(load_recipe("photos-dinov2s", values))
        assert_same_network(expected, tmp_path / "test")
        shutil.rmtree(tmp_path / "test")
        shutil.copytree(expected, tmp_path / "test")
        for name in ("result.json", "generator.safetensors", "checkpoints/step_000000006.pt"):
            (tmp_path / "test" / name).unlink()
        train_generator(load_recipe("photos-dinov2s", values))
    assert_same_network(expected, tmp_path / "test")
    found, other = (
        checkpoint.load(folder / "generator.safetensors").fingerprints
        for folder in (expected, tmp_path / "test")
    )
    assert found == other


def test_a_previews_encoder_is_freed_when_it_has_encoded_the_prompts(encoder):
    whole = CaptionEncoder.load(TextSpec("", str(encoder), LENGTH))
    prompts = ["a red cat", "a house", "a red cat"]
    wanted = whole(["a house", "", "a red cat"])
    once, alive = encoded_once(whole, prompts), weakref.ref(whole.encoder)
    del whole
    gc.collect()
    assert alive() is None
    for found, expected in zip(once(["a house", "", "a red cat"]), wanted, strict=True):
        torch.testing.assert_close(found, expected)


def test_states_of_another_encoder_or_of_other_captions_are_refused_before_a_run_is_claimed(
    states, store, encoder, write_store, tmp_path, monkeypatch
):
    train_here(monkeypatch)
    other = save_text_encoder(tmp_path / "other", seed=1)
    with pytest.raises(StoreError, match=r"another encoder's .*: text encoder: \w{64} there"):
        values = overrides(store, other, tmp_path, f"text.states={states}")
        train_generator(load_recipe("photos-dinov2s", values))
    with pytest.raises(StoreError, match=r"another encoder's .*: text settings: .*6.* there"):
        more = (f"text.states={states}", "text.max_length=5")
        train_generator(load_recipe("photos-dinov2s", overrides(store, encoder, tmp_path, *more)))
    captions = {row: captions_of(row) for row in range(19)} | {19: ("house", None)}
    changed = write_store(tmp_path / "changed", ("mean",), False, captions)
    with pytest.raises(StoreError, match="do not belong to the latents .* '019' with"):
        values = overrides(changed, encoder, tmp_path, f"text.states={states}")
        train_generator(load_recipe("photos-dinov2s", values))
    with pytest.raises(StoreError, match="not of format fae-text-states-1"):
        values = overrides(store, encoder, tmp_path, f"text.states={store.uri}")
        train_generator(load_recipe("photos-dinov2s", values))
    assert not (tmp_path / "test").exists()


@pytest.mark.integration
def test_states_in_another_precision_than_the_runs_belong_to_the_run(
    states, store, encoder, tmp_path, monkeypatch
):
    train_here(monkeypatch)
    more = (f"text.states={states}", "generator.training.precision=bf16")
    train_generator(load_recipe("photos-dinov2s", overrides(store, encoder, tmp_path, *more)))
    assert json.loads((tmp_path / "test/text_encoder.json").read_text())["text precision"] == "fp32"
    with pytest.raises(RecipeError, match="text precision: fp32 there, nothing now"):
        values = overrides(store, encoder, tmp_path, more[1])
        train_generator(load_recipe("photos-dinov2s", values))


def test_the_memory_of_a_step_with_stored_states_has_no_encoder_in_it(
    states, store, encoder, tmp_path
):
    values = overrides(store, encoder, tmp_path, f"text.states={states}")
    worker = {
        p.name: p for p in training_memory(load_recipe("photos-dinov2s", values), "generator")
    }["worker"]
    assert "text encoder: weights (frozen)" not in worker.host
    assert worker.host["kept for the backward pass"] > 0


def assert_same_network(one: Path, other: Path) -> None:
    expected, actual = (
        checkpoint.load(folder / "generator.safetensors", "mmdit").module.state_dict()
        for folder in (one, other)
    )
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name


def test_the_checkpoint_names_its_text_encoder_and_learned_from_captions(trained):
    loaded = checkpoint.load(trained / "generator.safetensors")
    written = json.loads((trained / "text_encoder.json").read_text())
    assert isinstance(loaded.module, MMDiT) and loaded.module.config.text_dim == 16
    assert {name: loaded.fingerprints[name] for name in written} == written
    assert json.loads(written["text settings"])["max_length"] == LENGTH
    assert loaded.fingerprints["text source"] == "a folder"
    assert loaded.module.text_input.bias.any()  # it began at zero


def test_a_run_goes_on_with_its_own_text_encoder_alone(
    trained, store, encoder, tmp_path, monkeypatch
):
    train_here(monkeypatch)
    moved = tmp_path / "moved"
    shutil.copytree(encoder, moved)
    folder = trained.parent
    train_generator(load_recipe("photos-dinov2s", overrides(store, moved, folder)))
    other = save_text_encoder(tmp_path / "other", seed=1)
    with pytest.raises(RecipeError, match=r"another text encoder:\n  text encoder: \w{64} there"):
        train_generator(load_recipe("photos-dinov2s", overrides(store, other, folder)))
    with pytest.raises(RecipeError, match="text.dropout: 0.1 there, 0.2 now"):
        more = overrides(store, encoder, folder, "text.dropout=0.2")
        train_generator(load_recipe("photos-dinov2s", more))


def test_a_training_starts_from_a_trained_generator_of_its_own_kind(
    trained, store, encoder, tmp_path, monkeypatch
):
    train_here(monkeypatch)
    start = f"generator.start_from={trained}"
    still = overrides(store, encoder, tmp_path, start, "generator.training.learning_rate=1e-12")
    train_generator(load_recipe("photos-dinov2s", still))
    before, after = (
        checkpoint.load(folder / "generator.safetensors") for folder in (trained, tmp_path / "test")
    )
    assert after.fingerprints == before.fingerprints
    for name, value in before.module.state_dict().items():
        torch.testing.assert_close(after.module.state_dict()[name], value, rtol=0, atol=1e-6)

    with pytest.raises(RecipeError, match=r"is MMDiTConfig.*width=32.*the recipe wants.*width=64"):
        wider = overrides(store, encoder, tmp_path, start, "run=wider", "generator.width=64")
        train_generator(load_recipe("photos-dinov2s", wider))
    other = save_text_encoder(tmp_path / "other", seed=1)
    with pytest.raises(checkpoint.CheckpointError, match=r"start_from=.*was trained with text enc"):
        train_generator(
            load_recipe("photos-dinov2s", overrides(store, other, tmp_path, start, "run=other"))
        )


def test_the_memory_of_a_step_has_the_text_encoder_in_it(store, encoder, tmp_path):
    recipe = load_recipe("photos-dinov2s", overrides(store, encoder, tmp_path))
    worker = {p.name: p for p in training_memory(recipe, "generator")}["worker"]
    assert worker.host["text encoder: weights (frozen)"] > 4 * 16 * 16
    assert worker.host["kept for the backward pass"] > 0
