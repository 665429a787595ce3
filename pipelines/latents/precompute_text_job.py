"""`fae precompute-text`: the captions of a latent store to the states of their tokens, by Ray Data.

plan of the latents -> frozen text encoder (actor pool) -> Parquet shard. Shards hold the captions
of the images that the latents' shards hold, so a training reads both by row, and does not run the
encoder.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from typing import Any

import numpy as np
import torch

from fae_core.machine import num_cpus
from fae_core.precision import autocast, settled_precision
from fae_core.weights import WeightsError

from ..config import Recipe, with_absolute_paths
from ..networks.text_encoder import CaptionEncoder, count_captions, text_spec
from ..runtime import metrics
from ..runtime.actor_pool import RowStages
from ..runtime.places import check_places
from ..storage import StoreError, paths
from .filling import fill_store
from .manifest import missing_shards
from .plan import FORMAT, PLAN, TEXT_FORMAT, Plan, PlanId, ensure_plan, open_plan
from .tasks import plan_of, store_states
from .text_store import PRECISION
from .token_states import STATES


def precompute_text(recipe: Recipe, show_progress: bool = True) -> dict[str, Any]:
    """Encode the captions that are missing and commit; returns the manifest.

    The latent store need not be finished. Raises RecipeError, WeightsError, TooManyErrors,
    StoreError where `latents` has no plan, and StoreMismatch where the output holds the store of
    another encoder or other captions.
    """
    started, written = time.monotonic(), recipe.to_yaml()
    recipe = with_absolute_paths(recipe)
    latents, output = recipe.require("precompute-text", "latents=STORE", "output")
    check_places(recipe, ("latents", "output", "text.weights"))
    if not paths.exists(paths.join(latents, PLAN)):
        raise StoreError(f"latents={latents} holds no latent store (no {PLAN}).")
    source, section = open_plan(latents), recipe.precompute
    if source.format != FORMAT:
        raise StoreError(f"latents={latents} is a store of token states, not of latents.")
    encoder = CaptionEncoder.load(text_spec(recipe.text))
    texts = (text for _, several in source.captions() for text in several)
    print(count_captions(texts, encoder.tokenizer), file=sys.stderr, flush=True)
    begun = open_plan(output).parts if paths.exists(paths.join(output, PLAN)) else {}
    section.precision = settled_precision(
        section.precision, section.gpus_per_actor, begun.get(PRECISION)
    )
    parts = {**encoder.fingerprints, PRECISION: section.precision}
    del encoder
    plan = ensure_plan(
        output, source.table(), source.shard_size, parts, source.account, TEXT_FORMAT
    )
    paths.write_bytes(paths.join(output, "recipe.yaml"), written.encode())
    stages = text_stages(recipe, plan)
    units = [[shard] for shard in missing_shards(output, plan)]
    return fill_store(plan, units, stages, section, started, show_progress)


def text_stages(recipe: Recipe, plan: Plan) -> RowStages:
    """A shard's way: encode, write."""
    return RowStages(
        EncodeCaptions,
        (recipe, plan.id, dict(plan.parts)),
        finish=partial(store_states, plan_id=plan.id),
    )


class EncodeCaptions:
    """The actor: one accelerator (or the CPU) each, with the text encoder."""

    def __init__(self, recipe: Recipe, plan_id: PlanId, parts: dict[str, str]) -> None:
        section = recipe.precompute
        if not section.gpus_per_actor:
            torch.set_num_threads(section.threads_per_actor or num_cpus())
        self.plan_id, self.batch_size = plan_id, section.batch_size
        self.precision = section.precision
        self.device = torch.device("cuda" if section.gpus_per_actor else "cpu")
        self.encoder = CaptionEncoder.load(text_spec(recipe.text)).to(self.device)
        if {**self.encoder.fingerprints, PRECISION: section.precision} != parts:
            raise WeightsError(
                "The text encoder on this node is not the one that the job was planned with. "
                "Either it changed, or this node has other files at the same path."
            )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        shard = int(batch["shard"][0])
        kept, errors, captions = [], [], []
        for place, record in enumerate(plan_of(self.plan_id).shard(shard)):
            several = record.captions or (record.caption or "",)
            if all(text.strip() for text in several):
                kept.append(place)
                captions.append(several)
            else:
                message = "it has no caption, or an empty one"
                errors.append({"key": record.key, "stage": "caption", "message": message})
        texts = ["", *(text for several in captions for text in several)]
        with metrics.stage("encode"), autocast(self.precision, self.device):
            empty, *states = self.encoder.states_of(texts, self.batch_size)
        lengths, start = [], 0
        for several in captions:
            lengths.append([len(some) for some in states[start : start + len(several)]])
            start += len(several)
        return {
            "shard": batch["shard"],
            "ok": [np.array(kept, np.int64)],
            "errors": [json.dumps(errors, ensure_ascii=False)],
            "encoded_at": [time.time()],
            "lengths": [json.dumps(lengths)],
            "empty": [empty],
            STATES: [np.concatenate([empty[:0], *states])],
        }
