"""Which network can guide a generator: a weaker one that draws the same from the same latents."""

from __future__ import annotations

from fae_core.checkpoint import CheckpointError, Loaded
from fae_core.generators.dit import DiT
from fae_core.generators.mmdit import MMDiT
from fae_core.generators.starflow import StarFlow

from ..config import RecipeError
from ..networks import check_fingerprints
from ..networks.text_encoder import SOURCE

SAME_STATISTICS = 0.01
"""Of a standard deviation: what float16 of a published network rounds is less."""


def checked_guide(name: str, guide: Loaded, generator: Loaded) -> DiT | MMDiT:
    """The network of `guide`, which messages call `name`, for samples of `generator`.

    Raises CheckpointError where it is of another kind or for other latents, classes or texts, and
    RecipeError where `generator` is a normalizing flow.
    """
    model: DiT | MMDiT | StarFlow = generator.module
    if isinstance(model, StarFlow):
        raise RecipeError(f"{name}: a normalizing flow has no velocity that can be guided.")
    if guide.kind != generator.kind:
        raise CheckpointError(f"{name} is of kind {guide.kind}, the generator {generator.kind}.")
    # The store may be another one of the same autoencoder, and a text encoder lie elsewhere.
    parts = generator.fingerprints.keys() - {"latents", SOURCE}
    marks = {part: generator.fingerprints[part] for part in sorted(parts)}
    check_fingerprints(name, guide, marks)
    network: DiT | MMDiT = guide.module
    for setting in ("latent_dim", "grid", "num_classes", "text_dim"):
        theirs, ours = (getattr(one.config, setting, None) for one in (network, model))
        if theirs != ours:
            raise CheckpointError(f"{name} has {setting} {theirs}, the generator {ours}.")
    # Either network may be on a GPU already, and the other not.
    theirs, ours = ((m.latent_mean.cpu(), m.latent_std.cpu()) for m in (network, model))
    moved, scaled = (theirs[0] - ours[0]).abs() / ours[1], (theirs[1] / ours[1] - 1).abs()
    if max(float(moved.max()), float(scaled.max())) > SAME_STATISTICS:
        raise CheckpointError(
            f"{name} normalizes latents by other statistics than the generator: it was trained on "
            "a store of other images."
        )
    return network
