"""The memory plan against sums done by hand."""

import torch
from torch import nn

from fae.pipelines.training.batches import Batch
from fae.pipelines.training.memory_plan import MEBI, kept_for_backward, plan_memory

WIDTH = 64


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
