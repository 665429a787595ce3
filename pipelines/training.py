"""The Ray Train harness that every trainer shares: one short loop, one optimizer step, checkpoints.

A trainer supplies a `Job` (model, feed, loss, validation, for a GAN an adversary); `run_job` trains it inside a Ray Train
worker, `fit` starts the workers. Randomness and data order come from the step (batches.py), and a checkpoint is one file
written whole, so the same command after a SIGKILL continues to the same parameters, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import math
import os
import pickle
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fae_core.errors import UserError
from pipelines import storage
from pipelines.batches import Batch
from pipelines.config import Recipe, TrainingSection
from pipelines.history import History
from pipelines.memory_plan import MemoryPlan, plan_memory
from pipelines.ray_session import plain_error, quiet_logs
from pipelines.sharding import is_sharded, shard, split_like, whole
from pipelines.tracking import Tracker, flatten

CHECKPOINTS = "checkpoints"
DECODE_CPUS = 0.5
MAX_KEYS_IN_ERROR = 32

Feed = Callable[[int, int, int, torch.device], Iterator[Batch]]
"""(first step, rank, number of workers, device) -> every micro-batch of this worker from that step on."""
LossFunction = Callable[[nn.Module, Batch], dict[str, Tensor]]
AdversaryLoss = Callable[[nn.Module, Batch], dict[str, Tensor] | None]
Validation = Callable[[nn.Module, int], tuple[dict[str, float], bytes | None]]


class NonFiniteError(UserError, RuntimeError):
    """Loss or gradient is NaN or infinite; the message names the step and the batch's keys."""


class TrainingError(UserError, RuntimeError):
    """A run that cannot start or went wrong; the message says what to do."""


class CheckpointDamaged(TrainingError):
    """A checkpoint whose bytes are not the ones that were written, or that is none."""


@dataclass(frozen=True)
class Adversary:
    """A second network that is trained beside the model on each micro-batch, just after the model's backward pass.

    `loss(adversary, batch)` returns terms with a 0-dim mean `adversary_loss`, or None while it is not its turn; no
    gradient of it may reach the model.
    """

    module: nn.Module
    loss: AdversaryLoss
    learning_rate: float


@dataclass(frozen=True)
class Job:
    """What a trainer supplies: the module to train, its data, `loss(model, batch)` with a 0-dim mean `loss` among its
    terms, `validate(model, step)` that returns metrics and a PNG (rank 0 calls it), and the frozen networks that stand
    beside the model, for the memory plan."""

    model: nn.Module
    feed: Feed
    loss: LossFunction
    validate: Validation | None = None
    adversary: Adversary | None = None
    frozen: Mapping[str, nn.Module] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A part of a training on the schedule of the whole: from the checkpoint at `start`, or from the beginning, to step `stop`."""

    start: str | None
    stop: int


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


def ema_decay(step: int, decay: float) -> float:
    """The average's decay at optimizer step `step` (from 0): min(decay, (1 + step) / (10 + step)), as TensorFlow's.

    Constant from the start, 0.9999 would leave the untrained weights a third of the average after ten thousand steps.
    """
    return min(decay, (1 + step) / (10 + step))


class TrainedNetwork:
    """A module with its AdamW; norm gains and biases are not decayed. `learning_rate` is its peak."""

    def __init__(self, module: nn.Module, training: TrainingSection, learning_rate: float) -> None:
        self.module = module
        self.learning_rate = learning_rate
        self.clip = training.gradient_clip or math.inf
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {
                "params": [p for p in self.parameters if p.ndim > 1],
                "weight_decay": training.weight_decay,
            },
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=learning_rate,
            betas=training.betas,
            fused=self.parameters[0].is_cuda or None,  # None: torch's own choice
        )

    def prepare(self, relative_rate: float) -> None:
        """Drop the last step's gradients and set the rate of this one."""
        self.optimizer.zero_grad(set_to_none=True)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * relative_rate

    def clip_gradients(self) -> Tensor:
        """The global gradient norm (0-dim) before clipping."""
        norm: Tensor = whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.clip))
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer as whole tensors. Where the module is sharded, all workers must call it together."""
        return {
            "weights": whole(self.module.state_dict()),
            "optimizer": whole(self.optimizer.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = self.module.state_dict()
        weights = {name: split_like(value, own[name]) for name, value in state["weights"].items()}
        self.module.load_state_dict(weights)
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            index: {name: split_like(value, ordered[index]) for name, value in values.items()}
            for index, values in state["optimizer"]["state"].items()
        }
        # Rates and decays are the recipe's, not the checkpoint's: a part of a training may have others than the one before.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"param_groups": groups, "state": moments})


class TrainState:
    """Model and adversary with their optimizers, moving average and step: what a checkpoint holds."""

    def __init__(
        self, model: nn.Module, training: TrainingSection, adversary: Adversary | None = None
    ) -> None:
        self.model = model
        self.step = 0
        self.networks = {"model": TrainedNetwork(model, training, training.learning_rate)}
        if adversary:
            self.networks["adversary"] = TrainedNetwork(
                adversary.module, training, adversary.learning_rate
            )
        self.ema_decay = training.ema_decay
        self.ema = (
            [p.detach().clone() for p in self.networks["model"].parameters]
            if training.ema_decay
            else []
        )

    @torch.no_grad()
    def update_ema(self) -> None:
        if self.ema_decay is not None:
            decay = ema_decay(self.step, self.ema_decay)
            # All tensors in a few kernels: hundreds of small ones would keep a GPU waiting for the processor.
            get_ema_multi_avg_fn(decay)(self.ema, self.networks["model"].parameters, self.step)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights, where the recipe keeps an average."""
        self.swap_ema()
        try:
            yield
        finally:
            self.swap_ema()

    @torch.no_grad()
    def swap_ema(self) -> None:
        """Exchange the model's weights and their average; nothing where the recipe keeps none."""
        for average, parameter in zip(self.ema, self.networks["model"].parameters, strict=False):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def to_bytes(self) -> bytes:
        """The state as torch.save writes it; `load_bytes` reads it without unpickling code.

        Holds whole tensors: where the model is sharded, all workers must call it together.
        """
        buffer = io.BytesIO()
        state = {
            "step": self.step,
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "ema": whole(self.ema),
            "rng": torch.get_rng_state(),
        }
        torch.save(state, buffer)
        return buffer.getvalue()

    def load_bytes(self, data: bytes) -> None:
        """Take over what `to_bytes` gave. Raises CheckpointDamaged, with nothing taken over."""
        state = _verified(data)
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        for average, saved in zip(self.ema, state["ema"], strict=True):
            average.copy_(split_like(saved, average))
        torch.set_rng_state(state["rng"])
        self.step = state["step"]


def _verified(data: bytes) -> dict[str, Any]:
    # torch.save notes a CRC-32 of each tensor, and torch.load does not look at it.
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointDamaged(f"the checksum of {damaged} is wrong")
        state: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        if isinstance(error, CheckpointDamaged):
            raise
        reason = str(error).partition("\n")[0]
        raise CheckpointDamaged(f"it is no checkpoint: {reason}") from None
    if not isinstance(state, dict) or not {"step", "networks", "ema", "rng"} <= state.keys():
        raise CheckpointDamaged("it is another kind of file")
    return state


def train_step(
    state: TrainState,
    wrapped: nn.Module,
    loss: LossFunction,
    batches: Sequence[Batch],
    training: TrainingSection,
    wrapped_adversary: nn.Module | None = None,
    adversary_loss: AdversaryLoss | None = None,
) -> dict[str, Tensor]:
    """One optimizer step over `batches`, the micro-batches of this worker; its mean loss terms and gradient norm.

    Each mean loss is scaled by its images over the planned ones, so the gradient is the sum over all images divided
    by the planned batch size, however the batch is split. `wrapped` is the model, or DDP around it; model and
    adversary both step from where they were before. Raises NonFiniteError before any parameter changes.
    """
    relative_rate = learning_rate(state.step, training) / training.learning_rate
    for network in state.networks.values():
        network.prepare(relative_rate)
    totals: dict[str, Tensor] = {}
    finite: list[Tensor] = []
    adversary_steps = False
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        scale = batch.weight / len(batches)
        autocast = torch.autocast(
            batch.device.type, torch.bfloat16, enabled=training.precision == "bf16"
        )
        with _synchronised(wrapped, last):
            with autocast:
                terms = loss(wrapped, batch)
            (terms["loss"] * scale).backward()
        if wrapped_adversary is not None and adversary_loss is not None:
            with _synchronised(wrapped_adversary, last):
                with autocast:
                    judged = adversary_loss(wrapped_adversary, batch)
                if judged is not None:
                    (judged["adversary_loss"] * scale).backward()
                    terms = {**terms, **judged}
                    adversary_steps = True
        losses = [value.detach() for name, value in terms.items() if name.endswith("loss")]
        finite.append(torch.stack(losses).isfinite().all())
        for name, value in terms.items():
            total = totals.get(name, torch.zeros((), device=value.device))
            totals[name] = total + value.detach() * scale
    stepping = [
        network
        for name, network in state.networks.items()
        if name != "adversary" or adversary_steps
    ]
    norms = [network.clip_gradients() for network in stepping]
    # The step's one wait for the device: until here nothing has been asked of a result.
    sound = torch.stack([*finite, *(norm.isfinite() for norm in norms)]).tolist()
    if not all(sound):
        suspects = [batch for batch, good in zip(batches, sound, strict=False) if not good]
        keys = [key for batch in suspects or batches for key in batch.keys]
        more = f" and {len(keys) - MAX_KEYS_IN_ERROR} more" if len(keys) > MAX_KEYS_IN_ERROR else ""
        raise NonFiniteError(
            f"Step {state.step}: loss {float(totals['loss'])}, gradient norm {float(norms[0])}. The images of this "
            f"batch: {', '.join(keys[:MAX_KEYS_IN_ERROR])}{more}. The last checkpoint is from before this step; look "
            "at these images, lower the learning rate or set the precision to fp32."
        )
    for network in stepping:
        network.optimizer.step()
    state.update_ema()
    state.step += 1
    return {**totals, "gradient_norm": norms[0].detach()}


def _synchronised(module: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Gradients are averaged over workers with the last micro-batch alone."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
        return contextlib.nullcontext()
    no_sync = getattr(module, "no_sync", None)
    return contextlib.nullcontext() if last or no_sync is None else no_sync()


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


def save_checkpoint(state: TrainState, run_uri: str, keep: int, write: bool = True) -> None:
    """Write the state, then delete all but the `keep` newest checkpoints.

    Sharded workers all call it, and one of them with `write`.
    """
    if not (write or is_sharded(state.model)):
        return
    data = state.to_bytes()
    if not write:
        return
    storage.write_bytes(checkpoint_uri(run_uri, state.step), data)
    for uri in list_checkpoints(run_uri)[:-keep]:
        storage.delete(uri)


def resume(state: TrainState, run_uri: str, start: str | None = None) -> str:
    """Load the newest checkpoint that is whole into `state`; what happened, in words, empty where there is none.

    A run that has none yet begins with the checkpoint `start`, where it is given. Raises TrainingError where there are
    some and every one is damaged.
    """
    found = list_checkpoints(run_uri) or ([start] if start else [])
    said = ""
    for uri in reversed(found):
        try:
            state.load_bytes(storage.read_bytes(uri))
        except CheckpointDamaged as error:
            said += f"{uri} is damaged ({error}); going back to the one before. "
            continue
        return f"{said}resumed at step {state.step} from {uri}"
    if found:
        raise TrainingError(
            f"{said}\nThere is none before. Delete {storage.join(run_uri, CHECKPOINTS)} to begin at step 0."
        )
    return ""


# The loop -------------------------------------------------------------------------------------------------------------


def run_job(
    job: Job,
    training: TrainingSection,
    recipe: Recipe,
    run_uri: str,
    tracking_uri: str,
    part: Part | None = None,
) -> tuple[nn.Module, dict[str, float]]:
    """Train `job` to the last step inside a Ray Train worker; the trained model and the last validation's metrics (rank 0).

    The model has the final weights (averaged ones where `training` has an EMA). `part` trains a part of it alone.
    """
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    tracker = _tracker(recipe, run_uri, tracking_uri) if rank == 0 else None
    sharded = training.parallel == "fsdp" and world_size > 1
    # What rank 0 validates and keeps: the model itself, or where that is split over the workers, a whole copy on its CPU.
    plain = copy.deepcopy(job.model) if sharded and rank == 0 else job.model
    model = job.model.to(device)
    if sharded:
        shard(model)
    if job.adversary:
        job.adversary.module.to(device)
    state = TrainState(model, training, job.adversary)
    if said := resume(state, run_uri, part.start if part else None):
        _say(rank, said)
    last_step = part.stop if part else training.steps
    wrapped = model if sharded else ray.train.torch.prepare_model(model)
    wrapped_adversary = (
        ray.train.torch.prepare_model(job.adversary.module) if job.adversary else None
    )
    adversary_loss = job.adversary.loss if job.adversary else None
    history = History(run_uri, state.step) if rank == 0 else None
    bad_images = _BadImages(run_uri, rank)
    meter = _Meter(training, world_size, device)
    validation: dict[str, float] = {}
    feed = job.feed(state.step, rank, world_size, device)
    if rank == 0 and not sharded and state.step < last_step:
        first = next(feed)
        _say(rank, memory_plan_of(job, training, first).text(device))
        feed = itertools.chain([first], feed)
    if training.compile:  # after the plan, whose small batches are not worth compiling for
        for module in (wrapped, *job.frozen.values()):
            module.compile()
    meter.restart()
    while state.step < last_step:
        with meter.waiting():
            batches = [next(feed) for _ in range(training.accumulation)]
        for batch in batches:
            bad_images.add(batch.errors)
        meter.add(
            train_step(
                state, wrapped, job.loss, batches, training, wrapped_adversary, adversary_loss
            )
        )
        step, last = state.step, state.step == last_step
        if step % training.log_every == 0 or last:
            metrics = meter.flush() | {"bad_images": float(len(bad_images))}
            metrics["learning_rate"] = learning_rate(step - 1, training)
            _say(rank, _line(f"step {step}/{training.steps}", metrics))
            if tracker and history:
                named = {f"train/{name}": value for name, value in metrics.items()}
                tracker.log_metrics(named, step)
                history.add(named, step)
        validates = step % training.validate_every == 0 and not last
        if validates:
            with state.averaged():
                _gather(model, plain)
                if tracker and history and job.validate:
                    validation = _validate(job.validate, plain, device, step, tracker, history)
        saves = step % training.checkpoint_every == 0 or last
        if saves:
            bad_images.save()
            save_checkpoint(state, run_uri, training.keep_checkpoints, write=rank == 0)
            if history:
                history.save()
        if validates or saves:
            ray.train.report({"step": step, **(validation if validates else {})})
            meter.restart()
    state.swap_ema()
    _gather(model, plain)
    if tracker and history:
        if job.validate:
            validation = _validate(job.validate, plain, device, state.step, tracker, history)
            history.save()
        tracker.finish()
    return plain, validation


def fit(
    worker: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    recipe: Recipe,
    training: TrainingSection,
    callbacks: Sequence[Any] = (),
) -> None:
    """Run `worker(config)` on the workers that `training` asks for under Ray Train.

    Where one is lost, all begin again at the newest checkpoint, up to `training.max_failures` times. `callbacks` are Ray
    Train's, which hear of every validation and checkpoint. Raises what `worker` itself raises, at once.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    wanted = training.num_workers * training.cpus_per_worker + DECODE_CPUS
    cpus = ray.cluster_resources().get("CPU", 0.0)
    if not os.environ.get("RAY_ADDRESS") and wanted > cpus:
        raise TrainingError(
            f"{training.num_workers} workers with {training.cpus_per_worker} CPUs each leave none of this machine's "
            f"{cpus:g} for decoding. Lower cpus_per_worker or num_workers."
        )
    filesystem, path = storage.filesystem(recipe.storage)
    for failures in range(training.max_failures + 1):
        trainer = TorchTrainer(
            worker,
            train_loop_config=config,
            scaling_config=ScalingConfig(
                num_workers=training.num_workers,
                use_gpu=training.use_gpu,
                resources_per_worker={"CPU": training.cpus_per_worker}
                | ({"GPU": 1} if training.use_gpu else {}),
            ),
            # Ray's own restarts would repeat what `worker` raises too, a NaN for example.
            run_config=RunConfig(
                name=recipe.run,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=0),
                callbacks=list(callbacks),
            ),
        )
        try:
            trainer.fit()
            return
        except TrainingFailedError as error:
            own = raised_by_worker(error)
            if isinstance(own, UserError):
                raise own from None
            if own is not None:
                raise own from error
            if failures == training.max_failures:
                raise
            reason = str(error).strip().splitlines()[-1]
            _say(
                0,
                f"workers were lost ({reason}); all go on from the newest checkpoint "
                f"({failures + 1} of {training.max_failures} times)",
            )


def raised_by_worker(error: Exception) -> Exception | None:
    """What the training function itself raised, out of Ray Train's `error`; None where workers or their nodes were lost.

    Ray Train makes no difference between them. One worker's end makes the others fail in their collectives, so an error
    of those alone is a loss that was not noticed yet, and beside another error it is that one's echo.
    """
    from ray.exceptions import RayError, RayTaskError, UserCodeException
    from ray.train.v2._internal.exceptions import RayTrainError

    failures = list(getattr(error, "worker_failures", {}).values())
    for failure in map(plain_error, failures):
        if isinstance(failure, UserError):
            return failure
    for failure in failures:
        cause = failure
        while isinstance(cause, RayTaskError) and isinstance(cause.cause, Exception):
            cause = cause.cause
        wrapped = isinstance(cause, RayTaskError | UserCodeException)
        if isinstance(cause, RayError | RayTrainError) and not wrapped:
            return None
    return next((failure for failure in failures if not _is_echo(failure)), None)


def _is_echo(failure: Exception) -> bool:
    if isinstance(failure, torch.distributed.DistError):
        return True
    return isinstance(failure, RuntimeError) and any(
        word in str(failure) for word in ("gloo", "NCCL")
    )


def prepare_worker(device: torch.device, training: TrainingSection) -> None:
    """On a CPU, give this worker its share of the machine's cores (Ray's default is one thread); quiet its log."""
    import ray.data
    import ray.train

    quiet_logs()
    if device.type == "cpu":
        local_workers = ray.train.get_context().get_local_world_size()
        share = max(1, (os.cpu_count() or 1) // local_workers)
        torch.set_num_threads(training.threads_per_worker or share)


def _tracker(recipe: Recipe, run_uri: str, tracking_uri: str) -> Tracker:
    return Tracker(recipe.tracking, tracking_uri, run_uri, flatten(recipe.model_dump(mode="json")))


def _gather(model: nn.Module, plain: nn.Module) -> None:
    """Bring the weights of a sharded model into rank 0's whole copy; all workers call it. Nothing where they are one."""
    if is_sharded(model):
        weights = whole(model.state_dict())
        if plain is not model:
            plain.load_state_dict(weights)


def _validate(
    validate: Validation,
    model: nn.Module,
    device: torch.device,
    step: int,
    tracker: Tracker,
    history: History,
) -> dict[str, float]:
    home = next(model.parameters()).device
    model.to(device).eval()
    with torch.no_grad():
        metrics, figure = validate(model, step)
    model.to(home).train()
    if metrics:
        _say(0, _line(f"validation at step {step}", metrics))
    named = {f"validation/{name}": value for name, value in metrics.items()}
    tracker.log_metrics(named, step)
    history.add(named, step)
    if figure:
        history.save_figure(figure)
        tracker.log_figure(figure, f"step_{step:09d}.png")
    return metrics


def memory_plan_of(job: Job, training: TrainingSection, batch: Batch) -> MemoryPlan:
    """What the run's last step, with everything on, holds in memory. Not of a sharded model."""
    adversary = job.adversary

    def forward(some: Batch) -> Any:
        bf16 = training.precision == "bf16"
        with torch.autocast(some.device.type, torch.bfloat16, enabled=bf16):
            terms = job.loss(job.model, replace(some, step=training.steps - 1))
            if adversary is None:
                return terms
            return terms, adversary.loss(adversary.module, replace(some, step=training.steps - 1))

    trained = {"model": job.model} | ({"adversary": adversary.module} if adversary else {})
    has_average = training.ema_decay is not None
    return plan_memory(trained, job.frozen, has_average, forward, batch)


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
