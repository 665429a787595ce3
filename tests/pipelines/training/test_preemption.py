"""A node that will be taken away: its step is saved, the workers resume, nothing is repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.config.sections import TrainingSection
from fae.pipelines.training.autoencoder import train_autoencoder
from fae.pipelines.training.launch import fit
from fae.pipelines.training.preemption import NodeLeaving, Notice
from tests.here import leave_ray_out, train_here
from tests.tiny import ROOT, noisy_jpegs


@pytest.mark.integration
def test_the_step_is_saved_and_the_run_ends_at_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    for number, jpeg in enumerate(noisy_jpegs(24)):
        (tmp_path / "images" / f"{number:02d}.jpg").write_bytes(jpeg)
    leave_ray_out(monkeypatch)
    train_here(monkeypatch, on_cluster=True)
    leaves: list[bool] = []
    monkeypatch.setattr(
        "fae.pipelines.training.preemption.node_leaves", lambda: leaves.pop() if leaves else False
    )
    monkeypatch.setattr("fae.pipelines.training.preemption.same_for_all", lambda _: 1)

    def train(run: str) -> None:
        values = [f"data.path={tmp_path}/images", f"storage={tmp_path}/runs", f"run={run}"]
        values += ["autoencoder.training.checkpoint_every=1000", "tracking.enabled=false"]
        train_autoencoder(load_recipe(str(ROOT / "tests" / "tiny_chain.yaml"), values))

    train("undisturbed")
    leaves += [True, False, False]
    with pytest.raises(NodeLeaving, match="saved at step 3"):
        train("moved")
    saved = (tmp_path / "runs" / "moved" / "checkpoints").iterdir()
    assert [path.name for path in saved] == ["step_000000003.pt"]
    train("moved")
    one, other = (
        load_file(tmp_path / "runs" / run / "autoencoder.safetensors")
        for run in ("undisturbed", "moved")
    )
    assert all(np.array_equal(value, other[name]) for name, value in one.items())
    lines = (tmp_path / "runs" / "moved" / "history.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, lines) if "train/loss" in row]
    assert steps == [2, 4, 6, 8]


def test_workers_ask_about_once_a_second_at_any_pace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = 0.0
    monkeypatch.setattr("time.monotonic", lambda: clock)
    monkeypatch.setattr("fae.pipelines.training.preemption.same_for_all", lambda value: value)
    monkeypatch.setattr("fae.pipelines.training.preemption.node_leaves", lambda: True)
    notice = Notice()
    asked = []
    for step in range(1, 42):
        clock += 0.1 if step < 20 else 0.5
        if notice.after_step():
            asked.append(step)
    assert asked == [1, 11, 21, 26, *range(28, 42, 2)]


def test_workers_that_move_are_no_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray.train import WorkerGroupError

    left = [NodeLeaving(f"a node will be taken away: saved at step {n}") for n in range(3)]

    class Trainer:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def fit(self) -> None:
            if left:
                error = left.pop()
                raise WorkerGroupError("", {0: error, 1: error})

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr("ray.train.torch.TorchTrainer", Trainer)
    monkeypatch.setattr("ray.cluster_resources", dict)
    fit(lambda _: None, {}, TrainingSection(max_failures=0), str(tmp_path / "run"))
    assert capsys.readouterr().out.count("the workers resume on the others") == 3 and not left
