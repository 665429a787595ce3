"""demo.html: what the demo showed, what its numbers mean, and the commands that it ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..latents import LatentStore
from ..pages import report_page
from ..pages.blocks import Chart, Commands, Picture, Table, Words
from ..pages.charts import Point, line_chart
from ..training.metrics_log import Series
from .figures import Kept

FLOAT16_BYTES = 2


@dataclass(frozen=True)
class Found:
    """What the stages of the demo gave."""

    kept: Kept
    store: LatentStore
    killed_at: int | None
    """Shards that there were when the driver was killed; None where none was killed."""
    history: Series
    drawn: bytes
    seconds: Mapping[str, float]
    """By the stage's title."""
    commands: Sequence[str]
    following: Sequence[str]


def demo_page(found: Found, seconds: float) -> bytes:
    """The page as one HTML file in UTF-8. `seconds` are of the whole demo."""
    return report_page(
        "FAE in a few minutes",
        f"Small networks that ship with the package, on this machine, in {seconds:.0f} s.",
        [
            ("Text to image", _texts(found)),
            ("What the latent keeps of a picture", _pictures(found.kept)),
            ("A latent store that survives its driver", _store(found)),
            ("A training that goes on", _training(found.history)),
            ("Time", [_times(found.seconds)]),
            ("The commands", [Words(_COMMANDS), Commands(found.commands)]),
            ("Next", [Commands(found.following)]),
        ],
        "Made by fae demo.",
    )


_COMMANDS = (
    "The demo ran the first command twice: it killed the first run and started it again. The first "
    "two take s3:// addresses, and run on a cluster with RAY_ADDRESS or fae submit. So does the "
    "third with output= in place of --grid."
)


def _texts(found: Found) -> list[Words | Picture]:
    caption = (
        "Each row is one text, drawn from the same noise at three guidance scales. A larger scale "
        "follows the text more closely and varies less. The true picture, where there is one, was "
        "held out from every training."
    )
    about = (
        "A text encoder (MiniLM) reads the text, a diffusion transformer turns noise into a latent "
        "of 8×8×32 numbers, FAE's decoder rebuilds DINOv2's features from it, and a pixel decoder "
        "draws them at 128 px. The trained networks have 15 M parameters together. They "
        "learned from 3,181 emoji on one CPU core. Small faces and small things are smeared."
    )
    return [Words(about), Picture(found.drawn, caption)]


def _pictures(kept: Kept) -> list[Picture | Table | Words]:
    caption = (
        "Columns: the picture; the principal components, as colours, of DINOv2's features, of the "
        "latent, and of the features that are rebuilt from the latent; the pixels that are decoded "
        "from the latent. Emoji that no training saw stand below."
    )
    rows = [[group, f"{cosine:.3f}"] for group, cosine in kept.cosines.items()]
    meaning = (
        "Cosine similarity of rebuilt and original features, averaged over patches; 1 is equal. "
        "These networks know emoji alone, so photographs are a hard test: their features come "
        "through in part, their pixels do not."
    )
    return [Picture(kept.figure, caption), Table(("pictures", "cosine"), rows), Words(meaning)]


def _store(found: Found) -> list[Words | Table]:
    store = found.store
    latent = FLOAT16_BYTES * int(np.prod(store.latent_shape))
    about = (
        "Ray Data streams images through actors that run DINOv2 and the FAE encoder. Each shard is "
        "written whole or not at all. "
    )
    if found.killed_at is not None:
        about += (
            f"The demo killed the driver (SIGKILL) when {found.killed_at} of {store.num_shards} "
            "shards were there. The same command then wrote the missing ones."
        )
    else:
        about += "An earlier run of the demo had finished this store."
    rows = [
        ["images planned", f"{store.manifest['planned']:,}"],
        ["latents stored", f"{store.manifest['stored']:,}"],
        ["images with an error", f"{store.manifest['errors']:,}"],
        ["shards, each verified by its hash", f"{store.num_shards:,}"],
        ["bytes of one latent", f"{latent:,}"],
    ]
    return [Words(about), Table(("what", "number"), rows)]


def _training(history: Series) -> list[Words | Chart]:
    losses = history["train/loss"]
    chart = line_chart("loss", {"loss": [Point(step, value) for step, value in losses]}, "step")
    about = (
        "Ray Train started from the shipped generator and went on for some steps on the store, "
        "whose 93 emoji are among those that it learned from. The loss is the mean squared error "
        "of the velocity (flow matching); it is noisy, because every step draws other times."
    )
    return [Words(about), Chart([chart])]


def _times(seconds: Mapping[str, float]) -> Table:
    rows = [[title, f"{value:.0f}"] for title, value in seconds.items()]
    return Table(("stage", "seconds"), rows)
