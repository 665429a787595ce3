"""Ray Data's part in this process: the same tasks and actors, called one row after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fae.pipelines.config import Recipe
from fae.pipelines.config.sections import DataSection
from fae.pipelines.data.decoding import DecodeBatch
from fae.pipelines.data.records import ImageRecord
from fae.pipelines.runtime.actor_pool import Row, RowStages


def run_rows(
    rows: Sequence[Row], stages: RowStages, pool: object, keep_order: bool = False
) -> Generator[Row, None, None]:
    """What `run_rows` of the runtime gives, without Ray."""
    actor = stages.actor(*stages.arguments)
    for row in rows:
        expanded = [row]
        if stages.expand is not None:
            expanded = [_unwrapped(some) for some in stages.expand(_wrapped(row))]
        for one in expanded:
            prepared = stages.prepare(one) if stages.prepare else one
            made = _unwrapped(actor(_wrapped(prepared)))
            yield stages.finish(made) if stages.finish else made


def decoded(
    parts: Sequence[Sequence[ImageRecord]], data: DataSection, size: int
) -> Iterator[tuple[np.ndarray, list[int], list[dict[str, str]]]]:
    """What `decoded` of the data gives, without Ray."""
    decode = DecodeBatch(data, size)
    for records in parts:
        row = decode({"records": json.dumps([[r.key, r.uri] for r in records])})
        notes = json.loads(row["notes"])
        yield row["images"][: len(notes["kept"])], notes["kept"], notes["errors"]


def leave_ray_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs and feeds work in this process, and starting Ray is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", refuse)
    for job in ("latents.filling", "sampling.sample_job"):
        monkeypatch.setattr(f"fae.pipelines.{job}.run_rows", run_rows)
    for features in ("features", "probe_features", "text_scores"):
        monkeypatch.setattr(f"fae.pipelines.evaluation.{features}.run_rows", run_rows)
    monkeypatch.setattr("fae.pipelines.latents.filling.fan_out", map)
    monkeypatch.setattr("fae.pipelines.latents.filling.start_ray", lambda: None)
    monkeypatch.setattr("fae.pipelines.evaluation.evaluate_job.start_ray", lambda: None)
    for feed in ("image_feed", "feature_cache"):
        monkeypatch.setattr(f"fae.pipelines.training.{feed}.decoded", decoded)


def train_here(monkeypatch: pytest.MonkeyPatch, on_cluster: bool = False) -> None:
    """The worker of a trainer runs in this process, alone, without Ray Train."""
    alone = SimpleNamespace(
        get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_world_size=lambda: 1
    )
    monkeypatch.setattr("ray.train.get_context", lambda: alone)
    monkeypatch.setattr("ray.train.report", lambda *_, **__: None)
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("ray.train.torch.prepare_model", lambda model: model)

    def launch(worker: Callable, recipe: Recipe, *_: object) -> None:
        config = {"tracking_uri": "", "account": None, "on_cluster": on_cluster}
        worker({"recipe": recipe.model_dump(mode="json"), **config})

    monkeypatch.setattr("ray.train.collective.barrier", lambda: None)
    for trainer in ("autoencoder", "pixel_decoder", "generator"):
        monkeypatch.setattr(f"fae.pipelines.training.{trainer}.launch", launch)


def _wrapped(row: Row) -> dict[str, Any]:
    return {name: [value] for name, value in row.items()}


def _unwrapped(batch: dict[str, Any]) -> Row:
    return {name: values[0] for name, values in batch.items() if len(values)}
