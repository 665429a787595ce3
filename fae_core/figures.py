"""Pictures of features: the first three principal components as colours, as in DINOv2's figure 1.

`principal_basis` fits one basis for several maps, so that equal colours mean equal features;
`picture_grid` arranges the maps in rows. Validation, `fae inspect` and the demo use these
functions.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

NAME_WIDTH = 24
"""Characters of a line beside a row of pictures."""


@dataclass(frozen=True)
class PrincipalBasis:
    """Projection of features to three components, and the range of each that maps to colours.

    `mean` [D], `components` [D, 3], `low` and `high` [3].
    """

    mean: np.ndarray
    components: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def colours(self, features: np.ndarray) -> np.ndarray:
        """Features [N, D] as uint8 colours [N, 3]."""
        projected = (features.astype(np.float64) - self.mean) @ self.components
        unit = (projected - self.low) / np.maximum(self.high - self.low, 1e-12)
        return np.rint(np.clip(unit, 0.0, 1.0) * 255.0).astype(np.uint8)


def principal_basis(features: np.ndarray) -> PrincipalBasis:
    """The three leading components of features [..., D] by eigenvectors of the covariance.

    The largest entry of each component is positive, so the same features give the same colours.
    Colours span the 1st to the 99th percentile. With fewer than three channels the last colours are
    constant.
    """
    rows = np.asarray(features, np.float64).reshape(-1, features.shape[-1])
    mean = rows.mean(0)
    centred = rows - mean
    _, vectors = np.linalg.eigh(centred.T @ centred)
    components = vectors[:, ::-1][:, :3]
    components = np.pad(components, ((0, 0), (0, 3 - components.shape[1])))
    largest = np.abs(components).argmax(0)
    signs = np.sign(components[largest, np.arange(3)])
    components = components * np.where(signs == 0, 1.0, signs)
    low, high = np.percentile(centred @ components, [1, 99], axis=0)
    return PrincipalBasis(mean, components, low, high)


def pca_map(
    features: np.ndarray,
    grid: tuple[int, int],
    basis: PrincipalBasis | None = None,
    size: int = 256,
) -> np.ndarray:
    """Features [N, D] on `grid` as a uint8 picture [height, width, 3].

    Its longer side is `size` px. Without `basis`, one is fitted to these features.
    """
    colours = (basis or principal_basis(features)).colours(features).reshape(*grid, 3)
    scale = size / max(grid)
    shape = (round(grid[1] * scale), round(grid[0] * scale))
    return np.asarray(Image.fromarray(colours).resize(shape, Image.Resampling.NEAREST))


def reconstruction_rows(
    images: np.ndarray,
    features: np.ndarray,
    latents: np.ndarray,
    reconstructions: np.ndarray,
    grid: tuple[int, int],
) -> list[list[np.ndarray]]:
    """A row for each image: the image, then PCA maps of its features, latents and reconstruction.

    `images` are uint8 [B, S, S, 3]; the others are [B, N, *]. Features and reconstructions share
    one basis, which is fitted to the features of all rows; latents have another.
    """
    feature_basis, latent_basis = principal_basis(features), principal_basis(latents)
    return [
        [
            image,
            pca_map(features[row], grid, feature_basis),
            pca_map(latents[row], grid, latent_basis),
            pca_map(reconstructions[row], grid, feature_basis),
        ]
        for row, image in enumerate(images)
    ]


def picture_grid(
    rows: Sequence[Sequence[np.ndarray | None]],
    titles: Sequence[str],
    note: str = "",
    titles_of_rows: Mapping[int, Sequence[str]] | None = None,
    names_of_rows: Sequence[str] = (),
) -> bytes:
    """A PNG of uint8 pictures [H, W, 3] in rows, with `titles` above the first row.

    `note`, of one or more lines, stands to the right. None leaves a cell blank. `titles_of_rows`
    gives titles to further rows, by the row's index. `names_of_rows` stand to the left of the rows.
    """
    from matplotlib.figure import Figure

    aside = 0.1 * max((len(line) for line in note.splitlines()), default=-4) + 0.4
    names_of_rows = [textwrap.fill(name, NAME_WIDTH) for name in names_of_rows]
    longest = max((len(line) for name in names_of_rows for line in name.splitlines()), default=0)
    before = 0.085 * longest + 0.1 * bool(longest)
    figure = Figure(
        figsize=(before + 2.0 * len(titles) + aside, 2.0 * len(rows) + 0.3), layout="constrained"
    )
    pictures, *texts = figure.subfigures(
        1,
        2 if note else 1,
        width_ratios=[before + 2.0 * len(titles), aside] if note else None,
        squeeze=False,
    )[0]
    axes = pictures.subplots(len(rows), len(titles), squeeze=False)
    for row, cells in zip(axes, rows, strict=True):
        for axis, cell in zip(row, cells, strict=True):
            axis.set_axis_off()
            if cell is not None:
                axis.imshow(cell)
    for row_index, row_titles in {0: titles, **(titles_of_rows or {})}.items():
        for axis, title in zip(axes[row_index], row_titles, strict=True):
            axis.set_title(title, fontsize=10)
    for axis, name in zip(axes[:, 0], names_of_rows, strict=False):
        axis.text(-0.05, 0.5, name, transform=axis.transAxes, ha="right", va="center", fontsize=10)
    for text in texts:
        text.text(0.0, 0.97, note, va="top", fontsize=10, family="monospace", linespacing=1.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


Curve = tuple[Sequence[float], Sequence[float]]


def curve_panels(panels: Mapping[str, Mapping[str, Curve]], logarithmic: bool = True) -> bytes:
    """A PNG with a panel for each title and in it a line for each name, given as (steps, values).

    With `logarithmic`, the y axis of a panel is logarithmic where all its values are positive.
    """
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.0 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
        for name, (steps, values) in curves.items():
            axis.plot(steps, values, marker="." if len(steps) < 30 else None, label=name)
        if logarithmic and all(v > 0 for _, values in curves.values() for v in values):
            axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
