"""The report at the end of `fae run`: numbers, learning curves and pictures, for people as
report.html, which is one file, and for MLflow and diffs as report.md.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fae_core.figures import Curve, curve_panels, picture_grid

from ..data.records import class_name
from ..pages import report_page
from ..pages.blocks import Chart, Commands, Picture, Table, Words
from ..pages.charts import Point, line_chart
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
    """Write report.html, report.md, PNG files and recipe.yaml into the folder of `report`.

    Returns the address of report.html.
    """
    lines = ["# From images to samples", "", *_table(stages), ""]
    panels = _panels(stages)
    if panels:
        _write(report, "curves.png", curve_panels(panels))
        lines += ["## Learning curves", "", "![Learning curves](curves.png)", ""]
    lines += ["## Pictures", ""]
    pictures: list[Picture] = []
    for stage in stages:
        for name, png in stage_pictures(stage).items():
            file, caption = f"{stage.name}-{name}", CAPTIONS.get(stage.name, stage.name)
            _write(report, file, png)
            lines += [f"![{stage.name}]({file})", "", caption, ""]
            pictures.append(Picture(png, caption))
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
    _write(report, "report.md", "\n".join(lines).encode())
    return _write(report, "report.html", _page(stages, panels, pictures))


def _page(
    stages: Sequence[Stage],
    panels: Mapping[str, Mapping[str, Curve]],
    pictures: Sequence[Picture],
) -> bytes:
    rows = [
        [stage.name, f"{seconds:.0f}", figures, folder]
        for stage, seconds, figures, folder in _rows(stages)
    ]
    drawings = [
        line_chart(
            title,
            {
                name: [Point(step, value) for step, value in zip(*curve, strict=True)]
                for name, curve in curves.items()
            },
            "step",
            logarithmic=(False, True),
        )
        for title, curves in panels.items()
    ]
    again = (
        "recipe.yaml beside this page is the whole recipe. With a changed value the command runs "
        "the stages that the value decides."
    )
    return report_page(
        "From images to samples",
        f"{len(stages)} stages, {sum(seconds for _, seconds, _, _ in _rows(stages)):,.0f} s",
        [
            ("Stages", [Table(["stage", "seconds", "results", "folder"], rows)]),
            ("Learning curves", [Chart(drawings)] if drawings else []),
            ("Pictures", pictures),
            ("Run it again", [Words(again), Commands(["fae run recipe.yaml"])]),
        ],
        "Made by fae run.",
    )


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


def _rows(stages: Sequence[Stage]) -> list[tuple[Stage, float, str, str]]:
    """Each stage with its seconds, its metrics in words, and the name of its folder."""
    rows = []
    for stage in stages:
        result = stage.result() or {"seconds": 0.0, "metrics": {}}
        figures = ", ".join(f"{name} {value:.4g}" for name, value in result["metrics"].items())
        rows.append((stage, float(result["seconds"]), figures, stage.uri.rpartition("/")[2]))
    return rows


def _table(stages: Sequence[Stage]) -> list[str]:
    """Lines of a Markdown table with one row for each stage."""
    lines = ["| stage | seconds | results | folder |", "|---|---:|---|---|"]
    for stage, seconds, figures, folder in _rows(stages):
        lines.append(f"| {stage.name} | {seconds:.0f} | {figures} | `{folder}` |")
    return lines


def _write(report: Stage, name: str, data: bytes) -> str:
    uri = paths.join(report.uri, name)
    paths.write_bytes(uri, data)
    return uri
