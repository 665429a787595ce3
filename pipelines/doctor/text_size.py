"""What `fae precompute-text` will write, counted by the tokenizer alone: `--dry-run`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from fae_core.text import CaptionTokenizer, text_width

from ..config import Recipe
from ..data.records import batched
from ..latents.plan import open_plan
from ..networks.text_encoder import COUNTED_CAPTIONS, text_spec
from ..storage import StoreError, paths


@dataclass(frozen=True)
class TextSize:
    """The store of states that a recipe would make."""

    rows: int
    """Images of the latents' plan."""
    captions: int
    tokens: int
    """Of all captions, without padding; of many captions extrapolated from the first ones."""
    state_dim: int
    shard_size: int
    max_length: int

    @property
    def num_bytes(self) -> int:
        """Of the states, float16."""
        return 2 * self.state_dim * self.tokens

    def text(self) -> str:
        """Lines for people."""
        each = self.tokens / max(1, self.captions)
        padded = 2 * self.state_dim * self.max_length * self.captions
        return (
            f"store: {self.rows:,} rows, {self.captions:,} captions of {each:.1f} tokens on "
            f"average, {self.num_bytes / 1e6:,.1f} MB of states ({self.state_dim} x float16 a "
            f"token; padded to {self.max_length} tokens they would take {padded / 1e6:,.1f} MB)"
        )


def expected_text(recipe: Recipe) -> TextSize:
    """Counted from the plan of `latents`.

    Raises RecipeError without `latents`, StoreError where it has no plan, WeightsError.
    """
    (latents,) = recipe.require("precompute-text", "latents=STORE")
    if not paths.exists(paths.join(latents, "plan.parquet")):
        raise StoreError(f"latents={latents} holds no latent store (no plan.parquet).")
    plan, spec = open_plan(latents), text_spec(recipe.text)
    tokenizer = CaptionTokenizer(spec)
    texts = (text for _, several in plan.captions() for text in several)
    some = list(itertools.islice(texts, COUNTED_CAPTIONS))
    rest = sum(1 for _ in texts)
    tokens = 0
    for part in batched(some, 4096):  # padded to max_length meanwhile
        tokens += int(tokenizer(part)[1].sum())
    if rest:
        tokens = round(tokens * (len(some) + rest) / len(some))
    return TextSize(
        plan.num_images,
        len(some) + rest,
        tokens,
        text_width(spec),
        plan.shard_size,
        spec.max_length,
    )
