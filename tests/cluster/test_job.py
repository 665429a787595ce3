"""`fae submit` against a real head: its job server on loopback, Ray's token authentication on."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from fae.pipelines.runtime.metrics import METRICS
from tests.tiny import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.faults]
TOKEN = "0123456789abcdef0123456789abcdef"
TINY = [
    "backbone.name=vit_tiny_patch16_224", "backbone.weights=random", "autoencoder.latent_dim=8",
    "autoencoder.encoder.num_heads=3", "autoencoder.encoder.head_dim=32",
    "autoencoder.decoder.num_heads=3", "autoencoder.decoder.depth=1", "precompute.shard_size=4",
    "precompute.decode_labels.fae-nodes=cpu",
]  # fmt: skip


@dataclass
class Head:
    address: str
    metrics: str
    environment: dict[str, str]

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "fae", "submit", *arguments, "--working-dir", str(ROOT)]

    def submit(
        self, *arguments: str, token: str | None = TOKEN
    ) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, "RAY_AUTH_TOKEN": token or ""}
        command = self.command(*arguments, "--address", self.address)
        return subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=90
        )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tempfile.mkdtemp(prefix="fae", dir="/tmp")  # short: Ray's sockets live below it
    dashboard, metrics = free_port(), free_port()
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_", "MLFLOW_"))}
    clean |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path_factory.mktemp("home")),  # no token lies there
    }
    started = subprocess.Popen(
        [
            shutil.which("ray", path=clean["PATH"]) or "ray", "start", "--head", "--block",
            "--node-ip-address=127.0.0.1", f"--port={free_port()}",
            f"--dashboard-port={dashboard}", f"--metrics-export-port={metrics}",
            f"--dashboard-agent-listen-port={free_port()}",
            f"--ray-client-server-port={free_port()}",
            "--min-worker-port=0", "--max-worker-port=0", "--num-cpus=2", "--labels=fae-nodes=cpu",
            "--object-store-memory=200000000", f"--temp-dir={folder}", "--disable-usage-stats",
        ],
        env={**clean, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN,
             "RAY_metrics_report_interval_ms": "500"},
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for_server(f"{address}/api/version", started)
        yield Head(address, f"http://127.0.0.1:{metrics}/metrics", clean)
    finally:
        # At once, since nothing of it is to be kept: asked to end, Ray takes half a minute.
        family = [
            psutil.Process(started.pid),
            *psutil.Process(started.pid).children(recursive=True),
        ]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=20)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_server(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "ray start ended"
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except urllib.error.HTTPError as error:
            assert error.code == 401  # it is up, and it wants the token
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("no job server after 60 s")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> list[str]:
    import torch

    from fae.pipelines.config.recipe import load_recipe
    from fae.pipelines.networks.untrained import build_autoencoder
    from fae_core import checkpoint
    from fae_core.backbone import load_backbone

    folder = tmp_path_factory.mktemp("job")
    recipe = load_recipe("photos-dinov2s", TINY)
    backbone = load_backbone(recipe.backbone.name, recipe.backbone.weights)
    torch.manual_seed(0)
    model = build_autoencoder(recipe.autoencoder, backbone.spec)
    theirs = {"backbone": f"{recipe.backbone.name}:{backbone.weights_sha256}", "image_size": "256"}
    checkpoint.save(folder / "autoencoder.safetensors", model, theirs)
    return [
        "precompute", "photos-dinov2s", *TINY, f"data.path={photographs}", "data.limit=16",
        f"autoencoder.checkpoint={folder / 'autoencoder.safetensors'}",
        f"output={folder / 'latents'}",
    ]  # fmt: skip


def interrupt_after(process: subprocess.Popen[str], word: str) -> str:
    """Read the command's output up to `word`, then press Ctrl-C; what was read."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if word in line:
            break
    time.sleep(1)  # into following the log
    process.send_signal(signal.SIGINT)
    return seen


def test_without_the_token_the_refusal_says_what_to_set(head, arguments):
    result = head.submit(*arguments, token=None)
    assert result.returncode == 2, result.stderr
    assert "wants a token (401)" in result.stderr and "RAY_AUTH_TOKEN" in result.stderr
    assert "Traceback" not in result.stderr
    result = head.submit(*arguments, token="another-token-another-token-0000")
    assert result.returncode == 2 and "(403)" in result.stderr, result.stderr


def test_a_job_is_stopped_when_asked_runs_once_however_often_submitted_and_its_log_is_followed(
    head, arguments
):
    environment = {**head.environment, "RAY_AUTH_TOKEN": TOKEN}
    command = head.command(*arguments, "--address", head.address)
    options = {"env": environment, "cwd": ROOT, "text": True, "stdout": subprocess.PIPE}

    # At a terminal Ctrl-C asks; yes stops the job.
    terminal, theirs = pty.openpty()
    first = subprocess.Popen(command, stdin=theirs, stderr=subprocess.STDOUT, **options)
    name = re.search(
        r"Submitted (fae-precompute-latents-\w+)\.", interrupt_after(first, "Submitted")
    )
    assert name
    os.write(terminal, b"y\n")
    rest, _ = first.communicate(timeout=60)
    assert first.returncode == 130 and f"{name[1]} was told to stop" in rest, rest

    # A stopped job may be submitted again, under the next number. Without a terminal Ctrl-C leaves
    # it running.
    wait_until_stopped(head, name[1])
    second = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, **options
    )
    assert f"Submitted {name[1]}-2." in interrupt_after(second, "Submitted")
    rest, _ = second.communicate(timeout=60)
    assert second.returncode == 130 and f"{name[1]}-2 runs on" in rest and "ray job stop" in rest

    # The same again joins it, and shows its log to the end.
    third = head.submit(*arguments)
    assert third.returncode == 0, third.stdout + third.stderr
    assert f"{name[1]}-2 is " in third.stdout and "Nothing was started" in third.stdout
    assert ": 16 latents, 0 errors" in third.stdout
    output = Path(next(a for a in arguments if a.startswith("output=")).partition("=")[2])
    assert json.loads((output / "manifest.json").read_text())["stored"] == 16

    scraped = urllib.request.urlopen(head.metrics, timeout=10).read().decode()
    for metric, (kind, _, _) in METRICS.items():
        if metric != "fae_image_errors":  # there were none
            suffix = "_total" if kind == "counter" else "_sum"
            assert f"ray_{metric}{suffix}" in scraped, metric

    # Once more: it is done.
    fourth = head.submit(*arguments)
    assert fourth.returncode == 0 and "has done this already" in fourth.stdout
    ids = [job["submission_id"] for job in jobs(head)]
    assert sorted(ids) == [name[1], f"{name[1]}-2"]


def test_a_failing_job_ends_with_its_own_status_and_nothing_secret_is_kept_of_it(head, arguments):
    head.environment["AWS_SECRET_ACCESS_KEY"] = "marker-secret"
    head.environment["AWS_REGION"] = "us-west-2"
    head.environment["MLFLOW_TRACKING_URI"] = "https://me:marker-secret@mlflow.example"
    result = head.submit(*arguments, "data.path=/nowhere", "output=/nowhere/latents")
    assert result.returncode == 2, result.stdout + result.stderr
    assert "/nowhere" in result.stdout and "ended as FAILED" in result.stderr
    kept = json.dumps(jobs(head))
    assert "us-west-2" in kept and "https://mlflow.example" in kept and "marker-secret" not in kept
    assert "marker-secret" not in result.stdout + result.stderr


def test_doctor_as_a_job_sees_the_cluster_from_inside_and_ends_with_its_findings(head):
    asked = ["doctor", "photos-dinov2s", "tracking.enabled=false", "precompute.num_actors=9"]
    result = head.submit(*asked, "precompute.decode_labels.fae-nodes=gpu")
    assert result.returncode == 1, result.stdout + result.stderr
    for line in (
        "1 alive: 1 × (2 CPU 0 GPU fae-nodes=cpu)",
        "equal on all nodes",
        "precompute.num_actors=9, each 1 CPU: 2 fit on the nodes that are up",
        "no node has fae-nodes=gpu",
        "2 problems",
    ):
        assert line in result.stdout


def jobs(head: Head) -> list[dict[str, object]]:
    request = urllib.request.Request(
        f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    found: list[dict[str, object]] = json.loads(urllib.request.urlopen(request, timeout=20).read())
    return [job for job in found if job["submission_id"]]


def wait_until_stopped(head: Head, name: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(j["submission_id"] == name and j["status"] == "STOPPED" for j in jobs(head)):
            return
        time.sleep(0.3)
    raise AssertionError(f"{name} did not stop")
