"""The report at the end of `fae run`: report.md with numbers, learning curves and pictures."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fae_core.figures import Curve, curve_panels, picture_grid

from ..data.records import class_name
from ..sampling.prompts import shortened
from ..storage import paths
from ..training.metrics_log import Series, figure_uri, read_metrics_log
from .stages import Stage, training_of

GRID_ROWS = 6
GRID_COLUMNS = 8
CAPTIONS = {
    "autoencoder": (
        "Held-out images, their features, latents and reconstructed features "
        "(principal components as colours)."
    ),
    "pixel-decoder": "Held-out images, and images decoded from their features.",
    "generator": "Samples during the generator's training.",
    "finetune": "Held-out images, decoded from true and from reconstructed features.",
    "samples": "Samples, one class or prompt in each row.",
}
"""What a stage's picture shows, by stage."""


def write_report(report: Stage, stages: Sequence[Stage]) -> str:
    """Write report.md, its PNG files and recipe.yaml into the folder of the stage `report`.

    Returns the address of report.md.
    """
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
        "## Run it again",
        "",
        "`recipe.yaml` beside this page is the whole recipe. `fae run recipe.yaml` finds these "
        "results and runs nothing; with a changed value it runs the stages that the value decides.",
        "",
    ]
    recipe = report.recipe.model_copy(deep=True)
    recipe.run = recipe.output = recipe.evaluate.output = recipe.probe.output = None
    _write(report, "recipe.yaml", recipe.to_yaml().encode())
    return _write(report, "report.md", "\n".join(lines).encode())


def stage_pictures(stage: Stage) -> dict[str, bytes]:
    """PNG files by name that show the result of a finished stage.

    They are the last validation of a training, a grid of samples, or the figures of a probe.
    """
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
    """A PNG of the first GRID_COLUMNS samples of up to GRID_ROWS classes or prompts, a row each.

    `uri` is a finished store of `fae sample`.
    """
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
    labels = sorted(by_class)[:GRID_ROWS]
    blank: list[np.ndarray | None] = [None] * GRID_COLUMNS
    rows = [(by_class[label] + blank)[:GRID_COLUMNS] for label in labels]
    texts = [shortened(text) for text in manifest.get("prompts", [])]
    names = [class_name(label, texts or manifest.get("class_names", [])) for label in labels]
    return picture_grid(rows, [""] * GRID_COLUMNS, names_of_rows=names)


def curves_of(history: Series, names: Sequence[str]) -> dict[str, Curve]:
    """Those of `names` that `history` has, as curves for `curve_panels`."""
    return {
        name: ([step for step, _ in history[name]], [value for _, value in history[name]])
        for name in names
        if name in history
    }


def _panels(stages: Sequence[Stage]) -> dict[str, dict[str, Curve]]:
    """Learning curves by stage and name."""
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
    """Lines of a Markdown table with one row for each stage."""
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
