"""`fae publish`: a folder with networks, what they were trained with, and a model card.

The folder holds each network as `fae train` wrote it, README.md, config.json, recipes and pictures.
fae.json has the fingerprints, the latent statistics, the versions, and size and SHA-256 of every
other file.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fae_core import checkpoint
from fae_core.layers import num_parameters

from ..runtime.packages import versions
from ..storage import fingerprint_of, paths
from .card import model_card
from .diffusers_layout import check_diffusers, write_diffusers
from .findings import Findings, Network, PublishError, find
from .recipes import published_recipe
from .upload import ACCOUNT, file_account

FORMAT = "fae-published-1"


def publish(
    places: Sequence[str],
    output: str,
    license_name: str = "unknown",
    name: str | None = None,
    half: bool = False,
    diffusers: bool = False,
) -> dict[str, Any]:
    """Write what is at `places` (findings.py) into the new folder `output`; returns its fae.json.

    `license_name` is the licence of the weights, as the Hub names licences. `name` is what the
    model is called in its card, OWNER/NAME where it will be pushed. `half` stores weights in
    float16. `diffusers` adds the files of diffusers_layout.py. `output` is a local folder or an
    s3:// prefix that does not exist or is empty. Raises PublishError and CheckpointError.
    """
    if next(iter(paths.list_files(output)), None) is not None:
        raise PublishError(f"{output} is not empty: a model is published whole into a new folder.")
    found = find(places, half)
    if diffusers:
        check_diffusers(found)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write_networks(found, folder, half)
        account: dict[str, Any] = {"format": FORMAT, **describe(found)}
        recipes = _recipes(found)
        for file, text in recipes.items():
            (folder / file).write_text(text)
        if found.pictures:
            (folder / "pictures").mkdir()
        for file, png in found.pictures.items():
            (folder / "pictures" / file).write_bytes(png)
        if diffusers:
            write_diffusers(found, folder, account["latents"], recipes.get("recipe.yaml"))
        else:
            _write_config(folder, account)
        title = name or output.rstrip("/").rpartition("/")[2]
        (folder / "README.md").write_text(
            model_card(found, account, _account_of(folder), title, license_name, diffusers)
        )
        text = json.dumps({**account, "files": _account_of(folder)}, indent=1)
        (folder / ACCOUNT).write_text(text)
        _copy(folder, output)
    return dict(json.loads(text))


def describe(found: Findings) -> dict[str, Any]:
    """Networks, latents and versions, as fae.json states them."""
    return {
        "networks": {name: _network(network) for name, network in found.networks.items()},
        "latents": latent_statistics(found),
        "versions": {"fae-ray": _own_version(), **versions()},
    }


def latent_statistics(found: Findings) -> dict[str, Any] | None:
    """Per-channel mean and std of the raw latents: the generator's, else the store's."""
    if generator := found.networks.get("generator"):
        model = generator.loaded.module
        mean, std = model.latent_mean, model.latent_std
        shape = [model.config.latent_dim, *model.config.grid]
        return {"shape": shape, "mean": mean.tolist(), "std": std.tolist()}
    if found.store is None:
        return None
    stats = found.store.stats
    return {
        "shape": list(found.store.latent_shape),
        "mean": np.asarray(stats.mean, np.float64).tolist(),
        "std": np.asarray(stats.std, np.float64).tolist(),
    }


def _network(network: Network) -> dict[str, Any]:
    loaded = network.loaded
    config = dataclasses.asdict(loaded.module.config)
    return {
        "file": f"{network.name}.safetensors",
        "kind": loaded.kind,
        "num_parameters": num_parameters(loaded.module),
        "config": config,
        "trained_with": loaded.fingerprints,
        "weights_sha256": loaded.weights_sha256,
        "fingerprint": fingerprint_of({"weights": loaded.weights_sha256, **loaded.fingerprints}),
        "metrics": dict(network.metrics),
        "num_images": network.num_images,
    }


def _write_networks(found: Findings, folder: Path, half: bool) -> None:
    for name, network in found.networks.items():
        file, loaded = folder / f"{name}.safetensors", network.loaded
        if half:
            checkpoint.save(file, loaded.module, loaded.fingerprints, loaded.class_names)
            continue
        with paths.local_copy(network.uri) as path:
            shutil.copyfile(path, file)


def _recipes(found: Findings) -> dict[str, str]:
    """Published recipes by file name.

    recipe.yaml is the chain's, else the autoencoder's, else that of the first network.
    """
    if found.chain_recipe is not None and paths.exists(found.chain_recipe):
        return {"recipe.yaml": _read_recipe(found.chain_recipe)}
    there = {}
    for name, network in found.networks.items():
        # A folder that was published may hold recipes of several networks.
        for file in (f"recipe-{name}.yaml", "recipe.yaml"):
            if paths.exists(uri := paths.join(network.folder, file)):
                there[name] = uri
                break
    first = "autoencoder" if "autoencoder" in there else next(iter(there), "")
    return {
        "recipe.yaml" if name == first else f"recipe-{name}.yaml": _read_recipe(uri)
        for name, uri in there.items()
        if name == first or uri != there[first]
    }


def _read_recipe(uri: str) -> str:
    return published_recipe(paths.read_bytes(uri).decode())


def _write_config(folder: Path, account: Mapping[str, Any]) -> None:
    """Write config.json, by whose presence the Hub counts downloads."""
    parts = {name: network["config"] for name, network in account["networks"].items()}
    config = {"library_name": "fae-ray", "networks": parts}
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _account_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of `folder` by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_account(path) for path in files}


def _copy(folder: Path, output: str) -> None:
    """Copy the finished folder to `output`; fae.json comes last, and says that it is whole."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path.name == ACCOUNT):
        with paths.writing(paths.join(output, path.relative_to(folder).as_posix())) as place:
            shutil.copyfile(path, place)


def _own_version() -> str:
    try:
        return importlib.metadata.version("fae-ray")
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return "0+unknown"
