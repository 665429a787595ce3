"""A sweep with real Ray and a real tracking server.

It is killed and resumed, trials share stages, and ASHA stops one trial early.
"""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from fae.pipelines.config.recipe import RecipeError, load_recipe
from fae.tune import SearchError, search
from fae.tune.algorithms import make_searcher
from fae.tune.concurrency import concurrent_trials, cores_of_each, with_shared_cores
from fae.tune.records import FINISHED
from fae.tune.stage_lock import stage_lock
from fae.tune.sweep_status import planned_trials
from fae.tune.trials import plan_trial
from tests.tiny import ROOT

RECIPE = str(ROOT / "tests" / "tiny_chain.yaml")
DIM, COLUMNS = "autoencoder.latent_dim", "precompute.columns"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of an MLflow server on loopback."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server",
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        try:
            urllib.request.urlopen(f"{address}/health", timeout=1)
            break
        except OSError:
            time.sleep(0.2)
    yield address
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(30)


@pytest.fixture(scope="module")
def local_ray():
    import ray

    from fae.pipelines.runtime.session import start_ray

    start_ray(num_cpus=4)
    yield
    ray.shutdown()


def values(photographs, folder, *more: str) -> list[str]:
    places = [f"data.path={photographs}", f"storage={folder}", "tune.name=s", "data.limit=48"]
    return [*places, *more]


def results(folder: Path) -> dict[str, dict]:
    files = (folder / "tune" / "s" / "trials").glob("*/result.json")
    return {file.parent.name: json.loads(file.read_text()) for file in files}


def test_a_trial_has_the_stages_that_its_objectives_need(photographs, tmp_path):
    def stages(*more: str) -> list[str]:
        recipe = load_recipe(RECIPE, values(photographs, tmp_path, *more))
        return [stage.name for stage in plan_trial(recipe, {}).stages]

    assert stages() == ["autoencoder"]
    assert stages("tune.objectives=[{metric: probe/knn_latent}]") == ["autoencoder", "probe"]
    assert stages("chain.until=generator") == ["autoencoder", "latents", "generator"]
    with pytest.raises(RecipeError, match="'frechet' is no STAGE/NAME"):
        stages("tune.objectives=[{metric: frechet}]")
    with pytest.raises(RecipeError, match="has no stage 'finetune'"):
        stages("tune.objectives=[{metric: finetune/mse}]", "chain.finetune=false")


def test_as_many_trials_at_once_as_the_cluster_trains(photographs, tmp_path):
    recipe = load_recipe(RECIPE, values(photographs, tmp_path, "chain.until=generator"))
    trial = plan_trial(recipe, {})
    assert [concurrent_trials(recipe, trial, {"CPU": n}) for n in (1, 2, 6)] == [1, 1, 4]
    recipe.tune.max_concurrent_trials = 3
    assert concurrent_trials(recipe, trial, {"CPU": 1}) == 3


def test_a_cluster_that_begins_without_nodes_does_not_limit_the_trials(photographs, tmp_path):
    on_gpus = values(photographs, tmp_path, "autoencoder.training.use_gpu=true")
    recipe = load_recipe(RECIPE, on_gpus)
    trial = plan_trial(recipe, {})
    for there in ({}, {"CPU": 8}):
        limit = concurrent_trials(recipe, trial, there, may_grow=True)
        assert limit is None and cores_of_each(limit, [0.0, 8.0]) is None
        assert concurrent_trials(recipe, trial, there) == 1  # this machine brings no nodes
    assert concurrent_trials(recipe, trial, {"CPU": 8, "GPU": 2}, may_grow=True) == 2
    assert cores_of_each(2, [0.0]) is None and with_shared_cores(recipe, None) == recipe
    recipe.tune.algorithm = "optuna"  # all at once, it would learn nothing
    assert concurrent_trials(recipe, trial, {}, may_grow=True) == 1


def test_trials_side_by_side_share_the_cores_and_are_the_same_trials(photographs, tmp_path):
    recipe = load_recipe(
        RECIPE,
        values(
            photographs, tmp_path, "chain.until=generator", "generator.training.num_workers=8",
            "pixel_decoder.training.threads_per_worker=3",
        ),
    )  # fmt: skip
    shared = with_shared_cores(recipe, 4)
    trainings = (shared.autoencoder, shared.pixel_decoder, shared.generator)
    assert [section.training.threads_per_worker for section in trainings] == [4, 3, 1]
    assert shared.precompute.threads_per_actor == 4
    assert plan_trial(shared, {}).uri == plan_trial(recipe, {}).uri
    assert [cores_of_each(n, [16.0, 16.0, 4.0]) for n in (1, 2, 3, 9, 100)] == [16, 16, 12, 4, 1]


def test_optuna_starts_from_recorded_trials_that_its_space_holds(photographs, tmp_path):
    recipe = load_recipe(
        RECIPE,
        values(
            photographs, tmp_path, "tune.algorithm=optuna", "tune.num_samples=3",
            f"tune.space.{DIM}.grid=[8,16]",
        ),
    )  # fmt: skip
    sizes = {"a": {DIM: 8}, "b": {DIM: 16}, "narrowed": {DIM: 4}, "point": {DIM: 8, "seed": 1}}
    for key, settings in sizes.items():
        place = tmp_path / "tune" / "s" / "trials" / key
        place.mkdir(parents=True)
        place.joinpath("settings.json").write_text(json.dumps(settings))
        if key != "b":
            result = {"state": "finished", "settings": settings}
            result["metrics"] = {"autoencoder/mse": 1.0 if key == "a" else math.nan}
            place.joinpath("result.json").write_text(json.dumps(result))
    searcher, missing = make_searcher(recipe, str(tmp_path / "tune" / "s"))
    assert missing == 2 and searcher.suggest("1") == {DIM: 16}, "the interrupted trial comes first"


def test_optuna_suggests_num_samples_beside_the_points(photographs, tmp_path):
    points = [{DIM: 8}, {DIM: 16}]
    recipe = load_recipe(
        RECIPE,
        values(
            photographs, tmp_path, "tune.algorithm=optuna", "tune.num_samples=4",
            f"tune.space.{DIM}.grid=[4,8,16,32]", f"tune.points={json.dumps(points)}",
        ),
    )  # fmt: skip
    for settings in [*points, {DIM: 4}]:
        trial = plan_trial(recipe, settings)
        trial.record_start()
        trial.record_result(FINISHED, {"autoencoder/mse": 1.0}, {})
    _, missing = make_searcher(recipe, str(tmp_path / "tune" / "s"))
    assert missing == 3 and planned_trials(recipe) == 6


def test_the_lock_of_a_stage_is_lost_only_with_the_node_of_its_owner(monkeypatch):
    made = {}

    def options(**given):
        made.update(given)
        lock = SimpleNamespace(ready=SimpleNamespace(remote=lambda: None))
        return SimpleNamespace(remote=lambda: lock)

    here = SimpleNamespace(get_node_id=lambda: "a1" * 28)
    monkeypatch.setattr("ray.remote", lambda _: SimpleNamespace(options=options))
    monkeypatch.setattr("ray.get", lambda _: None)
    monkeypatch.setattr("ray.kill", lambda _: None)
    monkeypatch.setattr("ray.get_runtime_context", lambda: here)
    with stage_lock("storage/autoencoder-1"):
        assert (made["name"], made["num_cpus"]) == ("storage/autoencoder-1", 0)
        place = made["scheduling_strategy"]
        assert (place.node_id, place.soft) == ("a1" * 28, False)


@pytest.mark.faults
@pytest.mark.integration
def test_a_killed_sweep_is_restored_and_trials_share_stages(
    server, local_ray, photographs, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    overrides = values(
        photographs, tmp_path, f"tune.space.{DIM}.grid=[4,8]",
        f"tune.space.{COLUMNS}.grid=[[mean],[mean,logvar]]",
        "tune.objectives=[{metric: autoencoder/cosine, mode: max},"
        " {metric: latents/bytes_per_image}]",
    )  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "fae", "tune", RECIPE, *overrides, "tune.max_concurrent_trials=1"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not results(tmp_path):
        assert time.monotonic() < deadline and process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = results(tmp_path)
    assert 1 <= len(before) < 4

    numbers = search(load_recipe(RECIPE, [*overrides, "tune.max_concurrent_trials=2"]))
    after = results(tmp_path)
    assert numbers["trials"] == numbers["finished"] == len(after) == 4
    assert {key: after[key] for key in before} == before
    ran = [stage for result in after.values() for stage in result["ran"]]
    assert (ran.count("autoencoder"), ran.count("latents")) == (2, 4)
    assert len(list(tmp_path.glob("autoencoder-*"))) == 2
    recommended = load_recipe(str(tmp_path / "tune" / "s" / "recommended.yaml"))
    assert numbers["best"] == {
        DIM: recommended.autoencoder.latent_dim,
        COLUMNS: recommended.precompute.columns,
    }
    check_tracking(server, numbers)


def check_tracking(server: str, numbers: dict) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("fae").experiment_id
    runs = {run.data.tags["fae.kind"]: [] for run in client.search_runs([experiment])}
    for run in client.search_runs([experiment]):
        runs[run.data.tags["fae.kind"]].append(run)
    (sweep,) = runs["sweep"]
    assert "Recommended" in sweep.data.tags["mlflow.note.content"]
    starred = [run.info.run_name for run in runs["trial"] if run.info.run_name.startswith("★ ")]
    assert len(starred) == 1 and f"latent_dim={numbers['best'][DIM]} " in starred[0]
    assert len(runs["trial"]) == 4
    for run in runs["trial"]:
        tags = run.data.tags
        assert tags["mlflow.parentRunId"] == sweep.info.run_id and tags["fae.state"] == "finished"
        assert (
            len(tags["fae.autoencoder"]) == len(tags["fae.latents"]) == len(tags["fae.data"]) == 64
        )
        assert tags["version.torch"] and run.info.status == "FINISHED"
        assert run.data.params["autoencoder.training.steps"] == "8"
        mse = client.get_metric_history(run.info.run_id, "autoencoder/validation/mse")
        assert [point.step for point in mse] == [4, 8]
        assert run.data.metrics["latents/bytes_per_image"] in (32, 64)
        figures = {file.path for file in client.list_artifacts(run.info.run_id, "figures")}
        assert "figures/autoencoder-validation.png" in figures
        recipe = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert "recipe.yaml" in recipe
    pages = {file.path for file in client.list_artifacts(sweep.info.run_id)}
    assert {"report.md", "recommended.yaml", "figures"} <= pages


@pytest.mark.faults
@pytest.mark.integration
def test_asha_stops_a_trial_in_the_middle_of_its_training(local_ray, photographs, tmp_path):
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    recipe = load_recipe(
        RECIPE,
        values(
            photographs, tmp_path, f"tracking.uri={uri}", "tune.scheduler=asha",
            "tune.max_concurrent_trials=1", "autoencoder.training.steps=80",
            "tune.space.autoencoder.training.learning_rate.grid=[1e-3,1e-9]",
            "autoencoder.training.validate_every=20", "autoencoder.training.checkpoint_every=20",
            "tune.asha.grace_steps=20", "tune.asha.reduction_factor=2",
        ),
    )  # fmt: skip
    numbers = search(recipe)
    assert (numbers["trials"], numbers["finished"]) == (2, 1)
    stopped = next(r for r in results(tmp_path).values() if r["state"] == "stopped early")
    assert stopped["settings"] == {"autoencoder.training.learning_rate": 1e-9}
    assert 20 <= stopped["metrics"]["autoencoder/step"] < 80
    folder = tmp_path / f"autoencoder-{stopped['stages']['autoencoder']}"
    assert not (folder / "result.json").exists()
    client = MlflowClient(tracking_uri=uri)
    statuses = {
        name: sorted(
            run.info.status
            for run in client.search_runs([client.get_experiment_by_name(name).experiment_id])
        )
        for name in ("fae", "fae-stages")
    }
    assert statuses == {"fae": ["FINISHED"] * 3, "fae-stages": ["FINISHED", "KILLED"]}
    again = search(recipe)
    assert again == numbers and not (folder / "result.json").exists()


@pytest.mark.integration
def test_optuna_draws_on_from_the_recorded_trials(local_ray, photographs, tmp_path):
    key = "autoencoder.kl_weight"
    recipe = load_recipe(
        RECIPE,
        values(
            photographs, tmp_path, "tracking.enabled=false", "tune.algorithm=optuna",
            "tune.num_samples=2", f"tune.space.{key}.loguniform=[1e-6,1e-3]",
            "tune.objectives=[{metric: autoencoder/mse}, {metric: autoencoder/kl}]",
        ),
    )  # fmt: skip
    before = plan_trial(recipe, {key: 1e-4})
    before.record_start()
    before.record_result(FINISHED, {"autoencoder/mse": 0.5, "autoencoder/kl": 100.0}, {})
    search(recipe)
    trials = results(tmp_path).values()
    errors = {trial["settings"][key]: trial["metrics"]["autoencoder/mse"] for trial in trials}
    assert len(errors) == 2 and errors.pop(1e-4) == 0.5
    ((weight, mse),) = errors.items()
    assert 1e-6 <= weight <= 1e-3 and mse > 0


def test_a_failed_trial_names_its_cause_in_its_record_and_in_mlflow(
    photographs, tmp_path, monkeypatch
):
    from mlflow.tracking import MlflowClient

    from fae.tune.records import FAILED, recorded
    from fae.tune.sweep import run_trial
    from fae_core.errors import UserError

    def no_room(*_):
        raise UserError("The disk is full. Free some space.")

    monkeypatch.setattr("fae.tune.sweep.run_stage", no_room)
    monkeypatch.setattr("fae.tune.sweep._ReportValidation", lambda: None)
    monkeypatch.setattr("fae.tune.sweep.stage_lock", contextlib.nullcontext)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    recipe = load_recipe(RECIPE, values(photographs, tmp_path, f"tracking.uri={uri}"))
    config = {"settings": json.dumps({DIM: 8})}
    with pytest.raises(UserError, match="disk is full"):
        run_trial(config, recipe.model_dump(mode="json"), 1)
    trial = plan_trial(recipe, {DIM: 8})
    assert trial.failure() == "The disk is full. Free some space."
    (record,) = recorded(str(tmp_path / "tune" / "s")).values()
    assert (record["state"], record["settings"]) == (FAILED, {DIM: 8})
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("fae").experiment_id])
    assert (run.info.status, run.data.tags["fae.state"]) == ("FAILED", FAILED)
    trial.record_start()  # what the next attempt does first
    assert trial.failure() is None


def test_runs_of_a_trial_that_others_ended_are_ended_in_mlflow(photographs, tmp_path):
    """By the scheduler, or with its process; a training that another trial resumes is not."""
    from mlflow.tracking import MlflowClient

    from fae.pipelines.training.tracking import Tracker
    from fae.tune.records import FAILED, recorded
    from fae.tune.sweep import _Recorder
    from fae.tune.sweep_tracking import trial_tracker

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    recipe = load_recipe(
        RECIPE, values(photographs, tmp_path, f"tracking.uri={uri}", "chain.until=latents")
    )
    client = MlflowClient(tracking_uri=uri)

    def running(settings: dict) -> SimpleNamespace:
        """Ray Tune's trial, which trains its autoencoder when its process ends."""
        trial = plan_trial(recipe, settings)
        trial.record_start()
        trial_tracker(recipe, trial)
        Tracker(trial.recipe.tracking, uri, trial.stages[0].uri, {})
        return SimpleNamespace(
            config={"settings": json.dumps(settings)}, last_result={"autoencoder/mse": 1.0},
            is_finished=lambda: False, get_error=lambda: None, get_pickled_error=lambda: None,
        )  # fmt: skip

    def statuses(experiment: str) -> dict[str, str]:
        found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
        return {run.data.tags["fae.run"]: run.info.status for run in found}

    settings = {"stopped": {DIM: 4}, "killed": {DIM: 8}, "shared": {DIM: 16, COLUMNS: ["mean"]}}
    settings["other"] = {DIM: 16, COLUMNS: ["mean", "logvar"]}
    trials = {name: running(some) for name, some in settings.items()}
    recorder, live = _Recorder(recipe), list(trials.values())
    recorder.on_trial_complete(1, live, trials["stopped"])
    recorder.on_trial_error(1, live, trials["killed"])
    recorder.on_trial_error(1, live, trials["shared"])

    planned = {name: plan_trial(recipe, some) for name, some in settings.items()}
    trainings, runs = statuses("fae-stages"), statuses("fae")
    assert [trainings[planned[name].stages[0].uri] for name in planned] == [
        "KILLED", "KILLED", "RUNNING", "RUNNING",
    ]  # fmt: skip
    assert [runs[planned[name].uri] for name in planned] == [
        "FINISHED", "FAILED", "FAILED", "RUNNING",
    ]  # fmt: skip
    records = recorded(str(tmp_path / "tune" / "s"))
    assert records[planned["killed"].uri.rpartition("/")[2]]["state"] == FAILED


def test_a_sweep_whose_trials_failed_is_failed_in_mlflow(photographs, tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    def fail(*_):
        raise SearchError("1 trials failed")

    monkeypatch.setattr("fae.tune.sweep.start_ray", lambda: None)
    monkeypatch.setattr("fae.tune.sweep._run_planned", fail)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    space = f"tune.space.{DIM}.grid=[4,8]"
    with pytest.raises(SearchError):
        search(load_recipe(RECIPE, values(photographs, tmp_path, f"tracking.uri={uri}", space)))
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("fae").experiment_id])
    assert run.info.status == "FAILED"
