"""The prompts of a text-to-image generator: read from the recipe, encoded with each batch.

Image i has prompt i modulo their number, as images have classes in turn.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fae_core.flow_matching import Velocity
from fae_core.generators.mmdit import MMDiT

from ..config import Recipe, RecipeError
from ..storage import paths

TEXT_SUFFIXES = (".txt", ".jsonl")
NAME_LENGTH = 48


Encode = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
"""Texts to token states [B, L, D] and their mask bool [B, L]."""


class Prompts:
    """Texts by number, and the encoder that makes them a condition."""

    def __init__(self, texts: Sequence[str], encode: Encode) -> None:
        self.texts = list(texts)
        self.encode = encode

    def name(self, number: int) -> str:
        """The beginning of a prompt, for pictures."""
        return shortened(self.texts[number])

    def condition(self, numbers: Tensor) -> tuple[Callable[[MMDiT], Velocity], Tensor, int]:
        """What makes a network's velocity of the prompts `numbers` int64 [n], which are on the CPU.

        Its labels are rows of the states that are encoded here: the second result [n] those of the
        images, the third that of the empty prompt, for guidance.
        """
        wanted = numbers.tolist()
        row_of = {number: row for row, number in enumerate(dict.fromkeys(wanted))}
        rows = torch.tensor([row_of[number] for number in wanted])
        texts = [self.texts[number] for number in row_of]
        states, mask = self.encode([*texts, ""])

        def velocity_of(model: MMDiT) -> Velocity:
            def velocity(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
                result: Tensor = model(x, t, states[labels], mask[labels])
                return result

            return velocity

        return velocity_of, rows, len(texts)


def shortened(text: str) -> str:
    """The beginning of a prompt that stands beside pictures."""
    return textwrap.shorten(text, NAME_LENGTH, placeholder=" …")


def has_prompts(recipe: Recipe) -> bool:
    """Whether the recipe names prompts."""
    return recipe.prompt is not None or recipe.prompts is not None


def read_prompts(recipe: Recipe) -> list[dict[str, Any]]:
    """What `prompt` or `prompts` name, in its order: each has its text as `prompt`.

    A .jsonl also gives what else its lines say, images their `key`. Raises RecipeError where there
    is no prompt, both keys are given, or a prompt is empty, and SourceError for images that cannot
    be listed.
    """
    uri = recipe.prompts
    if recipe.prompt is not None:
        if uri is not None:
            raise RecipeError("Give prompt=TEXT or prompts=FILE, not both.")
        if not recipe.prompt.strip():
            raise RecipeError("prompt is empty: give a text.")
        return [{"prompt": recipe.prompt.strip()}]
    if uri is None:
        raise RecipeError(
            "The generator draws images of texts: give prompt=TEXT, or prompts=FILE with one on "
            "each line."
        )
    found = _read_file(uri) if uri.endswith(TEXT_SUFFIXES) else _read_captions(recipe, uri)
    if not found:
        raise RecipeError(f"prompts={uri} holds no prompt.")
    return found


def _read_file(uri: str) -> list[dict[str, Any]]:
    """One prompt a line; of .jsonl the object in each line, as GenEval's file has them."""
    try:
        # Bytes are split at line ends alone, str also at U+2028, which a prompt may hold.
        lines = [line.decode("utf-8") for line in paths.read_bytes(uri).splitlines()]
    except UnicodeDecodeError:
        raise RecipeError(f"prompts={uri} is not UTF-8 text.") from None
    found = []
    for number, line in enumerate(lines, 1):
        record = {"prompt": line}
        if uri.endswith(".jsonl") and line.strip():
            try:
                record = dict(json.loads(line))
                record["prompt"] = str(record["prompt"])
            except (ValueError, KeyError, TypeError):
                raise RecipeError(
                    f'prompts={uri}, line {number}: expected JSON such as {{"prompt": "a red cat"}}'
                    f", not {line[:60]!r}."
                ) from None
        if not record["prompt"].strip():
            raise RecipeError(f"prompts={uri}: line {number} of {len(lines)} has no prompt.")
        found.append({**record, "prompt": record["prompt"].strip()})
    return found


def _read_captions(recipe: Recipe, uri: str) -> list[dict[str, Any]]:
    """The first caption of every image of a source, read as the section `data` says."""
    data = recipe.data.model_copy(update={"path": uri})
    from ..data import plan_source  # with boto3, which no prompts of one's own need

    table = plan_source(data).table
    keys, captions = table["key"].to_pylist(), table["caption"].to_pylist()
    without = [key for key, text in zip(keys, captions, strict=True) if not (text or "").strip()]
    if without:
        raise RecipeError(
            f"prompts={uri}: {len(without)} of its {len(keys)} images have no caption, for example "
            f"{without[0]!r}. (A file of prompts is called NAME.txt or NAME.jsonl.)"
        )
    return [{"prompt": text.strip(), "key": key} for key, text in zip(keys, captions, strict=True)]
