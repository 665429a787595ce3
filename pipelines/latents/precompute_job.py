"""`fae precompute`: images to latents, a Ray Data job that fills a latent store shard by shard.

list -> plan -> decode and crop (CPU tasks) -> frozen backbone and FAE encoder (actor pool) ->
Parquet shard. A row of the Ray data set is a whole shard, so no operator can split it, and each
file is written by one call.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from fae_core.precision import settled_precision

from ..config import Recipe, with_absolute_paths
from ..data import plan_source
from ..data.account import Account
from ..data.crops import crop_version
from ..networks import backbone_fingerprints
from ..runtime import metrics
from ..runtime.actor_pool import RowStages
from ..runtime.places import check_places
from ..storage import paths
from .encoder import LatentEncoder
from .filling import TooManyErrors, fill_store, shards_to_run
from .plan import PLAN, Plan, PlanId, ensure_plan, open_plan
from .tasks import decode_shard, is_readable, plan_of, read_shards, store_shard


def precompute(recipe: Recipe, show_progress: bool = True) -> dict[str, Any]:
    """Encode what is missing and commit; returns the manifest.

    Raises RecipeError, SourceError, TooManyErrors, and StoreMismatch where the output holds the
    store of another model, recipe or source.
    """
    started, written = time.monotonic(), recipe.to_yaml()
    recipe = with_absolute_paths(recipe)
    needed = ("data.path", "autoencoder.checkpoint", "output")
    *_, output = recipe.require("precompute", *needed)
    check_places(recipe, (*needed, "backbone.weights"))
    source = plan_source(recipe.data)
    if show_progress:
        print("\n".join(source.account.lines()), file=sys.stderr, flush=True)
    section = recipe.precompute
    begun: Mapping[str, str] = {}
    if paths.exists(paths.join(output, PLAN)):
        begun = open_plan(output).parts
    else:  # a plan that is there was allowed its losses
        _check_losses(source.account, section.max_error_rate)
    section.precision = settled_precision(
        section.precision, section.gpus_per_actor, begun.get("precision")
    )
    parts = fingerprint_parts(recipe)
    size = recipe.precompute.shard_size
    plan = ensure_plan(output, source.table, size, parts, source.account.to_dict())
    streamed = shards_in_large_groups(source.table["uri"], source.large_groups, size)
    del source
    paths.write_bytes(paths.join(output, "recipe.yaml"), written.encode())
    readable = partial(is_readable, plan_id=plan.id, data=recipe.data, image_size=recipe.image_size)
    units = units_of(shards_to_run(plan, section, readable), streamed)
    stages = shard_stages(recipe, plan)
    if any(len(unit) > 1 for unit in units):
        read = partial(read_shards, plan_id=plan.id, data=recipe.data)
        stages = dataclasses.replace(stages, expand=read)
    return fill_store(plan, units, stages, section, started, show_progress)


def fingerprint_parts(recipe: Recipe) -> dict[str, str]:
    """What decides a latent's bits besides its image.

    Raises CheckpointError where the autoencoder is another backbone's.
    """
    encoder = LatentEncoder.of(recipe)
    fingerprints = backbone_fingerprints(recipe, encoder.backbone)
    return {
        "backbone": fingerprints["backbone"].partition(":")[0],
        "backbone weights": encoder.backbone.weights_sha256,
        "autoencoder weights": encoder.autoencoder_sha256,
        "image size": str(recipe.image_size),
        "crop": crop_version(recipe.data),
        "columns": ",".join(recipe.precompute.columns),
        "precision": encoder.precision,
    }


def shard_stages(recipe: Recipe, plan: Plan) -> RowStages:
    """A shard's way: decode and crop, encode, write."""
    return RowStages(
        EncodeShards,
        (recipe, plan.id, dict(plan.parts)),
        prepare=partial(
            decode_shard, plan_id=plan.id, data=recipe.data, image_size=recipe.image_size
        ),
        finish=partial(store_shard, plan_id=plan.id, columns=recipe.precompute.columns),
    )


def shards_in_large_groups(
    uris: pa.ChunkedArray, large_groups: Mapping[str, Mapping[int, tuple[int, int]]], size: int
) -> dict[int, tuple[str, int]]:
    """(file, row group) of the shards whose first image lies in a large row group of Parquet.

    `uris` are the planned images' addresses, `size` of them a shard.
    """
    found: dict[int, tuple[str, int]] = {}
    if large_groups:
        firsts = uris.take(list(range(0, len(uris), size)))
        for shard, address in enumerate(firsts.to_pylist()):
            uri, _, row = address.rpartition("#row=")
            for group, (start, stop) in large_groups.get(uri, {}).items():
                if start <= int(row) < stop:
                    found[shard] = (uri, group)
    return found


def units_of(todo: Sequence[int], streamed: Mapping[int, tuple[str, int]]) -> list[list[int]]:
    """The shards `todo` in units of work: one each, but those of one large row group together."""
    units: list[list[int]] = []
    for shard in todo:
        group = streamed.get(shard)
        if units and group is not None and streamed.get(units[-1][-1]) == group:
            units[-1].append(shard)
        else:
            units.append([shard])
    return units


def _check_losses(account: Account, allowed: float) -> None:
    """Raises TooManyErrors where planning lost more than is allowed: of what it counts (images,
    members, sidecars), or of the files, each of which may hold many images.
    """
    num_read = account.num_files - account.num_skipped
    of_all = account.num_losses <= allowed * (account.num_images + account.num_losses)
    if of_all and account.lost_files <= allowed * num_read:
        return
    first = "\n".join(
        f"  {loss['address']} [plan] {loss['message']}" for loss in account.losses[:10]
    )
    files = f" ({account.lost_files / num_read:.1%} of the files)" if account.lost_files else ""
    raise TooManyErrors(
        f"{account.num_losses} files, members or sidecars of data.path={account.path} cannot be "
        f"read{files}, beside {account.num_images} planned images: more than "
        f"precompute.max_error_rate={allowed:g} allows. Nothing was written. Repair them or "
        f"raise the rate. The first:\n{first}"
    )


class EncodeShards:
    """The actor: one accelerator (or the CPU) each; the networks are loaded once."""

    def __init__(self, recipe: Recipe, plan_id: PlanId, weights: dict[str, str]) -> None:
        self.plan_id, self.batch_size = plan_id, recipe.precompute.batch_size
        self.encoder = LatentEncoder.for_actor(recipe, recipe.precompute.gpus_per_actor, weights)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        images, ok = np.asarray(batch["images"][0]), np.asarray(batch["ok"][0], dtype=np.int64)
        errors = json.loads(str(batch["errors"][0]))
        with metrics.stage("encode"):
            columns = self.encoder.encode(images, self.batch_size)
        finite = np.ones(len(ok), dtype=bool)
        for values in columns.values():
            finite &= np.isfinite(values).all(axis=(1, 2, 3))
        if not finite.all():
            shard = int(batch["shard"][0])
            records = plan_of(self.plan_id).shard(shard)
            errors += [
                {"key": records[i].key, "stage": "encode", "message": "the latent is not finite"}
                for i in ok[~finite]
            ]
        return {
            "shard": batch["shard"],
            "ok": [ok[finite]],
            "errors": [json.dumps(errors, ensure_ascii=False)],
            "encoded_at": [time.time()],
            **{name: [values[finite]] for name, values in columns.items()},
        }
