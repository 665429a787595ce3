"""`fae inspect`: what a latent store or a checkpoint holds, and whether it is sound."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fae_core import checkpoint
from fae_core.figures import pca_map, picture_grid, principal_basis

from ..config import RecipeError, load_recipe
from ..config.sections import DataSection
from ..data.account import Account
from ..data.reading import load_crops
from ..storage import StoreError, paths
from .manifest import missing_shards, read_manifest
from .plan import open_plan
from .reader import LatentStore
from .shards import read_errors
from .verify import verify_store

FIGURE_IMAGES = 8
SHOWN_ERRORS = 5


def inspect(uri: str, verify: bool = False, figure: str | None = None) -> bool:
    """Print what is at `uri`; False where `verify` finds a problem.

    Raises StoreError, CheckpointError, StorageError.
    """
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    if uri.endswith(".safetensors"):
        if figure:
            raise StoreError("A figure is drawn from a latent store, not from a checkpoint.")
        _show_checkpoint(console, uri)
        return True
    if not paths.exists(paths.join(uri, "plan.parquet")):
        raise StoreError(
            f"{uri} holds no latent store (no plan.parquet) and is no .safetensors checkpoint."
        )
    _show_store(console, uri)
    if figure:
        paths.write_bytes(figure, draw_latents(uri))
        console.print(f"figure: {figure}")
    return not verify or _verify(console, uri)


def _show_checkpoint(console: Console, uri: str) -> None:
    with paths.local_copy(uri) as path:
        metadata = checkpoint.read_metadata(path)
        loaded = checkpoint.load(path)
    table = _table(f"{metadata['kind']}  {uri}")
    for name, module in loaded.module.named_children():
        table.add_row(f"{name} parameters", f"{sum(p.numel() for p in module.parameters()):,}")
    for key, value in json.loads(metadata["config"]).items():
        table.add_row(key, str(value))
    for key, value in loaded.fingerprints.items():
        table.add_row(f"trained with {key}", value)
    if names := loaded.class_names:
        table.add_row("class names", f"{len(names)}: {names[0]} … {names[-1]}")
    table.add_row("weights SHA-256", f"{loaded.weights_sha256} (matches)")
    console.print(table)


def _show_store(console: Console, uri: str) -> None:
    plan = open_plan(uri)
    manifest = read_manifest(uri)
    table = _table(f"latent store  {uri}")
    errors = list(read_errors(uri))
    if manifest is None:
        missing = len(missing_shards(uri, plan))
        table.add_row("state", "not finished: run the same precompute command again")
        table.add_row("shards", f"{plan.num_shards - missing} of {plan.num_shards}")
        table.add_row("images", f"{plan.num_images} planned, {len(errors)} errors so far")
    else:
        _add_manifest(table, manifest)
    for part, value in plan.parts.items():
        table.add_row(part, value)
    table.add_row("fingerprint", plan.fingerprint)
    console.print(table)
    if plan.account:
        for line in Account.from_dict(dict(plan.account)).lines():
            console.print(line, markup=False)
    for error in errors[:SHOWN_ERRORS]:
        console.print(f"error: {error['key']} [{error['stage']}] {error['message']}", markup=False)
    if len(errors) > SHOWN_ERRORS:
        console.print(f"… and {len(errors) - SHOWN_ERRORS} more in {paths.join(uri, 'errors')}")


def _add_manifest(table: Table, manifest: dict[str, Any]) -> None:
    channels, height, width = manifest["latent_shape"]
    size = sum(entry["bytes"] for entry in manifest["shards"])
    per_image = 2 * channels * height * width * len(manifest["columns"])
    run = manifest["run"]
    table.add_row("state", "finished")
    table.add_row(
        "images",
        f"{manifest['planned']:,} planned = {manifest['stored']:,} stored"
        f" + {manifest['errors']:,} errors",
    )
    table.add_row("columns", ", ".join(manifest["columns"]))
    table.add_row(
        "latent", f"{channels} x {height} x {width} float16, {per_image:,} bytes an image"
    )
    table.add_row(
        "shards", f"{len(manifest['shards']):,} of {manifest['shard_size']}, {size:,} bytes"
    )
    for name, values in manifest["statistics"].items():
        mean, std = np.array(values["mean"]), np.array(values["std"])
        table.add_row(
            f"{name} by channel",
            f"mean {mean.min():.3f} … {mean.max():.3f}, std {std.min():.3f} … {std.max():.3f}",
        )
    table.add_row(
        "encoded in", f"{run['seconds']:.1f} s ({run['shards_encoded']} shards by the last run)"
    )
    table.add_row("versions", ", ".join(f"{k} {v}" for k, v in run["versions"].items()))


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _verify(console: Console, uri: str) -> bool:
    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\rverified {done}/{total} shards", end=end, file=sys.stderr, flush=True)

    problems = verify_store(uri, show)
    if not problems:
        console.print("verified: every shard is what the manifest says")
        return True
    for problem in problems:
        console.print(f"problem: {problem}", markup=False)
    console.print(
        "Delete the files named above and run the same precompute command again: it encodes "
        "what is missing."
    )
    return False


def draw_latents(uri: str) -> bytes:
    """A PNG of some images, each over the PCA map of its latent; all maps share one basis."""
    store = LatentStore.open(uri)
    if not len(store):
        raise StoreError(f"{uri} stores no latents to draw.")
    num = min(FIGURE_IMAGES, len(store))
    rows = np.linspace(0, len(store) - 1, num).astype(int)
    ends = np.cumsum([entry["rows"] for entry in store.manifest["shards"]])
    column = store.columns[0]
    keys, latents = [], []
    for row in rows:
        index = int(np.searchsorted(ends, row, side="right"))
        shard = store.read_shard(index, ["key", column])
        place = int(row - (ends[index] - len(shard["key"])))
        keys.append((index, shard["key"][place]))
        latents.append(shard[column][place])
    channels, height, width = store.latent_shape
    tokens = np.stack(latents).reshape(num, channels, -1).transpose(0, 2, 1).astype(np.float32)
    basis = principal_basis(tokens)
    maps: list[np.ndarray | None] = [pca_map(t, (height, width), basis) for t in tokens]
    return picture_grid([_photographs(store, keys), maps], [""] * num)


def _photographs(store: LatentStore, keys: list[tuple[int, str]]) -> list[np.ndarray | None]:
    """The crops of the images, None for one that can no longer be read."""
    plan = open_plan(store.uri)
    records = [next(r for r in plan.shard(index) if r.key == key) for index, key in keys]
    data = _data_section(store.uri)
    size = int(plan.parts["image size"])
    images, kept, _ = load_crops(records, size, data)
    found = dict(zip(kept, images, strict=True))
    return [found.get(i) for i in range(len(records))]


def _data_section(uri: str) -> DataSection:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        try:
            path.write_bytes(paths.read_bytes(paths.join(uri, "recipe.yaml")))
            return load_recipe(str(path)).data
        except (paths.StorageError, RecipeError):
            return DataSection()
