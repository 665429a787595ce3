"""`fae export`: a finished latent store in the layouts that other trainers read.

lightningdit: safetensors files with latents, latents_flip and labels, and latents_stats.pt, which
LightningDiT's ImgLatentDataset opens as its own. webdataset: tar shards of KEY.npy and KEY.cls.
npy: one .npy an image in folders of a thousand, as REPA has it, and labels in dataset.json. hf and
lance are in export_tables.py. Values are raw, as stored, not normalized.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import tarfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from fae_core.errors import UserError

from ..storage import paths
from .export_tables import ROWS_PER_FILE, stored_shards, write_hf, write_lance
from .reader import LatentStore

FILES_PER_FOLDER = 1_000


class ExportError(UserError, ValueError):
    """A store that the wanted layout cannot hold."""


def export(uri: str, layout: str, output: str, dtype: str = "float32") -> dict[str, int]:
    """Write the finished store `uri` to `output`; {"rows", "files"}.

    Raises StoreError and ExportError.
    """
    layouts: dict[str, Callable[[LatentStore, str, np.dtype[Any]], int]] = {
        "lightningdit": _lightningdit,
        "webdataset": _webdataset,
        "npy": _npy,
        "hf": write_hf,
        "lance": write_lance,
    }
    if layout not in layouts:
        raise ExportError(f"No layout {layout!r}; there are {', '.join(layouts)}.")
    if dtype not in ("float32", "float16"):
        raise ExportError(f"dtype {dtype!r} is neither float32 nor float16.")
    if next(iter(paths.list_files(output)), None) is not None:
        raise ExportError(f"{output} is not empty: an export is written whole into an empty place.")
    store = LatentStore.open(uri)
    _check(store, layout)
    return {"rows": len(store), "files": layouts[layout](store, output, np.dtype(dtype))}


def _check(store: LatentStore, layout: str) -> None:
    """Raises ExportError where `layout` cannot hold the store, before anything is written."""
    if not len(store):
        raise ExportError(f"{store.uri} stores no latents: there is nothing to export.")
    if layout == "lance" and importlib.util.find_spec("lance") is None:
        raise ExportError("The format lance needs its package: pip install 'fae-ray[lance]'.")
    if layout in ("webdataset", "hf", "lance"):
        return
    needed = ["mean", "mean_flip"] if layout == "lightningdit" else ["mean"]
    if absent := [name for name in needed if name not in store.columns]:
        raise ExportError(
            f"{store.uri} has no {' and no '.join(absent)}, which the layout {layout} holds. "
            f"Precompute with precompute.columns=[{','.join(needed)}]."
        )
    unlabelled = next((key for key, label in store.labels() if label is None), None)
    if unlabelled is not None:
        raise ExportError(f"{unlabelled} has no label, and this layout needs one for each image.")


def _lightningdit(store: LatentStore, output: str, dtype: np.dtype[Any]) -> int:
    files = 0
    held: dict[str, list[np.ndarray]] = {"latents": [], "latents_flip": [], "labels": []}

    def flush() -> None:
        nonlocal files
        arrays = {name: np.concatenate(values) for name, values in held.items()}
        name = f"latents_rank00_shard{files:03d}.safetensors"
        paths.write_bytes(paths.join(output, name), save(arrays))
        files += 1
        for values in held.values():
            values.clear()

    for shard in stored_shards(store):
        held["latents"].append(shard["mean"].astype(dtype))
        held["latents_flip"].append(shard["mean_flip"].astype(dtype))
        held["labels"].append(np.array(shard["label"], np.int64))
        if sum(map(len, held["labels"])) >= ROWS_PER_FILE:
            flush()
    if held["labels"]:
        flush()
    buffer = io.BytesIO()
    stats = {
        "mean": torch.tensor(store.stats.mean, dtype=torch.float32).view(1, -1, 1, 1),
        "std": torch.tensor(store.stats.std, dtype=torch.float32).view(1, -1, 1, 1),
    }
    torch.save(stats, buffer)
    paths.write_bytes(paths.join(output, "latents_stats.pt"), buffer.getvalue())
    return files + 1


def _array_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _webdataset(store: LatentStore, output: str, dtype: np.dtype[Any]) -> int:
    files = 0
    for shard in stored_shards(store):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for row, key in enumerate(shard["key"]):
                # A dot in a name would end WebDataset's key early; a slash would move it.
                name = hashlib.sha256(key.encode()).hexdigest()[:16]
                members = {"json": json.dumps({"key": key}).encode()}
                if shard["label"][row] is not None:
                    members["cls"] = str(shard["label"][row]).encode()
                for column in store.columns:
                    members[f"{column}.npy"] = _array_bytes(shard[column][row].astype(dtype))
                for suffix, data in members.items():
                    member = tarfile.TarInfo(f"{name}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        paths.write_bytes(paths.join(output, f"{files:06d}.tar"), buffer.getvalue())
        files += 1
    return files


def _npy(store: LatentStore, output: str, dtype: np.dtype[Any]) -> int:
    labels, row = [], 0
    for shard in stored_shards(store):
        for place, label in enumerate(shard["label"]):
            name = f"{row // FILES_PER_FOLDER:05d}/img-latents-{row:08d}.npy"
            paths.write_bytes(
                paths.join(output, name), _array_bytes(shard["mean"][place].astype(dtype))
            )
            labels.append([name, label])
            row += 1
    paths.write_bytes(paths.join(output, "dataset.json"), json.dumps({"labels": labels}).encode())
    return row + 1
