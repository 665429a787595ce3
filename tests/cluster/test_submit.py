"""What `fae submit` sends and refuses to send, without a cluster."""

from __future__ import annotations

import shlex
import socket
import threading
import zipfile
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
from fae.cluster.working_tree import working_tree
from fae.pipelines.config import RecipeError
from fae_core.errors import UserError
from tests.cluster.job_server import JobServer, job_server
from tests.tiny import ROOT

PRECOMPUTE = ["precompute", "photos-dinov2s", "data.path=s3://b/x", "output=s3://b/latents"]


def parse(words: Sequence[str]) -> Command:
    return Command.parse(words, job_commands())


def name_of(*words: str) -> str:
    command = parse(words)
    return command.submission_id(command.load())


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"content of {name}")
    return root


def test_code_and_recipes_are_sent_and_data_weights_and_secrets_are_not(tmp_path):
    sent = ["fae/cli.py", "pipelines/__init__.py", "pipelines/data/plan.py", "mine/recipe.yaml"]
    sent += ["docs/a.md"]
    kept = [
        ".git/config", ".venv/lib/x.py", "runs/a/recipe.yaml", "data/x.csv",
        "deep/model.safetensors", "deep/a.JPEG", "deep/b.jpg", "x.parquet", ".env",
        "deep/.env.local", "home/.aws/credentials", "pipelines/__pycache__/a.pyc",
        "fae_ray.egg-info/PKG-INFO", "id.pem", "auth_token",
    ]  # fmt: skip
    found = [name for name, _ in working_tree(tree(tmp_path, *sent, *kept)).files]
    assert found == sorted([*sent, "deep/a.JPEG"])  # like git, patterns mind the case


def test_what_programs_keep_in_hidden_files_and_keys_by_their_names_is_not_sent(tmp_path):
    kept = [
        ".ssh/config", ".kube/config", ".docker/config.json", ".cache/x", ".git-credentials",
        ".pypirc", ".pgpass", ".s3cfg", ".boto", ".envrc", ".config/gcloud/x", ".bash_history",
        "credentials.json", "gcp-credentials.yaml", "secrets.yaml", "secret.json", "id_rsa",
        "keys/id_ed25519", "id_ecdsa_sk", "cert.p12", "kubeconfig.yaml", "a/.hidden/b.py",
        "credentials/token.json",
    ]  # fmt: skip
    sent = ["storage/secrets.py", "id_mapping.py", "my_credentials.py", ".rayignore"]
    sent += ["credentials/y.py", "id_rsa_tools.py", "kubeconfig_gen.py"]
    found = [name for name, _ in working_tree(tree(tmp_path, *sent, *kept)).files]
    assert found == sorted(sent)


def test_a_link_to_a_file_that_is_left_out_is_left_out_too(tmp_path):
    root = tree(tmp_path, ".env", "b/plain.txt", "b/private.txt", "c/x.py")
    (root / "b" / ".gitignore").write_text("private.txt\n")
    for link, target in {
        "a-settings.txt": ".env", "a-private.txt": "b/private.txt", "a-plain.txt": "b/plain.txt",
    }.items():  # fmt: skip
        (root / link).symlink_to(target)
    found = {name for name, _ in working_tree(root).files}
    assert found == {"a-plain.txt", "b/plain.txt", "b/.gitignore", "c/x.py"}


def test_ignore_files_above_count_up_to_the_repository_s_root(tmp_path):
    root = tree(tmp_path / "outer" / "repository", ".git/HEAD", "sub/deep/a.py", "sub/deep/b.txt")
    (tmp_path / "outer" / ".gitignore").write_text("*.py\n")
    (root / ".gitignore").write_text("/sub/deep/b.txt\n")
    assert [name for name, _ in working_tree(root / "sub").files] == ["deep/a.py"]
    (root / "sub" / ".rayignore").write_text("a.py\n")
    with pytest.raises(SubmitError, match=r"nothing to send that no \.gitignore"):
        working_tree(root / "sub" / "deep")


def test_the_home_folder_is_never_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tree(tmp_path / "me", "a.py", "code/b.py")))
    for root in (tmp_path / "me", tmp_path):
        with pytest.raises(SubmitError, match="your home folder would be sent"):
            working_tree(root)
    assert [name for name, _ in working_tree(tmp_path / "me" / "code").files] == ["b.py"]


def test_shipped_networks_are_sent_with_a_checkout_whose_recipe_names_them():
    words = [*PRECOMPUTE, "autoencoder.checkpoint=shipped:emoji"]
    sent = {name for name, _ in prepare(parse(words), ROOT).tree.files}
    assert "fae/shipped/emoji/autoencoder.safetensors" in sent
    assert not any("fae/shipped/emoji-images" in name and name.endswith(".webp") for name in sent)
    words = [*PRECOMPUTE, "data.path=shipped:emoji-images/train"]
    sent = {name for name, _ in prepare(parse(words), ROOT).tree.files}
    assert sum("fae/shipped/emoji-images" in n and n.endswith(".webp") for n in sent) == 300


def test_ignore_files_of_every_folder_count_but_bring_no_secret_back(tmp_path):
    tree(
        tmp_path, "a/keep.txt", "a/drop.txt", "a/b/drop.txt", "drop.txt", "c/secret.pem", "d/x.tmp"
    )
    (tmp_path / ".gitignore").write_text("*.tmp\n!*.pem\n")
    (tmp_path / "a" / ".rayignore").write_text("drop.txt\n")
    (tmp_path / "c" / ".gitignore").write_text("!secret.pem\n")
    found = {name for name, _ in working_tree(tmp_path).files}
    assert found == {".gitignore", "a/.rayignore", "a/keep.txt", "c/.gitignore", "drop.txt"}


def test_a_link_out_of_the_tree_is_not_sent(tmp_path):
    tree(tmp_path, "tree/a.py", "outside.txt")
    (tmp_path / "tree" / "link.txt").symlink_to(tmp_path / "outside.txt")
    assert [name for name, _ in working_tree(tmp_path / "tree").files] == ["a.py"]


def test_a_link_to_a_folder_of_the_tree_is_sent_as_its_files(tmp_path):
    root = tree(tmp_path / "tree", "rooms/a.py", "rooms/deep/b.py", "door/c.py")
    (root / "door" / "rooms").symlink_to("../rooms")
    (root / "again").symlink_to(root / "door" / "rooms")
    working_tree(root).write_zip(tmp_path / "tree.zip")
    with zipfile.ZipFile(tmp_path / "tree.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    unpacked = tmp_path / "unpacked"
    files = {str(p.relative_to(unpacked)) for p in unpacked.rglob("*") if p.is_file()}
    assert files == {
        "rooms/a.py", "rooms/deep/b.py", "door/c.py",
        "door/rooms/a.py", "door/rooms/deep/b.py", "again/a.py", "again/deep/b.py",
    }  # fmt: skip
    assert (unpacked / "door/rooms/deep/b.py").read_text() == "content of rooms/deep/b.py"
    assert not any(path.is_symlink() for path in unpacked.rglob("*"))


def test_a_link_brings_back_nothing_that_the_rules_leave_out(tmp_path):
    names = ["rooms/a.py", "rooms/private.yaml", "rooms/x.tmp", "rooms/.env", "data/mine/d.py"]
    root = tree(tmp_path, *names, "door/b.py")
    (root / ".gitignore").write_text("/rooms/private.yaml\n/door/unwanted\n")
    (root / "rooms" / ".gitignore").write_text("*.tmp\n")
    for link, target in {"rooms": "../rooms", "unwanted": "../rooms", "d": "../data/mine"}.items():
        (root / "door" / link).symlink_to(target)
    found = {name for name, _ in working_tree(root).files if not name.endswith(".gitignore")}
    assert found == {"rooms/a.py", "door/b.py", "door/rooms/a.py"}


def test_links_in_a_circle_and_to_folders_outside_end(tmp_path):
    root = tree(tmp_path / "tree", "a/x.py", "b/y.py")
    tree(tmp_path, "outside/z.py")
    for link, target in {
        "a/up": "..", "a/self": ".", "a/b": "../b", "b/a": "../a",
        "here": str(root), "out": "../outside", "there": "../tree/a", "none": "nowhere", "l": "l",
    }.items():  # fmt: skip
        (root / link).symlink_to(target)
    found = {name for name, _ in working_tree(root).files}
    assert found == {"a/x.py", "b/y.py", "a/b/y.py", "b/a/x.py", "there/x.py"}


def test_equal_trees_make_equal_zips_that_unpack_to_the_tree(tmp_path):
    for name in ("one", "two"):
        root = tree(tmp_path / name, "a.py", "b/c.py")
        (root / "a.py").chmod(0o755)
        working_tree(root).write_zip(tmp_path / f"{name}.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert archive.read("b/c.py") == b"content of b/c.py"


def test_a_tree_over_the_limit_is_refused_with_its_largest_files(tmp_path):
    tree(tmp_path, "a.py")
    (tmp_path / "large.bin").write_bytes(bytes(3_000_000))
    with pytest.raises(SubmitError, match=r"limit of 2 MB.*\.rayignore(?s:.*)3\.0 MB  large\.bin"):
        working_tree(tmp_path, limit=2_000_000)


def test_this_repository_is_small_and_holds_the_code_of_every_command():
    sent = working_tree(ROOT)
    assert sent.size < 5e6
    assert {
        "fae/cli.py",
        "fae/cluster/submit.py",
        "fae/tune/sweep.py",
        "fae/pipelines/latents/__init__.pyi",
        "fae/pipelines/latents/precompute_job.py",
        "fae/pipelines/config/recipes/photos-dinov2s.yaml",
        "pipelines/latents/precompute_job.py",
    } <= {name for name, _ in sent.files}


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
