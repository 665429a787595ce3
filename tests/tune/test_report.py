"""The page about a sweep from given records: Pareto front, importance, and a recommendation that can be trained."""

import json

import pytest

from fae.pipelines.config.recipe import RecipeError, load_recipe
from fae.pipelines.config.sections import ObjectiveSection
from fae.tune.report import Row, best_settings, importance, pareto_front, write_sweep_report

DIM, KIND = "autoencoder.latent_dim", "autoencoder.encoder.kind"
OBJECTIVES = [
    ObjectiveSection(metric="evaluation/frechet_backbone", mode="min"),
    ObjectiveSection(metric="probe/knn_latent", mode="max"),
]


def row(name: str, frechet: float, knn: float, **settings) -> Row:
    metrics = {"evaluation/frechet_backbone": frechet, "probe/knn_latent": knn}
    return Row(name, "finished", settings, metrics, 8)


def test_the_pareto_front_is_what_no_other_trial_beats():
    rows = [
        row("a", 1, 0.5),
        row("b", 2, 0.9),
        row("c", 2, 0.8),
        row("d", 3, 0.4),
        row("e", 1, 0.5),
    ]
    assert [r.key for r in pareto_front(rows, OBJECTIVES)] == ["a", "b", "e"]
    assert [r.key for r in pareto_front(rows, OBJECTIVES[1:])] == ["b"]


def test_the_best_settings_are_those_with_the_best_mean_over_seeds():
    lucky = [row("a", 1, 0.5, size=8, seed=0), row("b", 9, 0.5, size=8, seed=1)]
    steady = [row("c", 3, 0.5, size=16, seed=0), row("d", 4, 0.5, size=16, seed=1)]
    assert best_settings([*lucky, *steady], OBJECTIVES[0]) == {"size": 16}


def test_importance_is_the_share_of_variance_that_a_setting_explains_alone():
    rows = [
        row(f"{i}{j}{s}", 10.0 * i + j, 0.0, first=i, second=j, seed=s)
        for i in (0, 1) for j in (0, 1) for s in (0, 1)
    ]  # fmt: skip
    shares = importance(rows, "evaluation/frechet_backbone")
    assert shares == pytest.approx({"first": 100 / 101, "second": 1 / 101, "seed": 0.0})
    continuous = [row(str(i), float(i), 0.0, rate=i / 40) for i in range(40)]
    assert importance(continuous, "evaluation/frechet_backbone")["rate"] > 0.9


def record(folder, key, settings, metrics, state="finished"):
    place = folder / "tune" / "s" / "trials" / key
    place.mkdir(parents=True)
    text = json.dumps({"state": state, "settings": settings, "metrics": metrics})
    (place / "result.json").write_text(text)


def test_the_page_tells_what_is_there_and_recommends_a_recipe_that_loads(tmp_path):
    recipe = load_recipe(
        "photos-dinov2s",
        [
            "tune.name=s", f"storage={tmp_path}", "data.path=photos",
            "tune.space.autoencoder.latent_dim.grid=[8,16]",
            "tune.objectives=[{metric: evaluation/frechet_backbone}, {metric: probe/knn_latent, mode: max}]",
        ],
    )  # fmt: skip
    for number, (size, kind, frechet) in enumerate(
        [(8, "attention", 5.0), (8, "linear", 6.0), (16, "attention", 3.0), (16, "linear", 4.0)]
    ):
        metrics = {
            "autoencoder/mse": 1 / size, "latents/bytes_per_image": 32.0 * size,
            "evaluation/frechet_backbone": frechet, "probe/knn_latent": 0.5 + size / 100,
        }  # fmt: skip
        record(tmp_path, f"t{number}", {DIM: size, KIND: kind}, metrics)
    record(tmp_path, "t9", {DIM: 32, KIND: "linear"}, {"autoencoder/mse": 2.0}, "stopped early")
    numbers = write_sweep_report(recipe)
    assert (numbers["trials"], numbers["finished"]) == (5, 4)
    assert numbers["pareto"] == [{DIM: 16, KIND: "attention"}]
    folder = tmp_path / "tune" / "s"
    page = (folder / "report.md").read_text()
    assert "**latent_dim=16  kind=attention**" in page and "1 stopped early" in page
    assert page.count("★ |") == 1 and "| `autoencoder.latent_dim` | 0.80 | 1.00 |" in page
    recommended = load_recipe(str(folder / "recommended.yaml"))
    assert (recommended.autoencoder.latent_dim, recommended.data.path) == (16, "photos")
    for name in ("report.png", "importance.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_a_sweep_without_trials_says_so(tmp_path):
    with pytest.raises(RecipeError, match="holds no trials"):
        write_sweep_report(load_recipe("photos-dinov2s", ["tune.name=typo", f"storage={tmp_path}"]))
