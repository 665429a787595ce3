"""Runs `fae demo`: the shipped networks on pictures, a store, a training and texts, and a page.

Pictures and texts go through the networks in this process. The store and the training are commands
that run as a user's do, on a local Ray that this process starts. Started again, the demo resumes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fae_core.errors import UserError

from ..config import Recipe, load_recipe
from ..latents import LatentStore
from ..runtime.session import start_ray
from ..storage import paths
from ..training.metrics_log import read_metrics_log
from .command import command_line, run_command
from .demo_page import Found, demo_page
from .figures import Kept, captioned_pictures, kept_by_stages, prompt_rows, write_photographs
from .screen import Screen

RECIPE = "emoji-dinov2s"
NETWORKS = "shipped:emoji"
TRAINING_IMAGES = "shipped:emoji-images/train"
HELD_OUT = "shipped:emoji-images/heldout"
PROMPTS = (
    "woman construction worker light skin tone",
    "man pilot dark skin tone",
    "woman cook medium skin tone",
    "woman mage medium-dark skin tone",
    "thumbs up medium-light skin tone",
    "baby light skin tone",
)
"""Captions of HELD_OUT, which no training saw."""
PICTURES = "Pictures through every stage of FAE"
STORE = "Ray Data writes a latent store; its driver is killed, and the command resumes"
TRAINING = "Ray Train goes on with the shipped generator"
TEXTS = "Text to image: captions that no training saw"
EXPECTED = {PICTURES: 5.0, STORE: 50.0, TRAINING: 77.0, TEXTS: 16.0}
"""Seconds of the stages on two idle cores of an AMD EPYC without AVX-512."""
SHARD_SIZE = 4
KILL_AT = 0.4
"""Share of the shards at which the driver is killed."""
STEPS = 60


def run_demo(output: str, images: str | None = None, prompts: Sequence[str] = ()) -> None:
    """Run or resume the demo in the folder `output`.

    `images` is a folder of pictures to show instead of photographs, `prompts` are texts to draw
    instead of PROMPTS. Raises UserError where the demo's packages or pictures are missing.
    """
    folder, started = Path(output), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    texts = list(prompts) or list(PROMPTS)
    recipe = _recipe(folder, texts)
    screen, log = Screen(EXPECTED), folder / "demo.log"
    kept = _show_pictures(screen, recipe, folder, images)
    with screen.stage(STORE) as advance:
        address = _start_ray()
        killed_at = _kill_and_resume(folder, log, address, advance)
        latents = LatentStore.open(str(folder / "latents"))
        if problems := latents.verify():
            raise UserError(f"{latents.uri} is not sound:\n  " + "\n  ".join(problems))
    screen.say(_said_of_store(killed_at, latents))
    with screen.stage(TRAINING) as advance:
        run_command(_train_words(folder), log, address, lambda: _share_of_steps(log), advance)
        history = read_metrics_log(str(folder / "runs/continued"))
        losses = history["train/loss"]
    screen.say(f"loss {losses[0][1]:.3f} at step {losses[0][0]}, {losses[-1][1]:.3f} at {STEPS}")
    with screen.stage(TEXTS) as advance:
        drawn = prompt_rows(recipe, captioned_pictures(recipe, HELD_OUT, texts), advance)
        (folder / "texts.png").write_bytes(drawn)
    screen.say(f"{len(texts)} prompts at three guidance scales: {folder / 'texts.png'}")
    found = Found(
        kept, latents, killed_at, history, drawn, screen.seconds, _commands(folder),
        _following(folder),
    )  # fmt: skip
    seconds = time.monotonic() - started
    (folder / "demo.html").write_bytes(demo_page(found, seconds))
    print(_closing(folder, seconds), flush=True)


def _show_pictures(screen: Screen, recipe: Recipe, folder: Path, images: str | None) -> Kept:
    """Pictures of `images`, else photographs, and held-out emoji, as FOLDER/pictures.png."""
    with screen.stage(PICTURES):
        shown = images or str(folder / "photographs")
        if images is None:
            write_photographs(Path(shown))
        name = "photographs" if images is None else "your pictures"
        try:
            kept = kept_by_stages(recipe, {name: shown, "held-out emoji": HELD_OUT})
        except UserError as error:
            raise UserError(f"--images {images}: {error}" if images else str(error)) from None
        (folder / "pictures.png").write_bytes(kept.figure)
    for group, cosine in kept.cosines.items():
        screen.say(f"{group}: rebuilt features are like DINOv2's, cosine {cosine:.3f}")
    return kept


def _recipe(folder: Path, prompts: Sequence[str]) -> Recipe:
    """The emoji recipe with the shipped networks and with `prompts` from a file in `folder`."""
    if blank := [text for text in prompts if not text.strip()]:
        raise UserError(f"--prompt {blank[0]!r} is empty: give a text.")
    file = folder / "prompts.txt"
    file.write_text("\n".join(" ".join(text.split()) for text in prompts) + "\n")
    return load_recipe(RECIPE, [*_networks(), f"prompts={file}"])


def _networks() -> list[str]:
    names = ("autoencoder", "pixel_decoder", "generator")
    return [f"{name}.checkpoint={NETWORKS}" for name in names]


def _precompute_words(folder: Path) -> list[str]:
    return [
        "precompute", RECIPE, f"data.path={TRAINING_IMAGES}",
        f"autoencoder.checkpoint={NETWORKS}", f"output={folder / 'latents'}",
        f"precompute.shard_size={SHARD_SIZE}", f"precompute.batch_size={SHARD_SIZE}",
    ]  # fmt: skip


def _train_words(folder: Path) -> list[str]:
    training = {
        "steps": STEPS, "batch_size": 16, "learning_rate": 2e-4, "warmup_steps": 5,
        "log_every": 6, "checkpoint_every": 20, "validate_every": STEPS,
    }  # fmt: skip
    return [
        "train", "generator", RECIPE, f"latents={folder / 'latents'}",
        f"generator.start_from={NETWORKS}", f"storage={folder / 'runs'}", "run=continued",
        *(f"generator.training.{name}={value}" for name, value in training.items()),
        "tracking.enabled=false",
    ]  # fmt: skip


def _sample_words(folder: Path) -> list[str]:
    return [
        "sample", RECIPE, *_networks(), f"prompts={folder / 'prompts.txt'}",
        "--grid", str(folder / "texts.png"), "--scales", "1,2,4",
    ]  # fmt: skip


def _commands(folder: Path) -> list[str]:
    words = (_precompute_words(folder), _train_words(folder), _sample_words(folder))
    return [command_line(some) for some in words]


def _start_ray() -> str:
    """Start a local Ray, which ends with this process; HOST:PORT of its head."""
    start_ray()
    import ray

    return str(ray.get_runtime_context().gcs_address)


def _kill_and_resume(
    folder: Path, log: Path, address: str, advance: Callable[[float], None]
) -> int | None:
    """Fill the store, killing the first driver; the shards that there were then.

    None where an earlier demo has filled it.
    """
    store, words = str(folder / "latents"), _precompute_words(folder)
    if paths.exists(paths.join(store, "manifest.json")):
        return None
    share = _share_of_shards(store)
    killed = run_command(words, log, address, share, advance, kill_at=KILL_AT)
    shards = round(share() * share.total) if killed else None
    if killed:
        run_command(words, log, address, share, advance)
    return shards


class _share_of_shards:
    """How much of the latent store is written, from 0 to 1."""

    def __init__(self, store: str) -> None:
        self.folder = Path(store) / "shards"
        num_images = len(paths.read_bytes(f"{TRAINING_IMAGES}/metadata.jsonl").splitlines())
        self.total = -(-num_images // SHARD_SIZE)

    def __call__(self) -> float:
        return len(list(self.folder.glob("*.parquet"))) / self.total


def _share_of_steps(log: Path) -> float:
    """How much of the training is done, by the last step in the log's last command."""
    text = log.read_text(errors="replace").rpartition("\n$ ")[2]
    steps = re.findall(r"^step (\d+)/(\d+)", text, re.M)
    return int(steps[-1][0]) / int(steps[-1][1]) if steps else 0.0


def _said_of_store(killed_at: int | None, store: LatentStore) -> str:
    sound = f"{len(store)} latents, every shard verified"
    if killed_at is None:
        return f"{sound}; an earlier run had finished it"
    return f"killed at {killed_at} of {store.num_shards} shards, resumed: {sound}"


def _following(folder: Path) -> list[str]:
    return [
        "fae demo --prompt 'woman astronaut dark skin tone' --images MY_PHOTOGRAPHS",
        f"fae explore {HELD_OUT} --autoencoder {NETWORKS}/autoencoder.safetensors -o explore.html",
        f"fae inspect {folder / 'latents'} --verify --figure latents.png",
        f"fae status {folder / 'runs/continued'}",
        "fae demo --full   # train every network from nothing",
    ]


def _closing(folder: Path, seconds: float) -> str:
    following = "\n".join(f"  {line}" for line in _following(folder))
    return f"""
Finished in {seconds:.0f} s. Open {folder / "demo.html"} in a browser.

  pictures   {folder / "pictures.png"}, {folder / "texts.png"}
  latents    {folder / "latents"}  (Parquet: any pyarrow reads it)
  log        {folder / "demo.log"}  (everything that the commands printed)

Try next:
{following}
"""
