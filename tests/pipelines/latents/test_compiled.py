"""torch.compile in encoding, sampling and training: whole graphs, one for each batch size, and the
same numbers."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.latents.encoder import LatentEncoder
from fae.pipelines.networks.loading import backbone_of
from fae.pipelines.networks.untrained import build_autoencoder
from fae.pipelines.sampling.image_sampler import ImageSampler
from fae_core import checkpoint
from fae_core.autoencoder import AutoencoderConfig, FeatureAutoencoder
from fae_core.generators.dit import DiT, DiTConfig
from fae_core.generators.starflow import StarFlow, StarFlowConfig
from fae_core.pixel_decoder import PixelDecoder, PixelDecoderConfig
from tests.tiny import SMALLEST_BACKBONE, TINY

RECIPE = load_recipe("photos-dinov2s", [*TINY, *SMALLEST_BACKBONE])


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """Counts the graphs that are made; they run as they are, so that no compiler decides about
    equality."""
    torch.compiler.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


def test_shards_of_any_size_are_encoded_by_one_graph(graphs: CompileCounter) -> None:
    backbone = backbone_of(RECIPE)
    torch.manual_seed(0)
    autoencoder = build_autoencoder(RECIPE.autoencoder, backbone.spec).eval()
    columns = ["mean", "logvar", "mean_flip", "logvar_flip"]
    made = [
        LatentEncoder(backbone, autoencoder, "", columns, "bf16", torch.device("cpu"), compile)
        for compile in (False, True)
    ]
    random = np.random.default_rng(0)
    for size in (4, 9, 3, 8, 0):
        images = random.integers(0, 256, (size, 32, 32, 3), np.uint8)
        plain, compiled = (encoder.encode(images, 4) for encoder in made)
        for name in columns:
            assert compiled[name].shape == (size, 8, 2, 2)
            np.testing.assert_allclose(compiled[name], plain[name], atol=0.02)
    assert graphs.frame_count == 1


def test_shards_of_any_size_are_drawn_by_two_graphs(graphs: CompileCounter, tmp_path: Path) -> None:
    """One for the batch and one for the doubled batch of guidance."""
    torch.manual_seed(0)
    autoencoder = FeatureAutoencoder(
        AutoencoderConfig(24, 4, (4, 4), encoder_num_heads=2, encoder_head_dim=8,
                          decoder_depth=1, decoder_num_heads=2)
    )  # fmt: skip
    decoder = PixelDecoder(PixelDecoderConfig(24, (4, 4), 32, width=24, depth=1, num_heads=2))
    generator = DiT(DiTConfig(4, (4, 4), width=32, depth=2, num_heads=2, num_classes=2))
    for parameter in generator.parameters():  # adaLN-zero would ignore everything
        torch.nn.init.normal_(parameter, std=0.1)
    paths = {
        name: str(tmp_path / f"{name}.safetensors")
        for name in ("autoencoder", "pixel_decoder", "generator")
    }
    marks = {"backbone": "tiny:0", "image_size": "32"}
    checkpoint.save(paths["autoencoder"], autoencoder, marks)
    checkpoint.save(paths["pixel_decoder"], decoder, marks)
    owner = checkpoint.load(paths["autoencoder"]).weights_sha256
    checkpoint.save(paths["generator"], generator, {"latents": "none", "autoencoder": owner})
    settings = [
        *(f"{name}.checkpoint={path}" for name, path in paths.items()),
        "sample.batch_size=4",
        "sample.shard_size=11",
        "sample.num_steps=8",
        "sample.guidance=paper",
    ]
    plain, compiled = (
        ImageSampler(load_recipe("photos-dinov2s", [*settings, f"sample.compile={value}"]))
        for value in ("false", "true")
    )
    for count in (11, 4, 2):
        indices = list(range(count))
        labels = plain.labels(indices)
        np.testing.assert_allclose(compiled(indices, labels), plain(indices, labels), atol=1)
    assert graphs.frame_count == 2


NETWORKS = {
    "autoencoder": lambda: (
        FeatureAutoencoder(AutoencoderConfig(24, 4, (4, 4), encoder_num_heads=2, encoder_head_dim=8,
                                             decoder_depth=1, decoder_num_heads=2)),
        (torch.randn(3, 16, 24), torch.randn(3, 16, 4)),
    ),
    "pixel decoder": lambda: (
        PixelDecoder(PixelDecoderConfig(24, (4, 4), 32, width=24, depth=1, num_heads=2)),
        (torch.randn(3, 16, 24),),
    ),
    "dit": lambda: (
        DiT(DiTConfig(4, (4, 4), width=32, depth=2, num_heads=2, num_classes=2)),
        (torch.randn(3, 4, 4, 4), torch.rand(3), torch.tensor([0, 1, 2])),
    ),
    "starflow": lambda: (
        StarFlow(StarFlowConfig(4, (4, 4), width=64, layers=(1, 2), num_classes=2)),
        (torch.randn(3, 4, 4, 4), torch.tensor([0, 1, 2])),
    ),
    "backbone": lambda: (
        backbone_of(RECIPE),
        (torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8),),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_in_training_is_one_graph(graphs: CompileCounter, name: str) -> None:
    torch.manual_seed(0)
    network, inputs = NETWORKS[name]()
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    plain = network.train()(*inputs)
    network.compile(fullgraph=True)
    torch.testing.assert_close(network(*inputs), plain)
    assert graphs.frame_count == 1
