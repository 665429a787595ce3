"""FAE's networks against the paper's parameter counts and against their own definitions."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fae_core import checkpoint
from fae_core.autoencoder import (
    AutoencoderConfig,
    FeatureAutoencoder,
    FeatureDecoder,
    FeatureEncoder,
    Posterior,
)
from fae_core.hashing import tensors_sha256
from fae_core.layers import apply_rope, num_parameters, rope_table

SMALL = AutoencoderConfig(
    feature_dim=32,
    latent_dim=4,
    grid=(4, 4),
    encoder_num_heads=2,
    encoder_head_dim=16,
    decoder_depth=2,
    decoder_num_heads=2,
)


def test_parameter_counts_are_the_papers_at_dinov2_g():
    with torch.device("meta"):
        encoder = FeatureEncoder(1536, 32, num_heads=24, head_dim=256)
        decoder = FeatureDecoder(1536, 32, depth=6, num_heads=24, grid=(16, 16))
    assert round(num_parameters(encoder) / 1e6, 2) == 38.17
    assert round(num_parameters(decoder) / 1e6, 2) == 170.43


@pytest.mark.parametrize("kind", ["attention", "linear", "transformer"])
def test_every_encoder_kind_gives_a_posterior_that_learns(kind):
    torch.manual_seed(0)
    encoder = FeatureEncoder(32, 4, num_heads=2, head_dim=16, kind=kind, depth=2, grid=(4, 4))
    posterior = encoder(torch.randn(3, 16, 32))
    assert posterior.mean.shape == posterior.logvar.shape == (3, 16, 4)
    posterior.sample(torch.randn(3, 16, 4)).square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="none of"):
        FeatureEncoder(32, 4, kind="conv")


def test_kl_equals_torch_distributions():
    torch.manual_seed(0)
    mean, logvar = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0)
    )
    torch.testing.assert_close(Posterior(mean, logvar).kl(), expected, atol=1e-5, rtol=1e-5)


def test_logvar_is_clamped():
    posterior = Posterior(torch.zeros(1, 1, 2), torch.tensor([[[-1e3, 1e3]]]))
    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0]


def test_rotary_positions_depend_on_offsets_alone():
    torch.manual_seed(0)
    cos, sin = rope_table(16, (4, 4))
    q, k = (torch.randn(16).expand(16, 16) for _ in range(2))
    scores = apply_rope(q, cos, sin) @ apply_rope(k, cos, sin).T
    for step_down, step_right in ((0, 1), (1, 0), (2, -1)):
        offset = 4 * step_down + step_right
        at = [r * 4 + c for r in range(4 - step_down) for c in range(1, 3)]
        values = torch.stack([scores[i, i + offset] for i in at])
        torch.testing.assert_close(values, values[:1].expand_as(values), atol=1e-4, rtol=1e-4)


def test_loss_terms_follow_their_stated_reductions():
    torch.manual_seed(0)
    model = FeatureAutoencoder(SMALL)
    model.set_feature_stats(torch.randn(32), torch.rand(32) + 0.5)
    features, noise = torch.randn(3, 16, 32), torch.randn(3, 16, 4)
    terms = model(features, noise)
    posterior = model.encode(features)
    decoded = model.decode(posterior.sample(noise))
    mse = (((decoded - features) / model.feature_std) ** 2).mean()
    kl = torch.stack([element.sum() for element in posterior.kl()]).mean()
    torch.testing.assert_close(terms["mse"], mse)
    torch.testing.assert_close(terms["kl"], kl)
    torch.testing.assert_close(terms["loss"], mse + 1e-6 * kl)


def test_a_checkpoint_rebuilds_the_module(tmp_path):
    torch.manual_seed(0)
    model = FeatureAutoencoder(SMALL).eval()
    model.set_feature_stats(torch.randn(32), torch.rand(32) + 0.5)
    sha256 = checkpoint.save(tmp_path / "a.safetensors", model, {"backbone": "x"})
    loaded = checkpoint.load(tmp_path / "a.safetensors")
    features = torch.randn(2, 16, 32)
    assert torch.equal(loaded.module.encode(features).mean, model.encode(features).mean)
    assert loaded.fingerprints == {"backbone": "x"}
    assert loaded.weights_sha256 == sha256
    assert loaded.module.config == SMALL


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, FeatureAutoencoder(SMALL), {})
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        checkpoint.load(path)
    path.write_bytes(b"\x80\x04not tensors")
    with pytest.raises(checkpoint.CheckpointError, match="not a safetensors"):
        checkpoint.load(path)
    with pytest.raises(checkpoint.CheckpointError, match="No checkpoint"):
        checkpoint.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config, tensors: config.update(rotary="new"), "argument 'rotary'"),
        (lambda config, tensors: config.pop("latent_dim"), "argument: 'latent_dim'"),
        (lambda config, tensors: tensors.update(extra=torch.ones(1)), "1 tensors .* first extra"),
    ],
    ids=["a field more", "a field less", "a tensor more"],
)
def test_a_checkpoint_of_another_version_says_so(tmp_path, change, words):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, FeatureAutoencoder(SMALL), {})
    metadata, tensors = checkpoint.read_metadata(path), load_file(path)
    config = json.loads(metadata["config"])
    change(config, tensors)
    marks = {"config": json.dumps(config), "weights_sha256": tensors_sha256(tensors)}
    save_file(tensors, path, metadata | marks)
    with pytest.raises(checkpoint.CheckpointError, match=f"a.safetensors: another.*{words}"):
        checkpoint.load(path)


def test_constant_channels_are_refused_as_statistics():
    with pytest.raises(ValueError, match="above 0"):
        FeatureAutoencoder(SMALL).set_feature_stats(torch.zeros(32), torch.zeros(32))
