"""Damaged, hostile or half-uploaded checkpoints, and a clock that moved.

Resuming takes the newest undamaged one.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
import torch
from torch import nn

from fae.pipelines.config.sections import TrainingSection
from fae.pipelines.storage import paths
from fae.pipelines.training.checkpoints import (
    checkpoint_uri,
    list_checkpoints,
    resume,
    save_checkpoint,
)
from fae.pipelines.training.job import TrainingError
from fae.pipelines.training.state import TrainState
from tests.fault_proxy import FaultProxy


class Bomb:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.path),)


def new_state() -> TrainState:
    torch.manual_seed(0)
    return TrainState(nn.Linear(200, 200), TrainingSection(ema_decay=0.5))


def write_run(uri: str, steps: tuple[int, ...] = (2, 4)) -> dict[int, torch.Tensor]:
    """Checkpoints at `steps`; the weights of each."""
    state, weights = new_state(), {}
    for step in steps:
        with torch.no_grad():
            state.model.weight.add_(1.0)
        state.step = step
        save_checkpoint(state, uri, keep=9)
        weights[step] = state.model.weight.detach().clone()
    return weights


def flipped(data: bytes, folder: Path) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


def hostile(data: bytes, folder: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"step": 4, "networks": Bomb(folder / "exploded"), "ema": [], "rng": None}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flipped, "the checksum of .* is wrong"),
        (lambda data, folder: data[:-1000], "it is no checkpoint"),
        (lambda data, folder: b"", "it is no checkpoint"),
        (hostile, "it is no checkpoint"),
        (lambda data, folder: pickle.dumps(Bomb(folder / "exploded")), "it is no checkpoint"),
    ],
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, damage: Callable[[bytes, Path], bytes], said: str
) -> None:
    weights = write_run(str(tmp_path))
    newest = Path(checkpoint_uri(str(tmp_path), 4))
    newest.write_bytes(damage(newest.read_bytes(), tmp_path))
    state = new_state()
    text = resume(state, str(tmp_path))
    assert state.step == 2 and torch.equal(state.model.weight, weights[2])
    assert "step_000000004.pt is damaged" in text and text.endswith("step_000000002.pt")
    import re

    assert re.search(said, text), text
    assert not (tmp_path / "exploded").exists()


def test_where_every_checkpoint_is_damaged_training_does_not_silently_begin_again(
    tmp_path: Path,
) -> None:
    write_run(str(tmp_path))
    for uri in list_checkpoints(str(tmp_path)):
        os.truncate(uri, 100)
    with pytest.raises(
        TrainingError, match=r"step_000000002.pt is damaged(.|\n)*Delete .*checkpoints"
    ):
        resume(new_state(), str(tmp_path))
    assert resume(new_state(), str(tmp_path / "nothing")) == ""


def test_the_newest_checkpoint_is_the_highest_step_whatever_the_clock_says(tmp_path: Path) -> None:
    write_run(str(tmp_path))
    os.utime(checkpoint_uri(str(tmp_path), 4), (0, 0))
    state = new_state()
    resume(state, str(tmp_path))
    assert state.step == 4


def test_an_interrupted_upload_leaves_the_checkpoint_before_or_is_sent_again(
    s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(s3_server) as proxy:
        for name, value in {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3", endpoint_url=proxy.url).create_bucket(Bucket="runs")
        run = f"s3://runs/{tmp_path.name}"
        weights = write_run(run, (2,))
        proxy.inject("cut upload", 1, lambda method, path: method == "PUT")
        monkeypatch.setenv("FAE_S3_PATIENCE", "0")
        state = new_state()
        state.step = 4
        with pytest.raises(paths.StorageError, match="Cannot write .*step_000000004.pt"):
            save_checkpoint(state, run, keep=1)
        resumed = new_state()
        resume(resumed, run)
        assert resumed.step == 2 and torch.equal(resumed.model.weight, weights[2])
        proxy.inject("cut upload", 2, lambda method, path: method == "PUT")
        monkeypatch.setenv("FAE_S3_PATIENCE", "20")
        save_checkpoint(state, run, keep=1)
        assert proxy.injected["cut upload"] == 3
        assert list_checkpoints(run) == [checkpoint_uri(run, 4)]
        resume(resumed, run)
        assert resumed.step == 4
