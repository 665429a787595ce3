"""What `fae publish` finds at the places that it is given: networks, a latent store, scores.

A place is a .safetensors file, the folder of a training run, a latent store, the output of
`fae sample` or `fae evaluate`, the folder of a chain (`storage` of `fae run`) or of one of its
reports.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow.parquet as pq
from pyarrow import fs

from fae_core.checkpoint import FILES, Loaded, halved
from fae_core.errors import UserError

from ..chain import samples_grid
from ..latents import LatentStore
from ..networks import check_fingerprints, load_checkpoint
from ..storage import paths
from ..training import metrics_log, run_folder

REPORT = "report"
SECOND_DECODER = "finetune"


class PublishError(UserError, ValueError):
    """Places that hold nothing to publish, or networks that do not belong together."""


@dataclass(frozen=True)
class Network:
    """One trained network and what its run recorded."""

    uri: str
    """Its .safetensors file."""
    loaded: Loaded
    metrics: Mapping[str, float]
    """Of the last validation; empty where there is no run folder."""
    num_images: int | None
    """Images that the run planned to train on; None where that is not known."""

    @property
    def name(self) -> str:
        """autoencoder, pixel_decoder or generator: the stem of its file's name."""
        return FILES[self.loaded.kind].removesuffix(".safetensors")

    @property
    def folder(self) -> str:
        """The folder of the file, which is the run's."""
        return self.uri.rpartition("/")[0]


@dataclass
class Findings:
    """Everything that is published, by what it is."""

    networks: dict[str, Network] = field(default_factory=dict)
    """By `Network.name`."""
    store: LatentStore | None = None
    evaluation: str | None = None
    """Folder with scores.json."""
    pictures: dict[str, bytes] = field(default_factory=dict)
    """PNG files by name."""
    chain_recipe: str | None = None
    """Address of the recipe of the whole chain."""

    def add(self, network: Network) -> None:
        """Raises PublishError where there is already a network of this name."""
        if (other := self.networks.get(network.name)) is not None:
            raise PublishError(
                f"Both {other.uri} and {network.uri} are a {network.name}; a folder holds one."
            )
        self.networks[network.name] = network


def find(places: Sequence[str], half: bool = False) -> Findings:
    """What is at `places`, with `half` the networks in float16.

    Raises PublishError and CheckpointError.
    """
    found = Findings()
    for place in places:
        uri = place if paths.is_remote(place) else paths.filesystem(place)[1]
        if not _take(uri, found) and not _take_chain(uri, found):
            raise PublishError(
                f"{place} holds nothing to publish: expected a .safetensors file, the folder of a "
                "finished run, a latent store, scores or samples, or the folder of a chain."
            )
    if not found.networks:
        raise PublishError(f"{', '.join(places)}: no trained network is there.")
    if half:
        found.networks = {
            name: replace(network, loaded=halved(network.loaded))
            for name, network in found.networks.items()
        }
    _check(found)
    return found


def _take(uri: str, found: Findings) -> bool:
    """Add what the file or folder `uri` itself holds; whether that is anything."""
    if uri.endswith(".safetensors"):
        found.add(_network(uri))
        return True
    files = [name for name in dict.fromkeys(FILES.values()) if _has(uri, name)]
    for name in files:
        found.add(_network(paths.join(uri, name)))
    if files:
        figure = metrics_log.figure_uri(uri)
        if paths.exists(figure):
            name = files[0].removesuffix(".safetensors")
            found.pictures[f"{name}.png"] = paths.read_bytes(figure)
    elif _has(uri, "scores.json"):
        found.evaluation = uri
    elif _has(uri, "manifest.json") and _has(uri, "plan.parquet"):
        found.store = LatentStore.open(uri)
    elif _has(uri, "manifest.json") and _has(uri, "shards"):
        found.pictures["samples.png"] = samples_grid(uri)
    else:
        return False
    return True


def _take_chain(uri: str, found: Findings) -> bool:
    """Add the stages of the chain at `uri`, its storage or its report."""
    if (parts := _stage(uri, REPORT)) is not None:
        report, storage = uri, uri.rpartition("/")[0]
    else:
        storage, folders = uri, _folders(uri)
        reports = [folder for folder in folders if _stage(folder, REPORT) is not None]
        if len(reports) > 1:
            raise PublishError(
                f"{uri} holds the results of {len(reports)} chains. Name the report of one: "
                f"{', '.join(sorted(reports))}."
            )
        if not reports:
            return _take_stages(folders, found)
        (report,) = reports
        parts = _stage(report, REPORT) or {}
    found.chain_recipe = paths.join(report, "recipe.yaml")
    keys = {name: key for name, key in parts.items() if isinstance(key, str)}
    folders = [paths.join(storage, f"{name}-{key}") for name, key in keys.items()]
    return _take_stages((folder for folder in folders if _stage(folder) is not None), found)


def _take_stages(folders: Iterable[str], found: Findings) -> bool:
    """Add finished stages; a finetuned pixel decoder replaces the one that it started from."""
    finished = [folder for folder in folders if _stage(folder) is not None]
    names = [folder.rpartition("/")[2].rpartition("-")[0] for folder in finished]
    for folder, name in zip(finished, names, strict=True):
        if not (name == "pixel-decoder" and SECOND_DECODER in names):
            _take(folder, found)
    return bool(finished)


def _network(uri: str) -> Network:
    loaded = load_checkpoint(uri)
    folder = uri.rpartition("/")[0]
    metrics = run_folder.result(folder) or {}
    plan, num_images = paths.join(folder, "plan.parquet"), None
    if paths.exists(plan):
        with paths.open_input(plan) as file:
            num_images = pq.ParquetFile(file).metadata.num_rows
    return Network(uri, loaded, metrics, num_images)


def _check(found: Findings) -> None:
    """Raises CheckpointError or PublishError where networks and store do not belong together."""
    autoencoder = found.networks.get("autoencoder")
    if autoencoder is None:
        return
    sha256 = autoencoder.loaded.weights_sha256
    if decoder := found.networks.get("pixel_decoder"):
        wanted = {"backbone": autoencoder.loaded.fingerprints["backbone"]}
        check_fingerprints(decoder.uri, decoder.loaded, wanted)
    if generator := found.networks.get("generator"):
        check_fingerprints(generator.uri, generator.loaded, {"autoencoder": sha256})
    if found.store and found.store.manifest["parts"].get("autoencoder weights") != sha256:
        raise PublishError(f"{found.store.uri} holds no latents of {autoencoder.uri}.")


def _stage(folder: str, name: str | None = None) -> dict[str, Any] | None:
    """What decided the result of the finished stage in `folder`; None where there is none."""
    if name is not None and not folder.rpartition("/")[2].startswith(f"{name}-"):
        return None
    uri = paths.join(folder, "stage.json")
    return dict(json.loads(paths.read_bytes(uri))["parts"]) if paths.exists(uri) else None


def _folders(uri: str) -> list[str]:
    filesystem, path = paths.filesystem(uri)
    selector = fs.FileSelector(path, allow_not_found=True)
    found = filesystem.get_file_info(selector)
    return [paths.join(uri, i.base_name) for i in found if i.type == fs.FileType.Directory]


def _has(uri: str, name: str) -> bool:
    return paths.exists(paths.join(uri, name))
