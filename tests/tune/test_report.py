"""The report of a sweep from given records: Pareto front, importance, and recommended recipe."""

import json
import math

import optuna
import pytest

from fae.pipelines.config.recipe import RecipeError, load_recipe
from fae.pipelines.config.sections import ObjectiveSection
from fae.tune.records import RecordedTrial
from fae.tune.study import importance, make_study, pareto_front
from fae.tune.sweep_report import best_settings, write_sweep_report

DIM, KIND = "autoencoder.latent_dim", "autoencoder.encoder.kind"
OBJECTIVES = [
    ObjectiveSection(metric="evaluation/frechet_backbone", mode="min"),
    ObjectiveSection(metric="probe/knn_latent", mode="max"),
]


def row(name: str, frechet: float, knn: float, **settings) -> RecordedTrial:
    metrics = {"evaluation/frechet_backbone": frechet, "probe/knn_latent": knn}
    return RecordedTrial(name, "finished", settings, metrics, 8)


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


def test_importance_is_the_share_of_variance_that_a_setting_explains_by_itself():
    metric = "evaluation/frechet_backbone"
    rows = [
        row(f"{i}{j}{s}", 10.0 * i + j, 0.0, first=i, second=j, seed=s)
        for i in (0, 1) for j in (0, 1) for s in (0, 1)
    ]  # fmt: skip
    shares = importance(rows, metric)
    assert shares == pytest.approx({"first": 100 / 101, "second": 1 / 101, "seed": 0.0}, abs=0.01)
    assert list(shares) == ["first", "second", "seed"]
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares == importance(rows, metric), "the forest is seeded"
    tiny = [row(r.key, 1e-9 * r.metrics[metric], 0.0, **r.settings) for r in rows]
    assert importance(tiny, metric) == pytest.approx(shares, abs=0.01), "a unit does not matter"


def test_importance_of_a_number_does_not_depend_on_its_scale():
    metric = "evaluation/frechet_backbone"
    linear = [row(str(i), float(i), 0.0, rate=i, other=i % 3) for i in range(20)]
    powers = [row(str(i), float(i), 0.0, rate=10.0**-i, other=i % 3) for i in range(20)]
    assert importance(linear, metric)["rate"] > 0.9
    assert importance(powers, metric) == pytest.approx(importance(linear, metric), abs=0.01)


def test_importance_takes_lists_mixed_values_and_settings_that_only_some_trials_have():
    metric = "evaluation/frechet_backbone"
    columns, steps = (["mean"], ["mean", "logvar"]), (100, "auto")
    rows = [
        row(f"{i}{j}{s}", 10.0 * i + j, 0.0, columns=columns[i], steps=steps[j], fixed=3, **seed)
        for i in (0, 1) for j in (0, 1) for s, seed in enumerate(({}, {"seed": 1}))
    ]  # fmt: skip
    shares = importance(rows, metric)
    assert next(iter(shares)) == "columns" and set(shares) == {"columns", "steps", "seed"}
    assert shares["columns"] > 0.9


def test_without_anything_that_varies_there_is_no_importance():
    metric = "evaluation/frechet_backbone"
    one, other = row("a", 1, 0.5, size=8), row("b", 1, 0.5, size=16)
    for rows in ([], [one], [one, other], [one, row("c", 2, 0.5, size=8)]):
        assert importance(rows, metric) == {}
    assert pareto_front([], OBJECTIVES) == [] and pareto_front([one], OBJECTIVES) == [one]


def test_a_study_holds_the_trials_whose_settings_its_space_has_and_whose_values_are_finite():
    space = {"size": optuna.distributions.CategoricalDistribution([8, 16])}
    trials = {
        "a": ({"size": 8}, row("a", 1, 0.5).metrics),
        "outside the space": ({"size": 4}, row("b", 2, 0.5).metrics),
        "another key": ({"size": 8, "seed": 1}, row("c", 3, 0.5).metrics),
        "not a number": ({"size": 16}, row("d", math.nan, 0.5).metrics),
        "no number": ({"size": 16}, {}),
    }
    study = make_study(OBJECTIVES, space, trials)
    assert [(t.user_attrs["key"], t.values) for t in study.trials] == [("a", [1, 0.5])]
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MAXIMIZE"]


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
            "tune.objectives=[{metric: evaluation/frechet_backbone},"
            " {metric: probe/knn_latent, mode: max}]",
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
    record(tmp_path, "t8", {DIM: 8, KIND: "linear"}, {**metrics, "probe/knn_latent": math.nan})
    record(tmp_path, "t9", {DIM: 32, KIND: "linear"}, {"autoencoder/mse": 2.0}, "stopped early")
    numbers = write_sweep_report(recipe)
    assert (numbers["trials"], numbers["finished"]) == (6, 4)
    assert numbers["pareto"] == [{DIM: 16, KIND: "attention"}]
    folder = tmp_path / "tune" / "s"
    page = (folder / "report.md").read_text()
    assert "**latent_dim=16  kind=attention**" in page and "1 stopped early" in page
    assert page.count("★ |") == 1 and "fANOVA" in page
    html = (folder / "report.html").read_text()
    assert numbers["report"] == str(folder / "report.html")
    assert html.count('class="star"') == 5, "the front's trial in each of five charts"
    assert "latent_dim=16  kind=attention\nfinished, trial t2</title>" in html
    assert "<pre><code>fae train autoencoder recommended.yaml run=best" in html
    shares = {
        line.split("|")[1].strip(" `"): [float(cell) for cell in line.split("|")[2:-1]]
        for line in page.splitlines()
        if line.startswith("| `autoencoder.")
    }
    assert shares[DIM] == pytest.approx([0.8, 1.0], abs=0.1)
    assert shares[KIND] == pytest.approx([0.2, 0.0], abs=0.1)
    recommended = load_recipe(str(folder / "recommended.yaml"))
    assert (recommended.autoencoder.latent_dim, recommended.data.path) == (16, "photos")
    for name in ("report.png", "importance.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_a_sweep_without_trials_says_so(tmp_path):
    with pytest.raises(RecipeError, match="holds no trials"):
        write_sweep_report(load_recipe("photos-dinov2s", ["tune.name=typo", f"storage={tmp_path}"]))
