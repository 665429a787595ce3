"""Each way of having the package runs a job whose Ray workers import the code that was meant.

The ways are a wheel in an empty folder, a wheel in a folder with packages of the user's own that
are called pipelines, tune and cluster, an editable install, and the working tree that `fae submit`
sends, where the wheel is installed too. The virtual environments see the heavy packages of the
interpreter that runs the tests, but not its `fae`. The jobs of the wheel's environment attach to
one Ray, as to a cluster's; the editable install starts its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fae.cluster.working_tree import working_tree
from tests.tiny import ROOT, TINY, noisy_jpegs, save_autoencoder

pytestmark = pytest.mark.integration

NAMES = ("pipelines", "tune", "cluster")
MARKED = ("pipelines/latents/tasks.py", "fae_core/autoencoder.py")
MARK = """

import os as _os  # noqa: E402

with open(f"{_os.environ['IMPORTS']}/{__name__}.{_os.getpid()}", "w") as _file:
    _file.write(__file__)
"""
"""Appended to a module, it records which file a process has imported as that module."""
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 2}
HEAD = """
import sys, ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
"""A program that holds a Ray until its standard input ends, and prints its address."""


class Environment:
    """A virtual environment in `folder` that sees what this interpreter has, but for `fae`."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.bin = folder / "bin"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site = folder / "lib" / version / "site-packages"
        # A folder that is named in a .pth file is searched, but its own .pth files are not read;
        # one of them is the editable install of `fae`.
        heavy = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
        (self.site / "heavy.pth").write_text("\n".join(sorted(heavy)))

    def install(self, *what: str) -> Environment:
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install"]
        pip += ["--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed", "--quiet"]
        subprocess.run([*pip, *what], check=True)
        return self

    @contextmanager
    def started(
        self, *command: str, folder: Path, **variables: str
    ) -> Iterator[subprocess.Popen[str]]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHON"))}
        clean |= TOKEN | {"PATH": f"{self.bin}:{clean['PATH']}"} | variables
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        words = [str(self.bin / command[0]), *command[1:]]
        with subprocess.Popen(words, cwd=folder, env=clean, text=True, **pipes) as process:
            try:
                yield process
            finally:
                process.terminate()  # a Ray of its own ends with it

    def run(self, *command: str, folder: Path, **variables: str) -> tuple[int, str]:
        """The command's process id and standard output; it must succeed."""
        with self.started(*command, folder=folder, **variables) as process:
            output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, output + errors
        return process.pid, output


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout, its links kept, whose modules of MARKED record their imports."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("fae", "fae_core", *NAMES):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in MARKED:
        with (folder / name).open("a") as file:
            file.write(MARK)
    return folder


@pytest.fixture(scope="module")
def with_wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel of `checkout`."""
    built = tmp_path_factory.mktemp("built")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*pip, "--wheel-dir", str(built), str(checkout)], check=True)
    (wheel,) = built.glob("*.whl")
    return Environment(tmp_path_factory.mktemp("wheel")).install(str(wheel))


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the records, which MODULE.PROCESS names."""
    return tmp_path_factory.mktemp("imports")


@pytest.fixture(scope="module")
def head(with_wheel: Environment, imports: Path) -> Iterator[str]:
    """Address of a Ray whose workers are of the environment with the wheel."""
    words = ("python", "-c", HEAD)
    with with_wheel.started(*words, folder=imports, IMPORTS=str(imports)) as process:
        assert process.stdout
        yield process.stdout.readline().strip()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a precompute of eight pictures of noise, but for its output."""
    folder = tmp_path_factory.mktemp("images")
    autoencoder = save_autoencoder(folder / "autoencoder.safetensors")
    (folder / "noise").mkdir()
    for index, jpeg in enumerate(noisy_jpegs(8)):
        (folder / "noise" / f"{index}.jpg").write_bytes(jpeg)
    paths = [f"data.path={folder / 'noise'}", f"autoencoder.checkpoint={autoencoder}"]
    return ["precompute", "photos-dinov2s", *TINY, *paths]


@pytest.fixture
def precompute(arguments: list[str], imports: Path, tmp_path: Path) -> Callable[..., None]:
    def precompute(
        environment: Environment, *fae: str, folder: Path, code: Path, address: str = ""
    ) -> None:
        """Run it as `fae` in `folder`; its workers must have imported the code below `code`."""
        for record in imports.iterdir():
            record.unlink()
        output = tmp_path / "latents"
        words = (*fae, *arguments, f"output={output}")
        variables = {"IMPORTS": str(imports), "RAY_ADDRESS": address}
        driver, said = environment.run(*words, folder=folder, **variables)
        assert f"{output}: 8 latents, 0 errors" in said
        assert json.loads((output / "manifest.json").read_text())["stored"] == 8
        for module in ("fae.pipelines.latents.tasks", "fae_core.autoencoder"):
            records = [p for p in imports.glob(f"{module}.*") if p.suffix != f".{driver}"]
            assert records, f"no worker has imported {module}"
            files = {Path(record.read_text()).resolve() for record in records}
            assert len(files) == 1 and files.pop().is_relative_to(code.resolve())
        look = f"import importlib.util as i; print([n for n in {NAMES} if i.find_spec(n)])"
        assert environment.run("python", "-c", look, folder=tmp_path)[1] == "[]\n"
        assert not {path.stem for path in environment.site.iterdir()} & set(NAMES)

    return precompute


def test_a_wheel_runs_from_an_empty_folder(with_wheel, head, precompute, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    precompute(with_wheel, "fae", folder=folder, code=with_wheel.site, address=head)


def test_a_wheel_runs_beside_packages_of_the_user_that_have_the_rooms_names(
    with_wheel, head, precompute, tmp_path
):
    folder = tmp_path / "theirs"
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise ImportError('not ours')")
    fae = ("python", "-m", "fae")
    precompute(with_wheel, *fae, folder=folder, code=with_wheel.site, address=head)


def test_an_editable_install_runs_the_checkout(checkout, precompute, tmp_path):
    environment = Environment(tmp_path / "editable").install("--editable", str(checkout))
    folder = tmp_path / "empty"
    folder.mkdir()
    precompute(environment, "fae", folder=folder, code=checkout)


def test_the_tree_that_submit_sends_runs_its_own_code_and_not_the_wheel_s(
    checkout, with_wheel, head, precompute, tmp_path
):
    folder = tmp_path / "tree"
    working_tree(checkout).write_zip(tmp_path / "tree.zip")
    with zipfile.ZipFile(tmp_path / "tree.zip") as archive:
        archive.extractall(folder)
    fae = ("python", "-m", "fae")
    precompute(with_wheel, *fae, folder=folder, code=folder, address=head)
