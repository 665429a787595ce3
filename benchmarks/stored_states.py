"""Training on captions with the text encoder in every step, and on its stored states.

    python -m benchmarks.stored_states emoji-dinov2s latents=STORE text.states=STATES
                              [--steps 8] [--rounds 3] [KEY=VALUE ...]

STATES is what `fae precompute-text` made of STORE. The trainer's own feed and step run in turns,
some steps with the encoder and some with the states, in one process on one thread; seconds are
medians over all rounds. Waiting is the mean time until the feed has the next batch. The encoder's
seconds are those of its forward pass alone, once more on each batch of the first row.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks.environment import describe
from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.config.sections import GeneratorSection
from fae.pipelines.latents.reader import LatentStore
from fae.pipelines.latents.text_store import TextStore
from fae.pipelines.networks.text_encoder import CaptionEncoder, text_spec
from fae.pipelines.networks.untrained import build_generator
from fae.pipelines.training.batches import Batch
from fae.pipelines.training.captions import CaptionFeed, StateFeed
from fae.pipelines.training.generator import generator_job
from fae.pipelines.training.latent_feed import latent_feed
from fae.pipelines.training.state import TrainState
from fae.pipelines.training.step import train_step
from fae_core.precision import autocast, settled_precision
from fae_core.text import TextEncoder

CPU = torch.device("cpu")


@dataclass
class Way:
    """One way to train, and what its steps took [s]."""

    section: GeneratorSection
    state: TrainState
    feed: Iterator[Batch]
    encoder: TextEncoder | None
    steps: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    encodings: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def step(self) -> None:
        """One optimizer step, from the wait for its batch on."""
        started = time.perf_counter()
        batch = next(self.feed)
        fed = time.perf_counter()
        job = generator_job(self.section, self.state.model, self.encoder)
        train_step(self.state, self.state.model, job.loss, [batch], self.section.training)
        self.steps.append(time.perf_counter() - started)
        self.waits.append(fed - started)
        self.lengths.append(batch["mask"].shape[1])
        if self.encoder is not None:
            started = time.perf_counter()
            with autocast(self.section.training.precision, CPU):
                self.encoder(batch["tokens"], batch["mask"])
            self.encodings.append(time.perf_counter() - started)

    def row(self, name: str) -> str:
        """Of the table."""
        step = float(np.median(self.steps))
        encoding = float(np.median(self.encodings)) if self.encodings else 0.0
        wait = float(np.mean(self.waits))
        cells = [name, f"{np.mean(self.lengths):.1f}", f"{step:.3f}"]
        cells += [f"{encoding:.3f}", f"{encoding / step:.2f}", f"{wait * 1000:.1f}"]
        return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=8, help="steps of one way before the other's")
    parser.add_argument("--rounds", type=int, default=3)
    arguments, overrides = parser.parse_known_args()
    recipe = load_recipe(arguments.recipe, overrides)
    torch.set_num_threads(1)
    section = recipe.generator
    section.training.accumulation = 1
    section.training.precision = settled_precision(section.training.precision, False)
    latents, states = recipe.require("this benchmark", "latents=STORE", "text.states=STATES")
    store, text = LatentStore.open(latents), TextStore.open(states)
    spec, dropout = text_spec(recipe.text), recipe.text.dropout
    whole = CaptionEncoder.load(spec)
    text.check_encoder(whole.fingerprints)
    ways: dict[str, Way] = {}
    feeds = {
        "with the encoder": (CaptionFeed(whole.tokenizer, dropout), whole.encoder),
        "with stored states": (StateFeed(text, spec.max_length, dropout), None),
    }
    for name, (feed, encoder) in feeds.items():
        torch.manual_seed(recipe.seed)
        model = build_generator(section, store.latent_shape, recipe.text)
        batches = latent_feed(store, section, recipe.seed, feed)(0, 0, 1, CPU)
        ways[name] = Way(section, TrainState(model, section.training, None), batches, encoder)
    for number in range(arguments.rounds + 1):
        for way in ways.values():
            for _ in range(arguments.steps if number else 2):
                way.step()
            if number == 0:  # buffers and kernels
                for taken in (way.steps, way.waits, way.encodings, way.lengths):
                    taken.clear()
    size = sum(entry["bytes"] for entry in text.manifest["shards"])
    tokens, rows = text.manifest["tokens"], text.manifest["stored"]
    padded = 2 * text.state_dim * spec.max_length
    print(f"\n{describe()}; one thread, {section.training.precision}")
    print(
        f"{rows:,} images, {tokens / rows:.1f} tokens each: {size / rows:,.0f} bytes an image in "
        f"the store, {padded:,} for one caption padded to {spec.max_length} tokens\n"
    )
    print("| training | tokens of a batch | s a step | encoder s | share | waiting ms |")
    print("|---|---|---|---|---|---|")
    for name, way in ways.items():
        print(way.row(name))


if __name__ == "__main__":
    main()
