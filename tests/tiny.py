"""The smallest precompute that is still one: a random ViT on 32-pixel crops, JPEGs of noise, shards
of eight."""

from __future__ import annotations

import io
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.networks.loading import backbone_fingerprints, backbone_of
from fae.pipelines.networks.untrained import build_autoencoder
from fae_core import checkpoint
from fae_core.autoencoder import AutoencoderConfig, FeatureAutoencoder
from fae_core.pixel_decoder import PixelDecoder, PixelDecoderConfig

ROOT = Path(__file__).parents[1]
SHARD_SIZE = 8
TINY = [
    "backbone.name=vit_tiny_patch16_224",
    "backbone.weights=random",
    "backbone.image_size=32",
    "image_size=32",
    "autoencoder.latent_dim=8",
    "autoencoder.encoder.num_heads=3",
    "autoencoder.encoder.head_dim=32",
    "autoencoder.decoder.num_heads=3",
    "autoencoder.decoder.depth=1",
    f"precompute.shard_size={SHARD_SIZE}",
    "precompute.threads_per_actor=1",
]
SMALLEST_BACKBONE = [
    "backbone.name=test_vit",
    "autoencoder.encoder.num_heads=2",
    "autoencoder.decoder.num_heads=2",
]
"""After TINY: timm's ViT for tests, 64 wide and six blocks deep."""


def save_autoencoder(path: Path, seed: int = 0) -> Path:
    """An untrained autoencoder for TINY."""
    recipe = load_recipe("photos-dinov2s", TINY)
    backbone = backbone_of(recipe)
    torch.manual_seed(seed)
    model = build_autoencoder(recipe.autoencoder, backbone.spec)
    checkpoint.save(path, model, backbone_fingerprints(recipe, backbone))
    return path


def save_decoders(folder: Path, shape: tuple[int, int, int], image_size: int) -> str:
    """Untrained autoencoder and pixel decoder of latents [C, H, W] that belong together.

    Returns the autoencoder's SHA-256.
    """
    torch.manual_seed(0)
    grid = shape[1:]
    autoencoder = FeatureAutoencoder(
        AutoencoderConfig(24, shape[0], grid, encoder_num_heads=2, encoder_head_dim=8,
                          decoder_depth=1, decoder_num_heads=2)
    )  # fmt: skip
    config = PixelDecoderConfig(24, grid, image_size, width=24, depth=1, num_heads=2)
    marks = {"backbone": "tiny:0", "image_size": str(image_size)}
    checkpoint.save(folder / "pixel_decoder.safetensors", PixelDecoder(config), marks)
    return checkpoint.save(folder / "autoencoder.safetensors", autoencoder, marks)


def noisy_jpegs(count: int) -> Iterator[bytes]:
    random = np.random.default_rng(0)
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (40, 48, 3), np.uint8)).save(buffer, "JPEG")
        yield buffer.getvalue()


def wait_for(condition: Callable[[], object], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def wait_for_checkpoint(process: subprocess.Popen, run: Path) -> None:
    """Returns when the training `process` has written its first checkpoint of the folder `run`."""
    deadline = time.monotonic() + 240
    while not list((run / "checkpoints").glob("step_*.pt")):
        assert time.monotonic() < deadline and process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def save_towers(folder: Path, kind: str = "siglip") -> Path:
    """Random image and text towers, siglip or clip, of 24 channels on 32 px; returns `folder`."""
    import transformers

    save_text_encoder(folder)
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    sizes = {
        "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2,
        "num_hidden_layers": 2, "projection_size": 24,
    }  # fmt: skip
    text = {**sizes, "vocab_size": 12, "max_position_embeddings": 16, "pad_token_id": 0}
    text |= {"bos_token_id": 2, "eos_token_id": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    model, settings, processor = {
        "siglip": ("SiglipModel", "SiglipConfig", "SiglipImageProcessor"),
        "clip": ("CLIPModel", "CLIPConfig", "CLIPImageProcessor"),
    }[kind]
    more = {"projection_dim": 24} if kind == "clip" else {}
    config = getattr(transformers, settings)(text_config=text, vision_config=vision, **more)
    torch.manual_seed(0)
    network = getattr(transformers, model)(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    crop = {"crop_size": size} if kind == "clip" else {}
    getattr(transformers, processor)(size=size, **crop).save_pretrained(folder)
    return folder


def save_text_encoder(folder: Path, kind: str = "bert", seed: int = 0) -> Path:
    """A random text encoder of 16 channels with a tokenizer of few words; returns `folder`."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[END]"]
    words += ["a", "red", "green", "blue", "small", "big", "cat", "dog", "house"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [END]", special_tokens=[("[END]", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]"
    ).save_pretrained(folder)
    sizes = {"vocab_size": len(words), "num_attention_heads": 2, "num_hidden_layers": 2}
    wide = {**sizes, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 32}
    networks = {
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**wide)),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
            )
        ),
        "clip": lambda: transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={**wide, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 2},
                vision_config={**wide, "image_size": 8, "patch_size": 4},
                projection_dim=8,
            )
        ),
        "qwen3": lambda: transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**wide, num_key_value_heads=1, head_dim=8)
        ),
    }
    torch.manual_seed(seed)
    networks[kind]().save_pretrained(folder)
    return folder
