"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.config.sections import TrainingSection
from fae.pipelines.storage import paths
from fae.pipelines.training import checkpoints as module
from fae.pipelines.training.autoencoder import train_autoencoder
from fae.pipelines.training.checkpoint_files import checkpoint_uri, list_checkpoints
from fae.pipelines.training.checkpoints import Checkpoints
from fae.pipelines.training.preemption import NodeLeaving
from fae.pipelines.training.state import TrainState
from fae.pipelines.training.step import NonFiniteError
from tests.fault_proxy import FaultProxy
from tests.here import leave_ray_out, train_here
from tests.pipelines.training.test_checkpoint_parts import alike, new_state, save_at, train
from tests.tiny import ROOT, noisy_jpegs, wait_for
from tests.workers import on_workers

IN_BACKGROUND = TrainingSection(checkpoint_background=True, ema_decay=0.5)


def resumed_content(run: str) -> dict[str, Any]:
    state = new_state()
    Checkpoints(run, IN_BACKGROUND).resume(state)
    return state.content()


def test_training_goes_on_while_the_state_of_the_save_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, write = threading.Event(), module.write_content

    def held(content: Any, path: Path) -> None:
        assert may_write.wait(60)
        write(content, path)

    monkeypatch.setattr(module, "write_content", held)
    run = str(tmp_path)
    state, checkpoints = new_state(), Checkpoints(run, IN_BACKGROUND)
    train(state, 2)
    expected = state.content(copy=True)
    checkpoints.save(state)
    train(state, 4)
    checkpoints.check()
    assert not list_checkpoints(run)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(checkpoints.save, state)
        time.sleep(0.3)
        assert not second.done(), "one is in flight at most"
        may_write.set()
        second.result()
    assert checkpoint_uri(run, 2) in list_checkpoints(run)
    checkpoints.wait()
    assert list_checkpoints(run) == [checkpoint_uri(run, step) for step in (2, 4)]
    assert alike(resumed_content(run), state.content())
    paths.delete(checkpoint_uri(run, 4))
    assert alike(resumed_content(run), expected)


@pytest.mark.integration
def test_a_failed_upload_fails_the_run_at_its_next_step_save_or_end(
    limited_s3: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAE_S3_PATIENCE", "0")
    run, state = f"s3://large/{tmp_path.name}", new_state()
    checkpoints = Checkpoints(run, IN_BACKGROUND)

    def steps() -> None:
        def fails() -> bool:
            checkpoints.check()
            return False

        wait_for(fails)

    for notice in (steps, lambda: checkpoints.save(state), checkpoints.wait):
        train(state, state.step + 1)
        limited_s3.inject("cut upload", 1, lambda method, path: method == "PUT")
        checkpoints.save(state)
        with pytest.raises(paths.StorageError, match=f"write .*step_00000000{state.step}.pt"):
            notice()
    checkpoints.save(state)
    checkpoints.wait()
    assert list_checkpoints(run) == [checkpoint_uri(run, 3)]


def save_in_background(run: str, sharded: bool) -> dict[str, Any]:
    state = new_state(sharded)
    training = IN_BACKGROUND.model_copy(update={"checkpoint_parts": True})
    checkpoints = Checkpoints(run, training)
    for step in (1, 2, 3):
        train(state, step)
        checkpoints.save(state)
    held = state.content(copy=True)
    train(state, 4)
    checkpoints.wait()
    return held


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_workers_write_their_parts_in_the_background_while_they_train_together(
    tmp_path: Path, sharded: bool
) -> None:
    background, before = str(tmp_path / "background"), str(tmp_path / "before")
    held, _ = on_workers(2, save_in_background, background, sharded)
    names = [Path(uri).name for uri in list_checkpoints(background)]
    assert names == ["step_000000002.json", "step_000000003.json"]
    assert len(list((tmp_path / "background" / "checkpoints").iterdir())) == 6
    on_workers(2, save_at, before, sharded, (1, 2, 3))
    content = resumed_content(background)
    assert alike(content, resumed_content(before))
    assert alike(content["networks"], held["networks"])


@pytest.fixture
def run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trains the tiny autoencoder in this process as the run of a name; writing takes a while."""
    (tmp_path / "images").mkdir()
    for number, jpeg in enumerate(noisy_jpegs(24)):
        (tmp_path / "images" / f"{number:02d}.jpg").write_bytes(jpeg)
    leave_ray_out(monkeypatch)
    train_here(monkeypatch, on_cluster=True)
    write = module.write_content

    def slowly(content: Any, path: Path) -> None:
        time.sleep(0.5)
        write(content, path)

    monkeypatch.setattr(module, "write_content", slowly)
    monkeypatch.setattr("fae.pipelines.training.preemption.node_leaves", lambda: False)
    monkeypatch.setattr("fae.pipelines.training.preemption.same_for_all", lambda _: 1)

    def run(name: str, background: bool = True, every: int = 2) -> Path:
        training = (f"checkpoint_background={background}", f"checkpoint_every={every}")
        values = [f"data.path={tmp_path}/images", f"storage={tmp_path}/runs", f"run={name}"]
        values += [*(f"autoencoder.training.{one}" for one in training), "tracking.enabled=false"]
        train_autoencoder(load_recipe(str(ROOT / "tests" / "tiny_chain.yaml"), values))
        return tmp_path / "runs" / name

    return run


def saved(tmp_path: Path, run: str) -> list[str]:
    return [Path(uri).name for uri in list_checkpoints(str(tmp_path / "runs" / run))]


@pytest.mark.integration
def test_a_run_in_the_background_ends_at_the_same_bits_with_its_last_checkpoint_complete(
    run_here: Any, tmp_path: Path
) -> None:
    one, other = run_here("before", background=False), run_here("background")
    assert saved(tmp_path, "background") == saved(tmp_path, "before")
    weights = [load_file(folder / "autoencoder.safetensors") for folder in (one, other)]
    assert all(np.array_equal(value, weights[1][name]) for name, value in weights[0].items())
    states = [
        torch.load(folder / "checkpoints" / "step_000000008.pt", weights_only=True)
        for folder in (one, other)
    ]
    assert alike(*states)


def test_a_node_that_leaves_waits_for_its_checkpoint(
    run_here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = [True, False, False]
    monkeypatch.setattr(
        "fae.pipelines.training.preemption.node_leaves", lambda: leaves.pop() if leaves else False
    )
    with pytest.raises(NodeLeaving, match="saved at step 3"):
        run_here("moved", every=1000)
    assert saved(tmp_path, "moved") == ["step_000000003.pt"]


def test_an_error_of_the_training_waits_for_the_checkpoint_that_is_being_written(
    run_here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fae.pipelines.training import loop

    step = loop.train_step

    def fails_later(state: TrainState, model: nn.Module, *rest: Any) -> Any:
        if state.step == 2:
            raise NonFiniteError("step 2")
        return step(state, model, *rest)

    monkeypatch.setattr(loop, "train_step", fails_later)
    with pytest.raises(NonFiniteError):
        run_here("fails")
    assert saved(tmp_path, "fails") == ["step_000000002.pt"]
