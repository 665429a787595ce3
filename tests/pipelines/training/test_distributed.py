"""What a worker of a sharded training holds of the whole network, without Ray."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fae.pipelines.config.sections import TrainingSection
from fae.pipelines.training.batches import Batch, blank_batch
from fae.pipelines.training.distributed import gather, shard
from fae.pipelines.training.state import TrainState
from fae.pipelines.training.step import train_step
from fae_core.generators.dit import DiT, DiTConfig


@pytest.fixture(autouse=True)
def the_only_worker(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0,
                            world_size=1)  # fmt: skip
    yield
    dist.destroy_process_group()


def network() -> DiT:
    torch.manual_seed(0)
    config = DiTConfig(
        4, (4, 4), width=32, depth=8, num_heads=2, num_classes=5, checkpoint_activations=True
    )
    return DiT(config)


@pytest.mark.parametrize("is_first", [True, False], ids=["first worker", "others"])
def test_a_sharded_network_is_gathered_a_tensor_at_a_time(is_first, monkeypatch):
    model = network()
    expected = copy.deepcopy(model.state_dict())
    whole: nn.Module = copy.deepcopy(model)
    for parameter in whole.parameters():
        parameter.data.zero_()
    shard(model)
    gathered: list[weakref.ref[torch.Tensor]] = []
    full_tensor = DTensor.full_tensor

    def recorded(tensor: DTensor) -> torch.Tensor:
        assert not any(kept() is not None for kept in gathered)
        full = full_tensor(tensor)
        gathered.append(weakref.ref(full))
        return full

    monkeypatch.setattr(DTensor, "full_tensor", recorded)
    gather(model, whole if is_first else model)
    assert len(gathered) == len(list(model.parameters()))
    if is_first:
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, expected[name]), name


class Casts(TorchDispatchMode):
    """The matrices that were cast to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        if function is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            self.all.append(weakref.ref(result))
        return result


def test_a_sharded_network_in_bf16_keeps_no_casts_of_layers_that_are_computed_again():
    model = network().train()
    shard(model)
    layers = sum(p.ndim > 1 for p in model.blocks.parameters())
    kept: list[int] = []

    def loss(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        with Casts() as casts:
            output = model(batch["latents"], torch.rand(2), torch.zeros(2, dtype=torch.long))
        assert len(casts.all) > layers
        kept.append(sum(cast() is not None for cast in casts.all))
        return {"loss": output.square().mean()}

    training = TrainingSection(precision="bf16", batch_size=2)
    batch = blank_batch({"latents": torch.randn(2, 4, 4, 4)})
    train_step(TrainState(model, training), model, loss, [batch], training)
    assert kept[0] < layers / 2
