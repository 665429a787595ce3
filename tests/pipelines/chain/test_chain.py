"""`fae run` with real Ray: from images to a page, once."""

from pathlib import Path

import pytest

from fae.pipelines.chain.chain_job import run_chain
from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.training.metrics_log import read_metrics_log
from tests.here import leave_ray_out

RECIPE = str(Path(__file__).parents[2] / "tiny_chain.yaml")


@pytest.fixture(scope="module")
def local_ray():
    import ray

    from fae.pipelines.runtime.session import start_ray

    start_ray(num_cpus=4)
    yield
    ray.shutdown()


@pytest.mark.integration
def test_the_chain_ends_in_a_page_and_runs_only_what_a_change_decides(
    local_ray, photographs, tmp_path, capsys, monkeypatch
):
    places = [f"data.path={photographs}", f"storage={tmp_path}", "tracking.enabled=false"]
    first = run_chain(load_recipe(RECIPE, places))
    said = capsys.readouterr().out
    assert "autoencoder and pixel-decoder: side by side (needs 3 of 4 CPUs)" in said
    assert first["latents"] == {"stored": 96.0, "errors": 0.0, "bytes_per_image": 4 * 2 * 2 * 2}
    assert first["evaluation"]["frechet_backbone"] > 0 and first["evaluation"]["num_images"] == 32
    (report,) = tmp_path.glob("report-*")
    page = (report / "report.md").read_text()
    named = {line.partition("](")[2].rstrip(")") for line in page.splitlines() if line[:2] == "!["}
    assert named == {path.name for path in report.glob("*.png")} and "curves.png" in named
    assert {"autoencoder-validation.png", "samples-grid.png"} <= named
    html = (report / "report.html").read_text()
    assert html.count("data:image/png;base64,") == len(named) - 1, "curves are drawn as SVG"
    assert "<figcaption>autoencoder</figcaption>" in html and "validation/mse: " in html
    history = read_metrics_log(str(next(tmp_path.glob("autoencoder-*"))))
    assert [step for step, _ in history["validation/mse"]] == [4, 8]

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert run_chain(load_recipe(str(report / "recipe.yaml"))) == first
    assert "finished already" in capsys.readouterr().out
    assert written == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}

    leave_ray_out(monkeypatch)  # for the stages that are changed, which real Ray has run above
    changed = run_chain(load_recipe(RECIPE, [*places, "sample.num_steps=3"]))
    folders = [path.name.rpartition("-")[0] for path in tmp_path.iterdir()]
    again = {name for name in folders if folders.count(name) == 2}
    assert again == {"samples", "evaluation", "report"}
    assert changed["generator"] == first["generator"]
