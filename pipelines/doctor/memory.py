"""What a job will hold in memory, by process: `--dry-run` of precompute, train and sample.

The part of the networks is measured: they run a blank image and two of them on fake tensors, so
the estimate itself needs little memory. What Python and Ray hold are constants that were measured.
Left out are results inside one operation, what an allocator keeps for later, a GPU's context
(about 500 MiB), encoded images, one picture of many pixels while it is decoded, previews and
MLflow.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fae_core.generators.starflow import FlowBlock, StarFlow
from fae_core.machine import memory_bytes, num_cpus
from fae_core.precision import autocast, settled_precision
from fae_core.text import CaptionTokenizer, untrained_text_encoder

from ..config import Recipe
from ..config.sections import DataSection, PrecomputeSection, SampleSection
from ..data import plan_source
from ..latents import LatentEncoder
from ..networks.text_encoder import CaptionEncoder, text_spec
from ..networks.untrained import build_autoencoder, build_backbone, fake_networks, network_bytes
from ..sampling.image_sampler import ImageSampler
from ..storage import paths, s3
from ..training import requirements
from .peak import peak_of
from .text_size import expected_text

MEBI = 1 << 20
PYTHON = 600 * MEBI
"""Unique memory of a process that has imported torch, Ray and this package; measured, with torch's
CUDA build: 530 when it begins, 570 to 605 after it has worked."""
TASK = 180 * MEBI
"""Of one that decodes or writes, without torch; measured: 105 when it begins, 240 with crops."""
RAY = 620 * MEBI
"""Ray's own processes on its head node with a dashboard, and Ray Data's two actors; measured."""
TRAIN_ACTORS = 840 * MEBI
"""Ray Train's controller and four small actors; measured."""
PLAN_RECORD = 426
"""Bytes of an image while it is listed and planned, the worst measured (docs/reliability.md)."""
WAITING_SHARE = 0.15
"""Of a node's memory, what may wait in the object store: the store takes 0.3 of it, and Ray Data
fills half of that."""


@dataclass(frozen=True)
class Process:
    """One kind of process: how many run at once, and each one's bytes by name, on two places."""

    name: str
    count: int
    host: dict[str, int]
    device: dict[str, int] = field(default_factory=dict)


def memory_of(recipe: Recipe, job: str) -> list[Process]:
    """Of `precompute`, `precompute_text`, `sample`, or training: `autoencoder`, `pixel_decoder` or
    `generator`.
    """
    others = {
        "precompute": precompute_memory,
        "precompute_text": precompute_text_memory,
        "sample": sample_memory,
    }
    return others[job](recipe) if job in others else training_memory(recipe, job)


def precompute_memory(recipe: Recipe) -> list[Process]:
    """Of `fae precompute` where this machine's cores are all there are.

    Lists the source. Raises SourceError.
    """
    section, side = recipe.precompute, recipe.image_size
    num_images = len(plan_source(recipe.data).table)
    with torch.device("meta"):
        backbone = build_backbone(recipe.backbone)
        autoencoder = build_autoencoder(recipe.autoencoder, backbone.spec)
    cpu = torch.device("cpu")
    encoder = LatentEncoder(
        backbone,
        autoencoder,
        "",
        list(section.columns),
        settled_precision(section.precision, section.gpus_per_actor),
        cpu,
    )
    with fake_networks(backbone, autoencoder):
        crops = [torch.zeros(n, side, side, 3, dtype=torch.uint8) for n in (1, 2)]
        size = min(section.batch_size, section.shard_size)
        results = peak_of(lambda n: encoder.encode_batch(crops[n - 1]), size)
    networks, crop = network_bytes(backbone, autoencoder), 3 * side**2
    free_cpus = num_cpus() - section.num_actors * section.cpus_per_actor
    driver = {
        "Python": PYTHON,
        "plan": PLAN_RECORD * num_images,
        "networks, twice while they are loaded": 2 * networks,
    }
    tasks = {
        "Python": _decoding(recipe.data),
        "crops of a shard, three times": 3 * section.shard_size * crop,
    }
    return [
        Process("driver", 1, driver),
        Process("decode task", max(1, int(free_cpus / section.cpus_per_decode)), tasks),
        _actor(section, networks, results),
        Process("writing task", 1, {"Python": TASK}),
        _idle_workers(),
        _object_store("crops", num_images * crop),
        Process("Ray", 1, {"its processes": RAY}),
    ]


def precompute_text_memory(recipe: Recipe) -> list[Process]:
    """Of `fae precompute-text`. Raises RecipeError, StoreError without latents, WeightsError."""
    section, spec = recipe.precompute, text_spec(recipe.text)
    size = expected_text(recipe)
    with torch.device("meta"):
        encoder = untrained_text_encoder(spec)
    captions = CaptionEncoder(CaptionTokenizer(spec), encoder)
    with fake_networks(encoder):
        results = peak_of(partial(_states, captions), section.batch_size)
    of_shard = -(-size.num_bytes * min(size.shard_size, size.rows) // max(1, size.rows))
    states = {"states of a shard, twice": 2 * of_shard}
    networks = network_bytes(encoder)
    actor = _actor(section, networks, results)
    actor.host.update(states)
    driver = {
        "Python": PYTHON,
        "plan": PLAN_RECORD * size.rows,
        "networks, twice while they are loaded": 2 * networks,
    }
    return [
        Process("driver", 1, driver),
        actor,
        Process("writing task", 1, {"Python": TASK, **states}),
        _idle_workers(),
        _object_store("states", size.num_bytes),
        Process("Ray", 1, {"its processes": RAY}),
    ]


def training_memory(recipe: Recipe, network: str) -> list[Process]:
    """Of `fae train` for autoencoder, pixel_decoder or generator, in its largest step.

    Raises StoreError for a generator's store, UserError where LPIPS has no weights here.
    """
    training = requirements.training_of(recipe, network)
    needed = requirements.memory_of(recipe, network)
    processes = [Process("driver", 1, {"Python": PYTHON}), _idle_workers()]
    if needed.micro_batch:
        tasks = {
            "Python": _decoding(recipe.data),
            "crops of a micro-batch, three times": 3 * needed.micro_batch,
        }
        num_tasks = requirements.num_decode_tasks(training, num_cpus())
        processes.append(Process("decode task", num_tasks, tasks))
        processes.append(_object_store("crops", needed.decoded_ahead))
    host = {"Python": PYTHON, **needed.host}
    if paths.is_s3(recipe.storage):
        host["checkpoint, its parts while it is read"] = s3.TRANSFER_REQUESTS * s3.RANGE_SIZE
    on_host, on_device = (host, needed.step) if training.use_gpu else (host | needed.step, {})
    return [
        *processes,
        Process("worker", training.num_workers, on_host, on_device),
        Process("Ray", 1, {"its processes": RAY, "Ray Train's actors": TRAIN_ACTORS}),
    ]


def sample_memory(recipe: Recipe) -> list[Process]:
    """Of `fae sample`; loads its networks. Raises RecipeError, CheckpointError, WeightsError."""
    plain = recipe.model_copy(deep=True)
    plain.sample.compile = False  # one image and two are not worth compiling for
    section, sampler = recipe.sample, ImageSampler(plain)
    model, decoder = sampler.model, sampler.decoder
    loaded_networks = [model, decoder.autoencoder, decoder.pixel_decoder]
    if sampler.guide:
        loaded_networks.append(sampler.guide)
    if sampler.text:
        loaded_networks.append(sampler.text.encoder)
    networks = network_bytes(*loaded_networks)
    size = min(section.batch_size, section.shard_size)
    with fake_networks(*loaded_networks):
        results = peak_of(lambda n: decoder(torch.zeros(n, *sampler.shape)), size)
        if sampler.text:
            results = max(results, peak_of(partial(_states, sampler.text), size + 1))
        if not isinstance(model, StarFlow):
            rows = size * (1 if section.guidance == "none" or sampler.guide else 2)
            precision = settled_precision(section.precision, section.gpus_per_actor)
            results = max(results, peak_of(lambda n: _velocity(sampler, n, precision), rows))
        else:
            guided = section.flow_guidance > 0
            results = max(results, _key_values(model, size, guided))
    picture = 3 * recipe.image_size**2
    pictures = {"pictures of a shard, twice": 2 * section.shard_size * picture}
    loaded = {"networks, twice while they are loaded": 2 * networks}
    actor = _actor(section, networks, results)
    actor.host.update(pictures)
    return [
        Process("driver", 1, {"Python": PYTHON, **loaded}),
        actor,
        Process("writing task", 1, {"Python": TASK, **pictures}),
        _idle_workers(),
        _object_store("pictures", section.num_images * picture),
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


def _velocity(sampler: ImageSampler, num: int, precision: str) -> Tensor:
    latents, times = torch.zeros(num, *sampler.shape), torch.ones(num)
    if sampler.text:
        length = sampler.text.tokenizer.spec.max_length
        states = torch.zeros(num, length, sampler.model.config.text_dim)
        condition: tuple[Tensor, ...] = (states, torch.ones(num, length, dtype=torch.bool))
    else:
        condition = (torch.zeros(num, dtype=torch.int64),)
    with autocast(precision, torch.device("cpu")):
        velocity: Tensor = sampler.model(latents, times, *condition)
        return velocity


def _states(text: CaptionEncoder, num: int) -> Tensor:
    length = text.tokenizer.spec.max_length
    ids, mask = torch.zeros(num, length, dtype=torch.int64), torch.ones(num, length)
    states: Tensor = text.encoder(ids, mask.bool())
    return states


def _key_values(flow: StarFlow, size: int, guided: bool) -> int:
    """Of the largest block, of all places, float32; guidance doubles the block with the class."""
    sizes = []
    for block in flow.blocks:
        assert isinstance(block, FlowBlock)
        rows = size * (2 if guided and block.prefix is not None else 1)
        sizes.append(len(block.layers) * rows * len(block.rope_cos) * 2 * flow.config.width * 4)
    return max(sizes)


def _actor(section: PrecomputeSection | SampleSection, networks: int, results: int) -> Process:
    """The actors that hold `networks` bytes of them and compute a batch's `results`."""
    host = {"Python": PYTHON, "networks, twice while they are loaded": 2 * networks}
    batch = {"results of a batch": results}
    if section.gpus_per_actor:
        return Process("actor", section.num_actors, host, {"networks": networks, **batch})
    return Process("actor", section.num_actors, host | batch)


def _decoding(data: DataSection) -> int:
    """Of a process that decodes: the fast decoder's filter is torch's."""
    return PYTHON if data.decoder == "fast" else TASK


def _idle_workers() -> Process:
    """Ray keeps as many processes of finished tasks as it has CPUs."""
    return Process("idle worker", num_cpus(), {"Python": TASK})


def _object_store(what: str, size: int) -> Process:
    """Blocks that wait between stages: all `size` bytes of them, or as many as Ray Data allows."""
    held = min(size, int(WAITING_SHARE * memory_bytes()))
    return Process("object store", 1, {f"{what} that wait": held})
