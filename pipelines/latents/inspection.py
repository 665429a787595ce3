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
from ..pages import report_page
from ..pages.blocks import Picture, Section, Words
from ..pages.blocks import Table as BlockTable
from ..storage import StoreError, paths
from .manifest import missing_shards, read_manifest
from .plan import TEXT_FORMAT, open_plan
from .reader import LatentStore
from .shards import read_errors
from .token_states import empty_states
from .verify import verify_store

FIGURE_IMAGES = 8
SHOWN_ERRORS = 5


Rows = list[tuple[str, str]]


def inspect(
    uri: str, verify: bool = False, figure: str | None = None, page: str | None = None
) -> bool:
    """Print what is at `uri`; False where `verify` finds a problem.

    A PNG of some latents goes to `figure`, and the same as one HTML file to `page`.

    Raises StoreError, CheckpointError, StorageError.
    """
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    if uri.endswith(".safetensors"):
        if figure:
            raise StoreError("A figure is drawn from a latent store, not from a checkpoint.")
        title, rows = _checkpoint_rows(uri)
        console.print(_table(title, rows))
        if page:
            paths.write_bytes(page, _page(uri, title, rows, [], None))
            console.print(f"page: {page}")
        return True
    if not paths.exists(paths.join(uri, "plan.parquet")):
        raise StoreError(
            f"{uri} holds no latent store (no plan.parquet) and is no .safetensors checkpoint."
        )
    of_text = open_plan(uri).format == TEXT_FORMAT
    if figure and of_text:
        raise StoreError("A figure is drawn from a latent store, not from token states.")
    rows, remarks = _store_rows(uri)
    kind = "token states" if of_text else "latent store"
    console.print(_table(f"{kind}  {uri}", rows))
    for line in remarks:
        console.print(line, markup=False)
    finished = not of_text and read_manifest(uri) is not None
    drawn = draw_latents(uri) if figure or (page and finished) else None
    if figure and drawn:
        paths.write_bytes(figure, drawn)
        console.print(f"figure: {figure}")
    if page:
        paths.write_bytes(page, _page(uri, kind, rows, remarks, drawn))
        console.print(f"page: {page}")
    return not verify or _verify(console, uri)


def _page(uri: str, title: str, rows: Rows, remarks: list[str], figure: bytes | None) -> bytes:
    caption = "Some images, and their latents: principal components as colours, one basis for all."
    sections: list[Section] = [
        ("", [BlockTable(["part", "value"], rows)]),
        ("Pictures", [Picture(figure, caption)] if figure else []),
        ("Account", [Words(line) for line in remarks]),
    ]
    return report_page(uri.rstrip("/").rpartition("/")[2], title, sections, "Made by fae inspect.")


def _checkpoint_rows(uri: str) -> tuple[str, Rows]:
    """A title, and what the checkpoint holds by name."""
    with paths.local_copy(uri) as path:
        metadata = checkpoint.read_metadata(path)
        loaded = checkpoint.load(path)
    rows = [
        (f"{name} parameters", f"{sum(p.numel() for p in module.parameters()):,}")
        for name, module in loaded.module.named_children()
    ]
    rows += [(key, str(value)) for key, value in json.loads(metadata["config"]).items()]
    rows += [(f"trained with {key}", value) for key, value in loaded.fingerprints.items()]
    if names := loaded.class_names:
        rows.append(("class names", f"{len(names)}: {names[0]} … {names[-1]}"))
    rows.append(("weights SHA-256", f"{loaded.weights_sha256} (matches)"))
    return f"{metadata['kind']}  {uri}", rows


def _store_rows(uri: str) -> tuple[Rows, list[str]]:
    """What the store holds by name; then lines about its source and its errors."""
    plan = open_plan(uri)
    manifest = read_manifest(uri, plan.format)
    errors = list(read_errors(uri))
    if manifest is None:
        missing = len(missing_shards(uri, plan))
        rows = [
            ("state", "not finished: run the same precompute command again"),
            ("shards", f"{plan.num_shards - missing} of {plan.num_shards}"),
            ("images", f"{plan.num_images} planned, {len(errors)} errors so far"),
        ]
    else:
        rows = _manifest_rows(manifest)
    rows += [*plan.parts.items(), ("fingerprint", plan.fingerprint)]
    remarks = Account.from_dict(dict(plan.account)).lines() if plan.account else []
    remarks += [
        f"error: {error['key']} [{error['stage']}] {error['message']}"
        for error in errors[:SHOWN_ERRORS]
    ]
    if len(errors) > SHOWN_ERRORS:
        remarks.append(f"… and {len(errors) - SHOWN_ERRORS} more in {paths.join(uri, 'errors')}")
    return rows, remarks


def _manifest_rows(manifest: dict[str, Any]) -> Rows:
    size = sum(entry["bytes"] for entry in manifest["shards"])
    if manifest["format"] == TEXT_FORMAT:
        tokens, dim = manifest["tokens"], manifest["state_dim"]
        per_image = 2 * tokens * dim / max(1, manifest["stored"])
        content = f"{tokens:,} tokens of {dim} x float16, {per_image:,.0f} bytes an image"
        empty = f"{len(empty_states(manifest))} tokens"
        values = [("states", content), ("empty caption", empty)]
    else:
        channels, height, width = manifest["latent_shape"]
        per_image = 2 * channels * height * width * len(manifest["columns"])
        content = f"{channels} x {height} x {width} float16, {per_image:,} bytes an image"
        values = [("latent", content)]
    run = manifest["run"]
    counts = f"{manifest['planned']:,} planned = {manifest['stored']:,} stored"
    rows = [
        ("state", "finished"),
        ("images", f"{counts} + {manifest['errors']:,} errors"),
        ("columns", ", ".join(manifest["columns"])),
        *values,
        ("shards", f"{len(manifest['shards']):,} of {manifest['shard_size']}, {size:,} bytes"),
    ]
    for name, found in manifest.get("statistics", {}).items():
        mean, std = np.array(found["mean"]), np.array(found["std"])
        span = f"mean {mean.min():.3f} … {mean.max():.3f}, std {std.min():.3f} … {std.max():.3f}"
        rows.append((f"{name} by channel", span))
    took = f"{run['seconds']:.1f} s ({run['shards_encoded']} shards by the last run)"
    versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
    return [*rows, ("encoded in", took), ("versions", versions)]


def _table(title: str, rows: Rows) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
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
    try:
        images, kept, _ = load_crops(records, size, data)
    except paths.StorageError:
        return [None] * len(records)
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
