"""The spaces of a sweep: what they mean, and mistakes in them that stop it before anything runs."""

import pytest

from fae.pipelines.config.recipe import RecipeError, load_recipe
from fae.tune.spaces import apply, label, planned_settings


def recipe(*overrides: str):
    return load_recipe("photos-dinov2s", ["tune.name=s", *overrides])


def test_a_grid_is_every_combination_and_points_come_once_more():
    made = planned_settings(
        recipe(
            "tune.space.autoencoder.latent_dim.grid=[8,16]",
            "tune.space.autoencoder.encoder.kind.grid=[attention,linear]",
            "tune.points=[{autoencoder.latent_dim: 8, autoencoder.encoder.kind: linear},"
            "{autoencoder.latent_dim: 8, seed: 1}]",
        )
    )
    key, kind = "autoencoder.latent_dim", "autoencoder.encoder.kind"
    grid = [{key: n, kind: k} for n in (8, 16) for k in ("attention", "linear")]
    assert made == [*grid, {key: 8, "seed": 1}]


def test_random_draws_are_the_same_again_and_lie_in_the_space():
    values = (
        "tune.algorithm=random",
        "tune.num_samples=50",
        "tune.space.autoencoder.kl_weight.loguniform=[1e-8,1e-4]",
        "tune.space.autoencoder.training.learning_rate.uniform=[1e-4,1e-3]",
        "tune.space.generator.shift.choice=[1.0,2.5]",
    )
    made = planned_settings(recipe(*values))
    assert made == planned_settings(recipe(*values)) != planned_settings(recipe(*values, "seed=1"))
    weights = [settings["autoencoder.kl_weight"] for settings in made]
    assert len(made) == 50 and all(1e-8 <= w <= 1e-4 for w in weights)
    assert 10 < sum(w < 1e-6 for w in weights) < 40, "uniform in the logarithm"
    assert {settings["generator.shift"] for settings in made} == {1.0, 2.5}


def test_settings_change_the_recipe_and_nothing_else():
    base = recipe("tune.space.seed.grid=[1]")
    made = apply(base, {"autoencoder.encoder.kind": "linear", "seed": 3})
    assert (made.autoencoder.encoder.kind, made.seed) == ("linear", 3)
    made.autoencoder.encoder.kind, made.seed = "attention", 0
    assert made.model_dump(exclude={"tune"}) == base.model_dump(exclude={"tune"})


def test_names_are_short_where_they_can_be():
    settings = {"autoencoder.training.steps": 5, "generator.training.steps": 7, "seed": 1}
    assert label(settings) == "autoencoder.training.steps=5  generator.training.steps=7  seed=1"
    assert label({"autoencoder.kl_weight": 1.2345e-6}) == "kl_weight=1.23e-06"
    trained = {"autoencoder.checkpoint": "s3://b/runs/wide/autoencoder.safetensors"}
    assert label(trained) == "checkpoint=runs/wide"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tune.space.autoencoder.latent_dmi.grid=[8]"], "Did you mean 'autoencoder.latent_dim'"),
        (["tune.space.autoencoder.latent_dim.grid=[8,none]"], "given 'none'"),
        (["tune.space.autoencoder.kl_weight.loguniform=[1e-6,1e-3]"], "algorithm grid"),
        (["tune.points=[{autoencoder.latent_dim: -1}]"], "autoencoder.latent_dim: given -1"),
        (["tune.space.seed.x.grid=[1]"], "'seed', which is no section"),
        ([], "tune.space is empty"),
    ],
)
def test_a_mistake_in_the_space_is_named_before_anything_runs(overrides, message):
    with pytest.raises(RecipeError) as error:
        planned_settings(recipe(*overrides))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tune.space.seed.gird=[1]", "Did you mean 'tune.space.seed.grid'"),
        ("tune.space.seed.uniform=[2,1]", "lower bound first"),
        ("tune.space.seed.loguniform=[0,1]", "above 0"),
        ("tune.scheduler=asah", "given 'asah'"),
        ("tune.scheduler=pbt", "given 'pbt'; Input should be 'none' or 'asha'"),
    ],
)
def test_the_recipe_validates_its_sweep(override, message):
    with pytest.raises(RecipeError) as error:
        recipe(override)
    assert message in str(error.value)
