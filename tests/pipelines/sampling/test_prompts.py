"""Images of prompts: what prompts are, what an image depends on, what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import fae
from fae.pipelines.config.recipe import RecipeError, load_recipe
from fae.pipelines.doctor.memory import sample_memory
from fae.pipelines.networks.text_encoder import SOURCE, CaptionEncoder
from fae.pipelines.sampling.grid import draw_grid
from fae.pipelines.sampling.image_sampler import ImageSampler
from fae.pipelines.sampling.latent_sampler import intervals
from fae.pipelines.sampling.prompts import Prompts, read_prompts
from fae.pipelines.sampling.sample_job import sample
from fae.pipelines.storage.claims import StoreMismatch
from fae_core import checkpoint
from fae_core.checkpoint import CheckpointError
from fae_core.generators.dit import DiT, DiTConfig
from fae_core.generators.mmdit import MMDiT, MMDiTConfig
from fae_core.samplers import GuidanceInterval, sample_ode
from fae_core.text import TextSpec
from fae_core.weights import WeightsError
from tests.here import leave_ray_out, run_rows
from tests.tiny import save_decoders, save_text_encoder

SHAPE = (4, 4, 4)
PROMPTS = ["a red cat", "a blue dog", "a small house"]


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """With an output and modulations that are not zero, as an untrained model's are."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    """A folder with generator (of text), dit, autoencoder, pixel_decoder and text encoders."""
    folder = tmp_path_factory.mktemp("networks")
    marks = {"autoencoder": save_decoders(folder, SHAPE, 32)}
    spec = TextSpec(weights=str(save_text_encoder(folder / "text")), max_length=6)
    save_text_encoder(folder / "other", seed=1)
    text = CaptionEncoder.load(spec)
    torch.manual_seed(0)
    model = lively(MMDiT(MMDiTConfig(4, (4, 4), 16, width=32, depth=2, num_heads=2)))
    of_text = {**marks, **text.fingerprints, SOURCE: "a folder"}
    checkpoint.save(folder / "generator.safetensors", model, of_text)
    dit = DiT(DiTConfig(4, (4, 4), width=32, depth=1, num_heads=2, num_classes=2))
    checkpoint.save(folder / "dit.safetensors", dit, marks)
    return folder


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def recipe_of(networks: Path, *more: str, generator: str = "generator"):
    values = [
        f"generator.checkpoint={networks / generator}.safetensors",
        f"autoencoder.checkpoint={networks / 'autoencoder'}.safetensors",
        f"pixel_decoder.checkpoint={networks / 'pixel_decoder'}.safetensors",
        f"text.weights={networks / 'text'}", "sample.num_images=7", "sample.num_steps=4",
        "sample.shard_size=4", "sample.batch_size=4", "sample.guidance=paper-text", *more,
    ]  # fmt: skip
    return load_recipe("photos-dinov2s", values)


@pytest.fixture(scope="module")
def drawn(networks, prompts_file, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("samples")
    formats = "sample.formats=[png,npz,geneval]"
    with pytest.MonkeyPatch.context() as patch:
        leave_ray_out(patch)
        sample(recipe_of(networks, f"output={output}", f"prompts={prompts_file}", formats), False)
    return output


def pictures(output: Path) -> np.ndarray:
    return np.load(output / "samples.npz")["arr_0"]


def test_image_i_has_prompt_i_in_turn_in_every_layout(drawn):
    tables = [pq.read_table(path) for path in sorted((drawn / "shards").glob("*.parquet"))]
    texts = [text for table in tables for text in table["prompt"].to_pylist()]
    assert texts == [PROMPTS[i % 3] for i in range(7)]
    images = pictures(drawn)
    for i in range(7):
        assert np.array_equal(np.asarray(Image.open(drawn / f"png/{i:08d}.png")), images[i])
        path = drawn / f"geneval/{i % 3:05d}/samples/{i // 3:04d}.png"
        assert np.array_equal(np.asarray(Image.open(path)), images[i])
    about = [json.loads(p.read_text()) for p in sorted(drawn.glob("geneval/*/metadata.jsonl"))]
    assert about == [{"prompt": text} for text in PROMPTS]
    assert json.loads((drawn / "manifest.json").read_text())["prompts"] == PROMPTS


def test_an_image_depends_on_seed_index_and_prompt_alone(networks, prompts_file, drawn):
    images = pictures(drawn)
    sampler = ImageSampler(recipe_of(networks, f"prompts={prompts_file}"))
    again = sampler([5, 3], [2, 0])
    assert np.abs(again.astype(int) - images[[5, 3]].astype(int)).max() <= 1
    others = sampler([5, 3], [0, 2])  # the same noise
    assert np.abs(others.astype(int) - again.astype(int)).max() > 1
    alone = ImageSampler(recipe_of(networks, "prompt=a small house"))([5], [0])
    assert np.abs(alone.astype(int) - images[[5]].astype(int)).max() <= 1


def test_another_actor_and_a_restart_draw_the_same_pictures(
    networks, prompts_file, drawn, tmp_path, without_ray
):
    values = (f"output={tmp_path}", f"prompts={prompts_file}", "sample.num_actors=2")
    sample(recipe_of(networks, *values), False)
    assert np.array_equal(pictures(tmp_path), pictures(drawn))
    for name in ("manifest.json", "samples.npz", "shards/00000001.parquet"):
        (tmp_path / name).unlink()
    assert sample(recipe_of(networks, *values), False)["run"]["shards_drawn"] == 1
    assert np.array_equal(pictures(tmp_path), pictures(drawn))
    with pytest.raises(StoreMismatch, match="prompts_sha256"):
        sample(recipe_of(networks, f"output={tmp_path}", "prompt=a cat"), False)


def test_an_actor_that_finds_another_generator_than_the_driver_draws_nothing(
    networks, tmp_path, without_ray, monkeypatch
):
    for network in networks.glob("*.safetensors"):
        (tmp_path / network.name).write_bytes(network.read_bytes())
    recipe = recipe_of(
        tmp_path, f"output={tmp_path}/out", "prompt=a cat", f"text.weights={networks / 'text'}"
    )

    def on_another_host(*arguments):
        file = tmp_path / "generator.safetensors"
        loaded = checkpoint.load(file)
        checkpoint.save(file, lively(loaded.module), loaded.fingerprints)
        yield from run_rows(*arguments)

    monkeypatch.setattr("fae.pipelines.sampling.sample_job.run_rows", on_another_host)
    with pytest.raises(CheckpointError, match="not what it was when the job began: generator: "):
        sample(recipe, False)
    assert not list(tmp_path.glob("out/shards/*"))


def test_the_library_draws_the_same_pictures(networks, drawn):
    arguments = [networks / f"{n}.safetensors" for n in ("generator", "autoencoder")]
    arguments.append(networks / "pixel_decoder.safetensors")
    settings = {"num_steps": 4, "guidance": "paper-text", "batch_size": 4}
    images = fae.sample(
        *arguments, prompts=PROMPTS, text_encoder=networks / "text", indices=[3, 4, 5], **settings
    )
    assert np.abs(images.astype(int) - pictures(drawn)[3:6].astype(int)).max() <= 1
    with pytest.raises(CheckpointError, match="text_encoder=FOLDER"):
        fae.sample(*arguments, prompts=PROMPTS)
    for wrong in ({"labels": [0]}, {"prompts": "a cat"}, {}, {"labels": [0], "prompts": ["a"]}):
        with pytest.raises(ValueError, match="give a list of texts"):
            fae.sample(*arguments, text_encoder=networks / "text", **wrong)
    with pytest.raises(ValueError, match="empty"):
        fae.sample(*arguments, prompts=["a", " "], text_encoder=networks / "text")
    arguments[0] = networks / "dit.safetensors"
    with pytest.raises(ValueError, match="give labels"):
        fae.sample(*arguments, prompts=PROMPTS)


def test_guidance_leads_from_the_empty_prompt_to_the_prompt(networks):
    recipe = recipe_of(networks, "prompt=a red cat")
    assert intervals(recipe.sample) == (GuidanceInterval(0.9, 0.0, 1.5),)
    sampler = ImageSampler(recipe)
    noise, model = torch.randn(2, *SHAPE), sampler.model
    guidance = intervals(recipe.sample)
    with torch.inference_mode():
        velocity_of, rows, null = sampler.prompts.condition(torch.tensor([0, 0]))
        found = sample_ode(velocity_of(model), noise, rows, 4, 1.0, guidance, null)
        x = noise
        states, mask = sampler.prompts.encode(["a red cat", "a red cat", "", ""])
        for t in (1.0, 0.75, 0.5, 0.25):
            v = model(torch.cat([x, x]), torch.full((4,), t), states, mask)
            scale = 1.5 if t <= 0.9 else 1.0
            x = x - 0.25 * (v[2:] + scale * (v[:2] - v[2:]))
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_distinct_prompts_are_encoded_once_a_batch(networks):
    sampler = ImageSampler(recipe_of(networks, "prompt=a red cat"))
    asked = []

    def encoder(texts):
        asked.append(texts)
        return sampler.prompts.encode(texts)

    prompts = Prompts(PROMPTS, encoder)
    _, rows, null = prompts.condition(torch.tensor([2, 0, 2, 2]))
    assert asked == [["a small house", "a red cat", ""]]
    assert rows.tolist() == [0, 1, 0, 0] and null == 2


def test_prompts_are_lines_or_records_or_the_captions_of_images(networks, tmp_path):
    geneval = [
        {"tag": "color_attr", "include": [{"class": "cat", "color": "red"}], "prompt": "a red cat"},
        {"tag": "counting", "include": [], "prompt": "two dogs"},
    ]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in geneval))
    assert read_prompts(recipe_of(networks, f"prompts={path}")) == geneval
    lines = [{"prompt": "a\u2028b"}, {"prompt": "c\u0085d"}]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    assert read_prompts(recipe_of(networks, f"prompts={path}")) == lines
    images = tmp_path / "images"
    images.mkdir()
    for name, text in (("a", "a red cat\n"), ("b", "a dog")):
        Image.new("RGB", (4, 4)).save(images / f"{name}.png")
        (images / f"{name}.txt").write_text(text)
    found = read_prompts(recipe_of(networks, f"prompts={images}"))
    assert found == [{"prompt": "a red cat", "key": "a.png"}, {"prompt": "a dog", "key": "b.png"}]
    (images / "b.txt").unlink()
    with pytest.raises(RecipeError, match=r"1 of its 2 images have no caption.*'b.png'"):
        read_prompts(recipe_of(networks, f"prompts={images}"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"a cat\n\na dog\n", "line 2 of 3 has no prompt"),
        ("p.txt", b"", "holds no prompt"),
        ("p.txt", b"a \xff cat", "not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2: expected JSON"),
        ("p.jsonl", b'{"prompt": " "}\n', "line 1 of 1 has no prompt"),
        ("p.jsonl", b"[1]\n", "line 1: expected JSON"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused_with_its_line(
    networks, tmp_path, name, content, message
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        ImageSampler(recipe_of(networks, f"prompts={tmp_path / name}"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "give prompt=TEXT"),
        (("prompt=a", "prompts=b.txt"), "not both"),
        (("prompt=' '",), "prompt is empty"),
        (("prompt=a", "sample.classes=[0]"), "no sample.classes"),
    ],
)
def test_what_no_prompt_can_be_drawn_with_is_said(networks, more, message):
    with pytest.raises(RecipeError, match=message):
        ImageSampler(recipe_of(networks, *more))


def test_a_generator_of_classes_takes_no_prompts(networks):
    with pytest.raises(RecipeError, match="draws classes"):
        ImageSampler(recipe_of(networks, "prompt=a", generator="dit"))


def test_another_text_encoder_is_refused(networks):
    recipe = recipe_of(networks, "prompt=a", f"text.weights={networks / 'other'}")
    with pytest.raises(CheckpointError, match=r"was trained with text encoder \w{64}"):
        ImageSampler(recipe)
    with pytest.raises(WeightsError, match="no folder"):
        ImageSampler(recipe_of(networks, "prompt=a", "text.weights=/nowhere"))


def test_the_grid_has_a_row_a_prompt(networks, prompts_file, tmp_path):
    heights = []
    for number, values in enumerate(((f"prompts={prompts_file}",), ("prompt=a red cat",))):
        path = tmp_path / f"{number}.png"
        draw_grid(recipe_of(networks, *values), str(path), columns=2)
        heights.append(Image.open(path).height)
    assert heights[0] > 2.5 * heights[1] - 100


def test_the_memory_of_sampling_has_the_text_encoder_in_it(networks, prompts_file):
    recipe = recipe_of(networks, f"prompts={prompts_file}")
    with_text, without = (
        {p.name: p for p in sample_memory(r)}["actor"].host
        for r in (recipe, recipe_of(networks, generator="dit"))
    )
    name = "networks, twice while they are loaded"
    assert asdict(ImageSampler(recipe).model.config)["text_dim"] == 16
    assert with_text[name] > without[name] and with_text["results of a batch"] > 0
