"""The model card of a published folder, README.md: what the Hub shows, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import timm
import yaml

from fae_core.backbone_presets import parse_backbone_label, resolve_spec
from fae_core.text import MINILM
from fae_core.weights import WeightsError

from ..data.account import Account
from ..latents import LatentStore
from ..networks.text_encoder import SOURCE
from ..storage import paths
from .findings import Findings, Network
from .recipes import last_part

PAPER = "2512.07829"
KINDS = {
    "autoencoder": "feature autoencoder: patch features of the backbone to latents and back",
    "pixel_decoder": "pixel decoder: patch features to images",
    "dit": "diffusion transformer on normalized latents",
    "mmdit": "diffusion transformer of text on normalized latents",
    "starflow": "normalizing flow (STARFlow) on normalized latents",
}
TEXT_LICENCES = {
    MINILM: "apache-2.0",
    **{f"google/flan-t5-{size}": "apache-2.0" for size in ("small", "base", "large", "xl", "xxl")},
}
"""Of text encoders' weights, as their authors state them."""
PICTURES = {
    "autoencoder.png": "Held-out images, their features, latents and rebuilt features "
    "(principal components as colors)",
    "pixel_decoder.png": "Held-out images and their reconstructions",
    "generator.png": "Samples during the generator's training",
    "samples.png": "Samples, one class in each row",
}
TRAINED_BY = {
    "autoencoder": "fae train autoencoder",
    "pixel_decoder": "fae train pixel-decoder",
    "generator": "fae train generator",
}


def model_card(
    found: Findings,
    account: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
    title: str,
    license_name: str,
    diffusers: bool,
) -> str:
    """The text of README.md.

    `account` is what fae.json will say, `files` are the other files with size and SHA-256;
    `diffusers` tells whether its files are among them.
    """
    backbone = _backbone(found)
    sections = [
        _front_matter(found, backbone, license_name, diffusers),
        f"# {title}\n",
        f"Feature Auto-Encoder ([arXiv {PAPER}](https://arxiv.org/abs/{PAPER})), trained with FAE "
        "on Ray.\n",
        _networks(account),
        _licences(found, backbone, license_name),
        _loading(found, title),
        _loading_with_diffusers(found, title) if diffusers else "",
        _data(found),
        _scores(found, files),
        _pictures(found),
        _files(files),
    ]
    return "\n".join(section for section in sections if section)


def _front_matter(
    found: Findings, backbone: Mapping[str, str] | None, license_name: str, diffusers: bool
) -> str:
    generator = found.networks.get("generator")
    task = "image-feature-extraction"
    if generator is not None:
        task = "text-to-image" if _of_text(generator) else "unconditional-image-generation"
    values: dict[str, Any] = {
        "license": license_name,
        "library_name": "fae-ray",
        "pipeline_tag": task,
        "tags": ["fae", "feature-autoencoder", f"arxiv:{PAPER}"] + ["diffusers"] * diffusers,
    }
    if backbone and backbone["repository"]:
        values["base_model"] = backbone["repository"]
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n"


def _backbone(found: Findings) -> dict[str, str] | None:
    """Name, SHA-256, licence and repository of the backbone; None where no network names one."""
    marks = [n.loaded.fingerprints.get("backbone") for n in found.networks.values()]
    mark = next((mark for mark in marks if mark), None)
    if mark is None:
        return None
    full_name, _, sha256 = mark.rpartition(":")
    about = {"name": full_name, "sha256": sha256, "license": "", "repository": ""}
    try:
        spec = resolve_spec(*parse_backbone_label(full_name))
        config = timm.get_pretrained_cfg(spec.timm_name)
    except (WeightsError, RuntimeError):
        return about
    if config is not None:
        about["license"] = config.license or ""
        about["repository"] = config.hf_hub_id or ""
    return about


def _networks(account: Mapping[str, Any]) -> str:
    lines = ["| file | what it is | parameters | weights SHA-256 |", "|---|---|---:|---|"]
    for network in account["networks"].values():
        lines.append(
            f"| `{network['file']}` | {KINDS.get(network['kind'], network['kind'])} | "
            f"{network['num_parameters']:,} | `{network['weights_sha256'][:16]}…` |"
        )
    if latents := account["latents"]:
        shape = " × ".join(map(str, latents["shape"]))
        lines += ["", f"Latents are {shape}; their statistics by channel are in `fae.json`."]
    return "\n".join([*lines, ""])


def _licences(found: Findings, backbone: Mapping[str, str] | None, license_name: str) -> str:
    lines = ["## Licence", "", f"These weights: {license_name}."]
    if backbone:
        licence = backbone["license"] or "not known to timm; see its authors' page"
        lines.append(
            f"The backbone {backbone['name']} is not part of this repository. Its weights "
            f"(SHA-256 `{backbone['sha256'][:16]}…`) have the licence: {licence}."
        )
    generator = found.networks.get("generator")
    if generator is not None and _of_text(generator):
        marks = generator.loaded.fingerprints
        name = marks[SOURCE].removeprefix("hub:")
        licence = TEXT_LICENCES.get(name, "not known here; see its authors' page")
        lines.append(
            f"The text encoder ({name}) is not part of this repository. Its weights (SHA-256 "
            f"`{marks['text encoder'][:16]}…`) have the licence: {licence}."
        )
    return "\n".join([*lines, ""])


def _loading(found: Findings, title: str) -> str:
    lines = ["## Load it", "", "With `pip install fae-ray`:", "", "```python", "import fae", ""]
    if "autoencoder" in found.networks:
        lines += [
            f'model = fae.FeatureAutoencoder.from_pretrained("{title}")',
            "latents = model.encode_images(images)  # PIL images or uint8 [N, H, W, 3]",
        ]
        if "pixel_decoder" in found.networks:
            lines.append("pictures = model.decode_images(latents)")
            if (generator := found.networks.get("generator")) is not None:
                wanted = 'prompts=["a red cat"]' if _of_text(generator) else "labels=[0, 1, 2]"
                lines.append(f'samples = fae.sample("{title}", model, {wanted})')
    elif len(found.networks) == 1:
        lines.append(f'network = fae.load("{title}").module')
    else:
        place = f"hf://{title}" if "/" in title else title
        lines += [
            f'{name} = fae.load("{place}/{name}.safetensors").module' for name in found.networks
        ]
    lines += ["```", ""]
    return "\n".join(lines)


def _of_text(generator: Network) -> bool:
    return generator.loaded.kind == "mmdit"


def _loading_with_diffusers(found: Findings, title: str) -> str:
    lines = ['With `pip install "fae-ray[diffusers]"`, in diffusers:', "", "```python"]
    if "generator" in found.networks:
        lines += [
            "from diffusers import DiffusionPipeline",
            "",
            f'pipeline = DiffusionPipeline.from_pretrained("{title}", trust_remote_code=True)',
            "images = pipeline(class_labels=[0, 1, 2], num_inference_steps=50).images",
            "autoencoder = pipeline.vae",
        ]
    else:
        lines += [
            "from diffusers import AutoModel",
            "",
            f'autoencoder = AutoModel.from_pretrained("{title}", trust_remote_code=True)',
        ]
    lines += [
        "latents = autoencoder.encode(x).latent_dist.mode()  # x: [B, 3, S, S] in [-1, 1]",
        "pictures = autoencoder.decode(latents).sample",
        "```",
    ]
    return "\n".join([*lines, ""])


def _data(found: Findings) -> str:
    lines = []
    for name, network in found.networks.items():
        if network.num_images is not None:
            lines.append(f"- {name}: {network.num_images:,} images planned for training.")
    if found.store is not None:
        lines += _store_lines(found.store)
    return "\n".join(["## Data", "", *lines, ""]) if lines else ""


def _store_lines(store: LatentStore) -> list[str]:
    manifest = store.manifest
    lines = [
        f"- latents: {manifest['planned']:,} images planned = {manifest['stored']:,} stored + "
        f"{manifest['errors']:,} errors."
    ]
    if source := manifest.get("account"):
        account = Account.from_dict(dict(source))
        read = account.num_files - account.num_skipped
        lines += [
            f"- source: {last_part(account.path)} ({account.source_format}), "
            f"{account.num_files:,} files listed = {read:,} read + {account.num_skipped:,} "
            "skipped.",
            f"- labels of {account.num_labels:,} images in {account.num_classes:,} classes; "
            f"captions of {account.num_captions:,} images.",
        ]
    return lines


def _scores(found: Findings, files: Collection[str]) -> str:
    lines = []
    for name, network in found.networks.items():
        if network.metrics:
            own = f"recipe-{name}.yaml"
            recipe = own if own in files else "recipe.yaml"
            command = f"{TRAINED_BY[name]} {recipe} data.path=IMAGES run=NAME"
            if name == "generator":
                command = command.replace("data.path=IMAGES", "latents=STORE")
            lines += _score_table(f"{name}, last validation", network.metrics, command)
    if found.evaluation is not None:
        scores = json.loads(paths.read_bytes(paths.join(found.evaluation, "scores.json")))
        names = [name for name in scores["scores"] if not name.startswith("num_")]
        command = (
            "fae evaluate recipe.yaml evaluate.images=SAMPLES evaluate.reference=REFERENCE "
            f"evaluate.scores=[{','.join(_requested(scores, names))}]"
        )
        lines += _score_table("samples", scores["scores"], command)
        lines += [f"Warning of the evaluation: {note}\n" for note in scores["warnings"]]
    return "\n".join(["## Scores", "", *lines]) if lines else ""


def _requested(scores: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The scores that the evaluation was asked for."""
    asked = [
        value
        for key, value in sorted(scores["inputs"].items())
        if key == "scores" or key.startswith("scores.")
    ]
    flat = [v for value in asked for v in (value if isinstance(value, list) else [value])]
    return [str(value) for value in flat] or list(names)


def _score_table(title: str, values: Mapping[str, float], command: str) -> list[str]:
    lines = [f"| {title} | |", "|---|---:|"]
    lines += [f"| {name} | {value:.6g} |" for name, value in values.items()]
    return [*lines, "", "```", command, "```", ""]


def _pictures(found: Findings) -> str:
    lines = [
        f"![{PICTURES.get(name, name)}](pictures/{name})\n\n{PICTURES.get(name, name)}.\n"
        for name in found.pictures
    ]
    return "\n".join(["## Pictures", "", *lines]) if lines else ""


def _files(files: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["## Files", "", "| file | bytes | SHA-256 |", "|---|---:|---|"]
    for name, account in files.items():
        lines.append(f"| `{name}` | {account['size']:,} | `{account['sha256']}` |")
    return "\n".join([*lines, ""])
