"""Which files `fae submit` sends, and which it never does."""

from __future__ import annotations

import zipfile

import pytest

from fae.cluster.errors import SubmitError
from fae.cluster.working_tree import working_tree
from tests.cluster.trees import tree
from tests.tiny import ROOT


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
