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
from fae.pipelines.training.checkpoint_files import checkpoint_uri, list_checkpoints
from fae.pipelines.training.checkpoints import Checkpoints
from fae.pipelines.training.job import TrainingError
from fae.pipelines.training.state import TrainState
from tests.fault_proxy import FaultProxy

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Bomb:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.path),)


def new_state(width: int = 200) -> TrainState:
    torch.manual_seed(0)
    return TrainState(nn.Linear(width, width), TrainingSection(ema_decay=0.5))


def save_checkpoint(state: TrainState, run: str, keep: int) -> None:
    Checkpoints(run, TrainingSection(keep_checkpoints=keep)).save(state)


def resume(state: TrainState, run: str) -> str:
    return Checkpoints(run, TrainingSection()).resume(state)


def take_step(state: TrainState, step: int) -> None:
    network = state.networks["model"]
    network.prepare(1.0)
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, state.model.in_features, generator=generator)
    state.model(x).square().mean().backward()
    network.optimizer.step()
    state.step = step + 1
    state.update_ema()


def everything(state: TrainState) -> list[torch.Tensor]:
    """Weights, averages and AdamW's moments, in an order."""
    network = state.networks["model"]
    moments = [network.optimizer.state[p][name] for p in network.parameters for name in MOMENTS]
    return [*(p.detach() for p in network.parameters), *state.ema, *moments]


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


def test_a_checkpoint_above_the_limit_of_one_put_is_written_and_resumed_to_the_bit(
    limited_s3: FaultProxy, tmp_path: Path
) -> None:
    run = f"s3://large/{tmp_path.name}"
    whole = new_state(width=900)
    for step in range(3):
        take_step(whole, step)
        if step == 1:
            limited_s3.inject("cut upload", 2, lambda method, path: "partNumber=2" in path)
            save_checkpoint(whole, run, keep=1)
    (uri,) = list_checkpoints(run)
    assert next(paths.list_files(uri)).size > 2 * (limited_s3.put_limit or 0)
    with pytest.raises(paths.StorageError, match="EntityTooLarge"), paths.local_copy(uri) as path:
        paths.write_bytes(f"{run}/one-put", path.read_bytes())
    resumed = new_state(width=900)
    limited_s3.inject("cut answer", 2, lambda method, path: method == "GET" and ".pt" in path)
    assert resume(resumed, run).startswith("resumed at step 2")
    assert limited_s3.injected == {"cut upload": 2, "cut answer": 2}
    take_step(resumed, 2)
    assert all(map(torch.equal, everything(whole), everything(resumed)))


def test_a_resumed_state_holds_nothing_of_the_file_it_came_from(tmp_path: Path) -> None:
    first = new_state()
    take_step(first, 0)
    save_checkpoint(first, str(tmp_path), keep=1)
    (uri,) = list_checkpoints(str(tmp_path))
    second = new_state()
    resume(second, str(tmp_path))
    with open("/proc/self/maps") as maps:
        assert uri not in maps.read()
    before = Path(uri).read_bytes()
    take_step(second, 1)
    assert Path(uri).read_bytes() == before


def test_what_a_killed_writer_left_beside_the_checkpoints_is_removed_by_the_next(
    tmp_path: Path,
) -> None:
    write_run(str(tmp_path), (2,))
    left = tmp_path / "checkpoints" / ".step_000000004.pt.0123.tmp"
    left.write_bytes(b"half")
    write_run(str(tmp_path), (4,))
    assert [Path(uri).name for uri in list_checkpoints(str(tmp_path))] == [
        "step_000000002.pt",
        "step_000000004.pt",
    ]
    assert not left.exists()
