"""What `fae submit` sends and refuses to send, without a cluster."""

from __future__ import annotations

import shlex
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fae.cli import app, job_commands
from fae.cluster.command import Command
from fae.cluster.environment import job_environment
from fae.cluster.errors import SubmitError
from fae.cluster.kuberay import ray_job
from fae.cluster.submit import CODE, connect, prepare, submit
from fae.pipelines.config import RecipeError
from fae_core.errors import UserError
from tests.cluster.job_server import JobServer, job_server
from tests.cluster.trees import tree
from tests.tiny import ROOT

PRECOMPUTE = ["precompute", "photos-dinov2s", "data.path=s3://b/x", "output=s3://b/latents"]


def parse(words: Sequence[str]) -> Command:
    return Command.parse(words, job_commands())


def name_of(*words: str) -> str:
    command = parse(words)
    return command.submission_id(command.load())


def test_shipped_networks_are_sent_with_a_checkout_whose_recipe_names_them():
    words = [*PRECOMPUTE, "autoencoder.checkpoint=shipped:emoji"]
    sent = {name for name, _ in prepare(parse(words), ROOT).tree.files}
    assert "fae/shipped/emoji/autoencoder.safetensors" in sent
    assert not any("fae/shipped/emoji-images" in name and name.endswith(".webp") for name in sent)
    words = [*PRECOMPUTE, "data.path=shipped:emoji-images/train"]
    sent = {name for name, _ in prepare(parse(words), ROOT).tree.files}
    assert sum("fae/shipped/emoji-images" in n and n.endswith(".webp") for n in sent) == 300


@pytest.mark.parametrize("name", job_commands())
def test_a_job_runs_the_command_of_fae_that_was_submitted(name):
    entrypoint = parse([*name.split(), "photos-dinov2s", "run=a b"]).entrypoint
    assert entrypoint == f"python -m fae {name} photos-dinov2s 'run=a b'"
    result = CliRunner().invoke(app, [*shlex.split(entrypoint)[3:], "--help"])
    assert result.exit_code == 0 and f" {name} [OPTIONS] " in result.output


def test_every_command_that_does_work_on_a_cluster_can_be_a_job():
    assert {"precompute", "sample", "evaluate", "probe", "tune", "run", "doctor"} | {
        f"train {network}" for network in ("autoencoder", "pixel-decoder", "generator")
    } <= set(job_commands())
    assert not {"submit", "demo", "inspect", "export"} & set(job_commands())


def test_variables_travel_by_allow_list_and_no_secret_does():
    shell = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:7480",
        "AWS_REGION": "us-west-2",
        "AWS_ACCESS_KEY_ID": "AKIA",
        "AWS_SECRET_ACCESS_KEY": "marker",
        "AWS_SESSION_TOKEN": "marker",
        "RAY_AUTH_TOKEN": "marker",
        "RAY_ADDRESS": "elsewhere:6379",
        "MLFLOW_TRACKING_URI": "https://me:marker@mlflow.example:5000/x",
        "OMP_NUM_THREADS": "4",
    }
    made, remarks = job_environment(["OMP_NUM_THREADS"], shell)
    assert made == {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:7480",
        "AWS_REGION": "us-west-2",
        "MLFLOW_TRACKING_URI": "https://mlflow.example:5000/x",
        "OMP_NUM_THREADS": "4",
    }
    assert "marker" not in str(remarks) and "MLFLOW_TRACKING_PASSWORD" in str(remarks)


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "HF_TOKEN",
     "MLFLOW_TRACKING_PASSWORD", "WANDB_API_KEY", "RAY_AUTH_TOKEN", "MY_CREDENTIALS",
     "GITHUB_PAT_TOKEN", "openai_apikey"],
)  # fmt: skip
def test_a_name_that_looks_like_a_secret_is_refused_and_says_where_it_belongs(name):
    with pytest.raises(SubmitError, match=r"looks like a secret.*Secret") as refusal:
        job_environment([name], {name: "marker"})
    assert "marker" not in str(refusal.value)


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MONKEY", "HF_HOME", "KEYBOARD"])
def test_a_harmless_name_is_no_secret(name):
    assert job_environment([name], {name: "1"})[0] == {name: "1"}


def test_values_with_a_password_are_refused_without_showing_it():
    with pytest.raises(SubmitError, match="holds a user or a password") as refusal:
        job_environment(["PROXY"], {"PROXY": "http://me:marker@proxy:1"})
    assert "marker" not in str(refusal.value)
    with pytest.raises(SubmitError, match=r"tracking\.uri: the address holds") as refusal:
        parse([*PRECOMPUTE, "tracking.uri=http://me:marker@mlflow:5000"])
    assert "marker" not in str(refusal.value)


def test_a_tracking_file_of_this_machine_stays_here():
    made, remarks = job_environment([], {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"})
    assert not made and "file of this machine" in remarks[0]


def test_the_same_work_has_the_same_name_and_other_work_another():
    same = name_of(*PRECOMPUTE)
    assert same.startswith("fae-precompute-latents-") and same == name_of(*PRECOMPUTE, "seed=1")
    assert same != name_of(*PRECOMPUTE, "output=s3://b/other")
    assert same != name_of("sample", *PRECOMPUTE[1:])
    first = ["train", "generator", "photos-dinov2s", "storage=s3://b/runs", "run=dit"]
    assert name_of(*first).startswith("fae-train-generator-dit-")
    assert name_of(*first) != name_of(*first, "storage=s3://b/elsewhere")
    scores = ["evaluate", "photos-dinov2s", "evaluate.output=s3://b/scores"]
    assert name_of(*scores).startswith("fae-evaluate-scores-")
    sweep = ["tune", "sweep-fashion", "storage=s3://b/runs", "tune.name=kl"]
    assert name_of(*sweep).startswith("fae-tune-kl-") and name_of(*sweep) == name_of(
        *sweep, "seed=1"
    )
    chain = ["run", "fashion-dinov2s", "storage=s3://b/runs"]
    assert name_of(*chain).startswith("fae-run-fashion-dinov2s-")
    assert name_of(*chain) != name_of(*chain, "seed=1")  # other stages, beside the first ones
    long = name_of(*PRECOMPUTE[:2], "output=s3://b/" + "Very_Long" * 20)
    assert len(long) <= 47 and long == long.lower() and "_" not in long  # a RayJob's name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["precomput", "x"], "Did you mean 'precompute'?"),
        (["train", "generators", "x"], "Did you mean 'train generator'?"),
        (["precompute"], "needs a recipe"),
        (["precompute", "output=s3://b/x"], "needs a recipe"),
        (["precompute", "photos-dinov2s", "output"], "'output' is not key=value"),
    ],
)
def test_a_mistaken_command_is_explained(words, message):
    with pytest.raises(SubmitError) as refusal:
        parse(words)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "words",
    [
        ["precompute", "photos-dinov2s", "output=latents"],
        ["precompute", "photos-dinov2s", "output=s3://b/x", "data.path=photos"],
        [*PRECOMPUTE, "autoencoder.checkpoint=runs/a.safetensors"],
        ["train", "generator", "photos-dinov2s", "run=x", "latents=s3://b/x"],
    ],
)
def test_a_path_that_the_cluster_would_lose_is_refused(words):
    with pytest.raises(SubmitError, match="which the cluster deletes"):
        prepare(parse(words), ROOT)


DATA = "data.path=s3://b/x"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["evaluate", "photos-dinov2s", "evaluate.output=scores"], "evaluate.output=scores:"),
        (["evaluate", "photos-dinov2s", "evaluate.images=samples"], "evaluate.images=samples:"),
        (["probe", "photos-dinov2s", DATA, "probe.output=probe"], "probe.output=probe:"),
        (["tune", "sweep-fashion", DATA], "storage=runs (the default):"),
        (["run", "fashion-dinov2s", DATA], "storage=runs (the default):"),
        (["run", "fashion-dinov2s", DATA, "storage=./runs"], "storage=./runs:"),
    ],
)
def test_the_refusal_names_the_key_and_what_to_give(words, named):
    for refused in (lambda: prepare(parse(words), ROOT), lambda: ray_job(parse(words))):
        with pytest.raises(SubmitError) as refusal:
            refused()
        assert str(refusal.value).startswith(named)
        assert "Give s3://…, or an absolute path of a folder that every" in str(refusal.value)


@pytest.mark.parametrize(
    "words",
    [
        PRECOMPUTE,  # storage=runs is not where it writes
        [
            "evaluate",
            "photos-dinov2s",
            "evaluate.output=/shared/scores",
            "evaluate.images=s3://b/i",
        ],
        ["probe", "photos-dinov2s", DATA],  # its numbers are in the log
        ["run", "fashion-dinov2s", DATA, "storage=s3://b/runs"],
        ["tune", "sweep-fashion", DATA, "storage=/shared/runs"],
        ["doctor", "photos-dinov2s", "s3://b/latents"],
    ],
)
def test_paths_that_every_node_reaches_are_accepted(words):
    assert prepare(parse(words), ROOT).command.entrypoint.endswith(" ".join(words))


def test_a_path_that_the_recipe_s_file_gives_is_refused_too(tmp_path):
    tree(tmp_path, *CODE)
    (tmp_path / "mine.yaml").write_text("output: latents\n")
    with pytest.raises(SubmitError, match=r"^output=latents: a relative path"):
        prepare(parse(["precompute", "mine.yaml"]), tmp_path)


def test_a_mistake_in_the_recipe_is_found_before_anything_is_sent():
    with pytest.raises(RecipeError, match=r"Did you mean 'seed'\?"):
        prepare(parse([*PRECOMPUTE, "sed=1"]), ROOT)


def test_a_shipped_recipe_of_the_tree_counts_before_this_installation_s(tmp_path):
    recipes = "fae/pipelines/config/recipes"
    tree(tmp_path, *CODE, f"{recipes}/mine.yaml", f"{recipes}/photos-dinov2s.yaml")
    for name in ("mine", "photos-dinov2s"):
        (tmp_path / recipes / f"{name}.yaml").write_text("output: s3://b/theirs\n")
        made = prepare(parse(["precompute", name]), tmp_path)
        assert made.submission_id.startswith("fae-precompute-theirs-")


def test_a_checkout_without_its_links_is_refused(tmp_path):
    tree(tmp_path, "fae/__init__.py", "fae/cli.py", "fae/pipelines", "fae_core/__init__.py")
    with pytest.raises(SubmitError, match=r"no fae/pipelines/__init__\.py(?s:.*)core\.symlinks"):
        prepare(parse(PRECOMPUTE), tmp_path)


def test_a_recipe_file_must_be_among_what_is_sent(tmp_path):
    tree(tmp_path, "fae/__init__.py", *CODE)
    with pytest.raises(SubmitError, match=r"mine\.yaml: not among the files"):
        prepare(parse(["precompute", "mine.yaml", "output=s3://b/x"]), tmp_path)
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    prepare(parse(["precompute", "mine.yaml", "output=s3://b/x"]), tmp_path)


def test_a_dry_run_says_what_would_be_sent(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "marker")
    result = CliRunner().invoke(
        app, ["submit", *PRECOMPUTE, "--working-dir", str(ROOT), "--dry-run"]
    )
    assert result.exit_code == 0
    for word in (
        "fae-precompute-latents-",
        "python -m fae precompute photos-dinov2s",
        "MB in",
    ):
        assert word in result.output
    assert "marker" not in result.output


@pytest.mark.parametrize("answers", [False, True])
def test_an_address_without_a_job_server_is_an_error_at_once(monkeypatch, answers):
    monkeypatch.setattr("fae.cluster.submit.ANSWER_SECONDS", 1.0)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    # Else a token in this machine's home would turn it on for all tests that come after.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if answers:  # it takes the connection, and never says a word
            listener.listen()
        within = " within 1 s" if answers else ""
        said = f"No job server answers at {address}{within}\\. Are host and port right"
        with pytest.raises(SubmitError, match=said):
            connect(address)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobServer]:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr("fae.cluster.submit.POLL_SECONDS", 0.01)
    with job_server() as server:
        yield server


def submitted(server: JobServer, root: Path, *words: str, follow: bool = False) -> str:
    said: list[str] = []
    made = prepare(parse(words), root)
    assert submit(made, server.address, follow=follow, say=said.append) == 0
    return "\n".join(said)


def test_a_recipe_s_file_that_was_edited_is_other_work(server, tmp_path):
    (tmp_path / "mine.yaml").write_text("output: s3://b/latents\nseed: 1\n")
    words = ["precompute", "mine.yaml"]
    submitted(server, tmp_path, *words)
    (first,) = server.jobs.values()
    assert "is pending already" in submitted(server, tmp_path, *words)
    first["status"] = "SUCCEEDED"
    (tmp_path / "mine.yaml").write_text("# The same.\noutput: s3://b/latents\nseed: 1\n")
    assert "has done this already" in submitted(server, tmp_path, *words)

    (tmp_path / "mine.yaml").write_text("output: s3://b/latents\nseed: 2\n")
    assert f"Submitted {first['submission_id']}-2." in submitted(server, tmp_path, *words)
    (tmp_path / "mine.yaml").write_text("output: s3://b/latents\nseed: 3\n")
    with pytest.raises(SubmitError, match="pending and writes to the same place with another reci"):
        submitted(server, tmp_path, *words)


def test_a_job_whose_submission_kept_no_recipe_is_known_by_its_arguments(server, tmp_path):
    (tmp_path / "mine.yaml").write_text("output: s3://b/latents\n")
    submitted(server, tmp_path, "precompute", "mine.yaml")
    (first,) = server.jobs.values()
    first |= {"metadata": None, "status": "SUCCEEDED"}
    assert "has done this already" in submitted(server, tmp_path, "precompute", "mine.yaml")


def test_a_connection_that_ends_and_comes_back_is_followed_on(server, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("output: s3://b/latents\n")
    words = ["precompute", "mine.yaml"]
    submitted(server, tmp_path, *words)
    (job,) = server.jobs.values()
    server.dropped = 4  # the log's stream, and the job's state three times
    threading.Timer(0.1, lambda: job.update(status="SUCCEEDED")).start()
    submitted(server, tmp_path, *words, follow=True)
    assert "the log's stream broke" in capsys.readouterr().err and not server.dropped


def test_a_connection_that_stays_away_is_said_with_how_to_see_the_job(
    server, tmp_path, monkeypatch
):
    monkeypatch.setattr("fae.cluster.submit.PATIENCE_SECONDS", 0.1)
    (tmp_path / "mine.yaml").write_text("output: s3://b/latents\n")
    server.dropped = 10**6
    with pytest.raises(SubmitError, match=r"may run on(?s:.*)ray job logs --follow --address http"):
        submitted(server, tmp_path, "precompute", "mine.yaml", follow=True)


def test_kuberay_gets_the_command_its_settings_and_no_secret(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "marker")
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    document, _ = ray_job(parse(PRECOMPUTE), image="registry/fae-ray:1")
    job = yaml.safe_load(document)
    assert job["spec"]["entrypoint"].startswith("python -m fae precompute photos-dinov2s")
    assert job["metadata"]["name"] == name_of(*PRECOMPUTE)
    assert "us-west-2" in job["spec"]["runtimeEnvYAML"]
    assert "marker" not in document and "fae-ray:0.1.0" not in document
    assert document.count("secretRef") == 3  # head, CPU nodes, GPU nodes


def test_kuberay_s_file_may_lie_in_a_folder_that_is_not_there_yet(tmp_path):
    written = tmp_path / "new" / "job.yaml"
    words = ["submit", *PRECOMPUTE, "--backend", "kuberay"]
    result = CliRunner().invoke(app, [*words, "--output", str(written)])
    assert result.exit_code == 0 and yaml.safe_load(written.read_text())["kind"] == "RayJob"


def test_kuberay_has_only_the_recipes_of_its_image():
    with pytest.raises(SubmitError, match="the image's files alone"):
        ray_job(parse(["precompute", "mine.yaml", "output=s3://b/x"]))


def test_the_command_line_shows_a_refusal_as_an_error_for_people():
    result = CliRunner().invoke(app, ["submit", "precomput", "x"])
    assert isinstance(result.exception, UserError)
