"""Pictures of patch similarity: lines between matched patches, and maps of cosines to one patch.

By these two figures arXiv 2512.07829 shows that latents keep the semantics of patches. `fae probe`
draws them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SMALLEST_PICTURE = 256
"""Smaller images are enlarged to this side [px], so that a frame does not cover its patch."""


@dataclass(frozen=True)
class MatchedPair:
    """Two images uint8 [S, S, 3], patches [n] of the first, and their matches [n] in the second.

    `matches` and `reference` are the matches by two kinds of tokens. All three hold indices of
    patches in raster order.
    """

    first: np.ndarray
    second: np.ndarray
    patches: np.ndarray
    matches: np.ndarray
    reference: np.ndarray


def matching_figure(pairs: Sequence[MatchedPair], grid: tuple[int, int], note: str) -> bytes:
    """A PNG with a row for each pair: lines from patches of the first image to their matches.

    A ring of the line's colour marks the match by `reference`: where the line ends inside its ring,
    the two agree. `note` is the figure's title.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.4 * len(pairs) + 0.3), layout="constrained")
    for axis, pair in zip(figure.subplots(len(pairs), 1, squeeze=False)[:, 0], pairs, strict=True):
        side = pair.first.shape[0]
        gap = np.full((side, side // 16, 3), 255, np.uint8)
        axis.imshow(np.concatenate([pair.first, gap, pair.second], axis=1))
        offset = np.array([side + gap.shape[1], 0.0])
        starts = _patch_centres(pair.patches, grid, side)
        ends = _patch_centres(pair.matches, grid, side) + offset
        rings = _patch_centres(pair.reference, grid, side) + offset
        # Colours follow the height of the patch, so neighbouring lines are easy to tell apart.
        order = np.argsort(np.argsort(starts[:, 1], kind="stable"), kind="stable")
        colours = colormaps["hsv"](order / max(len(order), 1))
        for start, end, ring, colour in zip(starts, ends, rings, colours, strict=True):
            axis.plot(*np.stack([start, end]).T, color=colour, linewidth=1.2)
            axis.plot(*start, "o", color=colour, markersize=4, markeredgecolor="black")
            axis.plot(*end, "o", color=colour, markersize=4, markeredgecolor="black")
            axis.plot(*ring, "o", color=colour, markersize=9, fillstyle="none", markeredgewidth=1.5)
        axis.set_axis_off()
    figure.suptitle(note, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def similarity_rows(
    images: np.ndarray,
    patches: Sequence[int],
    similarities: Sequence[Sequence[np.ndarray]],
    grid: tuple[int, int],
) -> list[list[np.ndarray]]:
    """A row for each image uint8 [S, S, 3]: the image, then a map of each of its similarities [N].

    A frame marks the image's patch in all of them. The colours of a map go from dark at its
    smallest value to bright at its largest.
    """
    size = max(images.shape[1], SMALLEST_PICTURE)
    rows = []
    for image, patch, values in zip(images, patches, similarities, strict=True):
        pictures = [_resized(image, size), *(_resized(_heat(one, grid), size) for one in values)]
        rows.append([_framed(picture, patch, grid) for picture in pictures])
    return rows


def _heat(values: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    from matplotlib import colormaps

    unit = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
    colours = np.asarray(colormaps["viridis"](unit.reshape(grid)))
    return np.rint(colours[..., :3] * 255.0).astype(np.uint8)


def _resized(picture: np.ndarray, size: int) -> np.ndarray:
    resized = Image.fromarray(picture).resize((size, size), Image.Resampling.NEAREST)
    return np.asarray(resized)


def _framed(picture: np.ndarray, patch: int, grid: tuple[int, int]) -> np.ndarray:
    """The picture with a white frame, black on both sides, around one patch."""
    size = picture.shape[0]
    framed = Image.fromarray(picture)
    row, column = divmod(patch, grid[1])
    box = [column * size / grid[1], row * size / grid[0]]
    box += [(column + 1) * size / grid[1], (row + 1) * size / grid[0]]
    thick = max(size // 128, 1)
    draw = ImageDraw.Draw(framed)
    for grow, colour in ((2 * thick, "black"), (thick, "white"), (0, "black")):
        corners = [box[0] - grow, box[1] - grow, box[2] + grow - 1, box[3] + grow - 1]
        draw.rectangle(corners, outline=colour, width=thick)
    return np.asarray(framed)


def _patch_centres(patches: np.ndarray, grid: tuple[int, int], side: int) -> np.ndarray:
    """(x, y) [n, 2] in pixels of the picture."""
    rows, columns = np.divmod(patches, grid[1])
    centres = np.stack([(columns + 0.5) / grid[1], (rows + 0.5) / grid[0]], axis=1)
    return centres * side - 0.5
