"""Checkpoints in parts: each worker writes its rows, and an index completes them."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from typer.testing import CliRunner

from fae.cli import app
from fae.pipelines.config.sections import TrainingSection
from fae.pipelines.storage import paths, s3
from fae.pipelines.training import checkpoint_files
from fae.pipelines.training.checkpoint_files import list_checkpoints
from fae.pipelines.training.checkpoints import Checkpoints
from fae.pipelines.training.distributed import shard
from fae.pipelines.training.state import TrainState
from tests.fault_proxy import FaultProxy
from tests.workers import on_workers

IN_PARTS = TrainingSection(checkpoint_parts=True, ema_decay=0.5)


class Network(nn.Module):
    """Rows that two and three workers cannot share evenly, one row alone, gains, and a buffer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.places = nn.Parameter(torch.randn(1, 100 * width))
        self.unused = nn.Parameter(torch.randn(3))
        self.register_buffer("mean", torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x) * self.places.view(100, -1).mean(0) - self.mean


def new_state(sharded: bool = False, width: int = 203) -> TrainState:
    torch.manual_seed(0)
    model = Network(width)
    if sharded:
        shard(model)
    return TrainState(model, IN_PARTS)


def train(state: TrainState, until: int) -> None:
    """All workers with the same images, so that a mean over two of them changes no bit."""
    network = state.networks["model"]
    while state.step < until:
        network.prepare(1.0)
        generator = torch.Generator().manual_seed(state.step)
        state.model(
            torch.randn(4, state.model.mean.numel(), generator=generator)
        ).square().mean().backward()
        network.optimizer.step()
        state.step += 1
        state.update_ema()
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(10 * until + rank)  # each worker its own


def save_at(run: str, sharded: bool, steps: tuple[int, ...], width: int = 203) -> dict[str, Any]:
    """Train and save at `steps` without gathering anything; what the state holds in the end."""
    state = new_state(sharded, width)
    gather = DTensor.full_tensor
    DTensor.full_tensor = None  # type: ignore[assignment]
    for step in steps:
        train(state, step)
        Checkpoints(run, IN_PARTS).save(state)
    DTensor.full_tensor = gather
    return state.content()


def resumed(
    run: str, sharded: bool, until: int = 0, width: int = 203
) -> tuple[str, dict[str, Any], list[str]]:
    """What a state says and holds that resumed and trained on, and the files that it read."""
    state, read = new_state(sharded, width), []
    copy = paths.local_copy

    def recorded(uri: str) -> Any:
        read.append(Path(uri).name)
        return copy(uri)

    paths.local_copy = recorded
    text = Checkpoints(run, IN_PARTS).resume(state)
    paths.local_copy = copy
    rng = torch.get_rng_state()
    train(state, until)
    return text, {**state.content(), "rng": rng}, read


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return one == other


def without_rng(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "rng"}


def files(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def parts_of(run: Path, step: int) -> list[Path]:
    return sorted((run / "checkpoints").glob(f"step_{step:09d}-*.part"))


@pytest.fixture(scope="module", params=[False, True], ids=["ddp", "fsdp"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that two workers saved at steps 1 and 2: its folder, and what each of them held."""
    run = tmp_path_factory.mktemp("run")
    return run, on_workers(2, save_at, str(run), request.param, (1, 2)), request.param


def test_each_worker_writes_half_and_the_index_names_both(written: Any) -> None:
    run = written[0]
    for step in (1, 2):
        first, second = parts_of(run, step)
        assert 1.0 < first.stat().st_size / second.stat().st_size < 1.7
    whole = Checkpoints(str(run / "whole"), TrainingSection())
    state = new_state()
    train(state, 1)
    whole.save(state)
    size = (run / "whole" / "checkpoints" / "step_000000001.pt").stat().st_size
    assert size < sum(path.stat().st_size for path in parts_of(run, 1)) < 1.1 * size
    index = checkpoint_files.read_index(str(run / "checkpoints" / "step_000000002.json"))
    assert [(part.file, part.bytes) for part in index] == [
        (path.name, path.stat().st_size) for path in parts_of(run, 2)
    ]


@pytest.mark.parametrize(
    ("workers", "sharded"), [(1, False), (2, False), (2, True), (3, True)], ids=str
)
def test_any_number_of_workers_resumes_to_the_bit_sharded_or_not(
    written: Any, workers: int, sharded: bool
) -> None:
    run, held, _ = written
    for rank, (text, content, read) in enumerate(on_workers(workers, resumed, str(run), sharded)):
        assert text == f"resumed at step 2 from {run}/checkpoints/step_000000002.json"
        assert alike(without_rng(content), without_rng(held[0]))
        assert torch.equal(content["rng"], held[rank % 2]["rng"])
        if sharded and workers == 2:
            assert read == [parts_of(run, 2)[rank].name], "a worker reads its own part alone"


def test_a_run_that_resumed_ends_at_the_bits_of_one_that_was_not_interrupted(
    written: Any, tmp_path: Path
) -> None:
    run, _, sharded = written
    whole = on_workers(2, save_at, str(tmp_path), sharded, (4,))
    for (_, content, _), expected in zip(
        on_workers(2, resumed, str(run), sharded, 4), whole, strict=True
    ):
        assert alike(without_rng(content), without_rng(expected))


def test_a_network_of_small_tensors_that_was_sharded_resumes_whole(tmp_path: Path) -> None:
    held, _ = on_workers(2, save_at, str(tmp_path), True, (1,), 16)
    _, content, read = resumed(str(tmp_path), False, width=16)
    assert len(read) == 2
    assert alike(without_rng(content), without_rng(held))


def test_two_sharded_workers_resume_from_one_file(tmp_path: Path) -> None:
    state = new_state()
    train(state, 2)
    Checkpoints(str(tmp_path), TrainingSection()).save(state)
    for text, content, _ in on_workers(2, resumed, str(tmp_path), True):
        assert text.endswith("step_000000002.pt")
        assert alike(without_rng(content), without_rng(state.content()))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (lambda run: flip(parts_of(run, 2)[1]), "part: the checksum of .* is wrong"),
    "cut": (lambda run: os.truncate(parts_of(run, 2)[1], 9000), "part: 9,000 of .* bytes"),
    "missing": (lambda run: parts_of(run, 2)[1].unlink(), "-2-of-2-.*part: missing"),
    "index": (
        lambda run: os.truncate(run / "checkpoints" / "step_000000002.json", 50),
        "its index cannot be read",
    ),
    "another's": (
        lambda run: shutil.copy(parts_of(run, 2)[0], parts_of(run, 2)[1]),
        "of .* bytes",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_part_makes_all_fall_back_to_the_checkpoint_before(
    written: Any, tmp_path: Path, damage: str
) -> None:
    run, _, sharded = written
    copied = shutil.copytree(run, tmp_path / "run")
    act, said = DAMAGE[damage]
    act(copied)
    alone = resumed(str(copied), False)
    assert re.search(f"step_000000002.json is damaged .*{said}", alone[0]), alone[0]
    assert alone[0].endswith("step_000000001.json") and alone[1]["step"] == 1
    if damage == "flipped":  # under FSDP the second worker alone reads it
        for text, content, _ in on_workers(2, resumed, str(copied), sharded):
            assert text == alone[0]
            assert alike(without_rng(content), without_rng(alone[1]))


def killed_while_saving(run: str, at_index: bool) -> None:
    """The first worker ends before the index, or the second one in the middle of its part."""
    state = new_state()
    Checkpoints(run, IN_PARTS).resume(state)
    train(state, 2)

    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        kill()

    if at_index and dist.get_rank() == 0:
        checkpoint_files.write_index = kill
    if not at_index and dist.get_rank() == 1:
        import fae.pipelines.training.checkpoints as module

        module.write_content = half  # type: ignore[attr-defined]
    Checkpoints(run, IN_PARTS).save(state)


@pytest.mark.parametrize("at_index", [True, False])
def test_a_kill_during_a_save_leaves_the_one_before_and_the_next_save_cleans_up(
    tmp_path: Path, at_index: bool
) -> None:
    run = str(tmp_path)
    (first, _) = on_workers(2, save_at, run, False, (1,))
    with pytest.raises(RuntimeError):  # the killed one's, or the other's that waits for it
        on_workers(2, killed_while_saving, run, at_index)
    left = {Path(file.uri).name for file in checkpoint_files.parts_without_index(run)}
    assert left and (not at_index or len(left) == 2)
    assert [Path(uri).name for uri in list_checkpoints(run)] == ["step_000000001.json"]
    text, content, _ = resumed(run, False)
    assert "resumed at step 1" in text and alike(without_rng(content), without_rng(first))
    on_workers(2, save_at, run, False, (2,))  # the same step again
    assert not left & set(files(tmp_path))
    assert len(files(tmp_path)) == 6 and not checkpoint_files.parts_without_index(run)
    on_workers(2, save_at, run, False, (3,))
    kept = [name for name in files(tmp_path) if name.endswith("json")]
    assert kept == ["step_000000002.json", "step_000000003.json"] and len(files(tmp_path)) == 6


def test_parts_are_chosen_from_one_gib_on_where_several_workers_train() -> None:
    gib = 1 << 30
    auto, never = TrainingSection(), TrainingSection(checkpoint_parts=False)
    assert checkpoint_files.num_parts(auto, 4, gib) == 4
    assert checkpoint_files.num_parts(auto, 4, gib - 1) == 1
    assert checkpoint_files.num_parts(auto, 1, 9 * gib) == 1
    assert checkpoint_files.num_parts(never, 4, 9 * gib) == 1
    assert checkpoint_files.num_parts(IN_PARTS, 4, 1) == 4


def one_cannot_write(run: str) -> str:
    state = new_state()
    train(state, 1)
    if dist.get_rank() == 1:
        run = "/proc/nowhere"
    try:
        Checkpoints(run, IN_PARTS).save(state)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_where_one_worker_cannot_write_its_part_all_say_so(tmp_path: Path) -> None:
    first, second = on_workers(2, one_cannot_write, str(tmp_path))
    assert first.startswith("TrainingError: worker 1 of 2: Cannot write /proc/nowhere")
    assert second.startswith("FileError: Cannot write /proc/nowhere")
    assert not list_checkpoints(str(tmp_path))


def save_on_s3(run: str, environment: dict[str, str], limit: int) -> dict[str, Any]:
    os.environ.update(environment)
    s3.PART_SIZE = s3.RANGE_SIZE = limit
    return save_at(run, True, (2,), width=1100)


def test_parts_above_the_limit_of_one_put_are_written_and_resumed_to_the_bit(
    limited_s3: FaultProxy, tmp_path: Path
) -> None:
    run, limit = f"s3://large/{tmp_path.name}", limited_s3.put_limit or 0
    names = ("AWS_", "FAE_")
    environment = {key: value for key, value in os.environ.items() if key.startswith(names)}
    limited_s3.inject("cut upload", 2, lambda method, path: "partNumber=2" in path)
    held = on_workers(2, save_on_s3, run, environment, limit)
    sizes = [file.size for file in paths.list_files(run) if file.uri.endswith(".part")]
    assert len(sizes) == 2 and min(sizes) > 2 * limit
    state = new_state(width=1100)
    limited_s3.inject("cut answer", 2, lambda method, path: method == "GET" and ".part" in path)
    assert Checkpoints(run, IN_PARTS).resume(state).startswith("resumed at step 2")
    assert limited_s3.injected == {"cut upload": 2, "cut answer": 2}
    assert alike(without_rng(state.content()), without_rng(held[0]))

    def doctor() -> str:
        result = CliRunner().invoke(app, ["doctor", "s3://large"])
        assert result.exit_code == 0, result.output
        return result.output

    assert "without an index" not in doctor()
    paths.delete(list_checkpoints(run)[0])
    assert f"2 parts without an index in {run}/checkpoints" in doctor()
