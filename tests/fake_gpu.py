"""A GPU of which only devices, shapes and types exist: what would fail or wait on a real one shows
on any machine.

torch's fake tensors carry a device without having one, and refuse operations between devices.
`Waits` sits before them and counts what makes the processor wait for the device: reading a value,
and a copy that is not asked to be asynchronous. Backward passes need a driver; they are torch's
own, and are left out: gradients are zeros where there would be some.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda:0")


class Waits(TorchDispatchMode):
    """Where the processor waited: the names of the operations, in order. Every value that is read
    is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func is torch.ops.aten._local_scalar_dense.default:
            if isinstance(first, FakeTensor) and first.device.type == "cuda":
                self.operations.append("read")
            return True if first.dtype == torch.bool else 1
        if func.namespace == "aten":
            with self:  # inference mode hands over operations whole that others see in parts
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        source, asynchronous = first, kwargs.get("non_blocking", False)
        if func is torch.ops.aten.copy_.default:
            source, asynchronous = args[1], (args[2] if len(args) > 2 else asynchronous)
        elif func is not torch.ops.aten._to_copy.default:
            return result
        kinds = {source.device.type, result.device.type}
        if kinds == {"cpu", "cuda"} and not asynchronous:
            self.operations.append(f"copy to {result.device.type}")
        return result


class FakeGPU:
    """`place` modules and tensors on it outside `running`; compute on them inside."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=False)
        self.parameters: list[nn.Parameter] = []

    def tensor(self, real: Tensor, device: torch.device = GPU) -> Tensor:
        """A fake of `real` on `device`."""
        real = real.detach()
        with self.mode:
            return self.mode.from_tensor(real).to(device)

    def place(self, module: nn.Module, device: torch.device = GPU) -> nn.Module:
        """The module with its parameters and buffers on `device`; a tensor that is neither stays
        behind and is found."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    made = nn.Parameter(self.tensor(parameter, device), parameter.requires_grad)
                    part._parameters[name] = made
                    self.parameters.append(made)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = self.tensor(buffer, device)
        return module

    @contextmanager
    def running(self) -> Iterator[Waits]:
        """bfloat16 autocast believes in the GPU; what waits for it is counted."""
        believe = mock.patch.multiple(torch.cuda, is_bf16_supported=lambda: True)
        common = mock.patch.object(
            torch.cuda.amp.common, "amp_definitely_not_available", lambda: False
        )
        # A function, not a method: torch.Tensor is to bind it.
        backward = mock.patch.object(Tensor, "backward", lambda loss: self._backward(loss))
        grad = mock.patch.object(torch.autograd, "grad", _grad)
        with believe, common, backward, grad, self.mode, Waits() as waits:
            yield waits

    def _backward(self, loss: Tensor) -> None:
        assert loss.device == GPU and loss.requires_grad
        for parameter in self.parameters:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)


def _grad(outputs: Tensor, inputs: Tensor, **_: Any) -> tuple[Tensor]:
    return (torch.zeros_like(inputs),)
