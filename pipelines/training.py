"""The Ray Train harness that every trainer shares: one short loop, its data feed, its checkpoints.

A trainer supplies a `Job` (model, loss, validation); `run_job` trains it inside a Ray Train worker, `fit` starts the
workers. Randomness comes from (seed, step, sample), data order from the step, and a checkpoint is one file written
whole, so the same command after a SIGKILL continues to the same parameters, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fae_core.errors import UserError
from pipelines import storage
from pipelines.config import DataSection, Recipe, TrainingSection
from pipelines.epoch_order import EpochOrder
from pipelines.images import ImageRecord, decode_records, read_records
from pipelines.ray_session import quiet_logs
from pipelines.tracking import Tracker, flatten

CHECKPOINTS = "checkpoints"
WINDOW_BATCHES = 256
PREFETCH_BATCHES = 4
DECODE_CPUS = 0.5
MAX_KEYS_IN_ERROR = 32
T = TypeVar("T")


class NonFiniteError(UserError, RuntimeError):
    """Loss or gradient is NaN or infinite; the message names the step and the batch's image keys."""


class TrainingError(UserError, RuntimeError):
    """A run that cannot start or went wrong; the message says what to do."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one worker.

    `images` uint8 [n, S, S, 3] on the worker's device; `samples` are their places in the global batch of `step`,
    which seed their randomness; `weight` is n over the planned size, below 1 where images could not be decoded.
    """

    step: int
    images: Tensor
    samples: list[int]
    keys: list[str]
    weight: float
    errors: list[dict[str, str]]


LossFunction = Callable[[nn.Module, Batch], dict[str, Tensor]]
Validation = Callable[[nn.Module, int], tuple[dict[str, float], bytes | None]]


@dataclass(frozen=True)
class Job:
    """What a trainer supplies: the module to train, `loss(model, batch)` with a 0-dim mean `loss` among its terms,
    and `validate(model, step)` that returns metrics and a PNG; rank 0 calls it."""

    model: nn.Module
    loss: LossFunction
    validate: Validation | None = None


# Randomness -----------------------------------------------------------------------------------------------------------


def sample_generator(seed: int, stream: str, step: int, sample: int) -> torch.Generator:
    """A CPU generator that depends on these four alone: never on rank, accumulation or what was drawn before."""
    digest = hashlib.sha256(f"{seed}/{stream}/{step}/{sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


def sample_noise(seed: int, stream: str, batch: Batch, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise [n, *shape] float32 on the batch's device, one generator a sample."""
    draws = [
        torch.randn(shape, generator=sample_generator(seed, stream, batch.step, sample))
        for sample in batch.samples
    ]
    return torch.stack(draws).to(batch.images.device)


def random_flips(seed: int, batch: Batch) -> Tensor:
    """The batch's images, half of them mirrored left to right."""
    draws = [
        torch.rand((), generator=sample_generator(seed, "flip", batch.step, sample)) < 0.5
        for sample in batch.samples
    ]
    mirrored = torch.stack(draws).to(batch.images.device)
    return torch.where(mirrored[:, None, None, None], batch.images.flip(2), batch.images)


# One optimizer step ---------------------------------------------------------------------------------------------------


def learning_rate(step: int, training: TrainingSection) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up, then cosine to the final rate, or constant."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    if training.schedule == "constant":
        return training.learning_rate
    progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return (
        training.final_learning_rate
        + (training.learning_rate - training.final_learning_rate) * cosine
    )


class TrainState:
    """Model, optimizer, moving average and step: what a checkpoint holds."""

    def __init__(self, model: nn.Module, training: TrainingSection) -> None:
        self.model = model
        self.step = 0
        parameters = [p for p in model.parameters() if p.requires_grad]
        # Norm gains and biases are not decayed.
        groups = [
            {
                "params": [p for p in parameters if p.ndim > 1],
                "weight_decay": training.weight_decay,
            },
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=training.learning_rate,
            betas=training.betas,
        )
        self.parameters = parameters
        self.ema_decay = training.ema_decay
        self.ema = [p.detach().clone() for p in parameters] if training.ema_decay else []

    @torch.no_grad()
    def update_ema(self) -> None:
        if self.ema_decay is not None:
            for average, parameter in zip(self.ema, self.parameters, strict=True):
                average.lerp_(parameter, 1.0 - self.ema_decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights, where the recipe keeps an average."""
        self._swap_ema()
        try:
            yield
        finally:
            self._swap_ema()

    @torch.no_grad()
    def _swap_ema(self) -> None:
        for average, parameter in zip(self.ema, self.parameters, strict=False):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def to_bytes(self) -> bytes:
        """The state as torch.save writes it; `load_bytes` reads it without unpickling code."""
        buffer = io.BytesIO()
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema,
            "rng": torch.get_rng_state(),
        }
        torch.save(state, buffer)
        return buffer.getvalue()

    def load_bytes(self, data: bytes) -> None:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for average, saved in zip(self.ema, state["ema"], strict=True):
            average.copy_(saved)
        torch.set_rng_state(state["rng"])
        self.step = state["step"]


def train_step(
    state: TrainState,
    wrapped: nn.Module,
    loss: LossFunction,
    batches: Sequence[Batch],
    training: TrainingSection,
) -> dict[str, Tensor]:
    """One optimizer step over `batches`, the micro-batches of this worker; its mean loss terms and gradient norm.

    Each mean loss is scaled by its images over the planned ones, so the gradient is the sum over all images divided
    by the planned batch size, however the batch is split. `wrapped` is the model, or DDP around it. Raises
    NonFiniteError before any parameter changes.
    """
    rate = learning_rate(state.step, training)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    suspects: list[str] = []
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        synchronise = (
            contextlib.nullcontext()
            if last
            else getattr(wrapped, "no_sync", contextlib.nullcontext)()
        )
        scale = batch.weight / len(batches)
        device = batch.images.device.type
        with synchronise:
            with torch.autocast(device, torch.bfloat16, enabled=training.precision == "bf16"):
                terms = loss(wrapped, batch)
            (terms["loss"] * scale).backward()
        if not bool(torch.isfinite(terms["loss"])):
            suspects += batch.keys
        for name, value in terms.items():
            totals[name] = (
                totals.get(name, torch.zeros((), device=value.device)) + value.detach() * scale
            )
    norm = torch.nn.utils.clip_grad_norm_(state.parameters, training.gradient_clip or math.inf)
    if suspects or not bool(torch.isfinite(norm)):
        keys = suspects or [key for batch in batches for key in batch.keys]
        more = f" and {len(keys) - MAX_KEYS_IN_ERROR} more" if len(keys) > MAX_KEYS_IN_ERROR else ""
        raise NonFiniteError(
            f"Step {state.step}: loss {float(totals['loss'])}, gradient norm {float(norm)}. The images of this batch: "
            f"{', '.join(keys[:MAX_KEYS_IN_ERROR])}{more}. The last checkpoint is from before this step; look at "
            "these images, lower training.learning_rate or set training.precision=fp32."
        )
    state.optimizer.step()
    state.update_ema()
    state.step += 1
    return {**totals, "gradient_norm": norm.detach()}


# Data -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One planned micro-batch: item numbers of the training images and their places in the global batch."""

    step: int
    items: list[int]
    samples: list[int]


def step_parts(
    order: EpochOrder, training: TrainingSection, step: int, rank: int, world_size: int
) -> list[Part]:
    """The micro-batches of worker `rank` at `step`: an equal slice of the global batch for each (micro, rank)."""
    slices = world_size * training.accumulation
    if training.batch_size % slices:
        raise TrainingError(
            f"training.batch_size={training.batch_size} is not divisible by num_workers x accumulation = "
            f"{world_size} x {training.accumulation}."
        )
    size = training.batch_size // slices
    items, _ = order.batch(step, training.batch_size, 0, 1)
    starts = [(micro * world_size + rank) * size for micro in range(training.accumulation)]
    return [
        Part(
            step,
            [int(item) for item in items[start : start + size]],
            list(range(start, start + size)),
        )
        for start in starts
    ]


class DecodeBatch:
    """Ray Data's map function: records of one micro-batch to its crops, one row to one row."""

    def __init__(self, data: DataSection, size: int) -> None:
        self.data = data
        self.size = size

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        records = [ImageRecord(key, uri) for key, uri in json.loads(row["records"])]
        blobs = read_records(records, self.data)
        images, kept, errors = decode_records(records, blobs, self.size, self.data.max_pixels)
        if not kept:  # a tensor of no images has no place in a block
            images = np.zeros((1, self.size, self.size, 3), np.uint8)
        notes = json.dumps({"kept": [int(index) for index in kept], "errors": errors})
        return {"images": images, "notes": notes}


def decoded(
    parts: Sequence[Sequence[ImageRecord]], data: DataSection, size: int
) -> Iterator[tuple[np.ndarray, list[int], list[dict[str, str]]]]:
    """For each list of records: (crops uint8, kept places, errors), decoded by Ray Data on CPUs, in this order."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    decode = DecodeBatch(data, size)
    for start in range(0, len(parts), WINDOW_BATCHES):
        window = parts[start : start + WINDOW_BATCHES]
        rows = [{"records": json.dumps([[r.key, r.uri] for r in records])} for records in window]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        # One row a block, so that any idle CPU takes the next micro-batch.
        for row in dataset.map(decode, num_cpus=DECODE_CPUS).iter_rows():
            notes = json.loads(row["notes"])
            kept = notes["kept"]
            yield np.asarray(row["images"])[: len(kept)], kept, notes["errors"]


def prefetched(items: Iterator[T], depth: int = PREFETCH_BATCHES) -> Iterator[T]:
    """The same items, made `depth` ahead by a thread; its exception is raised here."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def offer(message: tuple[str, Any]) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(message, timeout=0.2)
                return True
        return False

    def produce() -> None:
        try:
            for item in items:
                if not offer(("item", item)):
                    return
            offer(("end", None))
        except BaseException as error:
            offer(("error", error))

    threading.Thread(target=produce, name="feed", daemon=True).start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()


def training_batches(
    records: Sequence[ImageRecord],
    recipe: Recipe,
    start_step: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Every micro-batch of worker `rank` from `start_step` to the last step, in EpochOrder's order."""
    training = recipe.training
    order = EpochOrder(len(records), recipe.seed)

    def windows() -> Iterator[Batch]:
        steps_per_window = max(1, WINDOW_BATCHES // training.accumulation)
        for first in range(start_step, training.steps, steps_per_window):
            steps = range(first, min(first + steps_per_window, training.steps))
            parts = [
                part
                for step in steps
                for part in step_parts(order, training, step, rank, world_size)
            ]
            wanted = [[records[item] for item in part.items] for part in parts]
            made = decoded(wanted, recipe.data, recipe.image_size)
            for part, planned, (images, kept, errors) in zip(parts, wanted, made, strict=True):
                yield _batch(part, planned, images, kept, errors)

    for batch in prefetched(windows()):
        yield Batch(**{**vars(batch), "images": batch.images.to(device, non_blocking=True)})


def _batch(
    part: Part,
    planned: Sequence[ImageRecord],
    images: np.ndarray,
    kept: list[int],
    errors: list[dict[str, str]],
) -> Batch:
    keys = [planned[index].key for index in kept]
    samples = [part.samples[index] for index in kept]
    weight = len(kept) / len(planned)
    if not kept:  # weight 0: a worker without images still takes part in averaging gradients
        images, samples = np.zeros((1, *images.shape[1:]), np.uint8), part.samples[:1]
    return Batch(part.step, torch.from_numpy(np.array(images)), samples, keys, weight, errors)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def checkpoint_uri(run_uri: str, step: int) -> str:
    return storage.join(run_uri, CHECKPOINTS, f"step_{step:09d}.pt")


def list_checkpoints(run_uri: str) -> list[str]:
    """Addresses of the run's checkpoints, oldest step first. Each file was written whole or is not there."""
    folder = storage.join(run_uri, CHECKPOINTS)
    names = (file.uri for file in storage.list_files(folder))
    return sorted(
        uri for uri in names if uri.rpartition("/")[2].startswith("step_") and uri.endswith(".pt")
    )


def save_checkpoint(state: TrainState, run_uri: str, keep: int) -> None:
    """Write the state, then delete all but the `keep` newest checkpoints."""
    storage.write_bytes(checkpoint_uri(run_uri, state.step), state.to_bytes())
    for uri in list_checkpoints(run_uri)[:-keep]:
        storage.delete(uri)


# The loop -------------------------------------------------------------------------------------------------------------


def run_job(
    job: Job, recipe: Recipe, run_uri: str, records: Sequence[ImageRecord], tracking_uri: str
) -> dict[str, float]:
    """Train `job` to the recipe's last step inside a Ray Train worker; the last validation's metrics (rank 0).

    The model keeps the final weights (averaged ones where the recipe has an EMA).
    """
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    training = recipe.training
    tracker = _tracker(recipe, run_uri, tracking_uri) if rank == 0 else None
    model = job.model.to(device)
    state = TrainState(model, training)
    found = list_checkpoints(run_uri)
    if found:
        state.load_bytes(storage.read_bytes(found[-1]))
        _say(rank, f"resumed at step {state.step} from {found[-1]}")
    wrapped = ray.train.torch.prepare_model(model)
    bad_images = _BadImages(run_uri, rank)
    meter = _Meter(training, world_size, device)
    validation: dict[str, float] = {}
    feed = training_batches(records, recipe, state.step, rank, world_size, device)
    while state.step < training.steps:
        with meter.waiting():
            batches = [next(feed) for _ in range(training.accumulation)]
        for batch in batches:
            bad_images.add(batch.errors)
        meter.add(train_step(state, wrapped, job.loss, batches, training))
        step, last = state.step, state.step == training.steps
        if step % training.log_every == 0 or last:
            metrics = meter.flush() | {"bad_images": float(len(bad_images))}
            metrics["learning_rate"] = learning_rate(step - 1, training)
            _say(rank, _line(f"step {step}/{training.steps}", metrics))
            if tracker:
                tracker.log_metrics(
                    {f"train/{name}": value for name, value in metrics.items()}, step
                )
        if tracker and job.validate and step % training.validate_every == 0 and not last:
            _validate(job.validate, state, tracker)
            meter.restart()
        if step % training.checkpoint_every == 0 or last:
            bad_images.save()
            if rank == 0:
                save_checkpoint(state, run_uri, training.keep_checkpoints)
            ray.train.report({"step": step})
            meter.restart()
    if tracker:
        if job.validate:
            validation = _validate(job.validate, state, tracker)
        tracker.finish()
    if state.ema:
        state._swap_ema()
    return validation


def fit(worker: Callable[[dict[str, Any]], None], config: dict[str, Any], recipe: Recipe) -> None:
    """Run `worker(config)` on the recipe's workers under Ray Train. Raises NonFiniteError or TrainingError."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    training = recipe.training
    wanted = training.num_workers * training.cpus_per_worker + DECODE_CPUS
    cpus = ray.cluster_resources().get("CPU", 0.0)
    if not os.environ.get("RAY_ADDRESS") and wanted > cpus:
        raise TrainingError(
            f"{training.num_workers} workers with {training.cpus_per_worker} CPUs each leave none of this machine's "
            f"{cpus:g} for decoding. Lower training.cpus_per_worker or training.num_workers."
        )
    filesystem, path = storage.filesystem(recipe.storage)
    trainer = TorchTrainer(
        worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=training.num_workers,
            use_gpu=training.use_gpu,
            resources_per_worker={"CPU": training.cpus_per_worker}
            | ({"GPU": 1} if training.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=recipe.run,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        failures = list(getattr(error, "worker_failures", {}).values())
        for failure in failures:
            for cause in (failure, getattr(failure, "cause", None)):
                if isinstance(cause, NonFiniteError | TrainingError):
                    raise type(cause)(str(cause)) from None
        raise


def prepare_worker(device: torch.device) -> None:
    """On a CPU, give this worker its share of the machine's cores (Ray's default is one thread); quiet its log."""
    import ray.data
    import ray.train

    quiet_logs()
    if device.type == "cpu":
        local_workers = ray.train.get_context().get_local_world_size()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_workers))


def _tracker(recipe: Recipe, run_uri: str, tracking_uri: str) -> Tracker:
    return Tracker(recipe.tracking, tracking_uri, run_uri, flatten(recipe.model_dump(mode="json")))


def _validate(validate: Validation, state: TrainState, tracker: Tracker) -> dict[str, float]:
    state.model.eval()
    with state.averaged(), torch.no_grad():
        metrics, figure = validate(state.model, state.step)
    state.model.train()
    if metrics:
        _say(0, _line(f"validation at step {state.step}", metrics))
    tracker.log_metrics(
        {f"validation/{name}": value for name, value in metrics.items()}, state.step
    )
    if figure:
        tracker.log_figure(figure, f"step_{state.step:09d}.png")
    return metrics


def _say(rank: int, text: str) -> None:
    if rank == 0:
        print(text, flush=True)


def _line(title: str, metrics: dict[str, float]) -> str:
    return title + "  " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())


class _Meter:
    """Loss terms averaged since the last log, images per second and the share of time spent waiting for data."""

    def __init__(self, training: TrainingSection, world_size: int, device: torch.device) -> None:
        self.batch_size = training.batch_size
        self.world_size = world_size
        self.device = device
        self.waited = self.elapsed = 0.0
        self.steps = 0
        self.totals: dict[str, Tensor] = {}
        self.start = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def add(self, terms: dict[str, Tensor]) -> None:
        self.steps += 1
        now = time.perf_counter()
        self.elapsed, self.start = self.elapsed + now - self.start, now
        for name, value in terms.items():
            self.totals[name] = self.totals.get(name, torch.zeros((), device=value.device)) + value

    def restart(self) -> None:
        """Leave what happened since the last step (validation, checkpoint) out of the rates."""
        self.start = time.perf_counter()

    def flush(self) -> dict[str, float]:
        means = torch.stack([total.float() for total in self.totals.values()]) / self.steps
        if self.world_size > 1:
            torch.distributed.all_reduce(means)
            means /= self.world_size
        metrics = dict(zip(self.totals, means.tolist(), strict=True))
        metrics["images_per_second"] = self.batch_size * self.steps / self.elapsed
        metrics["data_wait_share"] = self.waited / self.elapsed
        self.waited = self.elapsed = 0.0
        self.steps, self.totals = 0, {}
        return metrics


class _BadImages:
    """The images that this worker met and could not decode, one JSON line a key, in the run's folder."""

    def __init__(self, run_uri: str, rank: int) -> None:
        self.uri = storage.join(run_uri, f"bad_images-{rank:05d}.jsonl")
        lines = (
            storage.read_bytes(self.uri).decode().splitlines() if storage.exists(self.uri) else []
        )
        self.found = {error["key"]: error for error in map(json.loads, lines)}
        self.saved = len(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def add(self, errors: list[dict[str, str]]) -> None:
        for error in errors:
            self.found.setdefault(error["key"], error)

    def save(self) -> None:
        if len(self.found) > self.saved:
            lines = [json.dumps(self.found[key], ensure_ascii=False) for key in sorted(self.found)]
            storage.write_bytes(self.uri, ("\n".join(lines) + "\n").encode())
            self.saved = len(self.found)
