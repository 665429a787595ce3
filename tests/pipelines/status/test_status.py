"""`fae status` reads folders as jobs leave them, through the command line and without Ray."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from fae.cli import app
from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.data.records import ImageRecord
from fae.pipelines.latents.manifest import commit
from fae.pipelines.latents.plan import ensure_plan
from fae.pipelines.latents.shards import write_shard
from fae.pipelines.status import account, display
from fae.pipelines.storage import paths
from fae.pipelines.training.metrics_log import MetricsLog


def status(*places: str) -> dict:
    result = CliRunner().invoke(app, ["status", *places, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def shown(*places: str) -> str:
    result = CliRunner().invoke(app, ["status", *places])
    assert result.exit_code == 0, result.output
    return result.output


def begin_run(uri: str, *overrides: str) -> None:
    """An autoencoder's run as it is before its first step."""
    recipe = load_recipe("photos-dinov2s", ["autoencoder.training.steps=400", *overrides])
    paths.write_bytes(paths.join(uri, "recipe.yaml"), recipe.to_yaml().encode())
    paths.write_bytes(paths.join(uri, "plan.parquet"), b"")
    paths.write_bytes(paths.join(uri, "linear_baseline.safetensors"), b"")


def log_steps(uri: str, steps: range, images_per_second: float) -> None:
    log = MetricsLog(uri, 10**9)
    for step in steps:
        log.add({"train/loss": 1 / step, "train/images_per_second": images_per_second}, step)
    log.add({"validation/mse": 0.25}, steps[-1])
    log.save()


def fill_store(uri: str, shards: range, errors: int = 0):
    """A store of 40 images in shards of 8, of which `shards` are there."""
    records = [ImageRecord(f"{index:02d}.jpg", f"/nowhere/{index:02d}.jpg") for index in range(40)]
    plan = ensure_plan(uri, records, 8, {"backbone": "b"})
    for index in shards:
        rows = plan.shard(index)
        lost = errors if index == 0 else 0
        found = [{"key": r.key, "stage": "decode", "message": "torn"} for r in rows[:lost]]
        kept = list(range(lost, len(rows)))
        values = {"mean": np.zeros((len(kept), 2, 4, 4), np.float16)}
        write_shard(uri, index, rows, kept, values, found, plan.fingerprint)
    return plan


def written(folder, seconds_ago: list[float]) -> None:
    """Set when the shards of the local store were written."""
    files = sorted((folder / "shards").glob("*.parquet"))
    for file, ago in zip(files, seconds_ago, strict=True):
        os.utime(file, (time.time() - ago,) * 2)


def test_a_run_says_steps_rate_time_left_and_losses_from_its_folder_alone(root):
    uri = paths.join(root, "first")
    begin_run(uri, "autoencoder.training.batch_size=16")
    log_steps(uri, range(10, 101, 10), images_per_second=32.0)
    for name in ("step_000000040.pt", "step_000000080.json", "step_000000090-1-of-2-ab12.part"):
        paths.write_bytes(paths.join(uri, "checkpoints", name), b"")
    for rank, found in enumerate((b'{"key": "a"}\n{"key": "b"}\n', b'{"key": "b"}\n')):
        paths.write_bytes(paths.join(uri, f"bad_images-0000{rank}.jsonl"), found)
    found = status(uri)
    assert found["kind"] == "training of the autoencoder" and found["state"] == "running"
    assert (found["done"], found["total"], found["unit"]) == (100, 400, "steps")
    assert found["rate"] == pytest.approx(2.0) and found["seconds_left"] == pytest.approx(150.0)
    assert found["errors"] == 2
    assert found["losses"]["validation/mse"] == [[100, 0.25]]
    assert len(found["losses"]["train/loss"]) == 10
    text = shown(uri)
    for words in ("100 of 400 steps", "2 steps/s", "2 min left", "resume at step 80", "errors: 2"):
        assert words in text, text
    assert "0.1 highest" in text and "█" in text


def test_a_run_without_a_log_says_so_and_guesses_nothing(tmp_path):
    begin_run(str(tmp_path / "new"))
    found = status(str(tmp_path / "new"))
    assert found["state"] == "begun" and found["done"] == 0 and found["total"] == 400
    assert found["rate"] is None and found["seconds_left"] is None
    assert "no log yet" in shown(str(tmp_path / "new"))


def test_a_finished_run_has_nothing_left(tmp_path):
    begin_run(str(tmp_path))
    log_steps(str(tmp_path), range(10, 401, 10), 32.0)
    (tmp_path / "result.json").write_text("{}")
    found = status(str(tmp_path))
    assert found["state"] == "finished" and found["done"] == 400
    assert found["seconds_left"] is None


def test_a_run_that_has_been_silent_for_long_may_have_stopped(tmp_path):
    begin_run(str(tmp_path))
    log_steps(str(tmp_path), range(10, 101, 10), 32.0)
    for file in tmp_path.iterdir():
        os.utime(file, (time.time() - 7300,) * 2)
    assert status(str(tmp_path))["state"] == "silent"
    text = shown(str(tmp_path))
    assert "last write 2.0 h ago" in text and "the same command resumes" in text
    assert "left once it runs" in text


def test_a_store_says_shards_rate_and_errors(root):
    uri = paths.join(root, "latents")
    fill_store(uri, range(0), 0)
    assert status(uri)["state"] == "begun" and "no shard yet" in shown(uri)
    plan = fill_store(uri, range(1), errors=2)
    assert status(uri)["rate"] is None and "no rate yet" in shown(uri)
    fill_store(uri, range(5), errors=2)
    paths.write_bytes(paths.join(uri, "errors", ".00000001.parquet.0a.tmp"), b"of a killed job")
    found = status(uri)
    assert (found["done"], found["total"], found["errors"]) == (5, 5, 2)
    assert "manifest.json, which is written last, is not" in shown(uri)
    commit(uri, plan, {"seconds": 2.0})
    found = status(uri)
    assert found["state"] == "finished" and found["seconds_left"] is None


def test_the_pause_between_two_sessions_does_not_slow_the_rate(tmp_path):
    fill_store(str(tmp_path), range(4))
    written(tmp_path, [90_000, 30, 20, 10])
    found = status(str(tmp_path))
    assert found["rate"] == pytest.approx(0.1, rel=1e-3)
    assert found["seconds_left"] == pytest.approx(10.0, rel=1e-3)
    assert found["state"] == "running"
    written(tmp_path, [90_030, 90_020, 90_010, 90_000])
    assert status(str(tmp_path))["state"] == "silent"


def test_samples_are_counted_by_their_plan(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"num_images": 100, "shard_size": 32}))
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/00000000.parquet").write_bytes(b"")
    found = status(str(tmp_path))
    assert (found["kind"], found["done"], found["total"]) == ("samples", 1, 4)


def test_a_chain_shows_its_stages_in_their_order(root):
    begin_run(paths.join(root, "autoencoder-0123456789ab"))
    log_steps(paths.join(root, "autoencoder-0123456789ab"), range(10, 401, 10), 32.0)
    paths.write_bytes(paths.join(root, "autoencoder-0123456789ab", "result.json"), b"{}")
    fill_store(paths.join(root, "latents-aaaaaaaaaaaa"), range(3))
    paths.write_bytes(paths.join(root, "evaluation-bbbbbbbbbbbb", "scores.json"), b"{}")
    found = status(root)
    assert [part["kind"] for part in found["parts"]] == [
        "training of the autoencoder",
        "latent store",
        "scores",
    ]
    assert found["kind"] == "chain" and (found["done"], found["total"]) == (2, 3)
    assert "3 of 5 shards" in shown(root)


def test_a_sweep_counts_trials_and_names_the_best(root):
    uri = paths.join(root, "tune", "sizes")
    recipe = load_recipe("photos-dinov2s", [
        "tune.name=sizes",
        "tune.space.autoencoder.latent_dim.grid=[8,16,32]",
        "tune.objectives=[{metric: autoencoder/mse}]",
    ])  # fmt: skip
    paths.write_bytes(paths.join(uri, "recipe.yaml"), recipe.to_yaml().encode())
    assert status(uri)["state"] == "begun"
    for size, name, content in (
        (8, "result.json", {"state": "finished", "metrics": {"autoencoder/mse": 0.5}}),
        (16, "failure.json", {"state": "failed", "metrics": {}}),
    ):
        settings = {"autoencoder.latent_dim": size}
        folder = paths.join(uri, "trials", f"key{size}")
        paths.write_bytes(paths.join(folder, "settings.json"), json.dumps(settings).encode())
        written = {**content, "settings": settings}
        paths.write_bytes(paths.join(folder, name), json.dumps(written).encode())
    found = status(uri)
    assert (found["kind"], found["done"], found["total"]) == ("sweep", 1, 3)
    assert found["errors"] == 1 and found["rate"] is None
    assert "best so far: autoencoder/mse 0.5 with latent_dim=8" in found["notes"]


def test_another_folder_is_refused_with_what_was_looked_for(tmp_path):
    result = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert isinstance(result.exception, account.StatusError)
    assert "plan.parquet" in str(result.exception)


def test_status_needs_neither_ray_nor_torch(tmp_path):
    begin_run(str(tmp_path / "run"))
    log_steps(str(tmp_path / "run"), range(10, 101, 10), 32.0)
    fill_store(str(tmp_path / "store"), range(2))
    code = (
        "import sys\nfrom fae.cli import app\n"
        f"app(['status', {str(tmp_path / 'run')!r}, {str(tmp_path / 'store')!r}], "
        "standalone_mode=False)\n"
        "print([name for name in ('ray', 'torch', 'mlflow') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1:] == ["[]"], result.stdout + result.stderr


def test_a_plot_keeps_the_ends_and_marks_what_is_not_finite():
    assert display.sparkline([1.0, 2.0, 3.0], 10) == "▁▅█"
    assert display.sparkline([1.0, float("nan"), 3.0], 10) == "▁!█"
    lines = display.plot([4.0, 3.0, 2.0, 1.0])
    assert [line[0] for line in lines] == ["█"] * 4 and lines[-1].startswith("███▁")


def test_a_log_is_published_in_the_background_between_checkpoints(tmp_path):
    log = MetricsLog(str(tmp_path), 0)
    log.add({"train/loss": 1.0}, 10)
    log.publish()
    log.publishing.join()
    assert '"step": 10' in (tmp_path / "history.jsonl").read_text()
    log.add({"train/loss": 0.5}, 20)
    log.publish()
    assert '"step": 20' not in (tmp_path / "history.jsonl").read_text(), "not again so soon"
    log.save()
    assert '"step": 20' in (tmp_path / "history.jsonl").read_text()
    assert MetricsLog(str(tmp_path), 10).lines == log.lines[:1], "a resumed run repeats its steps"
