"""`fae publish --diffusers`: the files by which diffusers loads a published folder.

vae/ is an AutoencoderFAE, and AutoModel finds it from the root too. With a generator the root is a
pipeline of vae/, transformer/ and scheduler/. The weights are written a second time, under
diffusers' names. The Python files import the installed package and hold no code of the networks:
who trusts them has few lines to read, and a folder that is published gets later corrections.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from ..config.sections import BackboneSection, SampleSection
from .findings import Findings, Network, PublishError

if TYPE_CHECKING:
    from fae_core.diffusers import AutoencoderFAE, FAETransformer2DModel

MAX_FILE = "5GB"
CODE = '''"""{name} of the installed package: pip install "fae-ray[diffusers]"."""

from fae_core.diffusers import {name}

__all__ = ["{name}"]
'''
CODE_AT_THE_ROOT = '''"""AutoencoderFAE of the folder vae/: pip install "fae-ray[diffusers]"."""

from fae_core import diffusers


class AutoencoderFAE(diffusers.AutoencoderFAE):
    @classmethod
    def from_pretrained(cls, path, **options):
        return diffusers.AutoencoderFAE.from_pretrained(path, **{**options, "subfolder": "vae"})
'''


def check_diffusers(found: Findings) -> None:
    """Raises PublishError where what was found cannot be written for diffusers."""
    if importlib.util.find_spec("diffusers") is None:
        raise PublishError("--diffusers needs the package: pip install 'fae-ray[diffusers]'.")
    if missing := {"autoencoder", "pixel_decoder"} - found.networks.keys():
        raise PublishError(
            "--diffusers writes an AutoencoderFAE, which is an autoencoder and a pixel decoder. "
            f"Name the run of the {' and of the '.join(sorted(missing)).replace('_', ' ')} too."
        )
    generator = found.networks.get("generator")
    if generator is not None and generator.loaded.kind != "dit":
        raise PublishError(
            f"{generator.uri} is a {generator.loaded.kind}, which diffusers' schedulers do not "
            "draw from. Publish it without --diffusers, or only the autoencoder with it."
        )


def write_diffusers(
    found: Findings, folder: Path, latents: Mapping[str, Any] | None, recipe: str | None
) -> None:
    """Write AutoencoderFAE, and with a generator its pipeline, into `folder`.

    `latents` are the statistics of fae.json; `recipe` is the published recipe, which names the
    source of the backbone's weights and the sampler's shift.
    """
    settings: Any = OmegaConf.create(recipe or "")
    vae = _autoencoder(found, latents, settings)
    _write_model(vae, folder / "vae", "autoencoder_fae")
    shutil.copy(folder / "vae/config.json", folder)
    (folder / "autoencoder_fae.py").write_text(CODE_AT_THE_ROOT)
    if (generator := found.networks.get("generator")) is None:
        return
    from diffusers import FlowMatchEulerDiscreteScheduler

    from fae_core.diffusers import FAEPipeline

    shift = OmegaConf.select(settings, "sample.shift") or SampleSection().shift
    scheduler = FlowMatchEulerDiscreteScheduler(shift=float(shift))
    pipeline = FAEPipeline(vae, _transformer(generator), scheduler)
    _write_model(pipeline.transformer, folder / "transformer", "transformer_fae")
    scheduler.save_pretrained(folder / "scheduler")
    pipeline.save_config(folder)
    _edit(
        folder / "model_index.json",
        _class_name=["pipeline", "FAEPipeline"],
        vae=["autoencoder_fae", "AutoencoderFAE"],
        transformer=["transformer_fae", "FAETransformer2DModel"],
    )
    (folder / "pipeline.py").write_text(CODE.format(name="FAEPipeline"))


def _autoencoder(
    found: Findings, latents: Mapping[str, Any] | None, settings: Any
) -> AutoencoderFAE:
    from fae_core.diffusers import AutoencoderFAE

    autoencoder = found.networks["autoencoder"].loaded
    pixel_decoder = found.networks["pixel_decoder"].loaded
    backbone, _, sha256 = autoencoder.fingerprints["backbone"].rpartition(":")
    weights = OmegaConf.select(settings, "backbone.weights") or BackboneSection().weights
    vae = AutoencoderFAE(
        autoencoder_config=_json(autoencoder.module.config),
        pixel_decoder_config=_json(pixel_decoder.module.config),
        pixel_decoder_kind=pixel_decoder.kind,
        backbone=backbone,
        backbone_sha256=sha256,
        backbone_weights=str(weights),
        image_size=int(autoencoder.fingerprints["image_size"]),
        latents_mean=latents and latents["mean"],
        latents_std=latents and latents["std"],
    )
    vae.autoencoder, vae.pixel_decoder = autoencoder.module, pixel_decoder.module
    return vae


def _transformer(generator: Network) -> FAETransformer2DModel:
    from fae_core.diffusers import FAETransformer2DModel

    dit = generator.loaded.module
    names = list(generator.loaded.class_names)
    transformer = FAETransformer2DModel(dit_config=_json(dit.config), class_names=names)
    transformer.dit = dit
    return transformer


def _json(config: Any) -> dict[str, Any]:
    """A network's configuration as JSON has it."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config))))


def _write_model(model: Any, folder: Path, module: str) -> None:
    """Write `model` and the Python file `module` that names its class."""
    model.save_pretrained(folder, max_shard_size=MAX_FILE)
    name = type(model).__name__
    _edit(folder / "config.json", auto_map={"AutoModel": f"{module}.{name}"})
    (folder / f"{module}.py").write_text(CODE.format(name=name))


def _edit(path: Path, **values: Any) -> None:
    """Set `values` in a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}, indent=2))
