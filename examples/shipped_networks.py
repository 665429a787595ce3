"""Texts and pictures that the shipped networks have not seen, as one PNG.

    python examples/shipped_networks.py shipped.png

A column is a caption that no training saw. Rows: what the generator draws of the text alone, the
true picture, the principal components of its DINOv2 features, of its latent and of the features
that are rebuilt from the latent, and the picture that is decoded from the latent.
"""

import argparse
import json
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image

import fae
from fae_core.figures import picture_grid, reconstruction_rows

NUM_PICTURES = 8
GUIDANCE = 4.0
NAMES = (
    "drawn from the text",
    "the true picture",
    "its DINOv2 features",
    "its latent",
    "features rebuilt from the latent",
    "decoded from the latent",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    model = fae.FeatureAutoencoder.from_pretrained("shipped:emoji")
    folder = Path(fae.__file__).parent / "shipped/emoji-images/heldout"
    held_out = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    # Evenly spread over the list, not chosen by their looks.
    entries = [held_out[i] for i in np.linspace(0, len(held_out) - 1, NUM_PICTURES).astype(int)]
    captions = [entry["text"] for entry in entries]
    pictures = [Image.open(folder / entry["file_name"]).convert("RGB") for entry in entries]

    drawn = fae.sample(
        "shipped:emoji", model, prompts=captions, num_steps=40, guidance=GUIDANCE, seed=0
    )
    latents = model.encode_images(pictures)
    columns = reconstruction_rows(
        np.stack([np.asarray(picture) for picture in pictures]),
        model.features(pictures).numpy(),
        latents.flatten(2).transpose(1, 2).numpy(),
        model.decode_features(latents).numpy(),
        latents.shape[2:],
    )
    decoded = model.decode_images(latents)
    columns = [
        [text, *column, image] for text, column, image in zip(drawn, columns, decoded, strict=True)
    ]
    titles = [textwrap.fill(caption, 20) for caption in captions]
    rows = list(zip(*columns, strict=True))
    output.write_bytes(picture_grid(rows, titles, names_of_rows=NAMES))


if __name__ == "__main__":
    main()
