"""Encoding, training steps and samplers on a fake GPU.

Every tensor is on the device, and the processor waits for it only where it must.
"""

import atexit
import contextlib
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from fae.pipelines.config.recipe import Recipe, load_recipe
from fae.pipelines.config.sections import TrainingSection
from fae.pipelines.latents.encoder import LatentEncoder
from fae.pipelines.networks.loading import backbone_of
from fae.pipelines.networks.text_encoder import CaptionEncoder, text_spec
from fae.pipelines.networks.untrained import (
    backbone_spec,
    build_autoencoder,
    build_generator,
    build_pixel_decoder,
)
from fae.pipelines.sampling.latent_decoder import LatentDecoder
from fae.pipelines.sampling.latent_sampler import LatentSampler, image_noise
from fae.pipelines.sampling.prompts import Prompts
from fae.pipelines.training.autoencoder import autoencoder_job
from fae.pipelines.training.batches import Batch
from fae.pipelines.training.captions import blank_captions
from fae.pipelines.training.generator import generator_job
from fae.pipelines.training.job import Job
from fae.pipelines.training.memory_plan import memory_plan_of
from fae.pipelines.training.pixel_objective import (
    Objective,
    make_adversary,
    pixel_decoder_job,
)
from fae.pipelines.training.state import TrainState
from fae.pipelines.training.step import train_step
from fae_core import samplers
from fae_core.text import CaptionTokenizer, load_text_encoder
from tests.fake_gpu import GPU, FakeGPU
from tests.tiny import SMALLEST_BACKBONE, TINY, save_text_encoder

GRID = (2, 2)
LATENT_SHAPE = (8, *GRID)
RECIPE = [
    *TINY,
    *SMALLEST_BACKBONE,
    *(f"{name}.training.precision=bf16" for name in ("autoencoder", "pixel_decoder", "generator")),
    "autoencoder.training.gradient_clip=1.0",
    "autoencoder.training.ema_decay=0.99",
    "pixel_decoder.width=32",
    "pixel_decoder.depth=1",
    "pixel_decoder.num_heads=2",
    "pixel_decoder.losses.perceptual=backbone",
    "pixel_decoder.losses.adversarial_weight=0.1",
    "pixel_decoder.losses.adversarial_start=0",
    "pixel_decoder.losses.discriminator_start=0",
    "pixel_decoder.losses.augment=true",
    "generator.width=64",
    "generator.depth=2",
    "generator.num_heads=1",
    "generator.num_classes=5",
    "sample.num_steps=4",
    "sample.guidance=paper",
    "sample.precision=bf16",
]

FLOW = [
    "generator.kind=starflow",
    "generator.layers=[1,2]",
    "generator.depth=null",
    "generator.num_heads=null",
]

TEXT = ["generator.kind=mmdit", "text.max_length=6"]

Case = tuple[Job, TrainingSection, Batch]


@functools.cache
def text_encoder() -> Path:
    """A folder of this process with a random text encoder."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    return save_text_encoder(Path(folder) / "text")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGPU:
    # A generator needs its device; without one fake numbers are drawn just as well.
    monkeypatch.setattr("fae_core.draws.sample_generator", lambda *_, **__: None)
    return FakeGPU()


def recipe_with(*settings: str) -> Recipe:
    return load_recipe("photos-dinov2s", [*RECIPE, *settings])


def batch_of(gpu: FakeGPU, **tensors: torch.Tensor) -> Batch:
    on_gpu = {name: gpu.tensor(value) for name, value in tensors.items()}
    return Batch(0, on_gpu, [0, 1], ["a", "b"], 1.0, [])


def images(gpu: FakeGPU) -> Batch:
    return batch_of(gpu, images=torch.zeros(2, 32, 32, 3, dtype=torch.uint8))


@pytest.mark.parametrize("inference", [False, True])
def test_a_forgotten_tensor_and_a_wait_are_found(inference: bool) -> None:
    gpu = FakeGPU()
    layer = gpu.place(torch.nn.Linear(2, 2)).requires_grad_(False)
    there = gpu.tensor(torch.zeros(3, 2))
    with gpu.running() as waits, torch.inference_mode(inference):
        there.to("cpu", non_blocking=True)
        assert waits.operations == []
        float(layer(there).sum())
        torch.zeros(3).to(GPU)
        torch.tensor(0.5, device=GPU)
        there[0, :].copy_(torch.zeros(2))
        there.cpu()
        assert waits.operations == ["read", *["copy to cuda"] * 3, "copy to cpu"]
        with pytest.raises(RuntimeError, match="devices"):
            layer(torch.zeros(3, 2))


def autoencoder(gpu: FakeGPU) -> Case:
    recipe = recipe_with("autoencoder.flip=true")
    backbone = gpu.place(backbone_of(recipe))
    model = gpu.place(build_autoencoder(recipe.autoencoder, backbone.spec))
    job = autoencoder_job(recipe.autoencoder, recipe.seed, backbone, model)
    return job, recipe.autoencoder.training, images(gpu)


def pixel_decoder(*settings: str) -> Callable[[FakeGPU], Case]:
    def made(gpu: FakeGPU) -> Case:
        recipe = recipe_with("pixel_decoder.flip=true", *settings)
        section = recipe.pixel_decoder
        backbone = gpu.place(backbone_of(recipe))
        model = gpu.place(
            build_pixel_decoder(recipe.pixel_decoder, backbone.spec, recipe.image_size)
        )
        autoencoder = None
        if section.stage == "finetune":
            autoencoder = gpu.place(build_autoencoder(recipe.autoencoder, backbone.spec))
        judge = make_adversary(section.losses, backbone)
        assert judge is not None
        gpu.place(judge)
        objective = Objective(
            section, recipe.seed, backbone, autoencoder, judge, section.noise_sigma
        )
        return pixel_decoder_job(model, objective), section.training, images(gpu)

    return made


def generator(*settings: str) -> Callable[[FakeGPU], Case]:
    def made(gpu: FakeGPU) -> Case:
        section = recipe_with(*settings).generator
        model = gpu.place(build_generator(section, LATENT_SHAPE))
        latents = torch.zeros(2, *LATENT_SHAPE)
        batch = batch_of(
            gpu,
            latents=latents.half(),
            noise=latents,
            time=torch.zeros(2),
            labels=torch.zeros(2, dtype=torch.int64),
        )
        return generator_job(section, model), section.training, batch

    return made


def of_text(gpu: FakeGPU) -> Case:
    recipe = recipe_with(*TEXT, f"text.weights={text_encoder()}")
    section = recipe.generator
    model = gpu.place(build_generator(section, LATENT_SHAPE, recipe.text))
    encoder = gpu.place(load_text_encoder(text_spec(recipe.text)))
    latents = torch.zeros(2, *LATENT_SHAPE)
    captions = blank_captions(2, recipe.text.max_length)
    times = torch.zeros(2)
    batch = batch_of(gpu, latents=latents.half(), noise=latents, time=times, **captions)
    return generator_job(section, model, encoder), section.training, batch


every_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(autoencoder, id="autoencoder"),
        pytest.param(pixel_decoder("pixel_decoder.losses.discriminator=patch"), id="patch"),
        pytest.param(
            pixel_decoder(
                "pixel_decoder.losses.discriminator=backbone",
                "pixel_decoder.losses.adaptive=true",
                "pixel_decoder.stage=finetune",
                "pixel_decoder.latent_noise=0.3",
            ),
            id="finetune",
        ),
        pytest.param(generator("generator.cosine_weight=1.0"), id="dit"),
        pytest.param(
            generator("generator.timesteps=lognormal", "generator.checkpoint_activations=true"),
            id="dit, activations recomputed",
        ),
        pytest.param(generator(*FLOW), id="starflow"),
        pytest.param(of_text, id="mmdit"),
    ],
)


@every_case
def test_a_training_step_waits_for_the_device_once(
    gpu: FakeGPU, case: Callable[[FakeGPU], Case]
) -> None:
    """Once, to ask of each micro-batch and each norm whether it is finite."""
    job, training, batch = case(gpu)
    model, adversary = job.model, job.adversary
    state = TrainState(model.train(), training, adversary)
    judge = (adversary.module, adversary.loss) if adversary else ()
    with gpu.running() as waits:
        terms = train_step(state, model, job.loss, [batch, batch], training, *judge)
    assert {value.device for value in terms.values()} == {GPU}
    norms = 2 if adversary else 1
    assert waits.operations == ["read"] * (2 + norms)
    moved = [p for p in model.parameters() if p.requires_grad]
    assert {p.grad.device for p in moved if p.grad is not None} == {GPU}


@every_case
def test_a_steps_memory_is_planned_without_waiting_for_the_device(
    gpu: FakeGPU, case: Callable[[FakeGPU], Case]
) -> None:
    job, training, batch = case(gpu)
    with gpu.running() as waits:
        plan = memory_plan_of(job, training, batch)
    assert waits.operations == []
    assert plan.num_images == 2 and plan.per_image > 0


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param([], id="ode"),
        pytest.param(["sample.sampler=sde"], id="sde"),
        pytest.param([*TEXT], id="text"),
        pytest.param([*FLOW, "sample.flow_guidance=1.0"], id="flow"),
        pytest.param([*FLOW, "sample.denoise=true"], id="flow, denoised"),
    ],
)
def test_drawing_pictures_never_waits_for_the_device(
    gpu: FakeGPU, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_with(*settings, f"text.weights={text_encoder()}")
    grid = samplers.timestep_grid(10)
    monkeypatch.setattr(samplers, "timestep_grid", lambda *_: grid)  # real numbers, all three parts
    backbone = backbone_of(recipe)
    model = gpu.place(build_generator(recipe.generator, LATENT_SHAPE, recipe.text)).eval()
    autoencoder = gpu.place(build_autoencoder(recipe.autoencoder, backbone.spec))
    decoder = gpu.place(build_pixel_decoder(recipe.pixel_decoder, backbone.spec, recipe.image_size))
    prompts = None
    if recipe.generator.kind == "mmdit":
        spec = text_spec(recipe.text)
        encoder = CaptionEncoder(CaptionTokenizer(spec), gpu.place(load_text_encoder(spec)))
        prompts = Prompts(["a red cat", "a dog"], encoder)
    draw = LatentSampler(model, recipe.sample, 0, GPU, prompts)
    paint = LatentDecoder(autoencoder, decoder, {})
    with gpu.running() as waits, torch.inference_mode():
        pictures = paint(draw(image_noise(0, [0, 1], LATENT_SHAPE), torch.zeros(2).long(), [0, 1]))
    assert waits.operations == []
    assert (pictures.device, pictures.dtype, tuple(pictures.shape)) == (
        GPU,
        torch.uint8,
        (2, 32, 32, 3),
    )


def test_encoding_waits_for_the_device_once_a_column(
    gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_with()
    backbone = gpu.place(backbone_of(recipe))
    autoencoder = gpu.place(build_autoencoder(recipe.autoencoder, backbone.spec))
    columns = ["mean", "logvar", "mean_flip"]
    encoder = LatentEncoder(backbone, autoencoder, "", columns, "bf16", GPU)
    pieces = [gpu.tensor(torch.zeros(3, 32, 32, 3, dtype=torch.uint8)) for _ in range(4)]
    monkeypatch.setattr(LatentEncoder, "micro_batches", lambda *_: pieces)  # streams need a driver
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: tensor)
    with gpu.running() as waits:
        latents = encoder.encode(np.zeros((12, 32, 32, 3), np.uint8), 3)
    assert waits.operations == ["copy to cpu"] * len(columns)
    assert {tuple(values.shape) for values in latents.values()} == {(12, *LATENT_SHAPE)}


def test_images_are_copied_while_the_gpu_computes_by_one_stream(
    gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, streams = recipe_with(), []
    networks = backbone_of(recipe), build_autoencoder(recipe.autoencoder, backbone_spec(recipe))
    encoder = LatentEncoder(*networks, "", ["mean"], "bf16", GPU)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: streams.append(device))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Mock())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: np.empty(tuple(tensor.shape)))
    images = np.zeros((5, 32, 32, 3), np.uint8)
    with gpu.running() as waits:
        sent = [list(encoder.micro_batches(images, 2)) for _ in range(3)]
    assert [[len(batch) for batch in batches] for batches in sent] == [[2, 2, 1]] * 3
    assert {batch.device for batches in sent for batch in batches} == {GPU}
    assert waits.operations == []
    assert streams == [GPU]
