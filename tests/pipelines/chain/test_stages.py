"""The chain's plan: what shares a stage, what leads to another one, and what is asked for."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from fae.pipelines.chain.chain_job import describe, fit_together
from fae.pipelines.chain.sizes import expected_bytes
from fae.pipelines.chain.stages import STAGES, check_stages, plan_stages, select
from fae.pipelines.config.recipe import RecipeError, load_recipe
from tests.tiny import save_decoders, save_text_encoder

USUAL = set(STAGES) - {"probe", "text-states"}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(6):
        Image.fromarray(np.full((40, 40, 3), index, np.uint8)).save(folder / f"{index}.png")
    return folder


def recipe(images, *overrides: str):
    places = (f"data.path={images}", f"storage={images.parent / 'runs'}")
    return load_recipe("fashion-dinov2s", [*places, "data.key_column=null", *overrides])


def keys(images, *overrides: str) -> dict[str, str]:
    return {stage.name: stage.key for stage in plan_stages(recipe(images, *overrides))}


@pytest.mark.parametrize(
    ("override", "others"),
    [
        ("autoencoder.latent_dim=8", {"pixel-decoder"}),
        ("pixel_decoder.depth=2", {"autoencoder", "latents", "generator"}),
        ("generator.shift=2.5", {"autoencoder", "pixel-decoder", "latents", "finetune"}),
        ("sample.num_steps=7", USUAL - {"samples", "evaluation", "report"}),
        ("chain.latents_limit=4", {"autoencoder", "pixel-decoder", "finetune"}),
        ("chain.finetune_steps=4", {"autoencoder", "pixel-decoder", "latents", "generator"}),
        ("evaluate.limit=4", USUAL - {"evaluation", "report"}),
        ("seed=1", set()),
        ("image_size=27", set()),
        ("autoencoder.training.num_workers=2", USUAL),
        ("precompute.num_actors=2", USUAL),
        ("tracking.enabled=false", USUAL),
    ],
)  # fmt: skip
def test_recipes_share_the_stages_up_to_the_first_that_differs(images, override, others):
    before, after = keys(images), keys(images, override)
    assert {name for name in before if before[name] == after[name]} == others


def test_another_image_is_another_source(images):
    before = keys(images)
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(images / "new.png")
    assert not set(before.values()) & set(keys(images).values())


def test_every_stage_names_its_own_place_and_what_it_reads(images):
    stages = {stage.name: stage for stage in plan_stages(recipe(images))}
    for name, stage in stages.items():
        assert stage.uri == f"{images.parent}/runs/{name}-{stage.key}"
    samples = stages["samples"].recipe
    assert samples.autoencoder.checkpoint == f"{stages['autoencoder'].uri}/autoencoder.safetensors"
    assert samples.pixel_decoder.checkpoint == f"{stages['finetune'].uri}/pixel_decoder.safetensors"
    assert stages["generator"].recipe.latents == stages["latents"].uri
    assert stages["evaluation"].recipe.evaluate.images == stages["samples"].uri
    assert stages["pixel-decoder"].recipe.autoencoder.checkpoint is None


def test_until_leaves_out_what_is_not_needed_and_from_wants_what_came_before(images):
    def names(*overrides: str) -> list[str]:
        made = recipe(images, *overrides)
        return [stage.name for stage in select(plan_stages(made), made.chain)]

    assert names("chain.until=generator") == ["autoencoder", "latents", "generator"]
    assert names("chain.until=probe") == ["autoencoder", "probe"]
    with pytest.raises(RecipeError, match="Before latents come autoencoder, pixel-decoder"):
        names("chain.first=latents")
    with pytest.raises(RecipeError, match="no stage 'finetune'"):
        names("chain.until=finetune", "chain.finetune=false")
    for name in ("autoencoder", "pixel-decoder"):
        folder = images.parent / "runs" / f"{name}-{keys(images)[name]}"
        folder.mkdir(parents=True)
        (folder / "stage.json").write_text(json.dumps({"metrics": {}}))
    assert names("chain.first=latents")[0] == "latents"
    states = {stage.name: state for stage, state, _ in describe(recipe(images))}
    assert (states["autoencoder"], states["latents"]) == ("finished", "absent")


def test_a_pixel_decoder_to_start_from_replaces_the_first_stage(images, tmp_path):
    save_decoders(tmp_path, (4, 2, 2), 32)
    start = str(tmp_path / "pixel_decoder.safetensors")
    made = recipe(images, f"pixel_decoder.start_from={start}")
    stages = {stage.name: stage for stage in plan_stages(made)}
    assert "pixel-decoder" not in stages
    assert stages["finetune"].recipe.pixel_decoder.start_from == start
    assert stages["finetune"].needs == ("autoencoder",)
    assert stages["finetune"].key != keys(images)["finetune"]


@pytest.fixture
def captioned(images):
    for index, path in enumerate(sorted(images.glob("*.png"))):
        path.with_suffix(".txt").write_text(f"{'red' if index % 2 else 'blue'} cat")
    return images


@pytest.fixture(scope="module")
def of_text(tmp_path_factory) -> list[str]:
    folder = save_text_encoder(tmp_path_factory.mktemp("text") / "encoder")
    return ["generator.kind=mmdit", f"text.weights={folder}", "text.max_length=8"]


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("text.template='{} on white'", {"generator", "samples", "evaluation", "report"}),
        ("prompt=red cat", {"samples", "evaluation", "report"}),
        ("generator.num_classes=7", {"generator", "samples", "evaluation", "report"}),
    ],
)
def test_captions_decide_the_generator_and_prompts_the_samples(
    captioned, of_text, override, changed
):
    before, after = keys(captioned, *of_text), keys(captioned, *of_text, override)
    assert {name for name in before if before[name] != after[name]} == changed


def test_stored_states_are_a_stage_that_changes_no_network_and_that_autoencoders_share(
    captioned, of_text
):
    online, stored = keys(captioned, *of_text), keys(captioned, *of_text, "text.states=stored")
    assert stored.pop("text-states")
    del online["report"], stored["report"]  # it tells of one stage more
    assert stored == online

    def states(*more: str) -> str:
        return keys(captioned, *of_text, "text.states=stored", *more)["text-states"]

    assert states("autoencoder.latent_dim=8") == states() == states("text.dropout=0.5")
    for decides in ("text.max_length=5", "precompute.shard_size=4", "data.limit=4",
                    "precompute.precision=fp32"):  # fmt: skip
        assert states(decides) != states(), decides
    mixed = ("text.states=stored", "precompute.precision=fp32")
    assert keys(captioned, *of_text, *mixed)["generator"] != online["generator"]
    stages = {s.name: s for s in plan_stages(recipe(captioned, *of_text, "text.states=stored"))}
    assert stages["generator"].recipe.text.states == stages["text-states"].uri
    assert set(stages["generator"].needs) == {"latents", "text-states"}
    assert stages["text-states"].needs == ("latents",)
    assert (
        expected_bytes(stages["text-states"])
        == 6 * 2 * 16 * stages["text-states"].recipe.text.max_length
    )


def test_the_content_of_a_text_encoders_folder_decides_and_not_its_place(
    captioned, of_text, tmp_path
):
    before = keys(captioned, *of_text)
    moved = tmp_path / "moved"
    shutil.copytree(of_text[1].partition("=")[2], moved)
    assert keys(captioned, *of_text, f"text.weights={moved}") == before
    other = save_text_encoder(tmp_path / "other", seed=1)
    after = keys(captioned, *of_text, f"text.weights={other}")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"generator", "samples", "evaluation", "report"}


def test_the_text_encoder_of_others_decides_nothing_for_a_generator_of_classes(images, of_text):
    assert keys(images) == keys(images, *of_text[1:])


def test_samples_have_the_captions_of_what_they_are_compared_with(captioned, of_text, tmp_path):
    stages = {stage.name: stage for stage in plan_stages(recipe(captioned, *of_text))}
    check_stages(list(stages.values()))
    assert stages["samples"].recipe.prompts == str(captioned)
    held_out = tmp_path / "held-out"
    held_out.mkdir()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(held_out / "a.png")
    values = (*of_text, f"evaluate.reference={held_out}")
    stages = {stage.name: stage for stage in plan_stages(recipe(captioned, *values))}
    with pytest.raises(RecipeError, match="samples cannot run: .*1 of its 1 images have no captio"):
        check_stages(list(stages.values()))
    (held_out / "a.txt").write_text("green cat")
    stages = {stage.name: stage for stage in plan_stages(recipe(captioned, *values))}
    check_stages(list(stages.values()))
    assert stages["samples"].recipe.prompts == str(held_out)


def test_a_chain_of_text_wants_captions_and_one_of_classes_no_prompts(images, of_text):
    with pytest.raises(RecipeError, match="generator cannot run: 6 of 6 images have no caption"):
        check_stages(plan_stages(recipe(images, *of_text)))
    values = ("generator.num_classes=1", "data.label_column=null", "prompt=a cat")
    with pytest.raises(RecipeError, match="samples cannot run: prompts need a generator of kind"):
        check_stages(plan_stages(recipe(images, *values)))


def test_sizes_are_those_of_networks_latents_and_pictures(images):
    stages = {stage.name: stage for stage in plan_stages(recipe(images))}
    assert expected_bytes(stages["latents"]) == 6 * 16 * 7 * 7 * 2
    # By hand: 6 heads of 128 from 384 channels, three decoder layers; the weights once, and three
    # times in each of two checkpoints.
    parameters = expected_bytes(stages["autoencoder"]) / (4 * (1 + 3 * 2))
    assert parameters == int(parameters) and 5e6 < parameters < 9e6
    assert expected_bytes(stages["evaluation"]) == 0


def test_trainings_go_side_by_side_where_the_cluster_holds_both(images):
    stages = plan_stages(recipe(images))[:2]
    assert fit_together(stages, {"CPU": 4.0}) == (True, "needs 3 of 4 CPUs")
    assert fit_together(stages, {"CPU": 2.0}) == (False, "needs 3 of 2 CPUs")
    on_gpus = plan_stages(
        recipe(images, "autoencoder.training.use_gpu=true", "pixel_decoder.training.use_gpu=true")
    )[:2]
    assert fit_together(on_gpus, {"CPU": 8.0, "GPU": 1.0}) == (False, "needs 2 of 1 GPUs")


@pytest.mark.parametrize(
    ("labels", "overrides", "message"),
    [
        (
            (0, 1, 2),
            ["generator.num_classes=1"],
            r"is 2 \(class 2\), and generator.num_classes is 1. Set "
            "generator.num_classes=3, or to train without classes set data.label_column=null",
        ),
        ((0, 1, 2), ["generator.num_classes=2"], "Set generator.num_classes=3"),
        ((None,), ["generator.num_classes=4"], "6 of 6 images have no label"),
        ((0, None), ["generator.num_classes=4"], "have no label"),
        ((0, 1), ["chain.until=probe"], "stage probe cannot run"),
        (
            (0, 1),
            ["data.validation_fraction=0.999999"],
            "stage autoencoder cannot run: All 6 images",
        ),
        ((0, 1, 2), ["generator.num_classes=3"], None),
        ((0, 1, 2), ["generator.num_classes=1", "data.label_column=null"], None),
        ((None,), ["generator.num_classes=1"], None),
        ((0, 1, 2), ["generator.num_classes=1", "chain.until=latents"], None),
    ],
)
def test_images_that_cannot_serve_a_stage_are_refused_before_the_first_one(
    images, labels, overrides, message
):
    for index, path in enumerate(sorted(images.iterdir())):
        label = labels[index % len(labels)]
        if label is not None:
            (images / f"class {label}").mkdir(exist_ok=True)
            path.rename(images / f"class {label}" / path.name)
    made = recipe(images, *overrides)
    stages = select(plan_stages(made), made.chain)
    if message is None:
        check_stages(stages)
    else:
        with pytest.raises(RecipeError, match=message):
            check_stages(stages)
