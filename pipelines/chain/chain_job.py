"""`fae run`: the whole chain as one resumable command, from images to scored samples and a report.

autoencoder ‖ pixel decoder → latents (→ text states) → generator → finetuning → samples →
evaluation (→ probe) → report. `stages.py` plans what each stage reads and where its result lies. A
stage that has finished is skipped; one that was interrupted resumes. Trials of `fae tune` call
`run_stage` too.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ..config import Recipe
from ..evaluation import evaluate, probe
from ..latents import precompute, precompute_text
from ..networks import load_checkpoint
from ..runtime.lanes import on_this_node
from ..runtime.places import check_places
from ..runtime.session import plain_error, start_ray
from ..sampling import sample
from ..storage import paths
from ..training import (
    requirements,
    train_autoencoder,
    train_generator,
    train_pixel_decoder,
)
from ..training.run_folder import TrainResult
from ..training.tracking import shared_tracking
from .report import write_report
from .sizes import expected_bytes, latent_bytes
from .stages import PLACES, Stage, check_stages, plan_stages, select, training_of

TRAINERS: dict[str, Callable[..., TrainResult]] = {
    "autoencoder": train_autoencoder,
    "pixel-decoder": train_pixel_decoder,
    "finetune": train_pixel_decoder,
    "generator": train_generator,
}
SIDE_BY_SIDE = {"autoencoder", "pixel-decoder"}
"""Stages that do not build on each other and can train at the same time."""


def run_chain(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Run the missing stages. Returns the metrics of every stage by its name.

    Raises what the stages' jobs raise.
    """
    check_places(recipe, PLACES)
    recipe = recipe.model_copy(update={"tracking": shared_tracking(recipe.tracking)})
    stages = select(plan_stages(recipe), recipe.chain)
    check_stages(stages)
    todo = [stage for stage in stages if stage.result() is None]
    for stage in stages:
        if stage not in todo:
            _say(f"{stage.name}: finished already, {stage.uri}")
    if todo:
        start_ray()
    together = [stage for stage in todo if stage.name in SIDE_BY_SIDE]
    if len(together) == 2:
        fits, why = fit_together(together, _cluster_resources())
        how = "side by side" if fits else "one after the other"
        _say(f"autoencoder and pixel-decoder: {how} ({why})")
        if fits:
            _run_side_by_side(together)
            todo = [stage for stage in todo if stage not in together]
    for stage in todo:
        _run_aloud(stage)
    return {stage.name: (stage.result() or {})["metrics"] for stage in stages}


def run_stage(stage: Stage, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Run or resume the stage. Returns its `result()`, which a finished stage has already.

    `callbacks` are Ray Train's, for a stage that trains.
    """
    found = stage.result()
    if found is not None:
        return found
    started = time.monotonic()
    metrics, made = _run_job(stage, callbacks)
    result = {
        "stage": stage.name,
        "metrics": metrics,
        "fingerprint": made,
        "seconds": round(time.monotonic() - started, 1),
        "parts": dict(stage.parts),
    }
    # stage.json is written last: where it exists, the stage has finished.
    text = json.dumps(result, indent=1).encode()
    paths.write_bytes(paths.join(stage.uri, "stage.json"), text)
    return result


def describe(recipe: Recipe) -> list[tuple[Stage, str, int]]:
    """For `--dry-run`: each stage, its state (finished, begun or absent), and its bytes.

    Of a finished stage these are the bytes in its folder, else those that are expected.
    """
    described = []
    for stage in select(plan_stages(recipe), recipe.chain):
        files = list(paths.list_files(stage.uri))
        state = "finished" if stage.result() else "begun" if files else "absent"
        size = sum(file.size for file in files) if state == "finished" else expected_bytes(stage)
        described.append((stage, state, size))
    return described


def print_plan(recipe: Recipe) -> None:
    """Print what `describe` finds, and the resources for training two stages side by side."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table(box=None, pad_edge=False)
    for title in ("stage", "state", "size", "where"):
        justify: Any = "right" if title == "size" else "left"
        table.add_column(title, justify=justify, overflow="fold", no_wrap=title != "where")
    described = describe(recipe)
    for stage, state, size in described:
        about = "" if state == "finished" else "about "
        table.add_row(stage.name, state, f"{about}{_bytes(size)}" if size else "small", stage.uri)
    console.print(table)
    absent = sum(size for _, state, size in described if state != "finished")
    console.print(f"to write: about {_bytes(absent)}; nothing was run")
    for stage, state, _ in described:
        if stage.problem and state != "finished":
            console.print(f"{stage.name} cannot run: {stage.problem}", markup=False)
    together = [stage for stage, state, _ in described if stage.name in SIDE_BY_SIDE]
    if len(together) == 2:
        need = ", ".join(
            f"{value:g} {name}" for name, value in training_resources(together).items()
        )
        console.print(f"autoencoder and pixel-decoder train side by side if the cluster has {need}")


def fit_together(stages: Sequence[Stage], available: dict[str, float]) -> tuple[bool, str]:
    """Whether the stages can train at the same time with `available`, and the reason in words."""
    needed = training_resources(stages)
    short = [name for name, value in needed.items() if value > available.get(name, 0.0)]
    names = short or list(needed)
    reason = ", ".join(f"{needed[n]:g} of {available.get(n, 0.0):g} {n}s" for n in names)
    return not short, f"needs {reason}"


def training_resources(stages: Sequence[Stage]) -> dict[str, float]:
    """CPUs and GPUs that the stages' trainings take at the same time."""
    return requirements.resources(t for stage in stages if (t := training_of(stage)))


def _cluster_resources() -> dict[str, float]:
    import ray

    return dict(ray.cluster_resources())


def _run_aloud(stage: Stage) -> None:
    _say(f"{stage.name}: {stage.uri}")
    _say_done(stage, run_stage(stage))


def _run_side_by_side(stages: Sequence[Stage]) -> None:
    """Run the stages at the same time, a process each, which an interrupt ends.

    Threads could not be ended. An error of one is raised after the others have ended, so their
    work is kept.
    """
    import ray

    for stage in stages:
        _say(f"{stage.name}: {stage.uri}")
    task: Any = ray.remote(max_calls=1)(run_stage).options(max_retries=0, **on_this_node())
    running = {task.remote(stage): stage for stage in stages}
    failed: list[Exception] = []
    try:
        while running:
            (ended,), _ = ray.wait(list(running))
            try:
                _say_done(running[ended], ray.get(ended))
            except Exception as error:
                failed.append(plain_error(error))
            del running[ended]
    finally:
        for unfinished in running:
            ray.cancel(unfinished, force=True)
    if failed:
        raise failed[0] from None


def _say_done(stage: Stage, result: dict[str, Any]) -> None:
    figures = "  ".join(f"{name} {value:.4g}" for name, value in result["metrics"].items())
    _say(f"{stage.name}: done in {result['seconds']:.0f} s  {figures}")


def _run_job(stage: Stage, callbacks: Sequence[Any]) -> tuple[dict[str, float], str]:
    """Run the stage's job. Returns its metrics, and the fingerprint of its result."""
    recipe = stage.recipe
    if stage.name in TRAINERS:
        preview = recipe.pixel_decoder.checkpoint
        if stage.name == "generator" and preview and not paths.exists(preview):
            # A chain that ends before the samples trains no pixel decoder: previews are PCA maps.
            recipe = recipe.model_copy(deep=True)
            recipe.pixel_decoder.checkpoint = None
        trained = TRAINERS[stage.name](recipe, callbacks)
        return trained.metrics, load_checkpoint(trained.checkpoint).weights_sha256
    if stage.name == "latents":
        manifest = precompute(recipe)
        counts = {name: float(manifest[name]) for name in ("stored", "errors")}
        size = float(latent_bytes(recipe))
        return {**counts, "bytes_per_image": size}, manifest["fingerprint"]
    if stage.name == "text-states":
        manifest = precompute_text(recipe)
        counts = {name: float(manifest[name]) for name in ("stored", "errors", "tokens")}
        return counts, manifest["fingerprint"]
    if stage.name == "samples":
        return {"stored": float(sample(recipe)["stored"])}, stage.key
    if stage.name == "evaluation":
        return evaluate(recipe), stage.key
    if stage.name == "probe":
        return probe(recipe), stage.key
    write_report(stage, [s for s in plan_stages(recipe) if s.name in stage.needs])
    return {}, stage.key


def _say(text: str) -> None:
    print(text, flush=True)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
