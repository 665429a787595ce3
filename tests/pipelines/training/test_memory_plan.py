"""The memory plan against sums done by hand, and against what a real step keeps."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.networks.untrained import tensors_of
from fae.pipelines.training.batches import Batch
from fae.pipelines.training.memory_plan import (
    MEBI,
    kept_for_backward,
    memory_plan_of,
    plan_memory,
)
from fae.pipelines.training.requirements import UNTRAINED_JOBS, memory_of, training_of
from tests.tiny import SMALLEST_BACKBONE, TINY

WIDTH = 64
SMALL = [
    *TINY,
    *SMALLEST_BACKBONE,
    "pixel_decoder.width=32",
    "pixel_decoder.depth=1",
    "pixel_decoder.num_heads=2",
    "pixel_decoder.losses.perceptual=backbone",
    "generator.width=64",
    "generator.num_classes=5",
    "generator.size=S",
]


def batch_of(num: int) -> Batch:
    return Batch(0, {"x": torch.ones(num, WIDTH)}, list(range(num)), ["k"] * num, 1.0, [])


def test_what_is_kept_is_each_layers_input_once_and_no_parameter():
    layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    x = torch.ones(5, WIDTH)
    # Both linear layers keep their inputs; tanh keeps its output, which is the second one's input.
    kept = kept_for_backward(lambda: layers(x), layers.parameters())
    assert kept == 2 * x.numel() * 4
    with torch.no_grad():
        assert kept_for_backward(lambda: layers(x), ()) == 0


def test_a_plan_counts_weights_gradients_moments_average_and_images():
    model, frozen = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
    adversary = nn.BatchNorm1d(WIDTH)  # has buffers that a forward pass changes
    frozen.requires_grad_(False)

    def forward(batch: Batch):
        # The batch norm needs two rows; its variance over one is not asked for.
        return frozen(model(batch["x"])), adversary(batch["x"].repeat(2, 1))

    before = adversary.running_mean.clone()
    trained = {"model": model, "adversary": adversary}
    plan = plan_memory(trained, {"frozen": frozen}, True, forward, batch_of(6))
    assert torch.equal(adversary.running_mean, before)
    weights = 4 * (WIDTH * WIDTH + WIDTH)
    assert plan.parts["model: weights"] == weights
    assert plan.parts["model: gradients, optimizer, average"] == 4 * weights
    assert plan.parts["adversary: gradients, optimizer"] == 3 * 4 * 2 * WIDTH
    assert plan.parts["frozen: weights (frozen)"] == 4 * (2 * WIDTH + 2)
    # An image keeps the model's input and, doubled, the adversary's.
    assert plan.num_images == 6 and plan.per_image == 3 * 4 * WIDTH
    assert plan.total == sum(plan.parts.values()) + plan.fixed + 6 * plan.per_image
    assert f"{plan.total / MEBI:,.0f}" in plan.text(torch.device("cpu"))


@pytest.mark.integration
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("network", "settings"),
    [
        ("autoencoder", []),
        ("pixel_decoder", ["pixel_decoder.losses.discriminator=patch"]),
        (
            "pixel_decoder",
            [
                "pixel_decoder.losses.discriminator=backbone",
                "pixel_decoder.losses.adaptive=true",
                "pixel_decoder.stage=finetune",
                "pixel_decoder.latent_noise=0.3",
            ],
        ),
        ("generator", ["generator.depth=2", "generator.num_heads=1"]),
        (
            "generator",
            [
                "generator.depth=2",
                "generator.num_heads=1",
                "generator.checkpoint_activations=true",
            ],
        ),
        ("generator", ["generator.kind=starflow", "generator.layers=[1,2]"]),
    ],
)
def test_a_plan_on_fake_tensors_is_what_a_real_step_keeps(network, settings, precision):
    common = [f"{network}.training.precision={precision}", f"{network}.training.batch_size=6"]
    recipe = load_recipe("photos-dinov2s", [*SMALL, *common, *settings])
    training = training_of(recipe, network)
    job, blank_batch = UNTRAINED_JOBS[network](recipe)
    before = [tensor.clone() for module in job.networks for tensor in tensors_of(module)]
    plan = memory_plan_of(job, training, blank_batch(6))
    known = [tensor for module in job.networks for tensor in tensors_of(module)]
    assert all(map(torch.equal, before, known))

    def step(num_images: int):
        batch = replace(blank_batch(num_images), step=training.steps - 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            terms = job.loss(job.model, batch)
            return terms, job.adversary and job.adversary.loss(job.adversary.module, batch)

    for num_images in (1, 2):
        kept = kept_for_backward(lambda num=num_images: step(num), known)
        assert plan.fixed + num_images * plan.per_image == kept
    # The same of networks that never were.
    unallocated = memory_of(recipe, network).step
    assert unallocated == {**plan.parts, "kept for the backward pass": plan.kept}


def test_a_sharded_training_holds_its_share_and_two_whole_layers():
    settings = [*SMALL, "generator.depth=3", "generator.num_heads=1"]
    settings.append("generator.training.num_workers=4")
    ddp, fsdp = (
        memory_of(load_recipe("photos-dinov2s", [*settings, f"generator.training.parallel={kind}"]),
                  "generator")
        for kind in ("ddp", "fsdp")
    )  # fmt: skip
    job, _ = UNTRAINED_JOBS["generator"](load_recipe("photos-dinov2s", settings))
    layers = [sum(p.nbytes for p in block.parameters()) for block in job.model.blocks]
    others = sum(p.nbytes for p in job.model.parameters()) - sum(layers)
    for name, whole in ddp.step.items():
        shared = name.startswith("model: ")
        assert fsdp.step[name] == pytest.approx(whole / 4 if shared else whole, abs=1)
    gathered = fsdp.step["model: layers that are gathered"]
    assert gathered == 2 * (others + 2 * layers[0])
    assert "network, whole for its file" in fsdp.host
    for fewest, share in ((2, 2), (1, 1)):  # it may have to go on with so few
        elastic = [*settings, "generator.training.parallel=fsdp"]
        elastic.append(f"generator.training.min_workers={fewest}")
        least = memory_of(load_recipe("photos-dinov2s", elastic), "generator").step
        for name, whole in ddp.step.items():
            if name.startswith("model: "):
                assert least[name] == pytest.approx(whole / share, abs=1)
