"""What a job will hold in memory, by process, said before it starts: `--dry-run` of precompute, train and sample.

A network's part is measured: it is built here, on the CPU and without anybody's weights, and runs a blank image and two of
them. What Python and Ray hold themselves are constants that were measured. Left out: results inside one
operation, what an allocator keeps for later, a GPU's context (about 500 MiB), encoded images, one picture of many
pixels while it is decoded, previews and MLflow.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fae_core.backbone import Backbone
from fae_core.generators.dit import DiT
from fae_core.generators.starflow import FlowBlock, StarFlow

from ..config import Recipe
from ..config.sections import TrainingSection
from ..data import plan_source
from ..data.decoding import DECODE_CPUS, WINDOW_BATCHES
from ..latents import LatentEncoder, LatentStore
from ..networks import backbone_of, backbone_spec
from ..networks.untrained import build_autoencoder, build_generator, build_pixel_decoder
from ..sampling import ImageSampler
from ..training import (
    MAX_VALIDATION_IMAGES,
    MEBI,
    PREFETCH_BATCHES,
    Adversary,
    Batch,
    Job,
    Objective,
    autoencoder_loss,
    generator_loss,
    make_adversary,
    memory_plan_of,
)

PYTHON = 600 * MEBI
"""Unique memory of a process that has imported torch, Ray and this package; measured, with torch's CUDA build: 530 when it
begins, 570 to 605 after it has worked."""
TASK = 180 * MEBI
"""Of one that decodes or writes, without torch (pipelines/cpu_tasks.py); measured: 105 when it begins, 240 when it kept crops."""
RAY = 620 * MEBI
"""Ray's own processes on its head node with a dashboard, and Ray Data's two actors; measured."""
TRAIN_ACTORS = 840 * MEBI
"""Ray Train's controller and four small actors; measured."""
PLAN_RECORD = 426
"""Bytes of an image while it is listed and planned, the worst measured (docs/reliability.md)."""
WAITING_SHARE = 0.15
"""Of a node's memory, what may wait in the object store: Ray's store takes 0.3, and Ray Data fills half of that."""


@dataclass(frozen=True)
class Process:
    """One kind of process: how many run at once, and bytes by name of each on the host and on its device."""

    name: str
    count: int
    host: dict[str, int]
    device: dict[str, int] = field(default_factory=dict)


def memory_of(recipe: Recipe, job: str) -> list[Process]:
    """Of the job `precompute`, `sample`, or the training of `autoencoder`, `pixel_decoder` or `generator`."""
    others = {"precompute": precompute_memory, "sample": sample_memory}
    return others[job](recipe) if job in others else training_memory(recipe, job)


def precompute_memory(recipe: Recipe) -> list[Process]:
    """Of `fae precompute` where this machine's cores are all there are; lists the source. Raises SourceError."""
    options, cpus = recipe.precompute, os.cpu_count() or 1
    num_images = len(plan_source(recipe.data).table)
    backbone = blank_backbone(recipe)
    autoencoder: nn.Module = build_autoencoder(recipe.autoencoder, backbone.spec)
    encoder = LatentEncoder(
        backbone, autoencoder, "", list(options.columns), options.precision, torch.device("cpu")
    )
    side = recipe.image_size
    crop = 3 * side**2
    crops = torch.zeros(2, side, side, 3, dtype=torch.uint8).numpy()
    results = _line(
        lambda n: encoder.encode(crops[:n], n), min(options.batch_size, options.shard_size)
    )
    networks = _bytes(backbone, autoencoder)
    shard = options.shard_size * crop
    num_tasks = _num_tasks(
        cpus - options.num_actors * options.cpus_per_actor, options.cpus_per_decode
    )
    loaded = {"networks, twice while they are loaded": 2 * networks}
    on_gpu = options.gpus_per_actor > 0
    actor = loaded if on_gpu else {**loaded, "results of a batch": results}
    device = {"networks": networks, "results of a batch": results} if on_gpu else {}
    return [
        Process("driver", 1, {"Python": PYTHON, "plan": PLAN_RECORD * num_images, **loaded}),
        Process(
            "decode task",
            num_tasks,
            {"Python": _decoding(recipe), "crops of a shard, three times": 3 * shard},
        ),
        Process("actor", options.num_actors, {"Python": PYTHON, **actor}, device),
        Process("writing task", 1, {"Python": TASK}),
        _idle_workers(),
        _object_store("crops", num_images * crop),
        Process("Ray", 1, {"its processes": RAY}),
    ]


def training_memory(recipe: Recipe, network: str) -> list[Process]:
    """Of `fae train` for autoencoder, pixel_decoder or generator; a worker's largest step, with everything on.

    The losses are the run's own, so LPIPS needs its weights here too. Raises StoreError for a generator's store.
    """
    training: TrainingSection = getattr(recipe, network).training
    size = max(1, training.batch_size // (training.num_workers * training.accumulation))
    make = {
        "autoencoder": _autoencoder_job,
        "pixel_decoder": _pixel_decoder_job,
        "generator": _generator_job,
    }[network]
    job, batch = make(recipe, size)
    plan = memory_plan_of(job, training, batch)
    step = {**plan.parts, "kept for the backward pass": plan.kept}
    # The state as bytes, and once more while they are taken out of the buffer; rank 0 alone.
    trained = [job.model, *([job.adversary.module] if job.adversary else [])]
    learned = [p for m in trained for p in m.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in learned)
    state = sum(size for name, size in plan.parts.items() if not name.endswith("(frozen)"))
    host = {"Python": PYTHON, "checkpoint, while it is written, twice": 2 * (state - gradients)}
    blank = sum(t[:1].numel() * t.element_size() for t in batch.tensors.values())
    host["batches made ahead"] = (PREFETCH_BATCHES + 2) * size * blank
    processes = [Process("driver", 1, {"Python": PYTHON}), _idle_workers()]
    if network != "generator":
        host["held-out images"] = MAX_VALIDATION_IMAGES * 3 * recipe.image_size**2
        left = (os.cpu_count() or 1) - training.num_workers * training.cpus_per_worker
        num_tasks = _num_tasks(left, DECODE_CPUS)
        tasks = {
            "Python": _decoding(recipe),
            "crops of a micro-batch, three times": 3 * size * blank,
        }
        processes.append(Process("decode task", num_tasks, tasks))
        window = WINDOW_BATCHES * training.num_workers * size * blank
        processes.append(_object_store("crops", window))
    worker = {**host} if training.use_gpu else {**host, **step}
    processes.append(
        Process("worker", training.num_workers, worker, step if training.use_gpu else {})
    )
    return [
        *processes,
        Process("Ray", 1, {"its processes": RAY, "Ray Train's actors": TRAIN_ACTORS}),
    ]


def sample_memory(recipe: Recipe) -> list[Process]:
    """Of `fae sample`; loads the three networks. Raises RecipeError, CheckpointError."""
    plain = recipe.model_copy(deep=True)
    plain.sample.compile = False  # one image and two are not worth compiling for
    options, sampler = recipe.sample, ImageSampler(plain)
    decoder = sampler.decoder
    networks = _bytes(sampler.model, decoder.autoencoder, decoder.pixel_decoder)
    size = min(options.batch_size, options.shard_size)
    results = _line(lambda n: decoder(torch.zeros(n, *sampler.shape)), size)
    if isinstance(sampler.model, DiT):
        rows = size * (1 if options.guidance == "none" else 2)
        results = max(results, _line(lambda n: _velocity(sampler, n), rows))
    else:
        results = max(results, _key_values(sampler.model, size, guided=options.flow_guidance > 0))
    pictures = options.shard_size * 3 * recipe.image_size**2
    loaded = {"networks, twice while they are loaded": 2 * networks}
    on_gpu = options.gpus_per_actor > 0
    actor = loaded if on_gpu else {**loaded, "results of a batch": results}
    device = {"networks": networks, "results of a batch": results} if on_gpu else {}
    host = {"Python": PYTHON, **actor, "pictures of a shard, twice": 2 * pictures}
    return [
        Process("driver", 1, {"Python": PYTHON, **loaded}),
        Process("actor", options.num_actors, host, device),
        Process("writing task", 1, {"Python": TASK, "pictures of a shard, twice": 2 * pictures}),
        _idle_workers(),
        _object_store("pictures", options.num_images * 3 * recipe.image_size**2),
        Process("Ray", 1, {"its processes": RAY}),
    ]


def total(processes: Iterable[Process]) -> int:
    """Bytes of all processes on the host, as if they ran on one."""
    return sum(process.count * sum(process.host.values()) for process in processes)


def text(processes: list[Process]) -> str:
    """A table for people."""
    lines = ["memory, estimated [MiB]; nothing was run"]
    for process in processes:
        for place, parts in (("host", process.host), ("device", process.device)):
            if parts:
                times = f"{process.count} x " if process.count > 1 else ""
                lines.append(f"{times}{process.name}, {place}: {sum(parts.values()) / MEBI:,.0f}")
                lines += [f"  {size / MEBI:>9,.0f}  {name}" for name, size in parts.items()]
    lines.append(f"together on one host: {total(processes) / MEBI:,.0f}")
    return "\n".join(lines)


def blank_backbone(recipe: Recipe) -> Backbone:
    """The recipe's backbone with random weights: nothing is downloaded."""
    made = recipe.model_copy(deep=True)
    made.backbone.weights = "random"
    return backbone_of(made)


class Results(TorchDispatchMode):
    """Inside it, `peak` is the most bytes of operations' results that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self.alive:
            return
        self.alive.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self.alive.discard(address)
        self.now -= size


def _line(run: Callable[[int], Any], size: int) -> int:
    """Peak of the results of `run(size)`, from those of one image and of two."""
    peaks = []
    for number in (1, 2):
        with torch.inference_mode(), Results() as results:
            run(number)
        peaks.append(results.peak)
    return peaks[0] + (size - 1) * (peaks[1] - peaks[0])


def _velocity(sampler: ImageSampler, number: int) -> Tensor:
    bf16 = sampler.recipe.sample.precision == "bf16"
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        noise = torch.zeros(number, *sampler.shape)
        labels = torch.zeros(number, dtype=torch.int64)
        velocity: Tensor = sampler.model(noise, torch.ones(number), labels)
        return velocity


def _key_values(flow: StarFlow, size: int, guided: bool) -> int:
    """Of the largest block, of all places, float32; guidance doubles the block that knows the class."""
    sizes = []
    for block in flow.blocks:
        assert isinstance(block, FlowBlock)
        rows = size * (2 if guided and block.prefix is not None else 1)
        sizes.append(len(block.layers) * rows * len(block.rope_cos) * 2 * flow.config.width * 4)
    return max(sizes)


def _autoencoder_job(recipe: Recipe, size: int) -> tuple[Job, Batch]:
    backbone = blank_backbone(recipe)
    model = build_autoencoder(recipe.autoencoder, backbone.spec)

    def loss(wrapped: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return autoencoder_loss(recipe, backbone, wrapped, batch)

    return Job(model, _no_feed, loss, frozen={"backbone": backbone}), _blank_images(recipe, size)


def _pixel_decoder_job(recipe: Recipe, size: int) -> tuple[Job, Batch]:
    backbone = blank_backbone(recipe)
    frozen: dict[str, nn.Module] = {"backbone": backbone}
    if recipe.pixel_decoder.stage == "finetune":
        autoencoder = build_autoencoder(recipe.autoencoder, backbone.spec)
        frozen["autoencoder"] = autoencoder.requires_grad_(False)
    adversary = make_adversary(recipe, backbone)
    objective = Objective(recipe, backbone, frozen.get("autoencoder"), adversary, noise_std=1.0)
    if objective.lpips is not None:
        frozen["lpips"] = objective.lpips
    model = build_pixel_decoder(recipe.pixel_decoder, backbone.spec, recipe.image_size)
    judged = None
    if adversary is not None:
        rate = recipe.pixel_decoder.losses.discriminator_learning_rate
        judged = Adversary(adversary, objective.adversary_loss, rate)
    job = Job(model, _no_feed, objective.model_loss, None, judged, frozen)
    return job, _blank_images(recipe, size)


def _generator_job(recipe: Recipe, size: int) -> tuple[Job, Batch]:
    section = recipe.generator
    if recipe.latents is not None:
        shape = LatentStore.open(recipe.latents).latent_shape
    else:
        shape = (recipe.autoencoder.latent_dim, *backbone_spec(recipe).grid)
    latents = torch.zeros(1, *shape).expand(size, *shape)
    tensors = {
        "latents": latents,
        "noise": latents,
        "labels": torch.zeros(size, dtype=torch.int64),
        "time": torch.zeros(size),
    }
    model = build_generator(section, shape)
    job = Job(model, _no_feed, lambda wrapped, batch: generator_loss(section, wrapped, batch))
    return job, _batch(tensors, size)


def _no_feed(*_: Any) -> Any:
    return iter(())


def _blank_images(recipe: Recipe, size: int) -> Batch:
    shape = (size, recipe.image_size, recipe.image_size, 3)
    return _batch({"images": torch.zeros(1, *shape[1:], dtype=torch.uint8).expand(shape)}, size)


def _batch(tensors: dict[str, Tensor], size: int) -> Batch:
    return Batch(0, tensors, list(range(size)), [""] * size, 1.0, [])


def _decoding(recipe: Recipe) -> int:
    """Of a process that decodes: the fast decoder's filter is torch's."""
    return PYTHON if recipe.data.decoder == "fast" else TASK


def _idle_workers() -> Process:
    """Ray keeps as many processes of finished tasks as it has CPUs."""
    return Process("idle worker", os.cpu_count() or 1, {"Python": TASK})


def _object_store(what: str, size: int) -> Process:
    """Blocks that wait between stages: all `size` bytes of them, or as many as Ray Data lets wait."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Process("object store", 1, {f"{what} that wait": min(size, int(WAITING_SHARE * memory))})


def _num_tasks(cpus: float, cpus_of_each: float) -> int:
    return max(1, int(cpus / cpus_of_each))


def _bytes(*modules: nn.Module) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    )
