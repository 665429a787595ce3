"""Trained modules as safetensors files with configuration and fingerprints in the metadata.

`load` rebuilds the module from the file alone. Nothing is unpickled: a file that is not safetensors
is refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fae_core.autoencoder import AutoencoderConfig, FeatureAutoencoder
from fae_core.errors import UserError
from fae_core.generators.dit import DiT, DiTConfig
from fae_core.generators.mmdit import MMDiT, MMDiTConfig
from fae_core.generators.starflow import StarFlow, StarFlowConfig
from fae_core.hashing import tensors_sha256
from fae_core.pixel_decoder import PixelDecoder, PixelDecoderConfig

MODULES: dict[str, tuple[Any, Any]] = {
    "autoencoder": (FeatureAutoencoder, AutoencoderConfig),
    "pixel_decoder": (PixelDecoder, PixelDecoderConfig),
    "dit": (DiT, DiTConfig),
    "mmdit": (MMDiT, MMDiTConfig),
    "starflow": (StarFlow, StarFlowConfig),
}

FILES = {
    "autoencoder": "autoencoder.safetensors",
    "pixel_decoder": "pixel_decoder.safetensors",
    "dit": "generator.safetensors",
    "mmdit": "generator.safetensors",
    "starflow": "generator.safetensors",
}
"""Kind of network -> the name of its file in the folder of a run, or of a published model."""
GENERATORS = tuple(kind for kind, name in FILES.items() if name == "generator.safetensors")
"""The kinds of generators."""

INSTALL_IT = "Install the version that trained it; a published folder's fae.json names it."


class CheckpointError(UserError, ValueError):
    """A file that `save` did not write, or that is incomplete or damaged."""


def save(
    path: str | Path,
    module: nn.Module,
    fingerprints: Mapping[str, str],
    class_names: Sequence[str] = (),
) -> str:
    """Write a module of one of `MODULES` to `path`; returns its `tensors_sha256`.

    The write is atomic: a temporary file is renamed to `path`. `fingerprints` names what the module
    was trained against, `class_names` a generator's classes in the order of their numbers.
    Raises OSError, where the disk is full for example.
    """
    kind = next(name for name, (cls, _) in MODULES.items() if isinstance(module, cls))
    config: Any = module.config
    tensors = {name: t.detach().cpu().contiguous() for name, t in module.state_dict().items()}
    sha256 = tensors_sha256(tensors)
    metadata = {
        "format": "fae-1",
        "kind": kind,
        "config": json.dumps(dataclasses.asdict(config), sort_keys=True),
        "fingerprints": json.dumps(dict(fingerprints), sort_keys=True),
        "weights_sha256": sha256,
    }
    if class_names:
        metadata["class_names"] = json.dumps(list(class_names))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)  # safetensors' own leaves other users out
        temporary.replace(path)
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if not code:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
    return sha256


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A rebuilt module of `kind`, in eval mode on the CPU.

    `fingerprints` names what it was trained against; `weights_sha256` is its `tensors_sha256`.
    `class_names` are a generator's, by number, and empty where its classes have none.
    """

    kind: str
    module: Any
    fingerprints: dict[str, str]
    weights_sha256: str
    class_names: tuple[str, ...] = ()


def halved(loaded: Loaded) -> Loaded:
    """The same network with weights in float16 and their hash: half the bytes of its file.

    `load` makes them float32 again, rounded to 11 bits.
    """
    module = loaded.module.half()
    return dataclasses.replace(
        loaded, module=module, weights_sha256=tensors_sha256(module.state_dict())
    )


def read_metadata(path: str | Path) -> dict[str, str]:
    """The file's metadata: format, kind, config, fingerprints, weights_sha256, class_names.

    Raises CheckpointError for a file that is missing or was not written by `save`.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"No checkpoint at {path}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error}).") from None
    if metadata.get("format") != "fae-1" or metadata.get("kind") not in MODULES:
        raise CheckpointError(
            f"{path} is safetensors, but not a checkpoint that `fae train` wrote."
        )
    return dict(metadata)


def build(kind: str, config: Mapping[str, Any]) -> Any:
    """A module of one of `MODULES` with initial weights; `config` has its configuration's fields.

    Lists are taken for tuples: JSON has no tuples, and the configurations have no lists. Raises
    CheckpointError for a field that is not known here or is missing.
    """
    module_class, config_class = MODULES[kind]
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    try:
        made = config_class(**values)
    except TypeError as error:
        raise CheckpointError(
            f"another version of fae-ray wrote this {kind} ({error}). {INSTALL_IT}"
        ) from None
    return module_class(made)


def load(path: str | Path, *kinds: str) -> Loaded:
    """Rebuild the module that `save` wrote. Where `kinds` are given, it must be of one of them.

    Raises CheckpointError for a file that is missing, of another kind, of another version, or whose
    weights do not match the hash in its metadata.
    """
    metadata = read_metadata(path)
    if kinds and metadata["kind"] not in kinds:
        raise CheckpointError(f"{path} holds a {metadata['kind']}; needed is {' or '.join(kinds)}.")
    try:
        module = build(metadata["kind"], json.loads(metadata["config"]))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    tensors = load_file(str(path))
    if tensors_sha256(tensors) != metadata["weights_sha256"]:
        raise CheckpointError(
            f"{path}: the weights do not match the hash in its metadata; the file is damaged."
        )
    if differing := sorted(module.state_dict().keys() ^ tensors.keys()):
        raise CheckpointError(
            f"{path}: another version of fae-ray wrote it: {len(differing)} tensors are only there "
            f"or only here, the first {differing[0]}. {INSTALL_IT}"
        )
    module.load_state_dict(tensors, strict=True)
    return Loaded(
        metadata["kind"],
        module.eval(),
        json.loads(metadata["fingerprints"]),
        metadata["weights_sha256"],
        tuple(json.loads(metadata.get("class_names", "[]"))),
    )
