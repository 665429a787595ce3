"""Pictures that the shipped networks have not seen, through every stage of FAE, as one PNG.

    python examples/shipped_networks.py shipped.png

Rows: the picture, the principal components of its DINOv2 features, of its latent and of the
features that are rebuilt from the latent, and the picture that is decoded from the latent.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import fae
from fae_core.figures import picture_grid, reconstruction_rows

NUM_PICTURES = 10
NAMES = ("picture", "DINOv2 features", "latent", "rebuilt features", "decoded from latent")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    model = fae.FeatureAutoencoder.from_pretrained("shipped:emoji")
    held_out = sorted((Path(fae.__file__).parent / "shipped/emoji-images/heldout").glob("*.webp"))
    chosen = np.linspace(0, len(held_out) - 1, NUM_PICTURES).astype(int)
    pictures = [Image.open(held_out[index]).convert("RGB") for index in chosen]

    latents = model.encode_images(pictures)
    rows = reconstruction_rows(
        np.stack([np.asarray(picture) for picture in pictures]),
        model.features(pictures).numpy(),
        latents.flatten(2).transpose(1, 2).numpy(),
        model.decode_features(latents).numpy(),
        latents.shape[2:],
    )
    columns = [[*row, image] for row, image in zip(rows, model.decode_images(latents), strict=True)]
    output.write_bytes(
        picture_grid(list(zip(*columns, strict=True)), [""] * NUM_PICTURES, names_of_rows=NAMES)
    )


if __name__ == "__main__":
    main()
