"""The page that ends `fae run`: report.md with every stage's numbers, learning curves, and pictures of what was made."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fae_core.figures import Curve, curve_panels, picture_grid

from ..storage import paths
from ..training.metrics_log import Series, figure_uri, read_metrics_log
from .stages import Stage, training_of

GRID_ROWS = 6
GRID_COLUMNS = 8
CAPTIONS = {
    "autoencoder": "Held-out images, their features, latents and rebuilt features (principal components as colours).",
    "pixel-decoder": "Held-out images and what the pixel decoder makes of their features.",
    "generator": "Samples during the generator's training.",
    "finetune": "Held-out images, decoded from true and from rebuilt features.",
    "samples": "Samples, a class in each row.",
}


def write_report(report: Stage, stages: Sequence[Stage]) -> str:
    """Write report.md, its PNG files and recipe.yaml into the stage's folder; the page's address."""
    lines = ["# From images to samples", "", *_table(stages), ""]
    panels = _panels(stages)
    if panels:
        _write(report, "curves.png", curve_panels(panels))
        lines += ["## Learning curves", "", "![Learning curves](curves.png)", ""]
    lines += ["## Pictures", ""]
    for stage in stages:
        for name, png in stage_pictures(stage).items():
            file = f"{stage.name}-{name}"
            _write(report, file, png)
            lines += [f"![{stage.name}]({file})", "", CAPTIONS.get(stage.name, stage.name), ""]
    lines += [
        "## Again",
        "",
        "`recipe.yaml` beside this page is the whole recipe; `fae run recipe.yaml` finds these results and stops, "
        "and with a changed value runs what that value decides.",
        "",
    ]
    recipe = report.recipe.model_copy(deep=True)
    recipe.run = recipe.output = recipe.evaluate.output = recipe.probe.output = None
    _write(report, "recipe.yaml", recipe.to_yaml().encode())
    return _write(report, "report.md", "\n".join(lines).encode())


def stage_pictures(stage: Stage) -> dict[str, bytes]:
    """PNG files that tell what a finished stage made, by name: its last validation, its samples, its figures."""
    if training_of(stage):
        uri = figure_uri(stage.uri)
        return {"validation.png": paths.read_bytes(uri)} if paths.exists(uri) else {}
    if stage.name == "samples":
        return {"grid.png": samples_grid(stage.uri)}
    if stage.name == "probe":
        files = paths.list_files(stage.uri, recursive=False)
        pngs = sorted(file.uri for file in files if file.uri.endswith(".png"))
        return {uri.rpartition("/")[2]: paths.read_bytes(uri) for uri in pngs}
    return {}


def samples_grid(uri: str) -> bytes:
    """A PNG of the first samples of up to six classes, a class in each row, eight images wide."""
    by_class: dict[int, list[np.ndarray | None]] = {}
    manifest = json.loads(paths.read_bytes(paths.join(uri, "manifest.json")))
    for entry in manifest["shards"]:
        data = paths.read_bytes(paths.join(uri, "shards", entry["name"]))
        table = pq.read_table(pa.BufferReader(data))
        for label, png in zip(table["label"].to_pylist(), table["image"].to_pylist(), strict=True):
            tiles = by_class.setdefault(label, [])
            if len(tiles) < GRID_COLUMNS:
                tiles.append(np.asarray(Image.open(io.BytesIO(png))))
        if all(len(tiles) == GRID_COLUMNS for tiles in by_class.values()):
            break
    rows = [by_class[label] for label in sorted(by_class)[:GRID_ROWS]]
    blank: list[np.ndarray | None] = [None] * GRID_COLUMNS
    return picture_grid([(row + blank)[:GRID_COLUMNS] for row in rows], [""] * GRID_COLUMNS)


def curves_of(history: Series, names: Sequence[str]) -> dict[str, Curve]:
    """The series of `names` that are there, as `curve_panels` draws them."""
    return {
        name: ([step for step, _ in history[name]], [value for _, value in history[name]])
        for name in names
        if name in history
    }


def _panels(stages: Sequence[Stage]) -> dict[str, dict[str, Curve]]:
    names = {
        "autoencoder": ("train/loss", "validation/mse"),
        "pixel-decoder": ("train/loss",),
        "finetune": ("train/loss",),
        "generator": ("train/loss",),
    }
    found = {
        stage.name: curves_of(read_metrics_log(stage.uri), names[stage.name])
        for stage in stages
        if stage.name in names
    }
    return {name: curves for name, curves in found.items() if curves}


def _table(stages: Sequence[Stage]) -> list[str]:
    lines = ["| stage | seconds | results | folder |", "|---|---:|---|---|"]
    for stage in stages:
        result = stage.result() or {"seconds": 0.0, "metrics": {}}
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in result["metrics"].items())
        folder = stage.uri.rpartition("/")[2]
        lines.append(f"| {stage.name} | {result['seconds']:.0f} | {numbers} | `{folder}` |")
    return lines


def _write(report: Stage, name: str, data: bytes) -> str:
    uri = paths.join(report.uri, name)
    paths.write_bytes(uri, data)
    return uri
