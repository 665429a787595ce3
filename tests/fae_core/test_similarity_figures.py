"""The probe's pictures: the patch that is framed and the patches that are joined are the ones that
were asked for."""

import io

import numpy as np
from PIL import Image

from fae_core.similarity_figures import MatchedPair, matching_figure, similarity_rows

GRID = (4, 8)  # patches of 32 x 16 px on an image of 128 px, twice that where it is enlarged


def test_the_frame_is_around_its_patch_and_the_map_is_brightest_there():
    images = np.zeros((1, 128, 128, 3), np.uint8)
    ((image, heat),) = similarity_rows(images, [13], [[np.eye(32)[13]]], GRID)  # row 1, column 5
    white = np.argwhere((image == 255).all(-1))
    inside = np.argwhere((heat.astype(int).sum(-1) > 300) & (heat != 255).any(-1))
    assert (inside.min(0) >= (64, 160)).all() and (inside.max(0) < (128, 192)).all()
    assert (white.min(0).tolist(), white.max(0).tolist()) == ([62, 158], [129, 193])


def test_lines_begin_and_end_on_matched_patches_and_rings_are_around_the_reference():
    dark = np.zeros((128, 128, 3), np.uint8)
    one = np.array([9])

    def picture(**changed) -> np.ndarray:
        pair = MatchedPair(
            dark, dark, **{"patches": one, "matches": one, "reference": one, **changed}
        )
        return np.asarray(Image.open(io.BytesIO(matching_figure([pair], GRID, ""))).convert("RGB"))

    def moved(other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = np.argwhere((picture() != other).any(-1))
        return places.min(0), places.max(0)

    width = picture().shape[1]
    (_, left), _ = moved(picture(reference=np.array([30])))
    assert left > width / 2  # a ring is drawn on the second image alone
    (_, left), (_, right) = moved(picture(patches=np.array([22])))
    assert left < width / 4 < width / 2 < right
    swapped = picture(
        patches=np.array([9, 22]), matches=np.array([22, 9]), reference=np.array([22, 9])
    )
    straight = picture(
        patches=np.array([9, 22]), matches=np.array([9, 22]), reference=np.array([9, 22])
    )
    assert (swapped != straight).any()
