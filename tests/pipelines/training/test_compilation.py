"""`compile: auto`: when it compiles, that a resumed run keeps to it, and that the bits are kept."""

from __future__ import annotations

import functools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.config.sections import TrainingSection
from fae.pipelines.latents.reader import LatentStore
from fae.pipelines.training import compilation, pixel_objective
from fae.pipelines.training.compilation import Compilation
from fae.pipelines.training.generator import train_generator
from fae.pipelines.training.state import TrainState
from fae.pipelines.training.step import train_step
from fae_core import checkpoint
from tests.here import train_here
from tests.tiny import ROOT, SMALLEST_BACKBONE, TINY, save_text_encoder, wait_for

LONG = "a red cat a blue dog a green house a small red cat and a big house"


@pytest.fixture(scope="module")
def store(write_store, tmp_path_factory) -> LatentStore:
    """Half of the captions have more than 16 tokens, so batches have two lengths."""
    captions = {row: (LONG if row % 8 == 0 else "a red cat", None) for row in range(20)}
    return write_store(tmp_path_factory.mktemp("store"), ("mean",), False, captions)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save_text_encoder(tmp_path_factory.mktemp("text") / "encoder")


@pytest.fixture(autouse=True)
def a_short_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "TRIAL_STEPS", 4)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """Counts the graphs that are made; they run as they are, which takes no time to compile."""
    torch.compiler.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


def values(store: LatentStore, encoder: Path, storage: Path, compile: str, *more: str) -> list[str]:
    return [
        "run=test", f"storage={storage}", f"latents={store.uri}", "generator.kind=mmdit",
        "generator.width=32", "generator.depth=2", "generator.num_heads=2", "generator.size=S",
        "generator.training.steps=10", "generator.training.batch_size=2",
        "generator.training.precision=fp32", "generator.training.warmup_steps=2",
        "generator.training.checkpoint_every=3", "generator.training.validate_every=6",
        "generator.training.keep_checkpoints=4", "generator.training.threads_per_worker=1",
        f"generator.training.compile={compile}", "sample.num_steps=2", "tracking.enabled=false",
        f"text.weights={encoder}", "text.max_length=30",
        *(f"generator.training.{setting}" for setting in more),
    ]  # fmt: skip


def train(store: LatentStore, encoder: Path, storage: Path, compile: str) -> Path:
    train_generator(load_recipe("photos-dinov2s", values(store, encoder, storage, compile)))
    return storage / "test"


def stopped_at(step: int, run: Path, storage: Path) -> None:
    """A copy of the run as a kill soon after the checkpoint at `step` would have left it."""
    shutil.copytree(run, storage / "test")
    (storage / "test/result.json").unlink()
    (storage / "test/generator.safetensors").unlink()
    for file in (storage / "test/checkpoints").iterdir():
        if int(file.stem.removeprefix("step_")) > step:
            file.unlink()


def record(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "compile.json").read_text()))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(run / "generator.safetensors").module.state_dict()


def assert_same(one: Path, other: Path) -> None:
    for (name, expected), actual in zip(weights(one).items(), weights(other).values(), strict=True):
        assert torch.equal(expected, actual), name


def test_every_length_of_long_captions_is_compiled(graphs, tmp_path):
    model = torch.nn.Linear(1, 1)
    training = TrainingSection(compile=True)
    compiled = Compilation(training, str(tmp_path), [model], torch.device("cpu"), True, 1)
    lengths = range(16, 256 + 1, 16)
    for step, length in enumerate(lengths):
        with compiled.step(step):
            model(torch.zeros(length, 1))
    assert graphs.frame_count == len(lengths)


def test_a_compiled_training_with_an_adaptive_weight_goes_on_when_the_adversary_starts(
    monkeypatch, tmp_path
):
    torch.compiler.reset()
    # Torch's own compiler without its kernels: what it keeps for the backward pass is the same.
    eager = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", eager)
    losses = ["adaptive=true", "adversarial_start=1", "discriminator_start=0", "augment=false",
              "discriminator=backbone", "perceptual=backbone"]  # fmt: skip
    network = ["width=32", "depth=1", "num_heads=2", "training.compile=true"]
    recipe = load_recipe(
        "photos-dinov2s",
        [*TINY, *SMALLEST_BACKBONE, "pixel_decoder.training.precision=fp32"]
        + [f"pixel_decoder.{setting}" for setting in network]
        + [f"pixel_decoder.losses.{setting}" for setting in losses],
    )
    job, blank = pixel_objective.untrained_job(recipe)
    training, device = recipe.pixel_decoder.training, torch.device("cpu")
    state = TrainState(job.model, training, job.adversary)
    compiled = Compilation(training, str(tmp_path), [job.model], device, True, 1, job.retains_graph)
    for step in range(2):
        with compiled.step(step):
            batch = replace(blank(2), step=step)
            terms = train_step(
                state, job.model, job.loss, [batch], training,
                job.adversary.module, job.adversary.loss,
            )  # fmt: skip
    assert terms["adaptive_weight"] > 0


@pytest.mark.integration
def test_a_long_run_is_compiled_after_its_first_steps_and_resumes_compiled(
    store, encoder, graphs, tmp_path, monkeypatch, capsys
):
    train_here(monkeypatch)
    monkeypatch.setattr(compilation, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(compilation, "GAIN", -math.inf)
    run = train(store, encoder, tmp_path / "whole", "auto")
    assert graphs.frame_count > 0
    assert record(run)["first_step"] == 5 and "last_step" not in record(run)
    said = capsys.readouterr().out
    assert "compile=auto: compiled from step 5 on" in said and "auto: stays compiled" in said

    monkeypatch.setattr(compilation, "WORTH_SECONDS", math.inf)
    for step in (3, 9):  # before and after the decisions
        before = graphs.frame_count
        torch.compiler.reset()
        stopped_at(step, run, tmp_path / f"from-{step}")
        assert_same(run, train(store, encoder, tmp_path / f"from-{step}", "auto"))
        assert graphs.frame_count > before


@pytest.mark.integration
def test_a_run_that_did_not_become_faster_goes_back_and_resumes_so(
    store, encoder, graphs, tmp_path, monkeypatch, capsys
):
    train_here(monkeypatch)
    monkeypatch.setattr(compilation, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(compilation, "GAIN", 1.0)
    run = train(store, encoder, tmp_path / "whole", "auto")
    assert "compile=auto: no longer compiled from step 9 on" in capsys.readouterr().out
    assert (record(run)["first_step"], record(run)["last_step"]) == (5, 9)
    for step, compiles in ((6, True), (9, False)):
        before = graphs.frame_count
        torch.compiler.reset()
        stopped_at(step, run, tmp_path / f"from-{step}")
        assert_same(run, train(store, encoder, tmp_path / f"from-{step}", "auto"))
        assert (graphs.frame_count > before) == compiles


@pytest.mark.integration
def test_a_short_run_is_not_compiled_and_resumes_as_it_is(
    store, encoder, graphs, tmp_path, monkeypatch, capsys
):
    train_here(monkeypatch)
    run = train(store, encoder, tmp_path / "whole", "auto")
    assert "compile=auto: not compiled; the steps to come take about" in capsys.readouterr().out
    monkeypatch.setattr(compilation, "WORTH_SECONDS", 0.0)
    stopped_at(6, run, tmp_path / "resumed")
    assert_same(run, train(store, encoder, tmp_path / "resumed", "auto"))
    assert graphs.frame_count == 0


@pytest.mark.integration
def test_without_a_compiler_a_long_run_goes_on_uncompiled(
    store, encoder, graphs, tmp_path, monkeypatch, capsys
):
    train_here(monkeypatch)
    monkeypatch.setattr(compilation, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr("shutil.which", lambda name: None)
    train(store, encoder, tmp_path, "auto")
    assert "no C++ compiler" in capsys.readouterr().out and graphs.frame_count == 0


@pytest.mark.parametrize(
    ("device", "there", "said"),
    [
        ("cuda", "gcc", "compiled from step 5"),
        ("cuda", "g++", "no C compiler"),
        ("cpu", "g++", "compiled from step 5"),
        ("cpu", "gcc", "no C++ compiler"),
    ],
)
def test_a_gpu_needs_a_compiler_of_c_and_a_cpu_one_of_cpp(
    device, there, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(compilation, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr("shutil.which", lambda name: name if name == there else None)
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    training = load_recipe("photos-dinov2s", ["generator.training.compile=auto"]).generator.training
    decides = compilation.Compilation(training, str(tmp_path), [], torch.device(device), True, 1)
    for step in range(compilation.FIRST_STEPS + 1):
        with decides.step(step):
            pass
    assert said in capsys.readouterr().out


@pytest.mark.faults
def test_a_compiled_run_that_was_stopped_ends_at_the_same_bits(
    store, encoder, tmp_path, monkeypatch
):
    """By torch's own compiler, with two lengths of captions that come in another order."""
    train_here(monkeypatch)
    plain = train(store, encoder, tmp_path / "plain", "false")
    run = train(store, encoder, tmp_path / "whole", "true")
    for step in (3, 6):
        torch.compiler.reset()
        stopped_at(step, run, tmp_path / f"from-{step}")
        assert_same(run, train(store, encoder, tmp_path / f"from-{step}", "true"))
    for name, expected in weights(plain).items():
        torch.testing.assert_close(weights(run)[name], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.integration
@pytest.mark.faults
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_workers_decide_together_and_resume_so(
    store: LatentStore,
    encoder: Path,
    tmp_path: Path,
    parallel: str,
    request: pytest.FixtureRequest,
) -> None:
    two = ["num_workers=2", "cpus_per_worker=0.5", f"parallel={parallel}"]
    long = ["steps=1000000", "checkpoint_every=20", "validate_every=1000000", "log_every=5"]
    settings = values(store, encoder, tmp_path, "auto", *two, *long)
    log, run = tmp_path / "log", tmp_path / "test"

    def until(condition: Callable[[], object]) -> subprocess.Popen:
        """The command, once `condition` holds while it runs."""
        command = [sys.executable, "-m", "fae", "train", "generator", "photos-dinov2s", *settings]
        with log.open("w") as file:
            job = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        request.addfinalizer(job.kill)
        wait_for(lambda: job.poll() is not None or condition(), 400)
        assert job.poll() is None, log.read_text()
        return job

    def decided() -> bool:
        return (run / "compile.json").exists() and record(run)["decided"]

    def last_step() -> int:
        names = (path.stem for path in run.glob("checkpoints/step_*"))
        return max((int(name[5:14]) for name in names), default=0)

    job = until(lambda: decided() and last_step() > 20)
    assert "compile=auto: compiled from step 5 on" in log.read_text()
    before = record(run)
    print(parallel, before)
    job.terminate()
    job.wait(60)
    step = last_step()
    job = until(lambda: last_step() > step)
    assert "resumed at step" in log.read_text() and record(run) == before
    job.terminate()
    job.wait(60)
